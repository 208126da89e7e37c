"""Training on Ray: any number of workers, any interruption, one result."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from armed import NAN_STEP, Arming, Killing, spoil_a_loss
from commands import MARK
from ray.train import WorkerGroupError
from ray.util.state import list_workers
from training_material import make_material, tiny_run

from mis_platform.artifacts import sha256
from mis_platform.config import Resources, Run
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.examples import open_stream
from mis_platform.data.images import ImageRefused
from mis_platform.model.weights import load_model, read_config
from mis_platform.stages.train import Job, _explained, plan, train
from mis_platform.stages.training_loop import Schedule, TrainingDiverged, complete_steps, load_history
from mis_platform.storage import Storage, StorageError

Material = tuple[Dataset, Storage]
Metrics = dict[str, float]

STEPS, BATCH = 12, 4


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"), count=5)


def short_run(**settings: object) -> Run:
    return tiny_run(**{"batch_size": BATCH, "epochs": 100, "max_steps": STEPS, **settings})


def resources(**settings: object) -> Resources:
    return Resources.model_validate({"log_every": 1, "checkpoint_every": 4, **settings})


def losses(rows: list[Metrics]) -> list[Metrics]:
    """History rows without what depends on the machine's mood."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


class Recorder:
    """on_metrics that remembers, and does something at one step."""

    def __init__(self, at: int = 0, action: Callable[[], object] | None = None) -> None:
        self.rows: list[Metrics] = []
        self.at, self.action = at, action

    def __call__(self, step: int, metrics: Metrics) -> None:
        self.rows.append({"step": step, **metrics})
        if step == self.at and self.action:
            action, self.action = self.action, None
            action()


@pytest.fixture(scope="module")
def straight(
    ray_cluster: None, material: Material, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Storage, Recorder]:
    """One worker, nothing happens."""
    out, recorder = Storage(str(tmp_path_factory.mktemp("straight"))), Recorder()
    train(*(material[0], short_run(), material[1], resources(), out), recorder)
    return out, recorder


@pytest.mark.ray
def test_a_training_leaves_a_model_its_history_and_two_checkpoints(
    material: Material, straight: tuple[Storage, Recorder]
) -> None:
    out, recorder = straight
    assert [row["step"] for row in recorder.rows] == list(range(1, STEPS + 1))
    history = [json.loads(line) for line in out.read_bytes("history.jsonl").splitlines()]
    assert history == recorder.rows
    names = {"loss", "loss_mask", "loss_smooth", "iou", "gradient_norm", "learning_rate", "images_per_second"}
    assert set(history[0]) == {"step", *names}
    assert complete_steps(out) == [8, 12]
    assert out.local is not None
    model = load_model(out.local)
    assert (model.variant, model.image_size) == ("vit_xt", (224, 224))
    assert read_config(out.local)["run"]["train"]["batch_size"] == BATCH
    # A second call finds everything done: it needs no cluster and repeats every step to its caller.
    again = Recorder()
    started = time.monotonic()
    output = train(material[0], short_run(), material[1], resources(), out, again)
    assert time.monotonic() - started < 5
    assert again.rows == history
    assert output.digest == sha256(out.read_bytes("model.safetensors"))
    assert {part.name for part in output.parts} == {"model.safetensors", "config.json", "history.jsonl"}
    assert output.summary["steps"] == STEPS


@pytest.mark.ray
def test_two_workers_and_then_one_follow_the_curve_of_one(
    material: Material, straight: tuple[Storage, Recorder], tmp_path: Path
) -> None:
    """Ctrl-C stops the two at step 6 or soon after.

    Two workers add up in another order. The curves are 1e-7 apart at first; a pixel on the edge of an error may then
    move a click (seen at the sixth step: 2e-5, 3e-4 at the last).
    """

    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    out, recorder = Storage(str(tmp_path)), Recorder(6, press_ctrl_c)
    two = resources(num_workers=2, checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(material[0], short_run(), material[1], two, out, recorder)
    (stopped,) = complete_steps(out)
    assert 6 <= stopped <= STEPS
    train(material[0], short_run(), material[1], resources(), out, recorder)
    expected = [row["loss"] for row in straight[1].rows]
    found = [row["loss"] for row in load_history(out, STEPS)]
    assert found[:4] == pytest.approx(expected[:4], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-3)
    assert sorted({row["step"] for row in recorder.rows}) == list(range(1, STEPS + 1))


KILLED = """
import os, signal, sys
from pathlib import Path
from commands import MARK, marked
from training_material import make_material
from test_train import Recorder, resources, short_run
from mis_platform.stages.cluster import cluster
from mis_platform.stages.train import train
from mis_platform.storage import Storage

folder = Path(sys.argv[1])
dataset, trees = make_material(folder / "material", count=5)
def kill():
    others = [pid for pid, _ in marked(os.environ[MARK]) if pid != os.getpid()]
    for pid in [*others, os.getpid()]:
        os.kill(pid, signal.SIGKILL)

with cluster():
    train(dataset, short_run(), trees, resources(), Storage(str(folder / "out")), Recorder(5, kill))
"""


@pytest.mark.ray
def test_a_killed_training_continues_to_the_bit(
    material: Material, straight: tuple[Storage, Recorder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver and all that it started get SIGKILL after step 5. In the continued training the worker gets it when it
    has written the checkpoint of step 8 but not published it, and again at step 10.
    """
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
            MARK: str(tmp_path),
        },
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    recorder = Recorder(10, kill_train_worker)
    out = Killing(str(tmp_path / "out"), moment="write 00000008/complete.json", flag=str(tmp_path / "torn"))
    assert complete_steps(out)[-1] == 4
    train(material[0], short_run(), material[1], resources(), out, recorder)
    assert recorder.action is None
    assert (tmp_path / "torn").exists()
    said = capsys.readouterr().err
    assert "train: restart 1: the workers go on from step 4, " in said  # the torn checkpoint of step 8 does not count
    assert "train: restart 2: the workers go on from step 8, " in said
    assert losses(recorder.rows) == losses(straight[1].rows)
    assert losses(load_history(out, STEPS)) == losses(straight[1].rows)
    assert out.read_bytes("model.safetensors") == straight[0].read_bytes("model.safetensors")


def kill_train_worker() -> None:
    here = ray.get_runtime_context().gcs_address  # other clusters may run on this machine
    for worker in list_workers(here, filters=[("is_alive", "=", True)], raise_on_missing_output=False):
        name = Path(f"/proc/{worker.pid}/cmdline").read_bytes().decode(errors="replace")
        if name.startswith("ray::RayTrainWorker"):
            os.kill(worker.pid, signal.SIGKILL)
            return
    raise AssertionError("no training worker is running")


@pytest.mark.ray
def test_a_loss_that_is_not_finite_on_any_worker_ends_the_training(
    ray_cluster: None, material: Material, tmp_path: Path
) -> None:
    recorder, out = Recorder(), Arming(str(tmp_path), action=spoil_a_loss)
    spoilt = open_stream(*material, short_run()).columns({"number": np.array([(NAN_STEP - 1) * BATCH + BATCH // 2])})
    with pytest.raises(TrainingDiverged) as error:
        train(material[0], short_run(), material[1], resources(num_workers=2, max_failures=3), out, recorder)
    told = str(error.value)
    assert told.startswith(f"the loss is not finite at step {NAN_STEP} (")
    assert "train.smooth_weight=10" in told
    assert told.endswith(f"images: {spoilt['image_id'][0]}")
    assert [row["step"] for row in recorder.rows] == list(range(1, NAN_STEP))
    assert complete_steps(out)[-1] == NAN_STEP - 1


@pytest.mark.ray
def test_a_photo_that_has_gone_bad_is_named(ray_cluster: None, tmp_path: Path) -> None:
    dataset, trees = make_material(tmp_path / "material", count=2)
    dataset.image_path(dataset.image_ids[0]).write_bytes(b"no photo any more")
    out = Storage(str(tmp_path / "out"))
    with pytest.raises(ImageRefused, match=dataset.image_ids[0]):
        train(dataset, short_run(), trees, resources(), out, Recorder())
    assert complete_steps(out) == []


@pytest.mark.parametrize(
    ("cause", "kind"),
    [(OSError(28, "No space left on device"), StorageError), (RuntimeError("out of memory\nsome trace"), RuntimeError)],
)
def test_failed_workers_are_explained_in_a_line(
    cause: Exception, kind: type[Exception], material: Material, tmp_path: Path
) -> None:
    stream = open_stream(*material, short_run())
    job = Job(stream, Schedule(5, stream.run.train), resources(max_failures=1), Storage(str(tmp_path)), 1, 1)
    explained = _explained(WorkerGroupError("many\nlines", {1: RuntimeError("connection reset"), 0: cause}), job)
    assert type(explained) is kind
    assert str(explained).startswith("training failed 2 time(s), the last time with: ")
    assert str(explained).endswith("; the same command resumes at step 0")
    assert "\n" not in str(explained)


@pytest.mark.ray
def test_a_cluster_that_is_too_small_is_refused_with_the_arithmetic(ray_cluster: None) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    with pytest.raises(
        ValueError, match=rf"needs at least {cpus * 10} x 0.1 = {cpus} CPUs, .* of the cluster's {cpus}"
    ):
        plan(Resources(num_workers=cpus * 10))
    if "GPU" not in ray.cluster_resources():
        with pytest.raises(ValueError, match="needs 1 GPUs, the cluster has 0"):
            plan(Resources(use_gpu=True))
    for workers in range(1, 4 * cpus):
        scaling, loaders, threads = plan(Resources(num_workers=workers))
        assert scaling.total_resources["CPU"] <= 0.9 * cpus
        assert min(loaders, threads) >= 1


def test_a_batch_that_the_workers_cannot_share_is_refused_before_ray(material: Material, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_workers=3; numbers of workers that can: 1, 2, 4"):
        train(material[0], short_run(), material[1], resources(num_workers=3), Storage(str(tmp_path)), Recorder())
