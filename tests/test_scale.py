"""The simulation of precompute at scale (benchmarks/scale.py) against what was measured, and its arithmetic."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import scale

        yield scale


def test_simulated_throughputs_are_the_measured_ones(scale: ModuleType) -> None:
    """One and two workers, two nodes, one GPU in two ways; docs/scaling.md states the band."""
    costs, measured = scale.read_costs(scale.MEASURED)
    points = list(scale.check(costs, measured))
    assert len(points) == len(measured["nodes"]["layouts"]) + len(measured["gpu"]["ways"]) == 5
    assert scale.BAND == (0.8, 1.25)
    outside = [point for point in points if not 0.8 <= point.ratio <= 1.25]
    assert not outside


@pytest.mark.parametrize("nodes", [1, 1000])
def test_what_the_driver_does_alone_delays_the_nodes(scale: ModuleType, nodes: int) -> None:
    costs, _ = scale.read_costs(scale.MEASURED)
    arguments = (costs, scale.CPU_NODE, scale.BUCKET, nodes, 20_000, 16)
    alone, whole = scale.predict(*arguments), scale.predict(*arguments, scale.HEAD)
    before = scale.start(costs, scale.BUCKET, scale.HEAD, 20_000)
    assert alone.start == 0 < before == whole.start
    assert whole.seconds == pytest.approx(alone.seconds + before)
    assert whole.rate == alone.rate
    assert whole.use["start"] == pytest.approx(before / whole.seconds)


def test_what_was_read_before_is_found_faster_than_it_is_read(scale: ModuleType) -> None:
    """By a lot: every photo would be a read of a mount, or 76 kB of a disk."""
    costs, _ = scale.read_costs(scale.MEASURED)
    disk = replace(scale.BUCKET, has_photos=False)
    again = scale.start(costs, disk, scale.HEAD, 10**7, is_remembered=True)
    assert again == scale.start(costs, scale.BUCKET, scale.HEAD, 10**7, is_remembered=True)
    assert 5 * again < scale.start(costs, disk, scale.HEAD, 10**7) < scale.start(costs, scale.BUCKET, scale.HEAD, 10**7)


def test_many_data_sets_are_listed_while_others_are_worked_on(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten sets on one head: only the first start delays ten slow nodes, all of them delay a hundred on three heads."""
    costs, _ = scale.read_costs(scale.MEASURED)
    monkeypatch.setattr(scale, "WINDOW", 4000)
    before = scale.start(costs, scale.BUCKET, scale.HEAD, 10**7)
    slow, fast = (
        scale.predict(replace(costs, features=seconds), scale.CPU_NODE, scale.BUCKET, nodes, 10**8, 128, scale.HEAD)
        for seconds, nodes in ((0.5, 10), (0.001, 100))
    )
    assert slow.start == fast.start == before
    assert slow.seconds - before > 9 * before
    assert 4 * before < fast.seconds < 5 * before
    assert (slow.binding, fast.binding) == ("cores", "start")


@pytest.mark.parametrize(("images", "nodes", "idle"), [(16, 1, 0), (16, 10, 9), (16 * 16, 3, 2), (16 * 16 * 3, 3, 0)])
def test_nodes_without_a_chunk_are_counted(scale: ModuleType, images: int, nodes: int, idle: int) -> None:
    """Chunks of 16 photos on nodes of 16 cores; nodes that are started later come too late for the last ones."""
    costs, _ = scale.read_costs(scale.MEASURED)
    node = replace(scale.CPU_NODE, boot=0)
    assert scale.predict(costs, node, scale.BUCKET, nodes, images, 16).idle == idle


def test_no_resource_is_busy_for_longer_than_there_is_time(scale: ModuleType) -> None:
    costs, measured = scale.read_costs(scale.MEASURED)
    for name in ("cpu", "gpu", "gpu-bf16"):
        applied, node = scale.set_up(name, costs, measured)
        for nodes, images in ((1, 10**4), (30, 10**5)):
            found = scale.predict(applied, node, scale.BUCKET, nodes, images, 16, scale.HEAD)
            assert all(0 <= share <= 1 for share in found.use.values())
            assert found.rate * (found.seconds - found.start) >= 0.5 * images or found.idle
