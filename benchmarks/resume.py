"""What a command costs the driver before any worker has work, and what a resumed one reads: at 10^7 synthetic photos.

    python benchmarks/resume.py [--images 10000000] [--json FILE]

Real files where files count: a folder is listed, hashed for the first time, and hashed again from what is remembered.
Of these there are `--files`; what is remembered, the manifest, the ledger of parts and the resumed run itself are of
`--images` photos. The parts of the resumed run are sparse files of the right size, which is all that is looked at.

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


def image_id_of(number: int) -> str:
    """22 letters, 16 of them as good as random: names that pack badly."""
    return f"{number // 1000:05d}/{hashlib.blake2b(str(number).encode(), digest_size=8).hexdigest()}"


def dataset_of(images: int) -> Dataset:
    samples = tuple(Sample(key, f"{key}.jpg", ()) for key in map(image_id_of, range(images)))
    return Dataset("folder", "train", Path("/nowhere"), samples, benchmarks.read_binary, False)


def make_files(folder: Path, count: int, size: int) -> None:
    content = np.random.default_rng(0).bytes(size)
    for number in range(count):
        path = folder / f"{image_id_of(number)}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(number.to_bytes(8, "little") + content[8:])


def parts_of(images: int) -> Iterator[tuple[Part, list[str]]]:
    chunk = precompute.images_in_a_chunk(images, Resources())
    for start in range(0, images, chunk):
        image_ids = [image_id_of(number) for number in range(start, min(start + chunk, images))]
        name = f"trees-{hashlib.sha256(image_ids[0].encode()).hexdigest()[:16]}.parquet"
        digest = hashlib.sha256(name.encode()).hexdigest()
        yield Part(name=name, rows=len(image_ids), bytes=PART_SIZE, sha256=digest, digest=digest), image_ids


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
    output = Output(parts=tuple(part for part, _ in parts_of(images)), digest=CHECKSUM)
    yield None
    publish(output, Storage(str(folder)))
    yield None


def manifest_reading(folder: Path) -> Iterator[Any]:
    yield None
    yield len(read_manifest(Storage(str(folder)))["parts"])


def ledger_writing(images: int, folder: Path) -> Iterator[Any]:
    found = [precompute.Found(part, tuple(image_ids)) for part, image_ids in parts_of(images)]
    for part, _ in found:
        with open(folder / part.name, "wb") as file:
            file.truncate(part.bytes)
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


def checking(folder: Path, images: int) -> Iterator[Any]:
    yield None
    found = precompute.finished_parts(Storage(str(folder)), map(image_id_of, range(images)))
    yield sum(each.part.rows for each in found)


def indexing(folder: Path) -> Iterator[Any]:
    reader = TreeReader(Storage(str(folder)))
    yield None
    yield len(reader.image_ids)


# -- report ----------------------------------------------------------------------------------------------------------


def write_trees(folder: Path, images: int, chunk: int) -> None:
    """Parts with the trees of random features, and their manifest."""
    random = np.random.default_rng(0)
    rows = [tree_row(image_id_of(k), (375, 500), _random_tree(random)) for k in range(images)]
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


def measure(options: argparse.Namespace, base: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def tell(name: str, cost: Cost, count: int, size: int | None = None, unit: str = "photos") -> None:
        about = "" if size is None else f"{size / 1e6:10.1f} MB"
        memory = f"{cost.memory / count:6.0f} bytes"
        print(
            f"{name:<44} {count:>10,} {unit:<6} {cost.cpu:8.2f} {cost.seconds:8.2f} s "
            f"{1e6 * cost.cpu / count:8.2f} us {memory} {about}",
            flush=True,
        )
        figures[name] = {
            "photos": count,
            "cpu_seconds": cost.cpu,
            "seconds": cost.seconds,
            "memory": cost.memory,
            "bytes": size,
        }

    print(f"{'':<44} {'':>17} {'CPU':>8} {'wall':>10} {'CPU each':>11} {'memory each':>12} {'on disk':>13}")
    tiny, large = base / "tiny", base / "large"
    for folder, count, size in ((tiny, options.files, 512), (large, options.large, options.photo_bytes)):
        folder.mkdir()
        make_files(folder, count, size)
    tell("list a folder", alone(listing, tiny), options.files)
    first = alone(hashing, large, 2**62)
    tell("hash photos", first, options.large)
    tell("hash small files, remembered afterwards", plain := alone(hashing, tiny, 0), options.files)
    tell("digest from what is remembered", again := alone(hashing, tiny, 0), options.files)
    file = remember(tiny, options.images)
    among = alone(hashing, tiny, 0)
    assert plain.result == again.result == among.result, "another digest"
    tell("the same among all images", among, options.files)
    tell("load what is remembered", alone(loading, tiny), options.images, file.stat().st_size)
    changed = f"{image_id_of(0)}.jpg"
    os.chmod(tiny / changed, 0o600)
    tell("remember one photo more", alone(saving, tiny, changed), options.images)

    done, parts = base / "done", base / "parts"
    done.mkdir()
    parts.mkdir()
    written = alone(manifest_writing, options.images, done)
    size = (done / MANIFEST).stat().st_size
    tell("write a manifest", written, options.images, size)
    tell("read a manifest", alone(manifest_reading, done), options.images)
    tell("first run, before its first chunk", alone(starting, options.images, base / "nothing"), options.images)
    written = alone(ledger_writing, options.images, parts)
    tell("write the ledger", written, options.images, (parts / precompute.LEDGER_FILE).stat().st_size)
    resumed = alone(resuming, options.images, parts)
    assert resumed.result == options.images
    tell("resume a run of which all parts are whole", resumed, options.images)
    for chunk in (16, 128):
        folder = base / f"trees-{chunk}"
        write_trees(folder, options.trees, chunk)
        size = sum(each.stat().st_size for each in folder.glob("*.parquet"))
        tell(f"check parts of {chunk} for the first time", alone(checking, folder, options.trees), options.trees, size)
    tell("find the trees, before a training", alone(indexing, folder), options.trees)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10**7)
    parser.add_argument("--files", type=int, default=50_000, help="small files that are listed and hashed")
    parser.add_argument("--large", type=int, default=2_000, help="files of the size of a photo that are hashed")
    parser.add_argument("--photo-bytes", type=int, default=75_800)
    parser.add_argument("--trees", type=int, default=1024, help="trees of 2 961 patches")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as base:
        os.environ["XDG_CACHE_HOME"] = str(Path(base, "cache"))
        figures = measure(options, Path(base))
    print(f"load {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
