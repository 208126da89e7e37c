"""Photos per second of precompute, and clicks per second of an evaluation, with one and two workers and nodes.

    python benchmarks/nodes.py --photos folder:PHOTOS --benchmark grabcut:GrabCut [--json FILE]

The nodes are raylets on this machine, each with object store and workers of its own, that reach one another over the
loopback address: what is compared is Ray's part in it, not a network. Every layout has as many CPUs as workers. Rounds
alternate between the layouts, because other load on the machine drifts; medians count. A rate counts from the first
finished chunk to the last one; start-up (processes, imports, compiled code) is the time until the first.

What one photo costs in each step is measured beside it, in one process with one thread and no Ray. The click model has
random weights: how long a click takes does not depend on them.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and OpenCV are imported

import cv2
import numpy as np
import torch
from precompute import Measured, measure
from ray.cluster_utils import Cluster

from mis_platform.config import DataConfig, EvalConfig, FeaturesConfig, Resources
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.model.features import build_extractor
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import save_model
from mis_platform.stages import cluster, evaluate, precompute
from mis_platform.stages.products import TREES_PRODUCT
from mis_platform.storage import Storage

STORE_BYTES = 200 * 2**20  # object store of a node


class Layout(NamedTuple):
    nodes: int
    workers: int

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' * (self.nodes > 1)}, {self.workers} worker{'s' * (self.workers > 1)}"


LAYOUTS = [Layout(1, 1), Layout(1, 2), Layout(2, 2)]


@contextlib.contextmanager
def nodes_of(layout: Layout) -> Iterator[None]:
    """A cluster that this process has joined."""
    started = Cluster()
    try:
        for _ in range(layout.nodes):
            started.add_node(
                num_cpus=layout.workers // layout.nodes,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                dashboard_port=0,
            )
        os.environ["RAY_ADDRESS"] = started.address
        with cluster.cluster():
            yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        started.shutdown()


# -- one photo -------------------------------------------------------------------------------------------------------


def costs_of(photos: Sequence[precompute.Photo], features: FeaturesConfig) -> dict[str, float]:
    """Seconds a photo of each step, medians; bytes of its row on disk and of what the workers send to the driver."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    extractor, rows = build_extractor(features), []
    TREES_PRODUCT.warm_up()
    seconds: dict[str, list[float]] = {"decode": [], "features": [], "merge": []}

    def timed(step: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        seconds[step].append(time.perf_counter() - began)
        return result

    def described(photo: precompute.Photo, pixels: np.ndarray) -> np.ndarray:
        return precompute.describe([precompute.Decoded(photo, pixels)], extractor)[0]

    described(photos[0], precompute.decode(photos[0], DataConfig()).pixels)  # compiled before it counts
    for photo in photos:
        pixels = timed("decode", precompute.decode, photo, DataConfig()).pixels
        patches = timed("features", described, photo, pixels)
        made = timed("merge", TREES_PRODUCT.make, photo.image_id, pixels.shape[:2], patches, None)
        rows.append(precompute.Result(photo, made))
    chunk = Resources().chunk_images
    with tempfile.TemporaryDirectory() as folder:
        out, writing, written = Storage(folder), [], 0
        for start in range(0, len(rows), chunk):
            began = time.perf_counter()
            record = precompute.finish_chunk(rows[start : start + chunk], out, TREES_PRODUCT)
            writing.append((time.perf_counter() - began) / len(rows[start : start + chunk]))
            written += sum(part["bytes"] for part in json.loads(record["record"][0].as_py())["parts"])
    return {
        **{f"{step}_seconds": statistics.median(each) for step, each in seconds.items()},
        "write_seconds": statistics.median(writing),
        "bytes": written / len(rows),
        "record_bytes": record.nbytes / len(rows[-(len(rows) % chunk or chunk) :]),
        "file_bytes": statistics.mean(os.path.getsize(photo.path) for photo in photos),
    }


# -- layouts ---------------------------------------------------------------------------------------------------------


def precomputed(photos: Sequence[precompute.Photo], features: FeaturesConfig, workers: int) -> Measured:
    resources = Resources(extractors=workers, use_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        return measure(precompute.compute(photos, features, DataConfig(), resources, Storage(folder)))


class Evaluated(NamedTuple):
    start_up: float  # seconds until the first chunk was finished
    rate: float  # clicks per second after that
    digest: str


def evaluated(benchmark: Dataset, model: Storage, config: EvalConfig, workers: int) -> Evaluated:
    """The driver writes a part when a chunk is finished: the times of the files tell."""
    resources = Resources(eval_workers=workers, use_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        output = evaluate.evaluate_model(benchmark, model, config, config.zoom_size, resources, Storage(folder))
        parts = sorted((os.path.getmtime(Path(folder) / part.name), part.rows) for part in output.parts)
    first, last = parts[0][0], parts[-1][0]
    return Evaluated(first - began, sum(rows for _, rows in parts[1:]) / (last - first), output.digest)


# -- report ----------------------------------------------------------------------------------------------------------


def report(costs: dict[str, float], trees: dict[Layout, list[Measured]], clicks: dict[Layout, list[Evaluated]]) -> Any:
    """Prints the table; the same as plain values."""
    steps = ("decode", "features", "merge", "write")
    print("one photo: " + ", ".join(f"{step} {1e3 * costs[f'{step}_seconds']:.2f} ms" for step in steps), end="; ")
    print(f"{costs['bytes'] / 1e3:.1f} kB on disk, {costs['record_bytes']:.0f} bytes to the driver")
    print(f"{'':<20} {'photos/s':>9} {'start-up':>9} {'clicks/s':>9} {'start-up':>9}")
    layouts = []
    for layout in trees:
        line = {
            **layout._asdict(),
            "photos_per_second": statistics.median(each.rate for each in trees[layout]),
            "start_up_seconds": statistics.median(each.start_up for each in trees[layout]),
            "clicks_per_second": statistics.median(each.rate for each in clicks[layout]),
            "evaluation_start_up_seconds": statistics.median(each.start_up for each in clicks[layout]),
        }
        layouts.append(line)
        print(
            f"{layout!s:<20} {line['photos_per_second']:9.2f} {line['start_up_seconds']:7.1f} s "
            f"{line['clicks_per_second']:9.2f} {line['evaluation_start_up_seconds']:7.1f} s"
        )
    return {"photo": costs, "layouts": layouts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="NAME:PATH, e.g. folder:photos")
    parser.add_argument("--benchmark", required=True, help="NAME:PATH, e.g. grabcut:GrabCut")
    parser.add_argument("--extractor", default="color_texture")
    parser.add_argument("--weights", help="weights file of the extractor")
    parser.add_argument("--number", type=int, default=400, help="photos")
    parser.add_argument("--objects", type=int, default=40, help="photos of the benchmark")
    parser.add_argument("--clicks", type=int, default=5, help="clicks on each object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()

    features = FeaturesConfig(extractor=options.extractor, weights=options.weights)
    dataset = open_dataset(options.photos)
    ids = sorted(dataset.image_ids)[: options.number]
    photos = [precompute.Photo(k, os.fsencode(dataset.image_path(k))) for k in ids]
    benchmark = open_dataset(options.benchmark, split="val")
    benchmark = replace(benchmark, samples=benchmark.samples[: options.objects])
    config = EvalConfig(max_clicks=options.clicks, zoom_size=224)
    evaluate.CHUNK_IMAGES = 2  # a small benchmark has few chunks of the usual size
    trees: dict[Layout, list[Measured]] = {layout: [] for layout in LAYOUTS}
    clicks: dict[Layout, list[Evaluated]] = {layout: [] for layout in LAYOUTS}
    load = [os.getloadavg()[0]]
    costs = costs_of(photos[:100], features)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), SimpleClick("vit_xt", config.zoom_size), {})
        for _ in range(options.rounds):
            for layout in LAYOUTS:
                with nodes_of(layout):
                    trees[layout].append(precomputed(photos, features, layout.workers))
                    clicks[layout].append(evaluated(benchmark, Storage(folder), config, layout.workers))
                load.append(os.getloadavg()[0])
                print(f"{layout!s:<20} {trees[layout][-1].rate:6.2f} photos/s, {clicks[layout][-1].rate:6.2f} clicks/s")
    for measured in (trees, clicks):
        assert len({each.digest for found in measured.values() for each in found}) == 1, "the layouts disagree"
    figures = report(costs, trees, clicks)
    figures |= {
        "extractor": options.extractor,
        "photos": len(photos),
        "rounds": options.rounds,
        "cpus": os.cpu_count(),
        "load": [round(each, 1) for each in load],
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
