"""How fast and at what price would `mis precompute` run on 1 to 1 000 nodes, for 10^4 to 10^9 photos?

    python benchmarks/scale.py [--measured benchmarks/scale.json] [--setup cpu|gpu] [--check | --driver]

A discrete-event simulation of the pipeline: the driver hands out chunks one after the other; a chunk is read from the
storage, decoded, described and merged on its node, and its part is written. Every resource is a queue: the driver, the
storage (bytes and requests), each node's network, cores and GPUs. Costs per photo come from a file of measurements that
`benchmarks/nodes.py` writes; what was not measured is an assumption and is listed as one. `--check` compares the
simulation with the measured throughputs of one and two workers and nodes.

A run of more than WINDOW chunks is simulated until the queues have settled, and then extended at the rate of its second
half: more of the same changes no rate.
"""

import argparse
import heapq
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.stages import cluster, precompute
from mis_platform.stages.precompute import images_in_a_chunk
from mis_platform.storage import Storage

NODES = (1, 3, 10, 30, 100, 300, 1000)
IMAGES = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
WINDOW = 40_000  # chunks that are simulated at least, if there are as many
ROUNDS = 8  # chunks of each slot that are simulated at least
JITTER = 0.25  # deviation of the logarithm of a chunk's computing time
MEASURED = Path(__file__).with_name("scale.json")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one photo; seconds of one core unless said otherwise."""

    decode: float
    features: float  # seconds of one core, or of one GPU
    merge: float
    write: float
    bytes_in: float  # compressed photo
    bytes_out: float  # its row
    driver_chunk: float  # seconds of the driver for each chunk
    worker_start: float  # seconds until a worker's first chunk
    driver_bytes: float  # memory of the driver, for each photo


@dataclass(frozen=True, kw_only=True)
class Node:
    """One kind of machine."""

    cores: int
    gpus: int
    network: float  # bytes/s
    price: float  # dollars an hour
    boot: float  # seconds until it takes work


@dataclass(frozen=True, kw_only=True)
class Store:
    """A bucket."""

    bandwidth: float  # bytes/s of all nodes together
    latency: float  # seconds of one request
    requests: float  # a second; S3 allows 5 500 reads and 3 500 writes for each prefix


@dataclass
class Pool:
    """Servers that take requests in the order of their arrival."""

    servers: int
    start: float = 0.0
    busy: float = 0.0  # seconds of service
    free: list[float] = field(default_factory=list)

    def serve(self, now: float, seconds: float) -> float:
        """When a request that arrives at `now` is done."""
        if not self.free:
            self.free = [self.start] * self.servers
        done = max(now, heapq.heappop(self.free)) + seconds
        heapq.heappush(self.free, done)
        self.busy += seconds
        return done


@dataclass(frozen=True)
class Prediction:
    seconds: float
    rate: float  # photos/s once all nodes work
    dollars: float
    use: dict[str, float]  # resource -> share of the time that it is busy

    @property
    def binding(self) -> str:
        return max(self.use, key=lambda name: self.use[name])


class Simulation:
    """`nodes` machines at work on equal chunks."""

    def __init__(self, costs: Costs, node: Node, store: Store, nodes: int, chunk: int, seed: int = 0) -> None:
        self.costs, self.node, self.store, self.nodes, self.chunk = costs, node, store, nodes, chunk
        self.rng = np.random.default_rng(seed)
        self.driver = Pool(1)
        self.bucket = Pool(1)
        self.networks = [Pool(1) for _ in range(nodes)]
        self.cores = [Pool(node.cores) for _ in range(nodes)]
        self.gpus = [Pool(node.gpus) for _ in range(nodes)] if node.gpus else []
        # Without GPUs a core takes a chunk from file to part; with them the queue before a GPU is kept filled.
        self.slots = node.cores + 2 * node.gpus

    def run(self, chunks: int) -> list[float]:
        """When each of `chunks` is done, ascending; 0 is the start of the nodes."""
        ready = [(self._start(node), slot, node, 0) for node in range(self.nodes) for slot in self._slots_of(node)]
        heapq.heapify(ready)
        handed, done = 0, []
        factors: dict[int, float] = {}
        while ready:
            now, slot, node, step = heapq.heappop(ready)
            if step == 0:
                if handed == chunks:
                    continue
                handed += 1
                factors[slot] = float(np.exp(self.rng.normal(-(JITTER**2) / 2, JITTER)))
            after = self._step(step, now, node, factors[slot])
            if step + 1 == len(self.steps):
                done.append(after)
                heapq.heappush(ready, (after, slot, node, 0))
            else:
                heapq.heappush(ready, (after, slot, node, step + 1))
        return sorted(done)

    steps = ("driver", "read", "decode", "features", "finish", "write")

    def _step(self, step: int, now: float, node: int, factor: float) -> float:
        costs, count = self.costs, self.chunk
        match self.steps[step]:
            case "driver":
                return self.driver.serve(now, costs.driver_chunk)
            case "read":  # photo by photo, several under way: latency counts once a chunk
                return self._transfer(now, node, count * costs.bytes_in, requests=count)
            case "decode":
                return self.cores[node].serve(now, factor * count * costs.decode)
            case "features":
                device = (self.gpus or self.cores)[node]
                return device.serve(now, factor * count * costs.features)
            case "finish":
                return self.cores[node].serve(now, factor * count * (costs.merge + costs.write))
            case _:
                return self._transfer(now, node, count * costs.bytes_out, requests=1)

    def _transfer(self, now: float, node: int, size: float, requests: int) -> float:
        through = self.bucket.serve(now, max(size / self.store.bandwidth, requests / self.store.requests))
        return self.networks[node].serve(through, size / self.node.network) + self.store.latency

    def limit(self) -> float:
        """Photos/s that no queue lets through more of."""
        costs, count = self.costs, self.chunk
        size = costs.bytes_in + costs.bytes_out
        core = costs.decode + costs.merge + costs.write + (0 if self.gpus else costs.features)
        limits = [
            count / costs.driver_chunk,
            self.store.bandwidth / size,
            self.store.requests * count / (count + 1),
            self.nodes * self.node.network / size,
            self.nodes * self.node.cores / core,
        ]
        return min([*limits, self.nodes * self.node.gpus / costs.features] if self.gpus else limits)

    def _start(self, node: int) -> float:
        return self.node.boot * (1 + 0.2 * node / max(1, self.nodes)) + self.costs.worker_start

    @property
    def first_start(self) -> float:
        return self._start(0)

    def _slots_of(self, node: int) -> range:
        return range(node * self.slots, (node + 1) * self.slots)

    def use(self, seconds: float) -> dict[str, float]:
        """Share of `seconds` that each resource was busy."""
        total = {
            "driver": self.driver.busy,
            "storage": self.bucket.busy,
            "network": sum(pool.busy for pool in self.networks) / self.nodes,
            "cores": sum(pool.busy for pool in self.cores) / (self.nodes * self.node.cores),
        }
        if self.gpus:
            total["GPUs"] = sum(pool.busy for pool in self.gpus) / (self.nodes * self.node.gpus)
        return {name: busy / seconds for name, busy in total.items()}


def predict(costs: Costs, node: Node, store: Store, nodes: int, images: int, chunk: int | None = None) -> Prediction:
    """Time, steady rate, price and the use of each resource."""
    chunk = chunk or images_in_a_chunk(images, Resources())
    chunks = max(1, round(images / chunk))
    simulation = Simulation(costs, node, store, nodes, chunk)
    window = min(chunks, max(WINDOW, ROUNDS * nodes * simulation.slots))
    done = simulation.run(window)
    half = window // 2
    # The rate between the first half and the last tenth: without start and without the idle end.
    last = max(half + 1, window - max(1, window // 10)) if window > 2 else window - 1
    rate = (last - half) * chunk / (done[last] - done[half]) if window > 2 else chunk * window / done[-1]
    rate = min(rate, simulation.limit())  # a burst of equal chunks is no steady rate
    seconds = done[-1] + (chunks - window) * chunk / rate
    use = simulation.use(done[-1] - simulation.first_start)
    dollars = nodes * node.price * seconds / 3600
    return Prediction(seconds, rate, dollars, use)


# -- input -----------------------------------------------------------------------------------------------------------

# Assumptions, not measurements: sizes and round prices of rented machines, and a bucket in the same region.
CPU_NODE = Node(cores=16, gpus=0, network=1.5e9, price=0.8, boot=120)
GPU_NODE = Node(cores=16, gpus=1, network=1.5e9, price=2.0, boot=240)
BUCKET = Store(bandwidth=20e9, latency=0.05, requests=5500)
DINO_SECONDS = 0.0095  # of an H100 for a photo of 504x376 pixels at patch 8 (2 961 tokens), fp32; 0.0017 in bf16


def read_costs(path: Path) -> tuple[Costs, dict[str, Any]]:
    """From a file with what `benchmarks/nodes.py --json` writes as "nodes", and what a driver costs as "driver"."""
    measured = json.loads(path.read_text())
    photo, driver = measured["nodes"]["photo"], measured["driver"]
    costs = Costs(
        **{name: photo[f"{name}_seconds"] for name in ("decode", "features", "merge", "write")},
        bytes_in=photo["file_bytes"],
        bytes_out=photo["bytes"],
        driver_chunk=driver["seconds_per_chunk"],
        worker_start=min(each["start_up_seconds"] for each in measured["nodes"]["layouts"]),
        driver_bytes=driver["bytes_per_photo"],
    )
    return costs, measured


def set_up(name: str, costs: Costs) -> tuple[Costs, Node]:
    if name == "cpu":
        return costs, CPU_NODE
    return replace(costs, features=DINO_SECONDS), GPU_NODE


def driver_seconds(chunks: int = 1000) -> float:
    """Seconds between two finished chunks of one tiny photo each: what handing out and recording a chunk takes.

    An upper bound: the workers, which share the machine, read, merge and write the tiny photo in that time too.
    """
    with tempfile.TemporaryDirectory() as folder, cluster.cluster():
        photo = Path(folder, "photo.png")
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(photo)
        photos = [(f"photo-{k}", str(photo).encode()) for k in range(chunks)]
        features, out = FeaturesConfig(extractor="color_texture"), Storage(str(Path(folder, "out")))
        records = precompute.compute(photos, features, DataConfig(), Resources(chunk_images=1), out)
        times = [time.perf_counter() for _ in records]
    return (times[-1] - times[0]) / (len(times) - 1)


# -- output ----------------------------------------------------------------------------------------------------------


def table(costs: Costs, node: Node, store: Store) -> Iterator[str]:
    columns = f"{'photos':>8} {'nodes':>6} {'photos/s':>10} {'time':>10} {'dollars':>10} {'a million':>10}"
    yield f"{columns}  binds first (use)"
    for images in IMAGES:
        for nodes in NODES:
            if images / (nodes * node.cores) < images_in_a_chunk(images, Resources()):  # fewer chunks than cores
                continue
            found = predict(costs, node, store, nodes, images)
            yield (
                f"{images:>8.0e} {nodes:>6} {found.rate:>10,.0f} {duration(found.seconds):>10} {found.dollars:>10,.2f}"
                f" {1e6 * found.dollars / images:>10,.2f}  {found.binding} ({found.use[found.binding]:.0%})"
            )


def duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def check(costs: Costs, measured: dict[str, Any], store: Store) -> Iterator[str]:
    """Simulated beside measured throughput, both without the start."""
    yield f"{'nodes':>6} {'workers':>8} {'measured':>10} {'simulated':>10} {'ratio':>6}   photos/s"
    for layout in measured["nodes"]["layouts"]:
        nodes, workers = layout["nodes"], layout["workers"]
        node = Node(cores=workers // nodes, gpus=0, network=10e9, price=0, boot=0)
        found = predict(costs, node, replace(store, latency=0.0), nodes, 20_000, chunk=16)
        rate = layout["photos_per_second"]
        yield f"{nodes:>6} {workers:>8} {rate:>10.1f} {found.rate:>10.1f} {found.rate / rate:>6.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--setup", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--driver", action="store_true", help="measure what the driver costs a chunk and stop")
    parser.add_argument("--check", action="store_true", help="compare with the measured points and stop")
    arguments = parser.parse_args()
    if arguments.driver:
        print(f"{driver_seconds():.4f} s a chunk")
        return
    costs, measured = read_costs(arguments.measured)
    if arguments.check:
        print("\n".join(check(costs, measured, BUCKET)))
        return
    costs, node = set_up(arguments.setup, costs)
    print(f"measured: {measured['about']}")
    print(f"assumed: {node}, {BUCKET}" + (f", {DINO_SECONDS} s of a GPU a photo" if node.gpus else ""))
    print(f"driver memory: {costs.driver_bytes:.0f} bytes a photo, {costs.driver_bytes * 1e7 / 2**30:.1f} GiB at 10^7")
    for line in table(costs, node, BUCKET):
        print(line)


if __name__ == "__main__":
    main()
