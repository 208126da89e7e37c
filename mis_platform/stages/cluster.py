"""The one place that starts or joins Ray."""

import contextlib
import errno
import functools
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mis_platform import stopping
from mis_platform.access import check_ray_address
from mis_platform.artifacts import note_machine
from mis_platform.config import Resources
from mis_platform.data.benchmarks import Dataset
from mis_platform.errors import DataError
from mis_platform.storage import TEMPORARY, Storage

NODE_SECONDS = 60.0  # for every node to look for a file: its first process has to start
CPU_SHARE = 0.9  # of the CPUs that workers reserve; the rest is for drivers, which otherwise could not start
PATIENCE = 60  # seconds for which Ray waits for a head to come back, unless this variable of its own says otherwise
PATIENCE_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
LOST_SHARE = 0.75  # of them, after which we leave: at their end Ray ends our process, with a code and a text of its own
JOIN_SECONDS = 25.0  # for the head of a cluster that is joined to answer; it may be starting
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # a gRPC client's; a server has its own
# Port 0 is a free one: at 8265, where `mis submit` looks, there is only a head that somebody started on purpose.
LOCAL = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}

_raylet: Any = None  # process of the Ray that this process started


@contextlib.contextmanager
def cluster(root: Storage | None = None, dataset: Dataset | None = None) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start one in this process and stop it at the end.

    root: where its workers will read and write; ValueError if it is a local path that not all nodes see, see
    `check_shared`. dataset: what they will read; DataError if not all nodes see it, see `check_seen`.

    A Ray that is already initialised (a notebook, a test session, an enclosing stage) is used as it is. A started one
    has Ray's token authentication (on by default for local clusters; RAY_AUTH_MODE must be set before Ray is imported
    to change that) on the ports it opens, and the dashboard, on a free port of the loopback address: placement groups
    of stopped trials are only cleaned up while its state API answers.
    When the head of a cluster that was joined is lost, the command line leaves with a line that says so; elsewhere Ray
    ends the process a little later, see `_head_watched`.
    Raises ValueError for a RAY_ADDRESS beyond loopback that asks for no token, ConnectionError when nobody answers.
    """
    global _raylet
    if ray.is_initialized():
        note_machine(machine())
        _check_nodes(root, dataset)
        yield
        return
    # Torch's threads otherwise spin while they wait for each other, on cores that loading tasks need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray otherwise ends a process that idles for a second; the loading tasks of a training then import all over again.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(60_000))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports to nobody, and saves a process that collects them
    # Seconds between the looks of Ray Train's controller at its workers; at 2, its default, short trainings end late.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_ray_address(address)
        _check_head(address)
    else:  # a process less for each training: what takes this machine away ends us, too
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    options: dict[str, Any] = {} if address else LOCAL
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it announces that tokens are on
    with _own_sigterm(), _start_explained(address), _whole_start():
        ray.init(address=address or "local", logging_level=logging.WARNING, log_to_driver=False, **options)
    _raylet = None if address else _own_raylet()
    # Around the shutdown, too: it waits for a head that is gone.
    with _head_watched(ray.get_runtime_context().gcs_address) if address else contextlib.nullcontext():
        try:
            note_machine(machine())
            _check_nodes(root, dataset)
            yield
        finally:
            _raylet = None
            ray.shutdown()


def _check_head(address: str) -> None:
    """Raises ConnectionError when no head answers at HOST:PORT within JOIN_SECONDS.

    Ray asks for minutes, in log lines of its own, and without end where connections are accepted and never answered.
    """
    found = canonicalize_bootstrap_address(address)  # where Ray will look: for a loopback address, this node's own
    if not found or os.environ.get("RAY_USE_TLS", "").lower() in {"1", "true"}:
        return
    until = time.monotonic() + JOIN_SECONDS
    while not _is_answering(found, max(0.1, until - time.monotonic())):
        if time.monotonic() >= until:
            raise ConnectionError(f"no Ray cluster answers at {address}; is it running, does a tunnel lead there?")
        time.sleep(0.5)


def _is_answering(address: str, seconds: float) -> bool:
    """Whether what listens at HOST:PORT answers a gRPC client with at least a byte."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds) as head:
            head.sendall(GREETING)
            return bool(head.recv(1))
    except OSError:
        return False


def is_lost() -> bool:
    """Whether the Ray that this process started has ended under it, as when a whole process group gets SIGTERM."""
    return _raylet is not None and (not _raylet.is_running() or _raylet.status() == "zombie")


@contextlib.contextmanager
def _head_watched(address: str) -> Iterator[None]:
    """Give up when nothing listens any more at HOST:PORT, where the head of a joined cluster was.

    Ray waits for a head that is gone, and then ends this process from C++ without asking: nobody would hear of it what
    to do. A head that is back in time is not lost. Nothing of this goes on after the context.
    """
    patience = float(os.environ.get(PATIENCE_VARIABLE, PATIENCE))
    pause, over = patience / 30, threading.Event()

    def watch() -> None:
        silent: float | None = None  # since when; a look that comes late says nothing about the time before it
        while not over.wait(pause):
            now = time.monotonic()
            silent = None if _is_listening(address, pause) else silent or now
            if silent is not None and now - silent >= LOST_SHARE * patience and not over.is_set():
                return stopping.abandon(
                    f"the Ray cluster at {address} has been lost; the same command goes on from what is finished"
                )

    thread = threading.Thread(target=watch, name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_listening(address: str, seconds: float) -> bool:
    """Whether a connection to HOST:PORT, [IPv6]:PORT too, is accepted; it is closed at once."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except OSError as error:
        return error.errno in {errno.EMFILE, errno.ENFILE}  # what we lack says nothing about the other side
    return True


def _own_raylet() -> Any:
    import psutil  # comes inside Ray

    return next((child for child in psutil.Process().children() if child.name() == "raylet"), None)


def _check_nodes(root: Storage | None, dataset: Dataset | None) -> None:
    if root is not None:
        check_shared(root)
    if dataset is not None:
        check_seen(dataset)


def check_seen(dataset: Dataset) -> None:
    """Refuse photos that not all nodes of a cluster see: a node without them would refuse every one that it is given.

    Its first photo is looked for on each node. Raises DataError that names the nodes without it.
    """
    if len(nodes()) < 2 or not dataset.samples:
        return
    photo = (dataset.root / dataset.samples[0].image).absolute()
    if blind := nodes_without(photo):
        raise DataError(
            f"{dataset.name}: {photo} is not there on {', '.join(blind)}; copy the photos to every node, or mount them "
            "there under the same path"
        )


def check_shared(root: Storage) -> None:
    """Refuse a local path on a cluster of several nodes that do not all see it; one on NFS passes.

    A file that was written here a moment ago must be read on every node. Raises ValueError that names the nodes which
    cannot, StorageError when the file cannot be written. Nothing is done for one node or an object store.
    """
    if root.local is None or len(nodes()) < 2:
        return
    name = f"{TEMPORARY}shared-{uuid.uuid4().hex}"
    root.write_bytes(name, b"")
    try:
        blind = nodes_without(root.local / name)
    finally:
        root.remove(name)
    if blind:
        raise ValueError(
            f"{root} is not the same directory on all {len(nodes())} nodes of the cluster: a file written there was "
            f"not seen on {', '.join(blind)}; use --root s3://bucket/prefix, or a path that is mounted from one file "
            "server on every node"
        )


def nodes() -> list[Mapping[str, Any]]:
    """What Ray says of each node that is alive; nothing without a cluster."""
    return [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []


def nodes_without(path: Path) -> list[str]:
    """Host names, sorted, of the nodes on which there is no such path, or that do not answer."""
    asked = {_exists.options(scheduling_strategy=_on(node["NodeID"])).remote(str(path)): node for node in nodes()}
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
    lacking = [*silent, *(each for each in ready if not _is_true(each))]
    return sorted(asked[each]["NodeManagerHostname"] for each in lacking)


@ray.remote(num_cpus=0, max_retries=0)
def _exists(path: str) -> bool:
    return os.path.exists(path)


def _is_true(answer: Any) -> bool:
    with contextlib.suppress(ray.exceptions.RayError):  # a node that has just died
        return bool(ray.get(answer))
    return False


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    """There and nowhere else."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


@contextlib.contextmanager
def _start_explained(address: str | None) -> Iterator[None]:
    """Ray's bare exceptions, such as that of a node that was not up within a minute, as one line for people."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        what = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
        raise ConnectionError(f"{what}: {str(error).strip().partition(chr(10))[0]}") from error


@contextlib.contextmanager
def _whole_start() -> Iterator[None]:
    """Ray ends the processes of a start that it has finished. Those of one that Ctrl-C cuts off would live on for a
    minute, until they notice that nobody is there."""
    import psutil  # comes inside Ray

    def processes() -> set[Any]:
        return set(psutil.Process().children(recursive=True))

    before = processes()
    try:
        yield
    except BaseException:
        for process in processes() - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's handler of SIGTERM, which leaves at once, does not stay."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[str]:
    """A directory for what Ray Train and Tune write about a run. Nothing in it is read again: checkpoints are ours."""
    path = tempfile.mkdtemp(prefix=prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def beside(kind: type[Any], *arguments: Any) -> Any:
    """An actor of `kind` on this process's node, whose calls come in order; it needs no CPU of its own."""
    here = _on(ray.get_runtime_context().get_node_id())
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=here).remote(*arguments)


def in_background(function: Callable[[], Any]) -> "Future[Any]":
    """Run Ray's fit() in a daemon thread: it blocks and, in the main thread, would take over Ctrl-C."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="ray-fit", daemon=True).start()
    return future


def remove_orphans() -> int:
    """Give back what actors of this job reserved and then died; how many placement groups that were.

    Ray Train's own cleaner learns of a reservation only when all its workers run. A trial that is given up while one of
    them still starts would keep its CPUs from all others for as long as the job lives.
    """
    job, state, count = ray.get_runtime_context().get_job_id(), ray._private.state.state, 0
    table: Any = vars(gcs_pb2)["PlacementGroupTableData"]  # the public table leaves out who has reserved
    for entry in map(table.FromString, state._connect_and_get_accessor().get_placement_group_table()):
        actor = ray.ActorID(entry.creator_actor_id)
        is_there = entry.creator_job_id.hex() == job and not actor.is_nil() and entry.state != table.REMOVED
        # Its own flag does not say so for what an actor reserved in its last moments.
        if is_there and state.actor_table(actor.hex()).get("State", "DEAD") == "DEAD":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(entry.placement_group_id)))
            count += 1
    return count


def cpus() -> int:
    """CPUs of the whole cluster; of this machine while there is none, as Ray would count them."""
    if not ray.is_initialized():
        return max(1, int(ray._private.utils.get_num_cpus()))
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cpus_of_trial(trials: int | None) -> int:
    """CPUs that one of `trials` rows of a sweep, at once, may call its own; None: there is one."""
    return max(1, cpus() // (trials or 1))


def gpus() -> int:
    """GPUs of the whole cluster; of this machine while there is none."""
    if not ray.is_initialized():
        return torch.cuda.device_count()
    return int(ray.cluster_resources().get("GPU", 0))


def machine() -> str:
    """The cluster in words: "2 CPUs", "16 CPUs, 1 GPU (H100)", "64 CPUs of 4 nodes"."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    kinds = sorted(name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:"))
    parts = [f"{cpus()} CPUs"]
    if gpus():
        parts.append(f"{gpus()} GPU{'s' if gpus() > 1 else ''}" + (f" ({', '.join(kinds)})" if kinds else ""))
    return ", ".join(parts) + (f" of {nodes} nodes" if nodes > 1 else "")


def usable_gpus(resources: Resources) -> int:
    """GPUs of the cluster that a stage may use: none with use_gpu=false. ValueError where it is true without any."""
    found = gpus() if resources.use_gpu is not False else 0
    if resources.use_gpu and not found:
        raise ValueError("resources.use_gpu=true, but the cluster has no GPU")
    return found


def gpu_share(processes: int, gpus: int) -> float:
    """What each of `processes` reserves so that all fit: a whole GPU, or one part of as many as one GPU has to take."""
    return math.floor(1e4 / math.ceil(max(1, processes / gpus))) / 1e4  # Ray counts in ten thousandths


def quiet_data() -> None:
    """Ray Data without progress bars and chatter: our own progress lines say what matters."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off


@functools.cache
def quiet_actors() -> None:
    """Have Ray say where nobody sees it what it says once a process, whenever Ray Data starts an actor.

    It is an error's line on the terminal, from C++ and past every level, about arguments in the object store of actors
    that may be restarted (https://github.com/ray-project/ray/issues/57733). Ray Data keeps its own as long as the
    actors live, so it asks nobody to do anything. An actor that no machine has room for, taken back at once, brings it
    out; what else is said in that moment is passed on.
    """
    nobody: Any = ray.remote(_Nobody).options(num_cpus=0, max_restarts=1, resources={"no machine has this": 1})
    with _held_back(b"has constructor arguments in the object store and max_restarts > 0"):
        ray.kill(nobody.remote(ray.put(None)))


class _Nobody:
    def __init__(self, argument: Any) -> None:
        raise AssertionError("no machine has room for it")


@contextlib.contextmanager
def _held_back(words: bytes) -> Iterator[None]:
    """Lines with `words` do not reach standard error, all others a little later; C++ writes to this descriptor too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            others = b"".join(line for line in said if words not in line)
            if others:
                os.write(2, others)
