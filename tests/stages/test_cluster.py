"""Starting, joining and tidying Ray; local files on a cluster of several nodes only where every node sees them."""

import contextlib
import math
import os
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray
from commands import mis
from ray._private import services
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.state import list_placement_groups

from mis_platform.config import EvalConfig, FeaturesConfig, Resources, Run
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.masks import read_binary
from mis_platform.errors import DataError
from mis_platform.stages import cluster, evaluate, precompute, train
from mis_platform.stages.cluster import LOST_SHARE
from mis_platform.storage import Storage

# The second node is a process tree of its own. An empty disk over what is `hidden` is there for that node alone.
STORY = """
    import os, subprocess, sys, time
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster
    from mis_platform.data.benchmarks import open_dataset
    from mis_platform.stages.cluster import cluster
    from mis_platform.storage import Storage

    root, photos, hidden = sys.argv[1:]
    os.makedirs(root, exist_ok=True)
    dataset = open_dataset(f"folder:{photos}", None, "train")
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = head.address
    join = f"exec {sys.executable} -m ray.scripts.scripts start --address={head.address} --num-cpus=1 --block"
    hide = f"mount -t tmpfs none {hidden} && " if hidden else ""
    node = subprocess.Popen(["unshare", "-m", "sh", "-c", hide + join], stdout=subprocess.DEVNULL)
    try:
        ray.init(address=head.address, logging_level="ERROR", log_to_driver=False)
        for _ in range(300):
            if len([each for each in ray.nodes() if each["Alive"]]) == 2:
                break
            time.sleep(0.1)
        else:
            raise TimeoutError("the second node did not join")
        try:
            with cluster(Storage(root), dataset):
                print("passed", os.listdir(root))
        except ValueError as error:
            print("refused", error)
        with cluster(Storage("s3://bucket/x?region=us-east-1")):
            print("object stores need no look")
    finally:
        ray.shutdown()
        node.terminate()
        node.wait(timeout=20)
        head.shutdown()
    """


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("hidden", ["", "root", "photos"])
def test_what_a_node_cannot_see_is_refused(tmp_path: Path, photo_folder: Path, hidden: str) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a second view of the disk needs root and mount namespaces")
    places = {"root": tmp_path / "root", "photos": photo_folder, "": ""}
    command = [sys.executable, "-c", textwrap.dedent(STORY), *map(str, (places["root"], photo_folder, places[hidden]))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    first, last = done.stdout.strip().splitlines()[-2:]
    assert last == "object stores need no look", done.stderr
    told = {
        "": "passed []",
        "root": f"refused {places['root']} is not the same directory on all 2 nodes of the cluster: ",
        "photos": f"refused folder: {photo_folder / 'a.png'} is not there on ",
    }
    assert first.startswith(told[hidden]), done.stderr
    assert ("use --root s3://bucket/prefix" in first) == (hidden == "root")
    assert list((tmp_path / "root").iterdir()) == []


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.full((40, 40, 3), 128, np.uint8))
    return folder


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (None, "Ray cannot be started here: not up"),
        ("10.0.0.1:6379", "the Ray cluster at 10.0.0.1:6379 cannot be joined: not up"),
    ],
)
def test_a_ray_that_does_not_start_is_told_in_one_line(address: str | None, told: str) -> None:
    with pytest.raises(ConnectionError) as caught, cluster._start_explained(address):
        raise RuntimeError("not up\nand much more")
    assert str(caught.value) == told


@pytest.mark.timeout(60)
@pytest.mark.parametrize("accepts", [True, False], ids=["silent", "refused"])
def test_a_head_that_does_not_answer_is_told_in_a_line(
    accepts: bool,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Ray itself would ask for minutes, and where it is accepted and never answered without end."""
    assert cluster.JOIN_SECONDS <= 30
    here = services.canonicalize_bootstrap_address("127.0.0.1:1").rpartition(":")[0]  # where Ray looks for that one
    with listen(here) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        if not accepts:
            head.close()
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(cluster, "JOIN_SECONDS", 1.0)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", None)
        words = ["precompute", "--dataset", f"folder:{photo_folder}", "--root", str(tmp_path / "root")]
        began = time.monotonic()
        assert mis(*words, "--set", "features.extractor=color_texture") == 6
        assert 1 <= time.monotonic() - began < 20
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error")]
    assert told == [f"Error: no Ray cluster answers at {address}; is it running, does a tunnel lead there?"]


@pytest.mark.ray
def test_a_head_answers(ray_cluster: None) -> None:
    assert cluster._is_answering(ray.get_runtime_context().gcs_address, 20)


def listen(host: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        pytest.skip(f"nothing listens at {host} here: {error}")


def wait_for_a_look(head: socket.socket) -> None:
    head.settimeout(10)
    head.accept()[0].close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of heads that are given up, after three quarters of a second."""
    messages: list[str] = []
    monkeypatch.setenv(cluster.PATIENCE_VARIABLE, "1")
    monkeypatch.setattr(cluster.stopping, "abandon", messages.append)
    return messages


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_head_that_is_gone_is_given_up_before_ray_ends_us(host: str, told: list[str]) -> None:
    head = listen(host)
    address = f"{host}:{head.getsockname()[1]}"
    with cluster._head_watched(address):
        wait_for_a_look(head)
        assert not told
        closed = time.monotonic()
        head.close()
        while not told and time.monotonic() < closed + 10:
            time.sleep(0.01)
        assert time.monotonic() - closed >= LOST_SHARE
    assert told == [f"the Ray cluster at {address} has been lost; the same command goes on from what is finished"]


def test_a_head_that_comes_back_is_not_lost(told: list[str]) -> None:
    head = listen("127.0.0.1")
    port = head.getsockname()[1]
    with cluster._head_watched(f"127.0.0.1:{port}"):
        for _ in range(3):  # together silent for longer than a lost one
            closed = time.monotonic()
            head.close()
            time.sleep(0.4 * LOST_SHARE)
            head = listen("127.0.0.1", port)
            wait_for_a_look(head)
            assert not told or time.monotonic() - closed >= LOST_SHARE, "given up too early"
    head.close()


def test_nobody_looks_for_a_head_after_the_work(told: list[str]) -> None:
    head = listen("127.0.0.1")
    with cluster._head_watched(f"127.0.0.1:{head.getsockname()[1]}"):
        assert "head-watch" in {thread.name for thread in threading.enumerate()}
        head.close()
        time.sleep(0.2)
    assert "head-watch" not in {thread.name for thread in threading.enumerate()}
    time.sleep(LOST_SHARE)
    assert not told


def test_a_shortage_of_our_own_is_no_lost_head() -> None:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
    try:
        assert cluster._is_listening("127.0.0.1:1", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    assert not cluster._is_listening("127.0.0.1:1", 1)


@pytest.mark.ray
def test_the_port_of_a_head_that_was_started_on_purpose_is_left_to_it(ray_cluster: None) -> None:
    """`mis submit` would otherwise send a job to a Ray that ends with another command."""
    node = ray._private.worker._global_node
    host, _, port = node.webui_url.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) not in range(8265, 8265 + 51), "Ray's default, and where it goes on when that is taken"
    group = placement_group([{"CPU": 0.01}])
    ray.get(group.ready())
    listed = list_placement_groups(address=node.gcs_address, limit=1000)
    assert group.id.hex() in {each.placement_group_id for each in listed}, "the state API answers there"
    remove_placement_group(group)


@pytest.mark.ray
def test_what_a_dead_actor_reserved_is_given_back_and_nothing_else(ray_cluster: None) -> None:
    class Reserves:  # here, so that it travels to its worker as it is
        """As the controller of Ray Train: what it reserves outlives it as long as its job runs."""

        def __init__(self, cpus: float) -> None:
            self.group = placement_group([{"CPU": cpus}])

        def ready(self) -> str:
            ray.get(self.group.ready())
            return self.group.id.hex()

    actor = ray.remote(num_cpus=0)(Reserves)
    dead, living, own = actor.remote(0.01), actor.remote(0.01), placement_group([{"CPU": 0.01}])
    ray.get(own.ready())
    names = [ray.get(each.ready.remote()) for each in (dead, living)] + [own.id.hex()]
    try:
        assert cluster.remove_orphans() == 0
        ray.kill(dead)
        until = time.monotonic() + 20
        while (removed := cluster.remove_orphans()) == 0 and time.monotonic() < until:
            time.sleep(0.1)
        assert removed == 1
        assert cluster.remove_orphans() == 0
        states = {name: entry["state"] for name, entry in placement_group_table().items()}
        assert [states[name] for name in names] == ["REMOVED", "CREATED", "CREATED"]
    finally:
        ray.kill(living)
        remove_placement_group(own)
        time.sleep(0.5)
        cluster.remove_orphans()


# -- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "gpus", lambda: 2)
    monkeypatch.setattr(cluster, "cpus", lambda: 16)


@pytest.mark.parametrize(("use_gpu", "gpus"), [(None, 2), (True, 2), (False, 0)])
def test_every_stage_uses_the_gpus_that_it_may(
    use_gpu: bool | None, gpus: int, two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = Resources(use_gpu=use_gpu)
    assert cluster.usable_gpus(resources) == precompute._gpus(FeaturesConfig(), resources) == gpus
    assert precompute._workers(resources, gpus) == (8 if gpus else 16)
    assert precompute._gpus(FeaturesConfig(extractor="color_texture"), resources) == 0
    scaling, _, _ = train.plan(resources)
    assert scaling.use_gpu is bool(gpus)
    assert train.images_at_once(resources, batch_size=64) == (16 if gpus else 8)
    two = resources.model_copy(update={"num_workers": 2})
    assert train.images_at_once(two, batch_size=10) == 5  # what a worker has
    few = two.model_copy(update={"batch_per_device": 3})
    assert train.images_at_once(few, batch_size=10) == 3
    assert train.trials_at_once(resources) == (2 if gpus else 1)

    jobs = []
    monkeypatch.setattr(cluster, "cluster", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(evaluate, "_score", lambda job, size, resources, gpus, out: jobs.append((job, gpus)) or [])
    empty, out = Dataset("folder", "val", tmp_path, (), read_binary, is_labelled=True), Storage(str(tmp_path))
    with pytest.raises(DataError, match="no object to score"):
        evaluate.evaluate_model(empty, out, EvalConfig(), 448, resources, out)
    ((job, given),) = jobs
    assert (job.device, job.batch, given) == (("cuda", 8, 2) if gpus else ("cpu", 1, 0))


@pytest.mark.parametrize(("processes", "gpus"), [(1, 1), (1, 2), (3, 2), (7, 1), (8, 2), (9, 4), (96, 7)])
def test_processes_that_share_gpus_all_fit(processes: int, gpus: int) -> None:
    share = cluster.gpu_share(processes, gpus)
    assert gpus * math.floor(1 / share + 1e-9) >= processes  # none is spread over two
    assert 0 < share <= 1
    assert (share == 1) is (processes <= gpus)


def test_trainings_of_one_worker_share_a_gpu_where_more_are_asked_for(two_gpus: None) -> None:
    crowded = Resources(trials=7)
    assert train.trials_at_once(crowded) == 7
    scaling, _, _ = train.plan(crowded)
    assert scaling.resources_per_worker == {"CPU": 1.0, "GPU": 0.25}
    assert evaluate._workers(crowded, 2) == 1  # as much as its training held: 1 / ceil(7 / 2)
    scaling, _, _ = train.plan(Resources(trials=2))
    assert scaling.resources_per_worker["GPU"] == 1
    with pytest.raises(ValueError, match=r"trials=3 x resources.num_workers=2 = 6 GPUs, .* has 2; at most 1 trials"):
        train.trials_at_once(Resources(trials=3, num_workers=2))


@pytest.mark.parametrize(("cpus", "trials"), [(2, 1), (2, 2), (16, 3), (16, 8), (96, 7)])
def test_trials_that_evaluate_at_once_all_fit(monkeypatch: pytest.MonkeyPatch, cpus: int, trials: int) -> None:
    """Else one waits for the other's CPUs, and counts as hung."""
    monkeypatch.setattr(cluster, "cpus", lambda: cpus)
    asked: list[float] = []

    class Kind:
        def options(self, num_cpus: float, **options: object) -> "Kind":
            self.each = num_cpus
            return self

        def remote(self) -> None:
            asked.append(self.each)

    monkeypatch.setattr(ray, "remote", lambda worker: Kind())
    for _ in range(trials):
        evaluate._start_workers(1000, Resources(trials=trials), 0)
    assert sum(asked) <= cluster.CPU_SHARE * cpus + 1e-9
    assert len(asked) == trials * (cpus // trials)  # and none stays idle


@pytest.mark.parametrize(("trials", "workers"), [(1, 1), (1, 2), (2, 1), (8, 1), (4, 2)])
def test_pipelines_of_all_trials_fit_into_the_object_store(
    monkeypatch: pytest.MonkeyPatch, trials: int, workers: int
) -> None:
    store, run = 2**30, Run()
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": float(store)})
    steps = train.steps_of_pipeline(run, Resources(trials=trials), workers)
    each = run.train.batch_size // workers * 4 * run.model.image_size**2  # bytes that a worker gets for a step
    assert 2 * workers * trials * steps * each <= train.STORE_SHARE * store or steps == 1
    assert 2 * workers * trials * (steps + 1) * each > train.STORE_SHARE * store or (steps + 1) * each > 2**29


def test_a_gpu_that_is_wanted_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "gpus", lambda: 0)
    with pytest.raises(ValueError, match="use_gpu=true, but the cluster has no GPU"):
        precompute._gpus(FeaturesConfig(extractor="color_texture"), Resources(use_gpu=True))
    assert cluster.usable_gpus(Resources()) == 0


# -- what Ray says ---------------------------------------------------------------------------------------------------

TALK = """
    import os, sys
    import ray
    from mis_platform.stages import cluster

    class Worker:
        def __init__(self, argument):
            pass

    with cluster.cluster():
        if sys.argv[1] == "quiet":
            cluster.quiet_actors()
            assert cluster.quiet_actors() is None, "the second call does nothing"
        worker = ray.remote(Worker).options(num_cpus=0, max_restarts=-1).remote(ray.put(0))  # as Ray Data starts them
        ray.kill(worker)
        os.write(2, b"the end")
"""


@pytest.mark.ray
def test_the_line_about_actors_that_may_be_restarted_is_not_seen(ray_cluster: None) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TALK), how],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in ("quiet", "loud")
    ]
    quiet, loud = (child.communicate(timeout=100)[1] for child in children)
    assert [child.returncode for child in children] == [0, 0], quiet + loud
    assert "core_worker.cc" in loud, "Ray has stopped to say it: `quiet_actors` can go"
    assert quiet == "the end"


def test_only_the_line_that_is_held_back_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with cluster._held_back(b"useless"):
        os.write(2, b"one\na useless line\ntwo\nthree, without an end")
    os.write(2, b"\nfour\n")
    assert capfd.readouterr().err == "one\ntwo\nthree, without an end\nfour\n"
