"""What the quickstart asks of a machine; that it works is a nightly test of test_end_to_end.py."""

import pytest

from mis_platform import quickstart
from mis_platform.stages import cluster, train


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_it_trains_on_two_cores_whatever_gpus_there_are(gpus, monkeypatch):
    monkeypatch.setattr(cluster, "gpus", lambda: gpus)
    monkeypatch.setattr(cluster, "cpus", lambda: 2)
    _, resources = quickstart.settings([])
    scaling, *_ = train.plan(resources)
    assert (scaling.num_workers, scaling.use_gpu) == (2, False)
    assert cluster.usable_gpus(resources) == 0


def test_the_command_line_has_the_last_word():
    run, resources = quickstart.settings(["resources.use_gpu=true", "resources.num_workers=1", "sampling.alpha=0.8"])
    assert (resources.use_gpu, resources.num_workers, run.sampling.alpha) == (True, 1, 0.8)
