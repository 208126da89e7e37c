"""What a command costs the driver before any worker has work, and what a resumed one reads: at 10^7 synthetic photos.

    python benchmarks/resume.py [--images 10000000] [--json FILE]

Real files where files count: a folder is listed, hashed for the first time, and hashed again from what is remembered.
Of these there are `--files`, several numbers of them to see what grows; what is remembered, the manifest, the ledger of
parts and the resumed runs themselves are of `--images` photos. Their parts are sparse files of the right size, which is
all that is looked at.

Every step runs in a process of its own. CPU seconds count, because other load on the machine drifts; seconds are
beside them. Memory is what the process had at its peak above what it had after its imports. Needs some 6 GB of memory
and 2 GB of disk at 10^7.
"""

import argparse
import hashlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mis_platform.artifacts import MANIFEST, Output, Part, Stage, read_manifest, write_manifest
from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.data import benchmarks, digests
from mis_platform.data.benchmarks import Dataset, Sample, open_dataset
from mis_platform.data.trees import TreeReader, tree_row
from mis_platform.simulation import ward
from mis_platform.simulation.tree import MergeTree
from mis_platform.stages import precompute
from mis_platform.storage import Storage

GRID = (47, 63)  # patches of a photo of 500x375 at patch 8
PART_SIZE = 2_000_000  # bytes of a part of 128 photos, about
CHECKSUM = "0" * 64


class Cost(NamedTuple):
    seconds: float
    cpu: float  # seconds of all threads
    memory: int  # bytes at the peak
    result: Any


def alone(work: Callable[..., Any], *arguments: Any) -> Cost:
    """What `work` costs in a process of its own, without its imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload([precompute.__name__, TreeReader.__module__])
    with context.Pool(1) as pool:
        return pool.apply(_measured, (work, *arguments))


def _measured(work: Callable[..., Any], *arguments: Any) -> Cost:
    steps = work(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    next(steps)  # what is needed for it
    wall, cpu = time.perf_counter(), _cpu()
    result = next(steps)
    seconds, used = time.perf_counter() - wall, _cpu() - cpu
    return Cost(seconds, used, _status("VmHWM") - before, result)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# -- material --------------------------------------------------------------------------------------------------------


def image_ids_of(images: int) -> Iterator[str]:
    """22 letters each, 16 of them random: names that pack badly."""
    random = np.random.default_rng(0)
    for folder in range(-(-images // 1000)):
        letters = random.bytes(8000).hex()
        for k in range(min(1000, images - 1000 * folder)):
            yield f"{folder:05d}/{letters[16 * k : 16 * k + 16]}"


def dataset_of(images: int) -> Dataset:
    samples = tuple(Sample(key, f"{key}.jpg", ()) for key in image_ids_of(images))
    return Dataset("folder", "train", Path("/nowhere"), samples, benchmarks.read_binary, False)


def make_files(folder: Path, count: int, size: int) -> None:
    content = np.random.default_rng(0).bytes(size)
    for number, image_id in enumerate(image_ids_of(count)):
        path = folder / f"{image_id}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(number.to_bytes(8, "little") + content[8:])


def parts_of(images: int) -> list[Part]:
    chunk = precompute.images_in_a_chunk(images, Resources())
    parts = []
    for start in range(0, images, chunk):
        digest = hashlib.sha256(str(start).encode()).hexdigest()
        rows = min(chunk, images - start)
        name = f"trees-{digest[:16]}.parquet"
        parts.append(Part(name=name, rows=rows, bytes=PART_SIZE, sha256=digest, digest=digest))
    return parts


def publish(output: Output, out: Storage) -> None:
    write_manifest(Stage(name="trees", version=0, config={}, run=lambda inputs, out: output), output, out)


# -- steps: what comes before, yield, what is measured, yield its result ---------------------------------------------


def listing(folder: Path) -> Iterator[Any]:
    yield None
    yield len(open_dataset(f"folder:{folder}"))


def hashing(folder: Path, slow_bytes: int) -> Iterator[Any]:
    benchmarks.SLOW_BYTES, digests.SETTLING_NS = slow_bytes, 0
    dataset = open_dataset(f"folder:{folder}")
    yield None
    yield dataset.digest()


def loading(folder: Path) -> Iterator[Any]:
    yield None
    memory = digests.Memory(folder)
    yield memory is None


def saving(folder: Path, file: str) -> Iterator[Any]:
    digests.SETTLING_NS = 0
    memory = digests.Memory(folder)
    memory.contents([file])
    yield None
    memory.save(0)
    yield None


def manifest_writing(images: int, folder: Path) -> Iterator[Any]:
    output = Output(parts=tuple(parts_of(images)), digest=CHECKSUM)
    yield None
    publish(output, Storage(str(folder)))
    yield None


def manifest_reading(folder: Path) -> Iterator[Any]:
    yield None
    yield len(read_manifest(Storage(str(folder)))["parts"])


def ledger_writing(images: int, folder: Path) -> Iterator[Any]:
    image_ids = image_ids_of(images)
    found = [precompute.Found(part, tuple(islice(image_ids, part.rows))) for part in parts_of(images)]
    for each in found:
        with open(folder / each.part.name, "wb") as file:
            file.truncate(each.part.bytes)
    yield None
    precompute._write_ledger(Storage(str(folder)), found)
    yield None


def starting(images: int, folder: Path) -> Iterator[Any]:
    """What a first run holds when its first chunk is handed out."""
    dataset = dataset_of(images)
    yield None
    found = precompute.finished_parts(Storage(str(folder)), (sample.image_id for sample in dataset.samples))
    yield len(found) + len(sorted(dataset.samples))


def resuming(images: int, folder: Path) -> Iterator[Any]:
    """A run that was killed after its last part."""
    dataset, features = dataset_of(images), FeaturesConfig(extractor="color_texture")
    yield None
    output = precompute.precompute(dataset, features, DataConfig(), Resources(), Storage(str(folder)))
    yield output.summary["images"]


def planning(images: int, folder: Path) -> Iterator[Any]:
    """What a run that was killed in the middle holds when its first chunk is handed out: `precompute`'s own steps."""
    dataset = dataset_of(images)
    yield None
    found = precompute.finished_parts(Storage(str(folder)), (sample.image_id for sample in dataset.samples))
    finished = {image_id for each in found for image_id in each.image_ids}
    missing = sorted(sample for sample in dataset.samples if sample.image_id not in finished)
    yield len(finished), len(missing)


def checking(folder: Path, images: int) -> Iterator[Any]:
    yield None
    found = precompute.finished_parts(Storage(str(folder)), image_ids_of(images))
    yield sum(each.part.rows for each in found)


def indexing(folder: Path) -> Iterator[Any]:
    reader = TreeReader(Storage(str(folder)))
    yield None
    yield len(reader.image_ids)


# -- report ----------------------------------------------------------------------------------------------------------


def write_trees(folder: Path, images: int, chunk: int) -> None:
    """Parts with the trees of random features, and their manifest."""
    random = np.random.default_rng(0)
    rows = [tree_row(image_id, (375, 500), _random_tree(random)) for image_id in image_ids_of(images)]
    out = Storage(str(folder))
    parts = [precompute.write_part(rows[start : start + chunk], out) for start in range(0, images, chunk)]
    output = Output(parts=tuple(parts), digest=CHECKSUM)
    publish(output, out)


def _random_tree(random: np.random.Generator) -> MergeTree:
    features = random.normal(size=(GRID[0] * GRID[1], 8)).astype(np.float32)
    return ward.merge(features, GRID)


def remember(folder: Path, rows: int) -> Path:
    """Fill what is remembered of the folder up to so many files; where it is."""
    (file,) = Path(os.environ["XDG_CACHE_HOME"]).rglob(
        f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.parquet"
    )
    table, random = pq.read_table(file), np.random.default_rng(0)
    count = rows - len(table)
    columns = [random.integers(0, 2**64, count, np.uint64) for _ in range(2)]
    contents = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), count, [None, pa.py_buffer(random.bytes(32 * count))]
    )
    more = pa.table([*map(pa.array, columns), contents], schema=digests.SCHEMA)
    pq.write_table(pa.concat_tables([table, more]).sort_by("place"), file, compression="none", write_page_checksum=True)
    return file


class Table:
    """Prints each line when it is known."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        print(f"{'':<42} {'photos':>10} {'CPU':>10} {'wall':>10} {'CPU each':>10} {'memory each':>12} {'on disk':>11}")

    def tell(self, name: str, cost: Cost, count: int, size: int | None = None) -> Cost:
        line = f"{name:<42} {count:>10,} {cost.cpu:8.2f} s {cost.seconds:8.2f} s {1e6 * cost.cpu / count:7.2f} us"
        memory = f"{cost.memory / count:10.0f} B" if count >= 10**5 else f"{'':>12}"  # of less it is the process's own
        print(line, memory, "" if size is None else f"{size / 1e6:8.1f} MB", flush=True)
        facts = {"photos": count, "cpu_seconds": cost.cpu, "seconds": cost.seconds}
        self.figures[name if name not in self.figures else f"{name}, {count}"] = facts | {
            "memory": cost.memory,
            "bytes": size,
        }
        return cost


def measure_photos(options: argparse.Namespace, base: Path, table: Table) -> None:
    large = base / "large"
    large.mkdir()
    make_files(large, options.large, options.photo_bytes)
    table.tell("hash photos", alone(hashing, large, 2**62), options.large)
    for count in sorted(options.files):
        tiny = base / f"tiny-{count}"
        tiny.mkdir()
        make_files(tiny, count, 512)
        table.tell("list a folder", alone(listing, tiny), count)
        plain = table.tell("hash small files, remembered afterwards", alone(hashing, tiny, 0), count)
        again = table.tell("digest from what is remembered", alone(hashing, tiny, 0), count)
        assert plain.result == again.result, "another digest"
    file = remember(tiny, options.images)
    among = table.tell("the same among all images", alone(hashing, tiny, 0), count)
    assert plain.result == among.result, "another digest"
    table.tell("load what is remembered", alone(loading, tiny), options.images, file.stat().st_size)
    changed = f"{next(image_ids_of(1))}.jpg"
    os.chmod(tiny / changed, 0o600)
    table.tell("remember one photo more", alone(saving, tiny, changed), options.images)


def measure_manifest(options: argparse.Namespace, base: Path, table: Table) -> None:
    done = base / "done"
    written = alone(manifest_writing, options.images, done)
    table.tell("write a manifest", written, options.images, (done / MANIFEST).stat().st_size)
    table.tell("read a manifest", alone(manifest_reading, done), options.images)


def measure_runs(options: argparse.Namespace, base: Path, table: Table) -> None:
    parts = base / "parts"
    parts.mkdir()
    table.tell("first run, before its first chunk", alone(starting, options.images, base / "none"), options.images)
    written = alone(ledger_writing, options.images, parts)
    table.tell("write the ledger", written, options.images, (parts / precompute.LEDGER_FILE).stat().st_size)
    resumed = table.tell("resumed run, all parts whole", alone(resuming, options.images, parts), options.images)
    assert resumed.result == options.images
    for part in list(parts.glob("trees-*.parquet"))[::2]:
        part.unlink()
    half = table.tell("resumed run, half of the parts", alone(planning, options.images, parts), options.images)
    assert sum(half.result) == options.images
    assert min(half.result) > options.images // 3


def measure_trees(options: argparse.Namespace, base: Path, table: Table) -> None:
    for chunk in (16, 128):
        folder = base / f"trees-{chunk}"
        write_trees(folder, options.trees, chunk)
        size = sum(each.stat().st_size for each in folder.glob("*.parquet"))
        cost = alone(checking, folder, options.trees)
        table.tell(f"check parts of {chunk} for the first time", cost, options.trees, size)
    table.tell("find the trees, before a training", alone(indexing, folder), options.trees)


STEPS = {"photos": measure_photos, "manifest": measure_manifest, "runs": measure_runs, "trees": measure_trees}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10**7)
    parser.add_argument("--files", type=int, nargs="+", default=[50_000], help="small files that are listed and hashed")
    parser.add_argument("--large", type=int, default=2_000, help="files of the size of a photo that are hashed")
    parser.add_argument("--photo-bytes", type=int, default=75_800)
    parser.add_argument("--trees", type=int, default=1024, help="trees of 2 961 patches")
    parser.add_argument("--steps", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as base:
        os.environ["XDG_CACHE_HOME"] = str(Path(base, "cache"))
        table = Table()
        for name in options.steps:
            STEPS[name](options, Path(base), table)
    print(f"load {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(table.figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
