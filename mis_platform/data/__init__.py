"""Files in, values out: photos, benchmarks, merge trees, training examples."""
