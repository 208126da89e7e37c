"""`python training_stories.py STORY FOLDER`: a training of two workers on a Ray of its own to which something happens.

Prints what the test wants to know; each story runs the same training undisturbed as well and compares.
"""

import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util.state import list_workers
from training_material import make_material, tiny_run

from mis_platform.config import Resources
from mis_platform.stages.cluster import cluster
from mis_platform.stages.train import train
from mis_platform.stages.training_loop import complete_steps, load_history
from mis_platform.storage import Storage

OnMetrics = Callable[[int, dict[str, float]], None]

NOTICE_SECONDS = 25  # between the notice and the end of a node


class Trainings:
    """The same training, as often as wanted, into directories of one folder."""

    def __init__(self, folder: Path, steps: int = 16) -> None:
        self.folder, self.steps = folder, steps
        self.dataset, self.trees = make_material(folder / "material", count=5)
        self.run = tiny_run(batch_size=4, epochs=1000, max_steps=steps)

    def out(self, name: str) -> Storage:
        return Storage(str(self.folder / name))

    def go(self, name: str, resources: Resources, on_metrics: OnMetrics = lambda step, metrics: None) -> None:
        train(self.dataset, self.run, self.trees, resources, self.out(name), on_metrics)

    def rows(self, name: str) -> list[dict[str, float]]:
        """The history, without what depends on the machine's mood."""
        rows = load_history(self.out(name), self.steps)
        return [{key: row[key] for key in row if key != "images_per_second"} for row in rows]

    def compare(self, first: str, second: str) -> None:
        assert self.rows(first) == self.rows(second)
        assert self.out(first).read_bytes("model.safetensors") == self.out(second).read_bytes("model.safetensors")
        say("same to the bit")


def two(**settings: Any) -> Resources:
    return Resources.model_validate({"num_workers": 2, "log_every": 1, "checkpoint_every": 5, **settings})


def once(at: int, action: Callable[[], None]) -> OnMetrics:
    """on_metrics that calls `action` at a step."""
    is_done = False

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        nonlocal is_done
        if step >= at and not is_done:
            is_done = True
            action()

    return on_metrics


def train_workers() -> list[tuple[int, str]]:
    """(process id, node id) of the training workers of this Ray; others may run on the machine."""
    here, found = ray.get_runtime_context().gcs_address, []
    for worker in list_workers(here, filters=[("is_alive", "=", True)], detail=True, raise_on_missing_output=False):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{worker.pid}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append((worker.pid, worker.node_id))
    return sorted(found)


def say(*words: object) -> None:
    print(*words, flush=True)


# -- nodes -----------------------------------------------------------------------------------------------------------


class Nodes:
    """A head without room for workers, and two nodes with room for one each."""

    def __init__(self) -> None:
        os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
        self.cluster = Cluster()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.cluster.add_node(num_cpus=0, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=port)
        self.nodes = [self.add() for _ in range(2)]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, include_dashboard=False)

    def victim(self) -> Any:
        """One that has a worker."""
        workers = train_workers()
        assert len({node for _, node in workers}) == 2, workers
        return next(node for node in self.nodes if node.node_id == workers[-1][1])

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()


def node(folder: Path, seed: str) -> None:
    """SIGKILL to one worker at a random step, and later to all processes of a node; another node comes."""
    trainings, rng = Trainings(folder), random.Random(int(seed))
    first, second = rng.randint(2, 8), rng.randint(10, 14)
    with two_nodes() as nodes:

        def kill_worker() -> None:
            os.kill(train_workers()[rng.randrange(2)][0], signal.SIGKILL)

        def kill_node() -> None:
            nodes.kill(nodes.victim())
            nodes.add()

        def strike(step: int, metrics: dict[str, float]) -> None:
            for due in (on_first, on_second):
                due(step, metrics)

        on_first, on_second = once(first, kill_worker), once(second, kill_node)
        say("strikes at steps", first, second)
        trainings.go("straight", two())
        trainings.go("struck", two(), strike)
        trainings.compare("straight", "struck")


def notice(folder: Path) -> None:
    """A node says at step 3 that it goes in 25 seconds, and does. No checkpoint is due and no failure allowed."""
    trainings = Trainings(folder, steps=120)
    rare = two(checkpoint_every=1000, max_failures=0)
    with two_nodes() as nodes:

        def give_notice() -> None:
            victim = nodes.victim()
            why = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            until = int((time.time() + NOTICE_SECONDS) * 1000)
            is_accepted, refusal = ray._raylet.GcsClient(address=nodes.cluster.address).drain_node(
                victim.node_id, why, "spot", until
            )
            assert is_accepted, refusal
            threading.Thread(target=take_away, args=(victim,), daemon=True).start()
            nodes.add()

        def take_away(victim: Any) -> None:
            time.sleep(NOTICE_SECONDS)
            say("newest checkpoint when the node went", complete_steps(trainings.out("struck"))[-1:])
            nodes.kill(victim)

        trainings.go("struck", rare, once(3, give_notice))
        trainings.go("straight", rare)
        trainings.compare("straight", "struck")


# -- one node --------------------------------------------------------------------------------------------------------


def hung(folder: Path, silence: str) -> None:
    """SIGSTOP to one of the two workers at step 8; silence: resources.worker_silence."""
    trainings = Trainings(folder)
    began = 0.0

    def strike() -> None:
        nonlocal began
        pid, began = train_workers()[-1][0], time.time()
        os.kill(pid, signal.SIGSTOP)
        say("stopped", pid)
        threading.Thread(target=watch, args=(pid,), daemon=True).start()

    def watch(pid: int) -> None:
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.1)
        say("killed after", round(time.time() - began, 1), "s")

    with cluster():
        trainings.go("straight", two())
        trainings.go("struck", two(worker_silence=float(silence)), once(8, strike))
        say("done after", round(time.time() - began, 1), "s")
        trainings.compare("straight", "struck")


class EnoughError(Exception):
    """Ends a training from outside."""


def resized(folder: Path) -> None:
    """Two workers to step 5, one to step 10, two to the end."""

    def stop() -> None:
        raise EnoughError

    trainings = Trainings(folder)
    with cluster():
        trainings.go("straight", two())
        for workers, until in ((2, 5), (1, 10)):
            with contextlib.suppress(EnoughError):
                trainings.go("resized", two(num_workers=workers, checkpoint_every=1000), once(until, stop))
            say("stopped at", complete_steps(trainings.out("resized"))[-1], "with", workers)
        trainings.go("resized", two(checkpoint_every=1000))
    pairs = list(zip(trainings.rows("straight"), trainings.rows("resized"), strict=True))
    assert len(pairs) == trainings.steps
    say("largest relative difference of a loss", max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs))


if __name__ == "__main__":
    {"node": node, "notice": notice, "hung": hung, "resized": resized}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
