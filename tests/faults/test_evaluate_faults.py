"""Evaluation killed with real signals: the rows of one process, and little done twice."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from processes import descendants, kill_group, named, start, wait_until
from ray.cluster_utils import Cluster

from mis_platform.artifacts import combine_digests
from mis_platform.config import EvalConfig
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.schemas import CLICKS
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import save_model
from mis_platform.stages import evaluate as stage
from mis_platform.storage import Storage

CONFIG = EvalConfig(max_clicks=3)
ZOOM = 224  # pixels
CHUNK = 2  # photos

DRIVER = f"""
import sys
from mis_platform.config import EvalConfig, Resources
from mis_platform.data.benchmarks import open_dataset
from mis_platform.leases import hold
from mis_platform.stages import evaluate as stage
from mis_platform.storage import Storage

stage.CHUNK_IMAGES = {CHUNK}
stage.SILENT_SECONDS = 5.0
root, model, out = sys.argv[1:]
benchmark, resources = open_dataset("folder:" + root, split="val"), stage.Resources(use_gpu=False)
with hold(Storage(out)) as held:
    output = stage.evaluate_model(
        benchmark, Storage(model), EvalConfig(max_clicks={CONFIG.max_clicks}), {ZOOM}, resources, held
    )
print("digest", output.digest)
"""


def make_benchmark(folder: Path, images: int) -> Dataset:
    """A bright ellipse on noise in each."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:60, :80]
    for k in range(images):
        inside = ((y - rng.integers(20, 40)) / 12) ** 2 + ((x - rng.integers(25, 55)) / 17) ** 2 <= 1
        photo = rng.integers(0, 120, (60, 80, 3), np.uint8) + 130 * inside[..., None].astype(np.uint8)
        Image.fromarray(photo).save(folder / "images" / f"photo-{k:03d}.png")
        Image.fromarray(255 * inside.astype(np.uint8)).save(folder / "masks" / f"photo-{k:03d}.png")
    return open_dataset(f"folder:{folder}", split="val")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_benchmark(tmp_path_factory.mktemp("benchmark"), 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers depend on the photo and the clicks."""
    torch.manual_seed(0)
    model = SimpleClick("vit_xt", ZOOM)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.06)
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, model, {})
    return directory


@pytest.fixture(scope="module")
def expected(benchmark: Dataset, model: Path) -> str:
    """The digest that this process computes alone."""
    job = stage.Clicking(benchmark, Storage(str(model)), CONFIG, ZOOM, batch=1, device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = job.score(benchmark.image_ids, lambda images, rows: None).rows
    torch.set_num_threads(threads)
    rows = pa.Table.from_pylist(rows, schema=CLICKS).to_pylist()  # float32 as plain numbers, as they are read
    return combine_digests([stage.row_digest(row) for row in rows])


def start_driver(benchmark: Dataset, model: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    return start("-c", DRIVER, benchmark.root, model, out, **environment)


def files_of(out: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and time of each part."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("clicks-*.parquet")}


def has_parts(out: Path, count: int) -> Callable[[], bool]:
    return lambda: len(files_of(out)) >= count


def check_whole(benchmark: Dataset, out: Path, expected: str, log: str) -> None:
    assert f"digest {expected}" in log, log
    found = stage.finished_parts(Storage(str(out)), "clicks", CLICKS, benchmark.image_ids)
    assert {each.part.name for each in found} == set(files_of(out))
    assert sorted(image_id for each in found for image_id in each.image_ids) == sorted(benchmark.image_ids)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_drivers_and_workers_are_killed(benchmark: Dataset, model: Path, expected: str, tmp_path: Path) -> None:
    """Six drivers die with all that they started, then three workers of the seventh."""
    rng = random.Random(0)
    for k in range(6):
        kept = files_of(tmp_path)
        with start_driver(benchmark, model, tmp_path) as child:
            wait_until(has_parts(tmp_path, len(kept) + k % 3), child)
            time.sleep(rng.uniform(0, 0.3 if k % 3 else 6))
            assert kill_group(child) < 15
        whole = stage.finished_parts(Storage(str(tmp_path)), "clicks", CLICKS, benchmark.image_ids)
        assert {each.part.name for each in whole} == set(files_of(tmp_path)), "a part was torn"
        assert kept.items() <= files_of(tmp_path).items(), "a whole part was written again"
    kept = files_of(tmp_path)
    assert 4 <= len(kept) < 25
    with start_driver(benchmark, model, tmp_path) as child:
        for k in range(3):
            wait_until(has_parts(tmp_path, len(kept) + k + 1), child)
            workers = named(descendants(child.pid), "ray::Worker")
            os.kill(workers[k % len(workers)], signal.SIGKILL)
        log, _ = child.communicate(timeout=200)
    assert child.returncode == 0, log
    assert kept.items() <= files_of(tmp_path).items(), "a whole part was written again"
    check_whole(benchmark, tmp_path, expected, log)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_of_two_nodes_is_killed(benchmark: Dataset, model: Path, expected: str, tmp_path: Path) -> None:
    """What the lost worker was at is taken over, although there is no room for another one."""
    cluster = Cluster()
    try:
        nodes = [cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=150 * 2**20) for _ in "ab"]
        with start_driver(benchmark, model, tmp_path, RAY_ADDRESS=cluster.address) as child:
            workers = [node.all_processes["raylet"][0].process.pid for node in nodes]
            wait_until(has_parts(tmp_path, 4), child)
            assert all(named(descendants(pid), "ray::Worker") for pid in workers), "a node had no worker"
            os.kill(workers[1], signal.SIGKILL)
            log, _ = child.communicate(timeout=200)
        assert child.returncode == 0, log
        check_whole(benchmark, tmp_path, expected, log)
    finally:
        cluster.shutdown()
