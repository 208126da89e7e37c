"""What the quickstart says of itself; the story is told in `test_end_to_end`."""

from pathlib import Path

from mis_platform import pipeline, quickstart
from mis_platform.data import synthetic


def test_the_benchmark_is_named_and_names_no_other_training(tmp_path: Path) -> None:
    synthetic.write_photos(tmp_path / "photos", 1)
    synthetic.write_benchmark(tmp_path / "benchmark", 1)
    photos = pipeline.open_dataset(f"folder:{tmp_path / 'photos'}")
    benchmark = pipeline.benchmark(f"synthetic:{tmp_path / 'benchmark'}", None)
    run, resources = quickstart.settings([])
    named = quickstart.on_material(run, photos, benchmark)
    assert named.eval_datasets == (f"synthetic:{tmp_path / 'benchmark'}",)
    again = pipeline.benchmark(named.eval_datasets[0], None)
    assert again.digest(masks=True) == benchmark.digest(masks=True), "`mis eval --dataset` takes it as it is"
    stages = [pipeline.checkpoint_stage(photos, each, resources, lambda step, metrics: None) for each in (run, named)]
    assert stages[0].fingerprint == stages[1].fingerprint
    assert pipeline.initial_stage(run).fingerprint == pipeline.initial_stage(named).fingerprint
