"""Photos per second of `mis precompute` on CPUs, beside a bare loop over the same functions.

    python benchmarks/precompute.py --dataset folder:PHOTOS

Both sides run the same worker on the same chunks with as many processes, and write the same Parquet files; one gets
its chunks from Ray Data, the other from a `ProcessPoolExecutor`. Rounds alternate between the two, because other load
on the machine drifts; medians count. The rate counts from the first finished chunk to the last one, so that start-up
(Ray, imports, compiled code) is apart; it is reported as the time until that first chunk. Target: Ray at 85% of the
bare loop or more.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mis_platform.artifacts import Part, combine_digests
from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.data.benchmarks import open_dataset
from mis_platform.stages import precompute
from mis_platform.stages.cluster import cluster
from mis_platform.storage import Storage


class Measured(NamedTuple):
    start_up: float  # seconds until the first chunk was finished
    rate: float  # photos per second after that
    digest: str
    bytes_per_photo: float


def measure(records: Iterable[dict[str, Any]]) -> Measured:
    began = time.perf_counter()
    arrivals = []
    parts = []
    for record in records:
        arrivals.append((time.perf_counter(), len(record["image_ids"]) + len(record["refused"])))
        parts += [Part(**part) for part in record["parts"]]
    first, last = arrivals[0][0], arrivals[-1][0]
    return Measured(
        start_up=first - began,
        rate=sum(photos for _, photos in arrivals[1:]) / (last - first),
        digest=combine_digests([part.digest for part in parts]),
        bytes_per_photo=sum(part.bytes for part in parts) / sum(part.rows for part in parts),
    )


def with_ray(photos: list[precompute.Photo], options: argparse.Namespace, out: Storage) -> Iterator[dict[str, Any]]:
    resources = Resources(chunk_images=options.chunk, extractors=options.processes, use_gpu=False)
    with cluster():
        yield from precompute.compute(photos, features_of(options), DataConfig(), resources, out)


def with_bare_loop(
    photos: list[precompute.Photo], options: argparse.Namespace, out: Storage
) -> Iterator[dict[str, Any]]:
    chunks = [photos[start : start + options.chunk] for start in range(0, len(photos), options.chunk)]
    pool = ProcessPoolExecutor(
        options.processes, get_context("spawn"), initializer=prepare_process, initargs=(features_of(options), out)
    )
    with pool:
        for done in as_completed([pool.submit(run_chunk, chunk) for chunk in chunks]):
            yield done.result()


WORKERS: list[precompute.ChunkWorker] = []  # the one of this process


def prepare_process(features: FeaturesConfig, out: Storage) -> None:
    os.nice(15)  # as Ray does with its workers: other load must not decide the comparison
    WORKERS.append(precompute.ChunkWorker(features, DataConfig(), out))


def run_chunk(chunk: list[precompute.Photo]) -> dict[str, Any]:
    image_ids, paths = zip(*chunk)
    table = WORKERS[0](pa.table({"image_ids": [list(image_ids)], "paths": [list(paths)]}))
    return json.loads(table["record"][0].as_py())


def features_of(options: argparse.Namespace) -> FeaturesConfig:
    return FeaturesConfig(extractor=options.extractor, weights=options.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="NAME:PATH, e.g. folder:photos")
    parser.add_argument("--extractor", default="color_texture")
    parser.add_argument("--weights", help="weights file of the extractor")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=Resources().chunk_images, help="photos in a chunk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, help="only so many")
    options = parser.parse_args()
    dataset = open_dataset(options.dataset)
    photos = [(k, str(dataset.image_path(k)).encode()) for k in sorted(dataset.image_ids)][: options.photos]
    print(f"{len(photos)} photos, {options.extractor}, {options.processes} processes, chunks of {options.chunk}")
    results: dict[str, list[Measured]] = {"Ray Data": [], "bare loop": []}
    sides = {"Ray Data": with_ray, "bare loop": with_bare_loop}
    for _ in range(options.rounds):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                found = measure(side(photos, options, Storage(str(Path(folder)))))
            results[name].append(found)
            print(f"{name:>9}: {found.rate:6.2f} photos/s, first chunk after {found.start_up:.1f} s", flush=True)
    assert len({each.digest for found in results.values() for each in found}) == 1, "the trees differ"
    ray, bare = (statistics.median(each.rate for each in found) for found in results.values())
    print(f"median: Ray Data {ray:.2f}, bare loop {bare:.2f} photos/s: {ray / bare:.1%}")
    print(f"on disk: {results['Ray Data'][0].bytes_per_photo / 1e3:.1f} kB a photo")


if __name__ == "__main__":
    main()
