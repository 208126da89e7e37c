"""How fast and at what price would `mis precompute` run on 1 to 1 000 nodes, for 10^4 to 10^9 photos?

    python benchmarks/scale.py [--setup cpu|gpu|gpu-bf16] [--photos disk|mount] [--start | --check | --driver]

First the driver alone lists and hashes the photos (`start`). Then a discrete-event simulation of the pipeline: the
driver hands out chunks one after the other; a chunk is read from the storage, decoded, described and merged on its
node, and its part is written. Every resource is a queue: the driver, the storage (bytes and requests), each node's
network, cores and GPUs. Costs per photo come from a file of measurements that `benchmarks/nodes.py` and
`benchmarks/resume.py` write; what was not measured is an assumption and is listed as one. `--check` compares the
simulation with the measured throughputs of one and two workers and nodes, and of one GPU. It fails outside BAND.

A run of more than WINDOW chunks is simulated until the queues have settled, and then extended at the rate of its second
half: more of the same changes no rate. More than ONE_SET photos are several data sets, one after the other on a head
for every NODES_OF_A_HEAD nodes; while the nodes work on one, the next is listed and hashed.
"""

import argparse
import heapq
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.storage import Storage

NODES = (1, 10, 100, 1000)
IMAGES = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
WINDOW = 40_000  # chunks that are simulated at least, if there are as many
ROUNDS = 8  # chunks of each slot that are simulated at least
JITTER = 0.25  # deviation of the logarithm of a chunk's computing time
ONE_SET = 10**7  # photos of one data set at most: the driver holds their names
NODES_OF_A_HEAD = 30
BAND = (0.8, 1.25)  # simulated over measured; the measurements themselves vary by a sixth
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
    listing: float  # of the driver, before anything else
    hashing: float  # of the driver's content, where it was not read before
    recall: float  # of the driver, to look the photo up among what was read before, read or not


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
    has_photos: bool  # or each node has them on its own disk


@dataclass(frozen=True, kw_only=True)
class Head:
    """The machine of the driver, which runs no chunks."""

    cores: int
    network: float  # bytes/s
    disk: float  # bytes/s
    price: float  # dollars an hour


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
    start: float  # of these, until there is work for the nodes
    rate: float  # photos/s once all nodes work
    dollars: float
    idle: int  # nodes that never had a chunk
    use: dict[str, float]  # resource -> share of the time that it is busy

    @property
    def binding(self) -> str:
        return max(self.use, key=lambda name: self.use[name])


class Simulation:
    """`nodes` machines at work on equal chunks."""

    def __init__(
        self, costs: Costs, node: Node, store: Store, nodes: int, chunk: int, drivers: int = 1, seed: int = 0
    ) -> None:
        self.costs, self.node, self.store, self.nodes, self.chunk = costs, node, store, nodes, chunk
        self.rng = np.random.default_rng(seed)
        self.driver = Pool(drivers)
        self.bucket = Pool(1)
        self.networks = [Pool(1) for _ in range(nodes)]
        self.cores = [Pool(node.cores) for _ in range(nodes)]
        self.gpus = [Pool(node.gpus) for _ in range(nodes)] if node.gpus else []
        # Without GPUs a core takes a chunk from file to part; with them the queue before a GPU is kept filled.
        self.slots = node.cores + 2 * node.gpus
        self.worked: set[int] = set()  # nodes that had a chunk

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
                self.worked.add(node)
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
            case "read" if not self.store.has_photos:  # a node's disk gives more than its cores take
                return now
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
        size = costs.bytes_in * self.store.has_photos + costs.bytes_out
        core = costs.decode + costs.merge + costs.write + (0 if self.gpus else costs.features)
        limits = [
            self.driver.servers * count / costs.driver_chunk,
            self.store.bandwidth / size,
            self.store.requests * count / (count * self.store.has_photos + 1),
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
            "driver": self.driver.busy / self.driver.servers,
            "storage": self.bucket.busy,
            "network": sum(pool.busy for pool in self.networks) / self.nodes,
            "cores": sum(pool.busy for pool in self.cores) / (self.nodes * self.node.cores),
        }
        if self.gpus:
            total["GPUs"] = sum(pool.busy for pool in self.gpus) / (self.nodes * self.node.gpus)
        return {name: busy / seconds for name, busy in total.items()}


def start(costs: Costs, store: Store, head: Head, images: int, is_remembered: bool = False) -> float:
    """Seconds until a command has listed its photos and knows their digest. is_remembered: they were read before."""
    each = costs.listing + costs.recall
    if not is_remembered:
        read = max(costs.bytes_in / head.network, store.latency / READERS_OF_HEAD, 1 / store.requests)
        each += max(costs.hashing / head.cores, read if store.has_photos else costs.bytes_in / head.disk)
    return images * each


def predict(
    costs: Costs, node: Node, store: Store, nodes: int, images: int, chunk: int, head: Head | None = None
) -> Prediction:
    """Time, steady rate, price and the use of each resource. Without a head, the photos were listed before."""
    chunks, sets = max(1, round(images / chunk)), math.ceil(images / ONE_SET)
    heads = min(sets, max(1, nodes // NODES_OF_A_HEAD))
    simulation = Simulation(costs, node, store, nodes, chunk, drivers=heads)
    slots = nodes * simulation.slots
    window = min(chunks, max(WINDOW, ROUNDS * slots))
    done = simulation.run(window)
    half = window // 2
    if chunks > 2 * slots:
        # The rate between the first half and the last tenth: without start and without the idle end.
        last = max(half + 1, window - max(1, window // 10))
        rate = (last - half) * chunk / (done[last] - done[half])
    else:
        rate = chunk * window / (done[-1] - simulation.first_start)
    rate = min(rate, simulation.limit())  # a burst of equal chunks is no steady rate
    working = done[-1] + (chunks - window) * chunk / rate
    before = start(costs, store, head, math.ceil(images / sets)) if head else 0.0
    turns = math.ceil(sets / heads)  # data sets that a head has, one after the other
    seconds = max(before + working, turns * before + working / turns)
    share = working / seconds
    use = {name: share * busy for name, busy in simulation.use(done[-1] - simulation.first_start).items()}
    price = nodes * node.price * (seconds - before) + (heads * head.price * seconds if head else 0)
    return Prediction(
        seconds=seconds,
        start=before,
        rate=rate,
        dollars=price / 3600,
        idle=nodes - len(simulation.worked),
        use=use | {"start": 1 - share},
    )


# -- input -----------------------------------------------------------------------------------------------------------

# Assumptions, not measurements: sizes and round prices of rented machines, and a bucket in the same region.
CPU_NODE = Node(cores=16, gpus=0, network=1.5e9, price=0.8, boot=120)
GPU_NODE = Node(cores=16, gpus=1, network=1.5e9, price=2.0, boot=240)
HEAD = Head(cores=4, network=1.5e9, disk=250e6, price=0.2)
READERS_OF_HEAD = min(16, 4 * HEAD.cores)  # as storage.READERS
BUCKET = Store(bandwidth=20e9, latency=0.05, requests=5500, has_photos=True)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One way to describe photos on an H100; DINO ViT-S/8, 504x376 pixels (2 961 tokens)."""

    network: float  # photos/s of the network alone, from and to memory
    passes: float  # work in copies that fill passes up, over the work that is needed
    cores: float  # busy while `rate` photos/s went through Ray
    rate: float

    def applied(self, costs: Costs) -> Costs:
        """The costs with this GPU's; all that its cores do but merging and writing is decoding here."""
        return replace(
            costs, features=self.passes / self.network, decode=self.cores / self.rate - costs.merge - costs.write
        )


def read_costs(path: Path) -> tuple[Costs, dict[str, Any]]:
    """From a file with what `nodes.py` writes as "nodes", `resume.py` as "resume", and what a driver costs."""
    measured = json.loads(path.read_text())
    photo, driver, resume = measured["nodes"]["photo"], measured["driver"], measured["resume"]

    def each(name: str) -> float:
        return float(resume[name]["cpu_seconds"] / resume[name]["photos"])

    costs = Costs(
        **{name: photo[f"{name}_seconds"] for name in ("decode", "features", "merge", "write")},
        bytes_in=photo["file_bytes"],
        bytes_out=photo["bytes"],
        driver_chunk=driver["seconds_per_chunk"],
        worker_start=min(each["start_up_seconds"] for each in measured["nodes"]["layouts"]),
        driver_bytes=resume["resumed run, all parts whole"]["memory"]
        / resume["resumed run, all parts whole"]["photos"],
        listing=each("list a folder"),
        hashing=each("hash photos"),
        recall=each("digest from what is remembered"),
    )
    return costs, measured


def set_up(name: str, costs: Costs, measured: dict[str, Any]) -> tuple[Costs, Node]:
    """cpu: color_texture. gpu: the default settings, fp32 and one photo at once; gpu-bf16: five at once.

    Chunks bring photos of one size together, so that in large sets passes are full.
    """
    if name == "cpu":
        return costs, CPU_NODE
    gpus = measured["gpu"]["ways"]
    way = Gpu(**gpus["bf16, five at once"])
    if name == "gpu":
        way = replace(way, network=measured["gpu"]["fp32_photos_per_second"])
    return replace(way, passes=1.0).applied(costs), GPU_NODE


def driver_seconds(chunks: int = 1000) -> float:
    """Seconds between two finished chunks of one tiny photo each: what handing out and recording a chunk takes.

    An upper bound: the workers, which share the machine, read, merge and write the tiny photo in that time too.
    """
    from mis_platform.stages import cluster, precompute  # Ray; the simulation needs none

    with tempfile.TemporaryDirectory() as folder, cluster.cluster():
        photo = Path(folder, "photo.png")
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(photo)
        photos = [precompute.Photo(f"photo-{k}", str(photo).encode()) for k in range(chunks)]
        features, out = FeaturesConfig(extractor="color_texture"), Storage(str(Path(folder, "out")))
        records = precompute.compute(photos, features, DataConfig(), Resources(chunk_images=1), out)
        times = [time.perf_counter() for _ in records]
    return (times[-1] - times[0]) / (len(times) - 1)


# -- output ----------------------------------------------------------------------------------------------------------


def table(costs: Costs, node: Node, store: Store, head: Head, several: Sequence[int] = NODES) -> Iterator[str]:
    from mis_platform.stages.precompute import images_in_a_chunk

    yield (
        f"{'photos':>7} {'nodes':>5} {'idle':>4} {'photos/s':>9} {'start':>9} {'in all':>9} {'dollars':>10}"
        f" {'a million':>10}  binds first (share of the time)"
    )
    for images in IMAGES:
        for nodes in several:
            chunk = images_in_a_chunk(min(images, ONE_SET), Resources())
            found = predict(costs, node, store, nodes, images, chunk, head)
            yield (
                f"{images:>7.0e} {nodes:>5} {found.idle or '':>4} {found.rate:>9,.0f} {duration(found.start):>9}"
                f" {duration(found.seconds):>9} {found.dollars:>10,.2f} {1e6 * found.dollars / images:>10,.2f}"
                f"  {found.binding} ({found.use[found.binding]:.0%})"
            )


def starts(costs: Costs, head: Head) -> Iterator[str]:
    """How long a command takes before there is work, or to find that there is none."""
    yield f"{'photos':>7} {'first, from a disk':>20} {'first, from a mount':>20} {'read before':>12}"
    disk = replace(BUCKET, has_photos=False)
    for images in IMAGES:
        if images <= ONE_SET:
            first = [start(costs, store, head, images) for store in (disk, BUCKET)]
            again = start(costs, disk, head, images, is_remembered=True)
            yield f"{images:>7.0e} {duration(first[0]):>20} {duration(first[1]):>20} {duration(again):>12}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


class Point(NamedTuple):
    """A throughput in photos/s, without any start."""

    name: str
    measured: float
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.measured


def check(costs: Costs, measured: dict[str, Any]) -> Iterator[Point]:
    """Every measured throughput beside the simulated one."""
    near = replace(BUCKET, latency=0.0, has_photos=False)
    for layout in measured["nodes"]["layouts"]:
        nodes, workers = layout["nodes"], layout["workers"]
        node = Node(cores=workers // nodes, gpus=0, network=10e9, price=0, boot=0)
        found = predict(costs, node, near, nodes, 20_000, chunk=16)
        yield Point(f"{workers} CPU workers on {nodes} nodes", layout["photos_per_second"], found.rate)
    node = Node(cores=16, gpus=1, network=10e9, price=0, boot=0)
    for name, way in measured["gpu"]["ways"].items():
        found = predict(Gpu(**way).applied(costs), node, near, 1, 20_000, chunk=measured["gpu"]["chunk"])
        yield Point(f"one GPU, {name}", way["rate"], found.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--setup", choices=("cpu", "gpu", "gpu-bf16"), default="cpu")
    parser.add_argument("--photos", choices=("disk", "mount"), default="mount", help="of every node, or of the bucket")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--driver", action="store_true", help="measure what the driver costs a chunk and stop")
    parser.add_argument("--check", action="store_true", help="compare with the measured points and stop")
    parser.add_argument("--start", action="store_true", help="what comes before any work, and stop")
    arguments = parser.parse_args()
    if arguments.driver:
        print(f"{driver_seconds():.4f} s a chunk")
        return
    costs, measured = read_costs(arguments.measured)
    if arguments.check:
        points = list(check(costs, measured))
        print(f"{'photos/s':<28} {'measured':>9} {'simulated':>9} {'ratio':>6}")
        for point in points:
            print(f"{point.name:<28} {point.measured:>9.1f} {point.simulated:>9.1f} {point.ratio:>6.2f}")
        sys.exit(any(not BAND[0] <= point.ratio <= BAND[1] for point in points))
    if arguments.start:
        print("\n".join(starts(costs, HEAD)))
        return
    costs, node = set_up(arguments.setup, costs, measured)
    store = replace(BUCKET, has_photos=arguments.photos == "mount")
    print(f"measured: {measured['about']}")
    print(f"assumed: {node}, {HEAD}, {store}" + (f", {costs.features:.4f} s of a GPU a photo" if node.gpus else ""))
    print(f"driver memory: {costs.driver_bytes:.0f} bytes a photo, {costs.driver_bytes * 1e7 / 2**30:.1f} GiB at 10^7")
    for line in table(costs, node, store, HEAD, arguments.nodes):
        print(line)


if __name__ == "__main__":
    main()
