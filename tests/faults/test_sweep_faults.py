"""Sweeps whose rows raise, run out of memory and hang, whose driver is killed, and whose MLflow server is faulty."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.mlflow_proxy import FaultyProxy, mlflow_server
from mlflow.tracking import MlflowClient
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from training_material import make_material, tiny_run

from mis_platform import sweep, tracking
from mis_platform.config import Resources
from mis_platform.data.examples import open_stream
from mis_platform.stages.train import Job, _explained
from mis_platform.stages.training_loop import Schedule
from mis_platform.storage import Storage
from mis_platform.trial import Task

HEAD = '''
"""Does it hold?"""
from mis_platform.config import Run
from mis_platform.experiment import Experiment, Row, changed

def row(name, **settings):
    return Row(name, changed(Run(), **{key.replace("__", "."): value for key, value in settings.items()}))

'''
FAULTS = (
    HEAD
    + """
EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 0",
    rows=(
        row("no memory", train__seed=1),
        row("hangs in training", train__seed=2),
        row("hangs as a whole", train__seed=4),
        row("diverges", train__learning_rate=1e30),
        row("hangs in evaluation", train__seed=3),
        row("good"),
        row("hangs without training", method="geodesic"),
        row("good without training", method="graphcut"),
    ),
)
"""
)
FIFTEEN = (
    HEAD
    + """
EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 0",
    rows=tuple(row(f"alpha={k / 20}", sampling__alpha=k / 20) for k in range(15)),
    default="alpha=0.0",
)
"""
)
ONE = HEAD + 'EXPERIMENT = Experiment(question=__doc__, source="Table 0", rows=(row("good"),))\n'
SHORT = ["train.max_steps=3", "eval.max_clicks=2"]
SILENCE = 90.0  # seconds; starting the workers of a row takes 10 to 60 on two busy cores


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "experiments"
    folder.mkdir()
    monkeypatch.setenv("MIS_EXPERIMENTS", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def prepare(name: str, root: Path, **resources: Any) -> sweep.Sweep:
    return sweep.prepare(
        name,
        profile="smoke",
        root=Storage(str(root)),
        data_root=None,
        resources=Resources(log_every=1, **resources),
        assignments=SHORT,
    )


def start(name: str, root: Path, **resources: Any) -> "subprocess.Popen[str]":
    words = ["run", "sweep", name, "--profile", "smoke", "--root", str(root)]
    settings = SHORT + [f"resources.{key}={value}" for key, value in {"log_every": 1, **resources}.items()]
    words += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "mis_platform.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def family(pid: int) -> dict[int, str]:
    """Every descendant of a process, with its title."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {each: titles.get(each, "") for each in found}


def kill_everything(child: "subprocess.Popen[str]") -> None:
    for pid in family(child.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    child.wait(timeout=30)


def query(database: Path, text: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(text).fetchall()


def reports(root: Path, name: str) -> dict[str, Any]:
    (path,) = (root / "sweeps" / f"{name}-smoke").glob("*/report.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# -- rows that fail --------------------------------------------------------------------------------------------------


def leave_no_memory(pid: int) -> None:
    """The kernel refuses this process any more memory than it has."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


def is_at_work(pid: int) -> bool:
    """Whether a worker has got past its start: torch is there."""
    try:
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def stop(pid: int) -> None:
    """It lives, but does nothing any more, not even end when it is asked to."""
    os.kill(pid, signal.SIGSTOP)


def made_first(task: Task, prepared: sweep.Sweep) -> Path:
    """The directory of a row's training, or of its clicks if it has none."""
    root, resources = prepared.root, prepared.resources
    stage = task.training(resources) if task.is_trained else task.clicks(root, resources)[0]
    local = stage.directory(root).local
    assert local is not None
    return local


class Saboteur(threading.Thread):
    """Acts on the processes of a row while that row is the newest one that is not finished.

    rows: the directory of what each makes first; faults: row -> whether that is to be finished before something
    happens, to which processes by their titles, and what.
    """

    def __init__(self, driver: int, rows: dict[str, Path], faults: dict[str, tuple[bool, str, Any]]) -> None:
        super().__init__(daemon=True)
        self._driver, self._rows, self._faults = driver, rows, faults
        self._touched: set[int] = set()
        self.done: dict[str, int] = {}  # row -> processes that were acted on

    def run(self) -> None:
        while Path(f"/proc/{self._driver}").exists():
            begun = [row for row, path in self._rows.items() if path.exists()]
            row = max(begun, key=lambda each: self._rows[each].stat().st_ctime, default="")
            is_later, title, act = self._faults.get(row, (False, "", None))
            if act is not None and (self._rows[row] / "manifest.json").exists() == is_later:
                self._act(row, title, act)
            time.sleep(0.1)

    def _act(self, row: str, title: str, act: Callable[[int], None]) -> None:
        for pid, found in family(self._driver).items():
            if found.startswith(title) and pid not in self._touched and is_at_work(pid):
                self._touched.add(pid)
                self.done[row] = self.done.get(row, 0) + 1
                act(pid)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rows_that_raise_hang_and_run_out_of_memory_leave_the_others_alone(experiments: Path, tmp_path: Path) -> None:
    """Real faults: memory is refused by the kernel, processes are stopped with SIGSTOP, a loss becomes infinite.

    Of those that hang one is the process of a trial, and with it the watch over its own work.
    """
    (experiments / "faults.py").write_text(FAULTS)
    root = tmp_path / "root"
    prepared = prepare("faults", root)
    rows = {task.row.name: made_first(task, prepared) for task in prepared.tasks}
    faults = {
        "no memory": (False, "ray::RayTrainWorker", leave_no_memory),
        "hangs in training": (False, "ray::RayTrainWorker", stop),
        "hangs as a whole": (False, "ray::ImplicitFunc.train", stop),
        "hangs in evaluation": (True, "ray::Worker", stop),
        "hangs without training": (False, "ray::Worker", stop),
    }
    with start("faults", root, max_failures=0, trial_silence=SILENCE) as child:
        saboteur = Saboteur(child.pid, rows, faults)
        saboteur.start()
        try:
            text, _ = child.communicate(timeout=1000)
        finally:
            left = family(child.pid)
            kill_everything(child)
    assert child.returncode == 4, text
    assert set(saboteur.done) == set(faults), text
    lines = {line["name"]: line for line in reports(root, "faults")["lines"]}
    states = {name: line["state"] for name, line in lines.items()}
    assert states == {name: "done" if name.startswith("good") else "failed" for name in rows}, text
    silence = f"gave no sign of life for {SILENCE:g} seconds"
    assert f"the training {silence}" in lines["hangs in training"]["reason"]
    assert f"the process of the trial {silence}" in lines["hangs as a whole"]["reason"]
    for name in ("hangs in evaluation", "hangs without training"):
        assert f"the evaluation {silence}" in lines[name]["reason"]
    assert "not finite at step" in lines["diverges"]["reason"]
    # Where memory is refused decides who tells: Python, C code that has none left for an exception, whoever finds the
    # process dead, or nobody, when it hangs as it starts.
    words = ("memory", "MemoryError", "died", "error return without exception set", silence)
    assert any(word in lines["no memory"]["reason"] for word in words), lines["no memory"]
    assert len(left) == 1, f"processes were left behind: {left}"
    database = root / "mlflow.db"
    reasons = query(database, "select value from tags where key = 'mis.error'")
    assert sorted(value for (value,) in reasons) == sorted(
        line["reason"][:500] for line in lines.values() if line["reason"]
    )
    statuses = query(database, "select status, count(*) from runs group by 1 order by 1")
    assert statuses == [("FAILED", 6), ("FINISHED", 3)], "the sweep itself and the good rows"


def test_a_worker_whose_memory_error_says_nothing_is_explained(tmp_path: Path) -> None:
    stream = open_stream(*make_material(tmp_path, count=1), tiny_run())
    job = Job(stream, Schedule(1, stream.run.train), Resources(), Storage(str(tmp_path)), 1, 1)
    explained = _explained(WorkerGroupError("failed", {0: MemoryError()}), job)
    assert "the last time with: MemoryError; the same command resumes" in str(explained)
    explained = _explained(ControllerError(RuntimeError("the actor died\nat once")), job)
    assert "the last time with: the actor died; the same command resumes" in str(explained)
    starting = RayTaskError("init_train_context", "ray::RayTrainWorker.init_train_context()", MemoryError())
    explained = _explained(ControllerError(starting.as_instanceof_cause()), job)
    assert "the last time with: MemoryError; the same command resumes" in str(explained)


# -- a driver that dies ----------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_fifteen_rows_survive_ten_kills(experiments: Path, tmp_path: Path) -> None:
    """SIGKILL of every process, each time a little later in the life of the sweep (F13)."""
    (experiments / "fifteen.py").write_text(FIFTEEN)
    stages = ["trees: ", "sweep: 15 training", *[": step "] * 8]
    seen = []
    for stage in stages:
        with start("fifteen", tmp_path / "killed") as child:
            assert child.stdout is not None
            for line in child.stdout:
                seen.append(line)
                if stage in line:
                    break
            kill_everything(child)
        assert stage in seen[-1], "".join(seen)
    with start("fifteen", tmp_path / "killed") as child:
        text, _ = child.communicate(timeout=1500)
    assert child.returncode == 0, text
    report = reports(tmp_path / "killed", "fifteen")
    assert [line["state"] for line in report["lines"]] == ["done"] * 15
    database = tmp_path / "killed" / "mlflow.db"
    assert query(database, "select count(*) from runs") == [(16,)], "15 rows and the sweep"
    assert query(database, "select status, count(*) from runs group by 1") == [("FINISHED", 16)]
    assert query(database, "select count(*) from tags where key = 'mlflow.parentRunId'") == [(15,)]
    assert not query(database, "select 1 from metrics group by run_uuid, key, step having count(*) > 1")
    curves = query(database, "select step, count(*) from metrics where key = 'train/loss' group by 1 order by 1")
    assert curves == [(1, 15), (2, 15), (3, 15)]
    histories = [path.read_bytes() for path in sorted((tmp_path / "killed" / "checkpoint").glob("*/history.jsonl"))]
    assert len(histories) == 15
    assert len({json.loads(each.splitlines()[-1])["loss"] for each in histories}) > 1, "rows are different trainings"


# -- an MLflow server with faults ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as address:
        yield address


def curve(server: str, experiment: str, fingerprint: str, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(server)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], f"tags.`{tracking.FINGERPRINT}` = '{fingerprint}'")
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_point_of_ten_thousand_is_lost_or_doubled_when_calls_fail(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 % of all calls end with 500 or 429, half of those after the server has done what was asked (F22)."""
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(tracking, "FAILURES", 30)
    about: dict[str, Any] = {"experiment": "flaky", "name": "flaky", "fingerprint": "f22", "params": {"a": 1}}
    with FaultyProxy(server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        proxy.failing = 0.3
        with tracking.open_run(Storage(str(tmp_path)), **about) as tracker:
            for step in range(5000):
                tracker.log_metrics({"train/loss": step / 7, "train/iou": float(step)}, step)
                if step % 50 == 49:
                    tracker._post_metrics()  # as every five seconds of a training
        assert proxy.refused > 10
        assert proxy.lost > 10
    assert curve(server, "flaky", "f22", "train/loss") == [(step, step / 7) for step in range(5000)]
    assert curve(server, "flaky", "f22", "train/iou") == [(step, float(step)) for step in range(5000)]
    assert not list(tmp_path.glob("mlflow-spool/*"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slow_server_holds_up_no_step(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds a call."""
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.5)
    about: dict[str, Any] = {"experiment": "slow", "name": "slow", "fingerprint": "slow", "params": {"a": 1}}
    with FaultyProxy(server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        proxy.delay = 2.0
        began = time.monotonic()
        tracker = tracking.open_run(Storage(str(tmp_path)), **about)
        assert time.monotonic() - began < tracking.OPENING_SECONDS + 5
        spent = 0.0
        for step in range(100):
            began = time.perf_counter()
            tracker.log_metrics({"train/loss": float(step)}, step)
            spent += time.perf_counter() - began
            time.sleep(0.05)
        assert spent < 0.01 * 100 * 0.05 * 10, "1 % of steps of half a second"
        tracker.close()
    assert curve(server, "slow", "slow", "train/loss") == [(step, float(step)) for step in range(100)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_through_an_outage(
    server: str, experiments: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes away when the training begins and comes back after the sweep, with failing calls (F21)."""
    (experiments / "one.py").write_text(ONE)
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.1)
    root = tmp_path / "root"
    prepared = prepare("one", root)
    (task,) = prepared.tasks
    training = root / "checkpoint" / task.training(prepared.resources).fingerprint
    with FaultyProxy(server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)

        def cut() -> None:
            while not training.exists():
                time.sleep(0.05)
            proxy.down = True

        threading.Thread(target=cut, daemon=True).start()
        comparison = sweep.run_sweep(prepared)
        assert [line.state for line in comparison.lines] == ["done"]
        assert list(root.glob("mlflow-spool/*/events.jsonl")), "what the server has missed"
        for proxy.down, proxy.failing in ((False, 0.3), (False, 0.0)):
            monkeypatch.setattr(tracking, "_outboxes", {})  # as in a new process, which knows nothing of an outage
            sweep.run_sweep(prepare("one", root))
    history = [json.loads(line) for line in (training / "history.jsonl").read_text().splitlines()]
    expected = [(int(each["step"]), each["loss"]) for each in history]
    assert curve(server, "one", task.fingerprint(prepared.resources), "train/loss") == expected
    assert not list(root.glob("mlflow-spool/*"))
