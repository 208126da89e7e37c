"""Distributed work, one file a stage: thin around the pure functions of `data`, `model` and `evaluation`."""
