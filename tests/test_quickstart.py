"""What the quickstart says of itself and asks of a machine; the story is told in `test_end_to_end`."""

from pathlib import Path

import pytest

from mis_platform import pipeline, quickstart
from mis_platform.data import synthetic
from mis_platform.stages import cluster, train


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


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_it_trains_on_two_cores_whatever_gpus_there_are(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "gpus", lambda: gpus)
    monkeypatch.setattr(cluster, "cpus", lambda: 2)
    _, resources = quickstart.settings([])
    scaling, *_ = train.plan(resources)
    assert (scaling.num_workers, scaling.use_gpu) == (2, False)
    assert cluster.usable_gpus(resources) == 0


def test_the_command_line_has_the_last_word() -> None:
    run, resources = quickstart.settings(["resources.use_gpu=true", "resources.num_workers=1", "sampling.alpha=0.8"])
    assert (resources.use_gpu, resources.num_workers, run.sampling.alpha) == (True, 1, 0.8)
    assert quickstart.settings(["train.epochs=5"])[0].train.epochs == 5, "a shorter training needs no other decays"
