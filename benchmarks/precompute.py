"""Photos per second of `mis precompute`, beside a bare loop over the same functions.

    python benchmarks/precompute.py --dataset folder:PHOTOS
    python benchmarks/precompute.py --dataset folder:PHOTOS --gpu --extractor dino_vits8 --weights FILE \
        --precision bf16 --batch 8 --repeat 10 --chunk 32 --rounds 1

Both sides run the same worker on the same chunks with as many processes, and write the same Parquet files; one gets
its chunks from Ray Data, the other from a `ProcessPoolExecutor`. Rounds alternate between the two, because other load
on the machine drifts; medians count. The rate counts from the first finished chunk to the last one, so that start-up
(Ray, imports, compiled code) is apart; it is reported as the time until that first chunk. Target: Ray at 85% of the
bare loop or more.

With --gpu the bare loop is the network alone: one process hands photos in memory to it, as many at once as the stage
does, and nothing is decoded, merged or written. Target: 90% of that, and 600 photos/s on one H200 with 16 cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mis_platform.artifacts import Part, combine_digests
from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.data.benchmarks import open_dataset
from mis_platform.model.features import build_extractor
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
    resources = Resources(chunk_images=options.chunk, extractors=options.processes, use_gpu=options.gpu)
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
    table = WORKERS[0](pa.Table.from_pylist([precompute.chunk_row(chunk)]))
    return json.loads(table["record"][0].as_py())


def features_of(options: argparse.Namespace) -> FeaturesConfig:
    return FeaturesConfig(
        extractor=options.extractor, weights=options.weights, precision=options.precision, batch_size=options.batch
    )


def network_alone(photos: list[precompute.Photo], options: argparse.Namespace) -> float:
    """Photos per second of the network on the GPU, from and to memory."""
    extractor = build_extractor(features_of(options), "cuda")
    by_size: dict[tuple[int, ...], list[np.ndarray]] = {}
    for photo in photos:
        pixels = extractor.prepare(precompute.decode(photo, DataConfig()).pixels)
        by_size.setdefault(pixels.shape, []).append(pixels)
    batches = []
    for shape, group in by_size.items():
        count = extractor.photos_at_once((shape[0] // extractor.patch_size) * (shape[1] // extractor.patch_size))
        batches += [np.stack(group[start : start + count]) for start in range(0, len(group) - count + 1, count)]
    for batch in batches:
        extractor(batch)
    began = time.perf_counter()
    for batch in batches:
        extractor(batch)
    return sum(map(len, batches)) / (time.perf_counter() - began)


class Load:
    """Mean use of the GPU and of the CPU cores while it is open, looked at five times a second."""

    def __enter__(self) -> "Load":
        self._end, self.gpu, self.cores, self.peak = threading.Event(), list[float](), list[float](), 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        import psutil  # comes inside Ray

        while not self._end.wait(0.2):
            self.cores.append(psutil.cpu_percent() * psutil.cpu_count() / 100)
            self.gpu.append(torch.cuda.utilization() if torch.cuda.is_available() else 0)
            self.peak = max(self.peak, _gpu_memory())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def __str__(self) -> str:
        """Of the third quarter, when everything is under way."""
        middle = slice(len(self.cores) // 2, 3 * len(self.cores) // 4 + 1)
        return (
            f"GPU busy {np.mean(self.gpu[middle]):.0f}%, at most {self.peak / 2**30:.1f} GiB of its memory in use, "
            f"{np.mean(self.cores[middle]):.1f} CPU cores"
        )


def _gpu_memory() -> int:
    """Bytes in use by all processes."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="NAME:PATH, e.g. folder:photos")
    parser.add_argument("--extractor", default="color_texture")
    parser.add_argument("--weights", help="weights file of the extractor")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=1, help="photos of one size in a forward pass")
    parser.add_argument("--gpu", action="store_true", help="against the network alone")
    parser.add_argument("--processes", type=int, help="that describe photos (default: 2; the stage's with --gpu)")
    parser.add_argument("--repeat", type=int, default=1, help="take every photo so many times")
    parser.add_argument("--chunk", type=int, default=Resources().chunk_images, help="photos in a chunk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, help="only so many")
    options = parser.parse_args()
    dataset = open_dataset(options.dataset)
    ids = sorted(dataset.image_ids)[: options.photos]
    listed = [precompute.Photo(k, str(dataset.image_path(k)).encode()) for k in ids]
    photos = [each._replace(image_id=f"{k}-{each.image_id}") for k in range(options.repeat) for each in listed]
    print(f"{len(photos)} photos, {options.extractor}, {options.processes} processes, chunks of {options.chunk}")
    if options.gpu:
        on_a_gpu(photos, listed, options)
    else:
        options.processes = options.processes or 2
        on_cpus(photos, options)


def on_a_gpu(photos: list[precompute.Photo], listed: list[precompute.Photo], options: argparse.Namespace) -> None:
    alone, rates = [], []
    for _ in range(options.rounds):
        alone.append(network_alone(listed, options))
        with tempfile.TemporaryDirectory() as folder, Load() as load:
            found = measure(with_ray(photos, options, Storage(folder)))
        rates.append(found.rate)
        print(
            f"{torch.cuda.get_device_name()}: Ray Data {found.rate:.0f} photos/s (first chunk after "
            f"{found.start_up:.1f} s; {load}), network alone {alone[-1]:.0f} photos/s",
            flush=True,
        )
    share = statistics.median(rates) / statistics.median(alone)
    print(f"median: {statistics.median(rates):.0f} photos/s, {share:.0%} of the network alone")


def on_cpus(photos: list[precompute.Photo], options: argparse.Namespace) -> None:
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
