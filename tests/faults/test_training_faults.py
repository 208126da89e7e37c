"""Training, and the commands around it, under real signals: what is lost, what is said, what stays behind.

Whole `mis` processes, several Ray nodes on this machine, SIGTERM, SIGINT, SIGKILL and SIGSTOP. Nearly all of it takes
minutes and runs nightly.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from armed import MOST_IMAGES, Arming, Killing, shrink_memory
from commands import REPOSITORY, TINY, Command, newest_step, running
from processes import kill_group, start, wait_until
from training_material import make_material, tiny_run

from mis_platform.config import Resources
from mis_platform.data import synthetic
from mis_platform.stages.train import train
from mis_platform.stages.training_loop import complete_steps, load_history
from mis_platform.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

GRACE = 30  # seconds between SIGTERM and SIGKILL on most clusters
COMMITTED = 20  # seconds to the checkpoint


def photos(folder: Path, count: int = 5) -> str:
    if not (folder / "photos").is_dir():
        synthetic.write_photos(folder / "photos", count)
    return f"folder:{folder / 'photos'}"


def mis_train(
    folder: Path, *settings: str, root: str = "root", environment: Mapping[str, str] | None = None
) -> AbstractContextManager[Command]:
    """A training of 100 000 steps unless `settings` say otherwise."""
    assignments = itertools.chain.from_iterable(("--set", text) for text in ("train.epochs=100000", *settings))
    return running(
        folder,
        "train",
        "--dataset",
        photos(folder),
        "--root",
        str(folder / root),
        *TINY,
        *assignments,
        **(environment or {}),
    )


def mlflow_states(root: Path) -> list[str]:
    with sqlite3.connect(root / "mlflow.db") as connection:
        return sorted({status for (status,) in connection.execute("select status from runs")})


def committed(root: Path) -> float:
    """When the newest checkpoint became whole, seconds since the epoch."""
    return max(file.stat().st_mtime for file in (root / "checkpoint").glob("*/steps/*/complete.json"))


def stepped(command: Command, step: int) -> Callable[[], bool]:
    """Whether the command has said that it has reached a step."""

    def is_so() -> bool:
        words = command.said().replace("/", " ").replace(",", " ").split()
        return any(
            word == "step" and number.isdigit() and int(number) >= step for word, number in itertools.pairwise(words)
        )

    return is_so


# -- SIGTERM and Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    """No checkpoint is due for long: what there is, was written because of the notice."""
    with mis_train(tmp_path) as command:
        command.wait_until(stepped(command, 1), 200)
        time.sleep(2)
        sent = time.time()
        command.send(signal.SIGTERM)
        code, seconds = command.end(GRACE)
        assert code == 75
        assert "preempted; run the same command again" in command.said()
        assert newest_step(tmp_path / "root" / "checkpoint") >= max(1, last_logged(command) - 1), "a step lost at most"
        after = committed(tmp_path / "root") - sent
        print(f"checkpoint {after:.1f} s after SIGTERM, end {seconds:.1f} s")
        assert 0 < after < COMMITTED
        assert mlflow_states(tmp_path / "root") == ["KILLED"]
        command.wait_alone(10)


@pytest.mark.slow
def test_after_sigterm_the_curve_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    short = ("train.max_steps=14", "resources.checkpoint_every=1000")
    with mis_train(tmp_path, *short, root="straight") as command:
        assert command.end(200)[0] == 0
    with mis_train(tmp_path, *short) as command:
        command.wait_until(stepped(command, 1), 200)
        command.send(signal.SIGTERM)
        assert command.end(GRACE)[0] == 75
    stopped = newest_step(tmp_path / "root" / "checkpoint")
    assert 1 <= stopped < 14
    with mis_train(tmp_path, *short) as command:
        assert command.end(200)[0] == 0
    assert_same_trainings(tmp_path / "straight", tmp_path / "root")


def assert_same_trainings(first: Path, second: Path) -> None:
    """To the bit: every logged number but the speed, and the model."""
    histories, models = [], []
    for root in (first, second):
        (artifact,) = (root / "checkpoint").iterdir()
        rows = load_history(Storage(str(artifact)), newest_step(root / "checkpoint"))
        histories.append([{name: row[name] for name in row if name != "images_per_second"} for row in rows])
        models.append((artifact / "model.safetensors").read_bytes())
    assert histories[0] == histories[1]
    assert models[0] == models[1]


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["to the command", "to its whole group"])
def test_ctrl_c_once_is_graceful(tmp_path: Path, to_all: bool) -> None:
    with mis_train(tmp_path) as command:
        command.wait_until(stepped(command, 1), 200)
        sent = time.time()
        command.send(signal.SIGINT, to_all=to_all)
        code, seconds = command.end(60)
        assert (code, seconds < 15) == (130, True), seconds
        assert "run the same command again" in command.said()
        after = committed(tmp_path / "root") - sent
        print(f"checkpoint {after:.1f} s after Ctrl-C, end {seconds:.1f} s")
        assert after > 0
        assert mlflow_states(tmp_path / "root") == ["KILLED"]
        command.wait_alone(10)


@pytest.mark.slow
def test_ctrl_c_twice_is_immediate(tmp_path: Path) -> None:
    with mis_train(tmp_path) as command:
        command.wait_until(stepped(command, 1), 200)
        command.send(signal.SIGINT, to_all=True)
        time.sleep(0.3)
        command.send(signal.SIGINT, to_all=True)
        code, seconds = command.end(60)
        assert (code, seconds < 2) == (130, True), seconds
        print(f"end {seconds:.1f} s after the second Ctrl-C, alone {command.wait_alone(10):.1f} s later")


@pytest.mark.slow
def test_sigterm_to_the_whole_group_still_says_preempted(tmp_path: Path) -> None:
    """As some schedulers do: Ray's processes end at once, so the last checkpoint is the newest regular one."""
    with mis_train(tmp_path, "resources.checkpoint_every=3") as command:
        command.wait_for_step(tmp_path / "root" / "checkpoint", 3)
        command.send(signal.SIGTERM, to_all=True)
        assert command.end(GRACE)[0] == 75
        command.wait_alone(10)
    assert newest_step(tmp_path / "root" / "checkpoint") >= 3


@pytest.mark.slow
def test_sigterm_while_photos_are_described(tmp_path: Path) -> None:
    words = ["precompute", "--dataset", photos(tmp_path, 60), "--root", str(tmp_path / "root")]
    words += ["--set", "features.extractor=color_texture", "--set", "resources.chunk_images=1"]
    with running(tmp_path, *words) as command:
        command.wait_until(lambda: any((tmp_path / "root" / "trees").glob("*/trees-*.parquet")), 200)
        command.send(signal.SIGTERM)
        assert command.end(GRACE)[0] == 75
        assert "preempted; run the same command again" in command.said()
        command.wait_alone(10)
    assert not list((tmp_path / "root" / "trees").glob("*/manifest.json"))
    with running(tmp_path, *words) as command:
        assert command.end(200)[0] == 0


@pytest.mark.slow
def test_sigterm_while_a_model_is_scored(tmp_path: Path) -> None:
    synthetic.write_benchmark(tmp_path / "benchmark", 40)
    with mis_train(tmp_path, "train.max_steps=1") as command:
        assert command.end(200)[0] == 0
    words = ["eval", "--dataset", f"synthetic:{tmp_path / 'benchmark'}", "--root", str(tmp_path / "root")]
    words += ["--set", "eval.zoom_size=224", "--set", "eval.max_clicks=5"]
    with running(tmp_path, *words) as command:
        command.wait_until(lambda: any((tmp_path / "root").glob("clicks/*/*/clicks-*.parquet")), 200)
        command.send(signal.SIGTERM)
        assert command.end(GRACE)[0] == 75
        assert "KILLED" in mlflow_states(tmp_path / "root")
        command.wait_alone(10)
    with running(tmp_path, *words) as command:
        assert command.end(200)[0] == 0


TWO_ROWS = """
'''Does it stop?'''
from mis_platform.config import Run
from mis_platform.experiment import Experiment, Row, changed

EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 0",
    default="first",
    rows=(Row("first", Run()), Row("second", changed(Run(), **{"train.smooth_weight": 1.0}))),
)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_sweep_leaves_checkpoints_of_what_it_trains(tmp_path: Path, number: int, expected: int) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "two.py").write_text(TWO_ROWS)
    root = tmp_path / "root"
    words = ["run", "sweep", "two", "--profile", "smoke", "--root", str(root)]
    words += ["--set", "train.max_steps=100000", "--set", "train.epochs=100000", "--set", "resources.log_every=1"]
    with running(tmp_path, *words, MIS_EXPERIMENTS=str(tmp_path / "experiments")) as command:
        command.wait_until(stepped(command, 1), 250)
        sent = time.time()
        command.send(number, to_all=number == signal.SIGINT)
        code, seconds = command.end(GRACE)
        assert code == expected, command.said()
        assert seconds < (GRACE if number == signal.SIGTERM else 18)
        after = committed(root) - sent
        print(f"checkpoint {after:.1f} s after the signal, end {seconds:.1f} s")
        assert 0 < after < COMMITTED
        assert mlflow_states(root) == ["KILLED"]
        assert "run the same command again" in command.said()
        command.wait_alone(10)


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sigkill_at_random_steps_loses_an_interval_at_most(tmp_path: Path) -> None:
    """The driver and all that it started, again and again, until the training is done all the same."""
    kills, interval = int(os.environ.get("MIS_TEST_KILLS", "6")), 4
    rng = random.Random(20231002)
    settings = (f"train.max_steps={8 * kills}", f"resources.checkpoint_every={interval}")
    with mis_train(tmp_path, *settings, root="straight") as command:
        assert command.end(400)[0] == 0
    checkpoints, wasted = tmp_path / "root" / "checkpoint", []
    for _ in range(kills):
        with mis_train(tmp_path, *settings) as command:
            target = newest_step(checkpoints) + rng.randint(1, 5)
            command.wait_until(logged(command, target), 200)
            command.kill()
        # Steps that were reported and are not in the newest checkpoint.
        wasted.append(max(0, last_logged(command) - newest_step(checkpoints)))
    with mis_train(tmp_path, *settings) as command:
        assert command.end(400)[0] == 0
    print(f"steps lost by each of {kills} kills: {wasted}")
    assert max(wasted) <= interval + 1  # one more may have been computed before its report
    assert_same_trainings(tmp_path / "straight", tmp_path / "root")


def last_logged(command: Command) -> int:
    """The last step in MLflow's record of a training: steps are told as they are made."""
    folder = command.errors.parent / "root" / "mlflow.db"
    if not folder.exists():
        return 0
    with sqlite3.connect(folder) as connection:
        return int(connection.execute("select max(step) from metrics where key = 'train/loss'").fetchone()[0] or 0)


def logged(command: Command, step: int) -> Callable[[], bool]:
    return lambda: last_logged(command) >= step or newest_step(command.errors.parent / "root" / "checkpoint") >= step


@pytest.mark.slow
def test_a_kill_while_old_checkpoints_are_dropped_leaves_the_newest(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 12's checkpoint is whole, step 4's half gone: the worker goes on from 12."""
    dataset, trees = make_material(tmp_path / "material", count=5)
    out = Killing(str(tmp_path / "out"), moment="remove steps/00000004", flag=str(tmp_path / "killed"))
    run = tiny_run(batch_size=2, epochs=100, max_steps=14)
    train(dataset, run, trees, Resources(log_every=1, checkpoint_every=4), out, lambda step, metrics: None)
    assert (tmp_path / "killed").exists()
    assert "restart 1: the workers go on from step 12, " in capsys.readouterr().err
    assert complete_steps(out) == [12, 14]
    assert sorted(path.name for path in (tmp_path / "out" / "steps").iterdir()) == ["00000012", "00000014"]


@pytest.mark.slow
def test_a_gpu_that_is_too_small_gets_half_the_images(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is that of a training that has always taken so few at once."""
    dataset, trees = make_material(tmp_path / "material", count=5)
    run = tiny_run(batch_size=4, epochs=100, max_steps=3)
    asked = Resources(log_every=1, batch_per_device=2 * MOST_IMAGES)
    out, small = Arming(str(tmp_path / "out"), action=shrink_memory), Storage(str(tmp_path / "small"))
    train(dataset, run, trees, asked, out, lambda step, metrics: None)
    assert f"for {2 * MOST_IMAGES} images at once; going on with {MOST_IMAGES}" in capsys.readouterr().err
    few = asked.model_copy(update={"batch_per_device": MOST_IMAGES})
    train(dataset, run, trees, few, small, lambda step, metrics: None)
    assert out.read_bytes("model.safetensors") == small.read_bytes("model.safetensors")
    never = asked.model_copy(update={"batch_per_device": 4 * MOST_IMAGES})
    wide = tiny_run(batch_size=4 * MOST_IMAGES, epochs=100, max_steps=3)
    hopeless = Arming(str(tmp_path / "hopeless"), action=shrink_memory)
    with pytest.raises(ValueError, match=r"4 image\(s\) at once, resources.batch_per_device=8; set it below 4"):
        train(dataset, wide, trees, never, hopeless, lambda step, metrics: None)


# -- several workers and nodes ---------------------------------------------------------------------------------------


def tell(folder: Path, story: str, *arguments: str, seconds: float = 400) -> str:
    """Run one of training_stories.py; what it and the training said."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("training_stories.py")), story, str(folder), *arguments],
        env=environment,
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    print(said)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_a_killed_worker_and_node_cost_an_interval_each_and_no_bit(tmp_path: Path) -> None:
    """At other steps every time; MIS_TEST_SEED repeats those that a failure names."""
    seed = os.environ.get("MIS_TEST_SEED") or str(random.randrange(2**32))
    print(f"MIS_TEST_SEED={seed}")
    said = tell(tmp_path, "node", seed)
    restarts = re.findall(r"restart \d: the workers go on from step (\d+), (\d+) step\(s\) are done again", said)
    assert len(restarts) == 2, "one each"
    assert max(int(again) for _, again in restarts) <= 5, "what the story's checkpoints are apart"
    assert "same to the bit" in said


@pytest.mark.slow
def test_a_node_that_gives_notice_loses_a_few_steps(tmp_path: Path) -> None:
    """No checkpoint is due at all, and no failure is allowed: a notice is none."""
    said = tell(tmp_path, "notice", seconds=500)
    assert "will be taken away; a checkpoint is written every few seconds from now on" in said
    assert "train: restart 1: the workers go on from step " in said
    assert "train: restart 1: the workers go on from step 0, " not in said
    assert "same to the bit" in said


@pytest.mark.slow
@pytest.mark.parametrize("silence", [10.0, Resources().worker_silence])
def test_a_worker_that_hangs_is_named_and_replaced(tmp_path: Path, silence: float) -> None:
    said = tell(tmp_path, "hung", str(silence))
    pid = next(line.split()[1] for line in said.splitlines() if line.startswith("stopped "))
    assert f", process {pid}, last finished step " in said
    assert " has given no sign of life for " in said
    found = next(float(line.split()[2]) for line in said.splitlines() if line.startswith("killed after "))
    assert silence <= found + 1
    assert found < silence + 20
    assert found < 120
    assert "train: restart 1: the workers go on from step 5, " in said
    assert "same to the bit" in said


@pytest.mark.slow
def test_two_workers_then_one_then_two_are_one_training(tmp_path: Path) -> None:
    said = tell(tmp_path, "resized")
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("stopped at")] == ["2", "1"]
    difference = float(said.rsplit("largest relative difference of a loss ", 1)[1].split()[0])
    assert difference < 1e-4


# -- other Rays on the machine ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_head_that_somebody_started_takes_nothing_from_a_local_training(tmp_path: Path) -> None:
    """What tidies up after dead controllers asks for its own; the head, which Ray finds first, knows of none."""
    with tempfile.TemporaryDirectory(prefix="mis-ray-", dir="/tmp") as folder:  # sockets need a short path
        environment = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
        head = start(
            *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1", "--disable-usage-stats"),
            *("--port=0", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--dashboard-port=0"),
            **environment,
        )
        try:
            wait_until(Path(folder, "ray", "ray_current_cluster").exists, head)
            with mis_train(tmp_path, "train.max_steps=200", environment=environment) as command:
                code, _ = command.end(200)
            assert code == 0, command.said()
            assert "train: restart" not in command.said()
        finally:
            kill_group(head, signal.SIGTERM)
