"""Precompute killed with real signals, at any moment: every image once, the digest of an undisturbed run."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from precompute_material import FEATURES, expected_digest, files_of, listed, quarantine_in, rows_in, run, write_photos
from processes import descendants, kill_group, memory, named, running, start, wait_until, wait_until_gone
from ray.cluster_utils import Cluster
from ray.exceptions import ActorUnavailableError

from mis_platform.config import DataConfig, Resources
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.trees import tree_from_row
from mis_platform.progress import Progress
from mis_platform.stages import precompute
from mis_platform.storage import TEMPORARY, Storage

DRIVER = Path(__file__).with_name("precompute_driver.py")
WORKERS = os.cpu_count() or 1  # of a cluster that a driver starts
SPOT_SECONDS = 4  # at least between two nodes that are taken away
SHORT_PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}  # until Ray gives a head up, instead of 60
WORKER_BYTES = 2 * 2**30  # that a worker may hold, whatever the number of photos


def start_driver(dataset: Dataset, out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return start(DRIVER, dataset.root, out, *options, **environment)


def parts_in(out: Path) -> int:
    return len(list(out.glob("trees-*.parquet")))


def has_parts(out: Path, count: int) -> Callable[[], bool]:
    return lambda: parts_in(out) >= count


def computed(out: Path) -> list[list[str]]:
    """Node, process and image id of each photo that workers began, in all attempts."""
    notes = Path(f"{out}.computed")
    return [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []


def check_whole(dataset: Dataset, out: Path, log: str = "") -> None:
    """Every image once, nothing torn, the rows that one process computes."""
    found = precompute.finished_parts(Storage(str(out)), dataset.image_ids)
    assert {each.part.name for each in found} == set(files_of(out)), "a part was torn"
    assert sorted(rows_in(out)) == sorted(dataset.image_ids), log
    assert quarantine_in(out) == {}, log
    assert precompute.combine_digests([each.part.digest for each in found]) == expected_digest(dataset)
    assert not [name for name in os.listdir(out) if name.startswith(TEMPORARY)]


# -- photos, without Ray ---------------------------------------------------------------------------------------------


def chunk_of(dataset: Dataset) -> pa.Table:
    return pa.Table.from_pylist([precompute.chunk_row(listed(dataset))])


def record_of(worker: precompute.ChunkWorker, dataset: Dataset) -> dict[str, Any]:
    return json.loads(worker(chunk_of(dataset))["record"][0].as_py())


def test_odd_and_identical_photos_have_trees(tmp_path: Path) -> None:
    """50:1, one colour, black, noise, and one photo twenty times: rows that differ in nothing but the id."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 1)
    for k in range(1, 20):
        os.link(photos / "photo_000.jpg", photos / f"photo_{k:03d}.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    Image.new("RGB", (96, 64)).save(photos / "black.png")
    Image.new("RGB", (96, 64), (90, 130, 40)).save(photos / "colour.png")
    Image.fromarray(noise).resize((6000, 120)).save(photos / "wide.png")
    Image.fromarray(noise).resize((120, 6000)).save(photos / "tall.png")
    dataset = open_dataset(f"folder:{photos}")
    record = record_of(precompute.ChunkWorker(FEATURES, DataConfig(), Storage(str(out))), dataset)
    assert record["refused"] == []
    rows = rows_in(out)
    for row in rows.values():
        tree_from_row(row)  # raises when it is not valid
    assert (rows["wide"]["grid_height"], rows["wide"]["grid_width"]) == (15, 750)
    assert (rows["tall"]["grid_height"], rows["tall"]["grid_width"]) == (750, 15)
    same = [{**row, "image_id": ""} for image_id, row in rows.items() if image_id.startswith("photo_")]
    assert len(same) == 20
    assert same.count(same[0]) == 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_cost_that_photo(tmp_path: Path, value: float) -> None:
    dataset = write_photos(tmp_path / "photos", 6)
    worker = precompute.ChunkWorker(FEATURES, DataConfig(), Storage(str(tmp_path / "out")))
    sound, calls = worker.extractor.describe, []

    def broken(batch: np.ndarray) -> np.ndarray:
        features = sound(batch).copy()
        calls.append(len(calls))
        if len(calls) == 3:
            features[0, 0] = value
        return features

    worker.extractor = dataclasses.replace(worker.extractor, describe=broken)
    record = record_of(worker, dataset)
    ((image_id, _, stage, reason, message),) = record["refused"]
    assert (image_id, stage, reason) == ("photo_002", "merge", "INTERNAL")
    assert "finite" in message or "number" in message, message
    assert sorted(rows_in(tmp_path / "out")) == [name for name in dataset.image_ids if name != "photo_002"]


def test_large_rows_are_written_before_the_chunk_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_photos(tmp_path / "photos", 12)
    monkeypatch.setattr(precompute, "PART_BYTES", 1000)
    out = tmp_path / "out"
    record = record_of(precompute.ChunkWorker(FEATURES, DataConfig(), Storage(str(out))), dataset)
    assert 3 < len(record["parts"]) < 12
    assert record["image_ids"] == list(dataset.image_ids)
    names = [part["name"] for part in record["parts"]]
    assert sorted(names) == sorted(files_of(out))
    monkeypatch.undo()
    found = precompute.finished_parts(Storage(str(out)), dataset.image_ids)
    assert precompute.combine_digests([each.part.digest for each in found]) == expected_digest(dataset)


@pytest.mark.parametrize("finished", [precompute.LOST_CHUNKS, precompute.LOST_CHUNKS + 1])
def test_lost_workers_end_a_run_unless_it_gets_on(finished: int) -> None:
    """As where nodes come and go: what is lost is tried again as long as more is finished meanwhile."""

    def records() -> Iterator[dict[str, Any]]:
        empty: dict[str, Any] = {**{name: [] for name in precompute.RECORDED}, "storage_error": None}
        part = {"name": "", "rows": 1, "bytes": 1, "sha256": "", "digest": ""}
        for k in range(finished):
            yield {**empty, "parts": [part], "image_ids": [str(k)]}
        raise ActorUnavailableError("its node is gone", None)

    tally = precompute.Tally(Progress("trees", finished, "images"))
    if finished > precompute.LOST_CHUNKS:
        assert not precompute.add_up(records(), tally)
    else:
        with pytest.raises(ActorUnavailableError):
            precompute.add_up(records(), tally)
    assert len(tally.parts) == finished


@pytest.mark.parametrize(
    ("images", "asked", "given"),
    [(1, 16, 16), (262_144, 16, 16), (1_000_000, 16, 62), (10**7, 16, 128), (10**9, 16, 128), (10**7, 500, 500)],
)
def test_chunks_grow_with_the_data_set(images: int, asked: int, given: int) -> None:
    assert precompute.images_in_a_chunk(images, Resources(chunk_images=asked)) == given


# -- the driver and its cluster --------------------------------------------------------------------------------------


def interrupt(dataset: Dataset, out: Path, parts: int, delay: float, sent: signal.Signals, patience: float) -> None:
    """A run whose process group is signalled when it has written `parts` parts and `delay` seconds passed."""
    with start_driver(dataset, out) as child:
        wait_until(has_parts(out, parts_in(out) + parts), child)
        time.sleep(delay)
        assert kill_group(child, sent, patience) < 15


def resume_after(
    dataset: Dataset, out: Path, stops: list[tuple[signal.Signals, int, float]], patience: float = 60
) -> None:
    for sent, parts, delay in stops:
        interrupt(dataset, out, parts, delay, sent, patience)
        there = set(files_of(out))  # without patience, a worker that still lives may write another one after this
        finished = {each.part.name for each in precompute.finished_parts(Storage(str(out)), dataset.image_ids)}
        assert there <= finished, "a part was torn"
    kept = files_of(out)
    assert 0 < len(kept) < len(dataset)
    began = len(computed(out))
    assert began <= len(kept) + WORKERS * len(stops), "more was lost than what workers were at"
    run(dataset, out, chunk_images=16)
    assert kept.items() <= files_of(out).items(), "a whole part was written again"
    check_whole(dataset, out)


@pytest.mark.ray
def test_killed_and_resumed(ray_cluster: None, tmp_path: Path) -> None:
    dataset = write_photos(tmp_path / "photos", 60, scale=8)
    resume_after(dataset, tmp_path / "out", [(signal.SIGKILL, 3, 0.05)], patience=0)


@pytest.mark.ray
@pytest.mark.slow
def test_stopped_and_resumed(ray_cluster: None, tmp_path: Path) -> None:
    dataset = write_photos(tmp_path / "photos", 60, scale=8)
    resume_after(dataset, tmp_path / "out", [(signal.SIGINT, 4, 0.1)], patience=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_while_ray_starts_leaves_no_process(tmp_path: Path) -> None:
    dataset, rng = write_photos(tmp_path / "photos", 60, scale=8), random.Random(0)
    for k in range(8):
        with start_driver(dataset, tmp_path / f"out{k}") as child:
            wait_until(lambda: bool(named(descendants(child.pid), "gcs_server")), child)
            time.sleep(rng.uniform(0, 3))
            assert kill_group(child, signal.SIGINT) < 15
            assert child.returncode != 0, "Ctrl-C was lost"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_many_times_and_resumed(ray_cluster: None, tmp_path: Path) -> None:
    """Twenty kills, a third of them while Python and Ray start."""
    dataset = write_photos(tmp_path / "photos", 512, scale=8)
    rng = random.Random(0)
    stops = [(signal.SIGKILL, k % 3, rng.uniform(0, 0.2 if k % 3 else 6)) for k in range(20)]
    resume_after(dataset, tmp_path / "out", stops)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_at_once_on_one_target(tmp_path: Path) -> None:
    """The second exits with 6 and says why; the first one's artifact is whole."""
    dataset, root = write_photos(tmp_path / "photos", 120, scale=8), tmp_path / "root"
    settings = ("--set", "features.extractor=color_texture", "--set", "resources.chunk_images=2")
    command = ("-m", "mis_platform.cli", "precompute", "--dataset", f"folder:{dataset.root}", "--root", root)
    with start(*command, *settings) as first:
        wait_until(lambda: len(list(root.glob("trees/*/trees-*.parquet"))) > 2, first)
        os.kill(first.pid, signal.SIGSTOP)  # or it may be done before the second one has started
        try:
            second = subprocess.run(
                [sys.executable, *map(str, command), *settings], capture_output=True, text=True, timeout=60
            )
        finally:
            os.kill(first.pid, signal.SIGCONT)
        assert second.returncode == 6, second.stdout + second.stderr
        assert "another mis process is working on" in second.stderr
        log, _ = first.communicate(timeout=200)
    assert first.returncode == 0, log
    assert "core_worker.cc" not in log
    (manifest,) = root.glob("trees/*/manifest.json")
    assert json.loads(manifest.read_text())["digest"] == expected_digest(dataset)
    check_whole(dataset, manifest.parent, log)


# -- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_workers_are_replaced(tmp_path: Path) -> None:
    """A worker dies six times; each death costs the chunk it was at, and the time until another one is at work."""
    dataset, out, alone = write_photos(tmp_path / "photos", 800, scale=8), tmp_path / "out", tmp_path / "alone"
    with start_driver(dataset, alone, "--chunk", "4") as child:
        wait_until(has_parts(alone, 1), child)
        began = time.monotonic()
        log, _ = child.communicate(timeout=200)
    undisturbed = time.monotonic() - began
    assert child.returncode == 0, log
    respawns = 0.0  # seconds
    with start_driver(dataset, out, "--chunk", "4") as child:
        wait_until(has_parts(out, 1), child)
        began = time.monotonic()
        for k in range(6):
            wait_until(has_parts(out, 10 * (k + 1)), child)
            workers, is_replaced, killed = named(descendants(child.pid), "MapWorker"), another(out), time.monotonic()
            os.kill(workers[k % len(workers)], signal.SIGKILL)
            wait_until(is_replaced, child)
            respawns += time.monotonic() - killed
        log, _ = child.communicate(timeout=200)
    wall = time.monotonic() - began
    assert child.returncode == 0, log
    check_whole(dataset, out, log)
    assert len(computed(out)) <= 800 + 6 * 4
    print(f"{wall:.0f} s; undisturbed {undisturbed:.0f} s, six respawns {respawns:.0f} s")
    assert wall <= 1.5 * undisturbed + respawns


def another(out: Path) -> Callable[[], bool]:
    """Whether a process has begun a photo that had not begun one when this was called."""
    seen = {pid for _, pid, _ in computed(out)}
    return lambda: not seen.issuperset(pid for _, pid, _ in computed(out))


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_hangs_is_given_up(tmp_path: Path) -> None:
    dataset, out = write_photos(tmp_path / "photos", 40), tmp_path / "out"
    scar = Path(f"{out}.hung")
    scar.write_text("photo_007")
    try:
        with start_driver(dataset, out, "--chunk", "4", "--stall", "10") as child:
            log, _ = child.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(scar.read_text()), signal.SIGKILL)
    assert child.returncode == 0, log
    check_whole(dataset, out, log)
    assert len(computed(out)) <= 40 + 2 * 4, "the chunk that hung and the one that waited behind it"


# -- nodes -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster_of(*cpus: int, store: int = 150 * 2**20) -> Iterator[Cluster]:
    """Nodes on this machine, the first one is the head."""
    cluster = Cluster()
    try:
        for each in cpus:
            cluster.add_node(num_cpus=each, include_dashboard=False, object_store_memory=store)
        yield cluster
    finally:
        cluster.shutdown()


def processes_of(node: object) -> dict[int, str]:
    """Process id -> start time of all that belongs to a node."""
    own = [info.process.pid for infos in node.all_processes.values() for info in infos]  # type: ignore[attr-defined]
    known = running()
    return {pid: known[pid][1] for parent in own for pid in (parent, *descendants(parent)) if pid in known}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_of_three_nodes_is_killed(tmp_path: Path) -> None:
    """All three work; when the raylet of one is killed the others go on and do its chunks again."""
    dataset, out = write_photos(tmp_path / "photos", 400, scale=8), tmp_path / "out"
    with cluster_of(1, 1, 1) as cluster:
        options = ("--chunk", "4", "--stall", "20")
        with start_driver(dataset, out, *options, RAY_ADDRESS=cluster.address) as child:
            wait_until(lambda: len({node for node, _, _ in computed(out)}) == 3 and parts_in(out) > 20, child)
            victim = sorted(cluster.worker_nodes, key=lambda node: str(node.unique_id))[0]
            family = processes_of(victim)
            os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            wait_until_gone(family, 60)
            log, _ = child.communicate(timeout=200)
        assert child.returncode == 0, log
        check_whole(dataset, out, log)
        assert len(computed(out)) <= 400 + 2 * 4
        shares = Counter(node for node, _, _ in computed(out))
        assert min(shares.values()) >= 4, shares


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_come_and_go_cost_little(tmp_path: Path) -> None:
    """Spot machines (F33): again and again one of four nodes dies whole and a new one takes its place.

    The list has twenty kills in twenty minutes; 28 lose more chunks than Ray Data may. A node lives for about 280
    photos instead of four minutes.
    """
    images, chunk, kills, rng = 2000, 2, 28, random.Random(0)
    dataset, out = write_photos(tmp_path / "photos", images, scale=8), tmp_path / "out"
    with cluster_of(0, 1, 1, 1, 1, store=80 * 2**20) as cluster:
        began = time.monotonic()
        with start_driver(dataset, out, "--chunk", str(chunk), RAY_ADDRESS=cluster.address) as child:
            for k in range(kills):
                wait_until(has_parts(out, (k + 1) * 70 // chunk), child, 180)
                kill_node(cluster, rng.choice(sorted(cluster.worker_nodes, key=lambda node: str(node.unique_id))))
                cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
                time.sleep(SPOT_SECONDS)
            log, _ = child.communicate(timeout=200)
    assert child.returncode == 0, log
    check_whole(dataset, out, log)
    begun = computed(out)
    wasted = len(begun) - images
    print(f"{wasted} of {images} photos computed again, {kills} nodes killed in {time.monotonic() - began:.0f} s")
    assert wasted <= 0.1 * images
    assert len({node for node, _, _ in begun}) > 4, "nodes that came did nothing"


def kill_node(cluster: Cluster, node: object) -> None:
    """All its processes at one moment, as when the machine is taken away."""
    family = processes_of(node)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until_gone(family, 60)
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_heads_are_killed_and_other_clusters_go_on(tmp_path: Path) -> None:
    """At 10, 25, 50, 75 and 90 %; the next cluster begins what is missing and nothing else. At 100 % it is nothing."""
    dataset, out = write_photos(tmp_path / "photos", 200, scale=8), tmp_path / "out"
    kept: dict[str, tuple[int, int]] = {}
    for percent in (10, 25, 50, 75, 90, 100):
        rows, before = rows_in(out).keys() if kept else set(), len(computed(out))
        with (
            cluster_of(1, 1) as cluster,
            start_driver(dataset, out, "--chunk", "4", RAY_ADDRESS=cluster.address, **SHORT_PATIENCE) as child,
        ):
            if percent < 100:
                wait_until(has_parts(out, percent * 200 // 4 // 100), child)
                kill_head(cluster)
            log, _ = child.communicate(timeout=200)
        assert (child.returncode == 0) is (percent == 100), log
        begun = [image_id for _, _, image_id in computed(out)[before:]]
        assert not rows & set(begun), "done again"
        assert kept.items() <= files_of(out).items(), "a whole part was written again"
        kept = files_of(out)
        assert len(begun) <= 4 * len(kept) - len(rows) + 2 * 4, "more was lost than the chunk that each worker was at"
    assert sorted(begun) == sorted(set(dataset.image_ids) - rows), "what was missing, once"
    check_whole(dataset, out, log)
    run(dataset, out)
    assert files_of(out) == kept


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_command_whose_head_is_killed_says_so(tmp_path: Path) -> None:
    """Exit code 6 and one line, before Ray ends the process with 1; the same command then finishes, on another Ray."""
    photos, root = write_photos(tmp_path / "photos", 120, scale=8).root, tmp_path / "root"
    words = ("precompute", "--dataset", f"folder:{photos}", "--root", str(root))
    words += ("--set", "features.extractor=color_texture", "--set", "resources.chunk_images=4")
    with (
        cluster_of(1, 1) as cluster,
        commands.running(tmp_path, *words, RAY_ADDRESS=cluster.address, **SHORT_PATIENCE) as command,
    ):
        address = cluster.address
        command.wait_until(lambda: len(list(root.rglob("trees-*.parquet"))) >= 3, 150)
        kill_head(cluster)
        code, seconds = command.end(60)
        print(f"{seconds:.1f} s after the head was killed; all that was said:\n{command.said()}")
        command.wait_alone(10)
    assert code == 6, command.said()
    told = f"Error: the Ray cluster at {address} has been lost; the same command goes on from what is finished"
    own = [line for line in command.said().splitlines() if line and not line.startswith(("trees: ", "["))]
    assert own == [told], "beside progress and Ray's own log"
    with commands.running(tmp_path, *words) as command:
        assert command.end(200)[0] == 0, command.said()


def kill_head(cluster: Cluster) -> None:
    for pid in processes_of(cluster.head_node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# -- memory ----------------------------------------------------------------------------------------------------------


def peaks_of(child: subprocess.Popen[str]) -> tuple[dict[int, int], str]:
    """Process id -> the most bytes it was seen to hold, of the driver and all that it started; the log."""
    peaks: dict[int, int] = {}
    while child.poll() is None:
        for pid in (child.pid, *descendants(child.pid)):
            peaks[pid] = max(peaks.get(pid, 0), memory(pid))
        time.sleep(0.25)
    return peaks, child.communicate()[0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_object_store_that_is_full(tmp_path: Path) -> None:
    """384 MB of pixels, and their features, go through a store of 80 MB: it spills, and the trees are the same."""
    dataset, out = write_photos(tmp_path / "photos", 64, scale=25), tmp_path / "out"
    for path in dataset.root.glob("*.jpg"):
        Image.open(path).resize((1600, 1250)).save(path, quality=95)
    with cluster_of(2, store=80 * 2**20) as cluster:
        options = ("--chunk", "8", "--steps", "--extractors", "1")  # one CPU for the network, one for all other steps
        with start_driver(dataset, out, *options, RAY_ADDRESS=cluster.address) as child:
            workers = cluster.head_node.all_processes["raylet"][0].process.pid
            peaks: dict[int, int] = {}
            while child.poll() is None:
                for pid in (child.pid, *descendants(workers)):
                    peaks[pid] = max(peaks.get(pid, 0), memory(pid))
                time.sleep(0.1)
            log = child.communicate()[0]
        assert child.returncode == 0, log
    check_whole(dataset, out, log)
    assert max(peaks.values()) < WORKER_BYTES, peaks


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_photos(tmp_path: Path) -> None:
    """Workers of 200 and of 6 000 photos hold the same; the driver a little for each name."""

    def peaks(count: int) -> tuple[int, int]:
        folder = tmp_path / f"photos-{count}"
        write_photos(folder, 50)
        for k in range(50, count):
            content = (folder / f"photo_{k % 50:03d}.jpg").read_bytes()
            (folder / f"photo_{k:06d}.jpg").write_bytes(content + str(k).encode())  # no copy: behind a JPEG's end
        with start_driver(open_dataset(f"folder:{folder}"), tmp_path / f"out-{count}", "--chunk", "16") as child:
            held, log = peaks_of(child)
        assert child.returncode == 0, log
        assert len(rows_in(tmp_path / f"out-{count}")) == count
        return held.pop(child.pid), max(held.values())

    (few_driver, few_worker), (many_driver, many_worker) = peaks(200), peaks(6000)
    assert many_worker < WORKER_BYTES
    assert many_worker - few_worker < 100 * 2**20
    assert many_driver - few_driver < 100 * 2**20
