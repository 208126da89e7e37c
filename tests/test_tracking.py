"""Runs in a real MLflow store: one run a fingerprint, every point once, and a store that is away costs nothing."""

import json
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from mlflow.models import Model
from mlflow.tracking import MlflowClient
from mlflow_here import serving
from PIL import Image

from mis_platform import doctor, tracking
from mis_platform.config import Resources, Run, fingerprint, flatten
from mis_platform.errors import DataError
from mis_platform.storage import Storage

ABOUT: dict[str, Any] = {
    "experiment": "mis",
    "name": "first",
    "fingerprint": "0123456789abcdef",
    "params": {"train.seed": 0},
}


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Storage:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return Storage(str(tmp_path))


def the_run(root: Storage) -> Any:
    client = tracking.connect(root)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return run


def points(root: Storage, name: str) -> list[tuple[int, float]]:
    history = tracking.connect(root).get_metric_history(the_run(root).info.run_id, name)
    return sorted((point.step, point.value) for point in history)


# -- what is recorded ------------------------------------------------------------------------------------------------


def test_a_run_with_its_settings_curves_and_pictures(root: Storage, tmp_path: Path) -> None:
    settings = Run()
    params = {**flatten(settings), **flatten(Resources(), "resources.")}
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    about = {**ABOUT, "fingerprint": fingerprint(settings), "params": params}
    with tracking.open_run(root, **about, tags={"mis.protocol": "abcd"}) as tracker:
        tracker.log_metrics({"train/loss": 0.75, "train/smooth": 2.0}, step=10)
        tracker.log_metrics({"train/loss": 0.5, "train/smooth": 1.0}, step=20)
        tracker.log_metrics({"grabcut/noc85": 1.94, "grabcut/noc90": 2.32})
        tracker.log_curve("grabcut/iou", np.array([0.8, 0.9, 0.95], np.float32))
        tracker.log_figure(figure, "figures/line.png")
        tracker.log_text("| NoC |", "tables/noc.md")
        tracker.log_dataset("grabcut", "f" * 64, "/data/GrabCut", "evaluation")
        tracker.set_model(Storage("/models/one"))
        run_id = tracker.run_id

    run = the_run(root)
    assert run.info.run_id == run_id
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert len(run.data.params) == len(params)
    assert run.data.params["train.smooth_weight"] == "10.0"
    assert run.data.params["train.decay_epochs"] == "50"
    assert run.data.params["train.max_steps"] == "none"
    assert run.data.params["eval.target_iou"] == "0.9"
    assert run.data.tags["mis.fingerprint"] == fingerprint(settings)
    assert run.data.tags["mis.protocol"] == "abcd"
    assert points(root, "train/loss") == [(10, 0.75), (20, 0.5)]
    assert points(root, "grabcut/noc85") == [(0, 1.94)]
    assert points(root, "grabcut/iou") == [(k, float(np.float32(v))) for k, v in ((1, 0.8), (2, 0.9), (3, 0.95))]
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("grabcut", "f" * 36)
    assert json.loads(given.dataset.source) == {"uri": "/data/GrabCut"}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "evaluation")]
    artifacts = Path(run.info.artifact_uri)
    assert artifacts.is_relative_to(tmp_path / "mlflow-artifacts")
    assert Image.open(artifacts / "figures/line.png").size == (100, 100)
    assert (artifacts / "tables/noc.md").read_text() == "| NoC |"
    assert not list(tmp_path.glob("mlflow-spool/*"))


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no luck"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (None, "FINISHED")]
)
def test_the_end_of_a_run_is_its_status(root: Storage, error: BaseException | None, status: str) -> None:
    def work() -> None:
        with tracking.open_run(root, **ABOUT):
            assert the_run(root).info.status == "RUNNING"
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    assert the_run(root).info.status == status
    if status == "FAILED":
        assert the_run(root).data.tags["mis.error"] == "RuntimeError: no luck"


def test_nothing_secret_reaches_the_store(
    root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    canary, password = "canary-5d1f0a", "hunter2hunter2"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canary)
    about = {**ABOUT, "params": {"data": f"s3://key:{password}@bucket/x"}}

    def work() -> None:
        with tracking.open_run(root, **about, tags={"from": f"token {canary}"}) as tracker:
            tracker.log_text(f"read with {canary}", "log.txt")
            tracker.log_dataset("x", "d", f"s3://key:{password}@bucket/x", "training")
            raise RuntimeError(f"cannot log in with {canary}")

    with pytest.raises(RuntimeError):
        work()
    assert the_run(root).data.params["data"] == "s3://***@bucket/x"
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) >= 2
    for secret in (canary, password):
        assert not any(secret.encode() in data for data in written)
        assert secret not in caplog.text


def test_a_tracker_does_not_travel(root: Storage) -> None:
    with tracking.open_run(root, **ABOUT) as tracker, pytest.raises(TypeError, match="driver"):
        pickle.dumps(tracker)


# -- once ------------------------------------------------------------------------------------------------------------


def test_the_same_fingerprint_is_the_same_run(root: Storage) -> None:
    with tracking.open_run(root, **ABOUT) as tracker:
        tracker.log_metrics({"loss": 1.0}, step=1)
    with tracking.open_run(root, **{**ABOUT, "params": {"train.seed": 0, "resources.num_workers": 2}}) as again:
        assert again.run_id == tracker.run_id
        assert the_run(root).info.status == "RUNNING"
        again.log_metrics({"loss": 9.0}, step=1)
        again.log_metrics({"loss": 0.5}, step=2)
    assert points(root, "loss") == [(1, 1.0), (2, 0.5)]
    with tracking.open_run(root, **{**ABOUT, "params": {"resources.num_workers": 4}}):
        pass
    run = the_run(root)
    assert run.data.params == {"train.seed": "0", "resources.num_workers": "2"}
    assert run.data.tags["latest.resources.num_workers"] == "4"
    assert run.data.tags["mis.attempt"] == "3"
    with tracking.open_run(root, **{**ABOUT, "fingerprint": "f" * 16}) as other:
        assert other.run_id != tracker.run_id


def test_points_of_a_killed_process_are_not_doubled(root: Storage) -> None:
    script = f"""
import os, signal
from mis_platform import tracking
from mis_platform.storage import Storage
tracker = tracking.open_run(Storage({root.uri!r}), **{ABOUT!r})
for step in range(10):
    tracker.log_metrics({{"loss": float(step), "rate": 1.0}}, step)
tracker.flush()
tracker.log_metrics({{"loss": 10.0, "rate": 1.0}}, 10)  # never sent
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert points(root, "loss") == [(step, float(step)) for step in range(10)]
    with tracking.open_run(root, **ABOUT) as tracker:
        for step in range(8, 12):  # resumed from the checkpoint of step 8
            tracker.log_metrics({"loss": float(step), "rate": 1.0}, step)
    assert points(root, "loss") == [(step, float(step)) for step in range(12)]
    assert points(root, "rate") == [(step, 1.0) for step in range(12)]
    assert the_run(root).info.status == "FINISHED"


def test_more_points_than_one_batch_holds(root: Storage) -> None:
    with tracking.open_run(root, **ABOUT) as tracker:
        tracker.log_curve("long", np.arange(2501))
        tracker.log_curve("long", np.arange(2501))
    assert points(root, "long") == [(step, step - 1.0) for step in range(1, 2502)]


def test_metrics_arrive_while_the_run_lasts(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.0)
    with tracking.open_run(root, **ABOUT) as tracker:
        tracker.log_metrics({"loss": float("nan")}, step=3)
        for _ in range(200):
            if points(root, "loss"):
                break
            time.sleep(0.05)
        ((step, value),) = points(root, "loss")
        assert step == 3
        assert np.isnan(value)


def test_a_run_lasts_as_long_as_its_work(root: Storage) -> None:
    """Not until it is reported on, nor until a store that was away is told; nor is it younger than its first point."""

    def span() -> tuple[int, int]:
        info = the_run(root).info
        return info.start_time, info.end_time

    def opened_after_a_moment(**changes: Any) -> tracking.Tracker:
        time.sleep(0.02)
        return tracking.open_run(root, **ABOUT | changes)

    with opened_after_a_moment():
        pass
    before = span()
    for status in ("FINISHED", "FAILED", "FINISHED"):
        opened_after_a_moment(computes=False).close(status)
        assert (the_run(root).info.status, span()) == (status, before)
    with opened_after_a_moment():  # resumed
        pass
    assert span()[0] == before[0]
    assert span()[1] >= before[1] + 20
    with opened_after_a_moment(fingerprint="never worked on", computes=False) as tracker:
        pass
    info = tracking.connect(root).get_run(str(tracker.run_id)).info
    assert 0 <= info.end_time - info.start_time < 10_000


def test_a_run_that_is_killed_while_it_is_reported_on_keeps_its_end(root: Storage) -> None:
    with tracking.open_run(root, **ABOUT):
        pass
    ended = the_run(root).info.end_time
    script = f"""
import os, signal
from mis_platform import tracking
from mis_platform.storage import Storage
tracking.open_run(Storage({root.uri!r}), **{ABOUT!r}, computes=False)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True)
    assert the_run(root).info.status == "RUNNING"
    with tracking.open_run(root, **ABOUT, computes=False):
        assert the_run(root).info.end_time == ended, "the one that died was ended first"
    assert (the_run(root).info.status, the_run(root).info.end_time) == ("FINISHED", ended)


@pytest.mark.parametrize("count", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_many_processes_meet_at_a_new_root(tmp_path: Path, count: int) -> None:
    """Drivers start at once on a root without a store. They are forked, so that they do start at once."""
    script = f"""
import os, sys
from mis_platform import tracking
from mis_platform.storage import Storage
about, start, tracking.OPENING_SECONDS = {ABOUT!r}, os.pipe(), 200.0  # the last one waits for all others
for number in range({count}):
    if os.fork() == 0:
        os.close(start[1])
        os.read(start[0], 1)  # until the parent closes its end
        with tracking.open_run(Storage({str(tmp_path)!r}), **about) as shared:
            shared_id = shared.run_id
        with tracking.open_run(Storage({str(tmp_path)!r}), **about | {{"fingerprint": f"own-{{number}}"}}) as own:
            own.log_metrics({{"loss": float(number)}}, 1)
        os.write(1, f"{{shared_id}} {{own.run_id}}\\n".encode())
        os._exit(0)
os.close(start[1])
failed = sum(os.wait()[1] != 0 for _ in range({count}))
sys.exit(failed)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=250, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    answers = [line.split() for line in done.stdout.splitlines()]
    assert len({shared for shared, _ in answers}) == 1
    assert len({own for _, own in answers}) == count
    client = tracking.connect(Storage(str(tmp_path)))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"] * (count + 1)
    assert sorted(run.data.metrics["loss"] for run in runs if run.data.metrics) == [float(k) for k in range(count)]


def test_a_killed_initialisation_leaves_no_half_store(tmp_path: Path) -> None:
    (tmp_path / ".tmp-mlflow.db").write_bytes(b"half a database")
    with tracking.open_run(Storage(str(tmp_path)), **ABOUT):
        pass
    assert the_run(Storage(str(tmp_path))).info.status == "FINISHED"
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert not list(tmp_path.glob(".tmp-*"))


# -- a store that is away --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def database(tmp_path: Path, empty_store: Path) -> Path:
    """Of a server, not of the root."""
    file = tmp_path / "server" / "server.db"
    file.parent.mkdir()
    file.write_bytes(empty_store.read_bytes())
    return file


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, which knows nothing of an outage."""
    monkeypatch.setattr(tracking, "_outboxes", {})
    monkeypatch.setattr(tracking, "_told", set())


def run_of(uri: str, fingerprint: str) -> Any:
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'mis'")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mis.fingerprint` = '{fingerprint}'")
    return run


def test_a_server_that_is_down_costs_nothing_and_loses_nothing(
    root: Storage, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FAILING_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "FAILURES", 3)
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.05)
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2hunter2@127.0.0.1:{port}")
    with tracking.open_run(root, **ABOUT) as tracker:
        assert tracker.run_id is None
        for step in range(200):
            tracker.log_metrics({"loss": 1.0 / (step + 1)}, step)
        tracker.log_text("| NoC |", "tables/noc.md")
        tracker.log_dataset("photos", "d1", "/photos", "training")
    assert caplog.text.count("does not answer") == 1
    assert "hunter2" not in caplog.text
    closed = int(time.time() * 1000)
    (spool,) = tmp_path.glob("mlflow-spool/*")
    assert (spool / "files/tables/noc.md").exists()
    time.sleep(0.02)

    forget(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:a-new-password@127.0.0.1:{port}/")  # the same server
    with serving(database, port):
        with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):  # the store is back, for any run
            pass
        assert not list(tmp_path.glob("mlflow-spool/*"))
        client = tracking.connect(root)
        run = run_of(f"http://127.0.0.1:{port}", "0123456789abcdef")
        history = client.get_metric_history(run.info.run_id, "loss")
    assert run.info.status == "FINISHED"
    assert run.info.start_time < run.info.end_time <= closed, "when it was worked on, not when the store was back"
    assert run.data.params == {"train.seed": "0"}
    assert run.inputs.dataset_inputs[0].dataset.name == "photos"
    assert (Path(run.info.artifact_uri) / "tables/noc.md").exists()
    assert sorted((point.step, point.value) for point in history) == [(k, 1.0 / (k + 1)) for k in range(200)]


def test_what_waits_for_one_store_is_not_sent_to_another(
    root: Storage, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FAILURES", 1)
    port = free_port()
    server = f"http://user:hunter2hunter2@127.0.0.1:{port}"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server)
        with tracking.open_run(root, **ABOUT) as tracker:
            tracker.log_metrics({"loss": 1.0}, 1)
        assert tracking.waiting(root) == {}, "that store is the present one"
    (spool,) = tmp_path.glob("mlflow-spool/*")
    assert "hunter2" not in spool.name + (spool / "events.jsonl").read_text()
    caplog.clear()
    for other in ("another", "a third"):
        with tracking.open_run(root, **{**ABOUT, "fingerprint": other}):
            pass
    runs = MlflowClient(tracking.tracking_uri(root)).search_runs(["1"])
    assert sorted(run.data.tags["mis.fingerprint"] for run in runs) == ["a third", "another"]
    assert list(tmp_path.glob("mlflow-spool/*")) == [spool]
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path}/mlflow-spool keeps 1 run(s) for another MLflow store until it is used again: "
        f"http://***@127.0.0.1:{port}"
    )
    assert tracking.waiting(root) == {f"http://***@127.0.0.1:{port}": 1}
    (told,) = (str(each) for each in doctor._mlflow(root) if each.state == doctor.WARN)
    assert f"1 run(s) wait in the root for http://***@127.0.0.1:{port}" in told
    forget(monkeypatch)
    with serving(database, port):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):
            pass
        assert run_of(server, "0123456789abcdef").data.metrics == {"loss": 1.0}
    assert not list(tmp_path.glob("mlflow-spool/*"))


def test_what_does_not_say_for_which_store_it_is_is_kept(root: Storage, tmp_path: Path) -> None:
    """As folders that were left there before they said so."""
    left = tmp_path / "mlflow-spool" / "1764000000000000000-0123456789abcdef"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    (left / "events.jsonl").write_text(json.dumps({"open": ABOUT}) + "\n")
    with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):
        pass
    assert the_run(root).data.tags["mis.fingerprint"] == "another", "it is alone"
    assert left.is_dir()
    assert tracking.waiting(root) == {"unknown": 1}


@pytest.mark.parametrize("prefix", ["own-", "0123456789abcdef-"])
@pytest.mark.parametrize("is_first", [True, False])
def test_damaged_lines_of_a_dead_run_stop_nobody(
    root: Storage, tmp_path: Path, prefix: str, is_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / "mlflow-spool" / f"{prefix}1764000000000000000-0123456789abcdef"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    known = {"fingerprint": "dead", "tags": {"mis.fingerprint": "dead"}, "parent": None, "computes": True, "opened": 1}
    opening = json.dumps({"open": ABOUT | known})
    lines = ["\xff\x00{", "[1]"] if is_first else [opening, "\xff\x00{", json.dumps({"tags": {"seen": "yes"}})]
    (left / "events.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode("latin1"))
    with caplog.at_level(logging.WARNING), tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):
        pass
    line = 1 if is_first else 2
    assert f"line {line} of {left}/events.jsonl, which is damaged" in caplog.text
    client = tracking.connect(root)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    tags = [run.data.tags for run in runs]
    assert any(each["mis.fingerprint"] == "another" for each in tags)
    if prefix == "own-" and not is_first:
        assert any(each["mis.fingerprint"] == "dead" and each["seen"] == "yes" for each in tags), "the rest is sent"


def test_the_store_of_a_folder_is_its_address_without_a_login(root: Storage, tmp_path: Path) -> None:
    def prefix(uri: str) -> str:
        return tracking._prefix(root, uri)

    assert prefix("http://a:b@Host:5000/") == prefix("http://host:5000") != prefix("http://host:5001")
    assert prefix("postgresql://a:b@host/one?sslmode=require") == prefix("postgresql://host/one")
    assert prefix("postgresql://host/one") != prefix("postgresql://host/two")
    assert prefix(f"sqlite:///{tmp_path}/mlflow.db") == "own-" != prefix(f"sqlite:///{tmp_path}/other.db")
    assert prefix(f"sqlite:///{os.path.relpath(tmp_path)}/mlflow.db") == "own-", "wherever one stands"


def test_a_store_is_known_again_by_no_secret(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(uri: str) -> str:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return tracking.store_of(root)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    own = tracking.store_of(root)
    assert known("http://a:b@host:5000") == known("http://c:d@host:5000") != known("http://host:5001")
    assert own == "own"


def test_a_root_that_was_moved_keeps_its_own_store(root: Storage, tmp_path: Path) -> None:
    with tracking.open_run(root, **ABOUT) as tracker:
        (spool,) = tmp_path.glob("mlflow-spool/*")
        tracker.flush()
        copy = tmp_path / "copy"
        (copy / "mlflow-spool").mkdir(parents=True)
        shutil.copytree(spool, copy / "mlflow-spool" / spool.name)  # as of a process that died
    (copy / "mlflow.db").write_bytes((tmp_path / "mlflow.db").read_bytes())
    with tracking.open_run(Storage(str(copy)), **{**ABOUT, "fingerprint": "another"}):
        pass
    assert not list(copy.glob("mlflow-spool/*"))
    assert tracking.connect(Storage(str(copy))).get_run(str(tracker.run_id)).info.status == "KILLED"


def test_a_store_that_is_away_for_long_gets_thinner_curves_and_says_so(
    root: Storage, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same as at 100 MB, with a thousandth of that."""
    limit = 100_000
    monkeypatch.setattr(tracking, "SPOOL_BYTES", limit)
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.0)
    monkeypatch.setattr(tracking, "FAILURES", 1)
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 60.0)
    port, steps, largest = free_port(), 3_001, 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with tracking.open_run(root, **ABOUT) as tracker:
        for step in range(steps):
            tracker.log_metrics({"loss": step / 7, "rate": 1.0}, step)
            if step % 100 == 0:
                tracker.log_text("x" * 2_000, f"texts/{step}.txt")
                size = sum(file.stat().st_size for file in tmp_path.glob("mlflow-spool/**/*") if file.is_file())
                largest = max(size, largest)
        tracker.log_metrics({"grabcut/noc90": 2.0})
    assert limit / 3 < largest < limit
    forget(monkeypatch)
    with serving(database, port):
        with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):
            pass
        run = run_of(f"http://127.0.0.1:{port}", "0123456789abcdef")
        client = tracking.connect(root)
        curves = {name: client.get_metric_history(run.info.run_id, name) for name in ("loss", "rate")}
    every = int(re.findall(r"one in (\d+) points", run.data.tags["mis.thinned"])[0])
    assert every in (4, 8, 16)
    told = [line for line in caplog.messages if "is away for too long" in line]
    assert f"of first it gets only one in {every} points of what was measured while the store was away" in told[-1]
    for points in curves.values():
        expected = [*range(0, steps, every), *([steps - 1] if (steps - 1) % every else [])]
        assert sorted(point.step for point in points) == expected, "evenly, with its end"
    assert sorted(point.value for point in curves["loss"])[-1] == (steps - 1) / 7
    assert run.data.metrics["grabcut/noc90"] == 2.0, "a number of its own is no curve"
    kept = sorted(Path(run.info.artifact_uri).glob("texts/*"))
    left_out = [line for line in caplog.messages if "MLflow does not get texts/" in line]
    assert len(kept) == limit // 4 // 2_000
    assert len(kept) + len(left_out) == len(range(0, steps, 100))
    assert run.info.status == "FINISHED"


def test_a_run_killed_while_the_server_is_down_is_recorded_as_killed(
    root: Storage, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    script = f"""
import os, signal
from mis_platform import tracking
from mis_platform.storage import Storage
os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:{port}"
tracker = tracking.open_run(Storage({root.uri!r}), **{ABOUT!r})
tracker.log_metrics({{"loss": 0.5}}, 1)
tracker.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with serving(database, port):
        with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):
            pass
        run = run_of(f"http://127.0.0.1:{port}", "0123456789abcdef")
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"loss": 0.5}


def test_a_run_whose_process_died_is_ended_by_the_next_one(root: Storage) -> None:
    """The store was there all the time; nobody has to resume the run for it to stop being RUNNING."""
    script = f"""
import os, signal
from mis_platform import tracking
from mis_platform.storage import Storage
tracker = tracking.open_run(Storage({root.uri!r}), **{ABOUT!r})
tracker.log_metrics({{"loss": 0.5}}, 1)
tracker.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True)
    assert the_run(root).info.status == "RUNNING"
    with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}) as other:
        pass
    client = tracking.connect(root)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert {run.info.run_id == other.run_id: run.info.status for run in runs} == {True: "FINISHED", False: "KILLED"}
    (dead,) = (run for run in runs if run.info.run_id != other.run_id)
    assert (dead.data.metrics, dead.data.tags["mis.attempt"]) == ({"loss": 0.5}, "1")


def test_a_server_that_hangs_holds_up_no_step(
    root: Storage, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and never answers, as behind a broken balancer: the dearest way to be away."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking, "OPENING_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "FAILING_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        tracker = tracking.open_run(root, **ABOUT)
        seconds = []
        for step in range(1000):
            began = time.perf_counter()
            tracker.log_metrics({f"train/{k}": float(step) for k in range(10)}, step)
            seconds.append(time.perf_counter() - began)
        assert sum(seconds) / len(seconds) < 0.01, "1 % of a step of a second"
        began = time.monotonic()
        tracker.close()
        assert time.monotonic() - began < 10
    (spool,) = tmp_path.glob("mlflow-spool/*")
    assert (spool / "events.jsonl").stat().st_size < 2_000_000, "ten thousand points"
    forget(monkeypatch)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setattr(tracking, "FAILING_SECONDS", 15.0)
    with serving(database, port):
        with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):
            pass
        client = tracking.connect(root)
        run = run_of(f"http://127.0.0.1:{port}", "0123456789abcdef")
        for k in (0, 9):
            history = client.get_metric_history(run.info.run_id, f"train/{k}")
            found = sorted((point.step, point.value) for point in history)
            assert found == [(step, float(step)) for step in range(1000)]


def test_many_runs_wait_once_for_a_server_that_hangs(
    root: Storage, database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a sweep opens a run for each of its rows, after everything is computed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracking, "OPENING_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "FAILING_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.01)
    monkeypatch.setattr(tracking, "GRACE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        with tracking.open_run(root, **ABOUT):
            pass
        assert time.monotonic() - began < 4, (
            "one question of two seconds is enough to know it, a second one is not asked"
        )
        began = time.monotonic()
        for row in range(20):
            with tracking.open_run(root, **{**ABOUT, "fingerprint": f"row {row}"}) as tracker:
                tracker.log_metrics({"loss": float(row)})
        assert time.monotonic() - began < 5, "each used to wait for two or three seconds"
    assert sum("has not got everything" in record.message for record in caplog.records) == 1
    forget(monkeypatch)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setattr(tracking, "OPENING_SECONDS", 60.0)
    monkeypatch.setattr(tracking, "FAILING_SECONDS", 15.0)
    with serving(database, port):
        with tracking.open_run(root, **{**ABOUT, "fingerprint": "the next process"}):
            pass
        client = tracking.connect(root)
        (experiment,) = client.search_experiments(filter_string="name = 'mis'")
        losses = [run.data.metrics.get("loss") for run in client.search_runs([experiment.experiment_id])]
    assert sorted(loss for loss in losses if loss is not None) == [float(row) for row in range(20)]


def test_what_a_store_has_missed_is_told_in_the_order_it_happened(
    root: Storage, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that failed in one sweep and was finished by the next is finished."""
    monkeypatch.setattr(tracking, "FAILURES", 1)
    names, port = [f"row {number}" for number in range(6)], free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    for status in ("FAILED", "FINISHED"):
        for name in names:
            tracker = tracking.open_run(root, **ABOUT | {"fingerprint": name, "name": name}, wait=False)
            tracker.set_tags({"mis.last": status})
            tracker.close(status)
    forget(monkeypatch)
    monkeypatch.setattr(tracking, "FAILURES", 5)
    with serving(database, port), tracking.open_run(root, **ABOUT):
        pass
    client = MlflowClient(f"sqlite:///{database}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()], "tags.`mis.last` LIKE '%'")
    found = {
        run.info.run_name: (run.info.status, run.data.tags["mis.last"], run.data.tags["mis.attempt"]) for run in runs
    }
    assert found == dict.fromkeys(names, ("FINISHED", "FINISHED", "2"))


def test_the_spool_of_a_living_process_is_left_alone(root: Storage, tmp_path: Path) -> None:
    with tracking.open_run(root, **ABOUT) as alive:
        file = alive._spool.new_file("waiting.txt")
        file.write_text("not yet sent")
        with tracking.open_run(root, **{**ABOUT, "fingerprint": "another"}):
            pass
        assert file.exists()


class Flaky(BaseHTTPRequestHandler):
    """Passes nothing on: every request is refused with 503."""

    requests = 0

    def refuse(self) -> None:
        Flaky.requests += 1
        self.send_response(503)
        self.end_headers()

    do_GET = do_POST = do_PATCH = refuse

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Flaky)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_overloaded_server_is_not_asked_at_every_step(
    root: Storage, refusing_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing_server)
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_FLUSHES", 0.0)
    monkeypatch.setattr(tracking, "FAILING_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 30.0)
    Flaky.requests = 0
    with tracking.open_run(root, **ABOUT) as tracker:
        asked = Flaky.requests
        assert asked >= 1
        for step in range(50):
            tracker.log_metrics({"loss": 1.0}, step)
        assert Flaky.requests == asked


class Forgetful(MlflowClient):
    """A store that takes a batch and loses its answer on the way back, once."""

    lost = False

    def log_batch(self, *arguments: Any, **keywords: Any) -> Any:
        answer = super().log_batch(*arguments, **keywords)
        if keywords.get("metrics") and not self.lost:
            self.lost = True
            raise ConnectionResetError("answer lost")
        return answer


def test_a_lost_answer_does_not_double_points(root: Storage, tmp_path: Path) -> None:
    client = Forgetful(tracking.tracking_uri(root))
    opening = {**ABOUT, "tags": {"mis.fingerprint": ABOUT["fingerprint"]}, "opened": 1}
    tracker = tracking.Tracker(tracking._Outbox(client, None), tracking._Spool(tmp_path / "spool", "own-"), opening)
    tracker.start()
    tracker.log_curve("loss", [3.0, 2.0, 1.0])
    tracker.flush()
    tracker.close()
    assert client.lost
    assert points(root, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]


class Stumbling(MlflowClient):
    """A store that fails once when it is asked for the history of the second of two metrics."""

    stumbled = False

    def get_metric_history(self, run_id: str, key: str, *arguments: Any) -> Any:
        if key == "rate" and not self.stumbled:
            self.stumbled = True
            raise ConnectionResetError("no answer")
        return super().get_metric_history(run_id, key, *arguments)


def test_a_failure_between_two_metrics_loses_neither(root: Storage, tmp_path: Path) -> None:
    client = Stumbling(tracking.tracking_uri(root))
    opening = {**ABOUT, "params": {}, "tags": {"mis.fingerprint": ABOUT["fingerprint"]}, "opened": 1}
    for _ in range(2):  # a run that is new has no history to ask for
        tracker = tracking.Tracker(tracking._Outbox(client, None), tracking._Spool(tmp_path / "spool", "own-"), opening)
        tracker.start()
        tracker.log_metrics({"loss": 1.0, "rate": 0.5}, 3)
        tracker.close()
    assert client.stumbled
    assert points(root, "loss") == [(3, 1.0)]
    assert points(root, "rate") == [(3, 0.5)]


class Choking(MlflowClient):
    """A store that cannot digest the metrics of one run."""

    run = ""

    def log_batch(self, run_id: str, *arguments: Any, **keywords: Any) -> Any:
        if run_id == self.run and keywords.get("metrics"):
            raise ConnectionResetError("no answer")
        return super().log_batch(run_id, *arguments, **keywords)


def test_one_run_that_the_store_cannot_digest_holds_up_no_other(
    root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.001)
    client = Choking(tracking.tracking_uri(root))
    outbox = tracking._Outbox(client, None)

    def opened(fingerprint: str) -> tracking.Tracker:
        opening = {**ABOUT, "fingerprint": fingerprint, "tags": {"mis.fingerprint": fingerprint}, "opened": 1}
        tracker = tracking.Tracker(outbox, tracking._Spool(tmp_path / "spool", "own-"), opening)
        tracker.start()
        return tracker

    bad, good = opened("bad"), opened("good")
    client.run = str(bad.run_id)
    bad.log_metrics({"loss": 1.0}, 1)
    bad.close(wait=False)
    good.log_metrics({"loss": 1.0}, 1)
    good.close()
    assert client.get_run(str(good.run_id)).info.status == "FINISHED"
    assert client.get_run(str(bad.run_id)).info.status == "RUNNING"
    client.run = ""  # the store is mended
    for _ in range(200):
        if client.get_run(str(bad.run_id)).info.status == "FINISHED":
            break
        time.sleep(0.05)
    assert client.get_run(str(bad.run_id)).info.status == "FINISHED"
    assert client.get_run(str(bad.run_id)).data.metrics == {"loss": 1.0}


def test_what_the_store_refuses_for_good_is_left_out(root: Storage, caplog: pytest.LogCaptureFixture) -> None:
    with tracking.open_run(root, **ABOUT) as tracker:
        tracker.log_metrics({"NoC@85": 1.0})  # MLflow allows no @
        tracker.flush()
        tracker.log_metrics({"loss": 1.0}, 1)
    assert caplog.text.count("refuses metrics") == 1
    assert points(root, "loss") == [(1, 1.0)]
    assert the_run(root).info.status == "FINISHED"


# -- addresses -------------------------------------------------------------------------------------------------------


def test_the_environment_names_the_store(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri(root) == f"sqlite:///{root.uri}/mlflow.db"
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        tracking.tracking_uri(Storage("s3://bucket/prefix"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.tracking_uri(Storage("s3://bucket/prefix")) == "http://server:5000"
    with pytest.raises(ValueError, match="open http://server:5000 in a browser"):
        tracking.ui_command(root)


@pytest.mark.parametrize("uri", ["nonsense://x", "file:///tmp/mlruns"])
def test_a_store_of_another_kind_is_refused(root: Storage, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match="MLflow"):
        tracking.open_run(root, **ABOUT)


def test_the_ui_stays_on_the_loopback_address(root: Storage) -> None:
    tracking.connect(root)
    port = free_port()
    command, environment = tracking.ui_command(root, port)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == str(port)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{root.uri}/mlflow.db"
    assert environment["PATH"] == os.environ["PATH"]


def test_the_password_of_a_store_is_on_no_command_line(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mis:canary-password@127.0.0.1:9/mlflow")
    monkeypatch.setattr(tracking, "connect", lambda root: None)  # no such server here
    command, environment = tracking.ui_command(root, free_port())
    assert "canary-password" not in " ".join(command)
    assert "canary-password" in environment["MLFLOW_BACKEND_STORE_URI"]


def test_no_page_for_a_root_without_runs_or_on_a_taken_port(root: Storage) -> None:
    mistyped = Storage(f"{root.uri}-mistyped")
    with pytest.raises(DataError, match=r"there are no runs yet: .*mlflow\.db does not exist"):
        tracking.ui_command(mistyped, free_port())
    assert not Path(mistyped.uri).exists(), "a mistyped root must not be made"
    tracking.connect(root)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: address already in use; choose another one"):
            tracking.ui_command(root, port)
    assert str(port) in tracking.ui_command(root, port)[0]


def test_a_model_is_found_by_run_or_fingerprint(root: Storage) -> None:
    with tracking.open_run(root, **ABOUT) as first:
        first.set_model(Storage("/models/first"))
    with tracking.open_run(root, **{**ABOUT, "fingerprint": "0123ffffffffffff"}) as second:
        second.set_model(Storage("/models/second"))
    assert first.run_id is not None
    assert tracking.find_model(root, first.run_id) == Storage("/models/first")
    assert tracking.find_model(root, "0123f") == Storage("/models/second")
    with pytest.raises(ValueError, match=r"2 models .*'0123'"):
        tracking.find_model(root, "0123")
    with pytest.raises(ValueError, match="no run with a model"):
        tracking.find_model(root, "beef")


def test_importing_it_turns_usage_reports_off() -> None:
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}  # not CI, not pytest
    code = (
        "from mis_platform import tracking\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "print(is_telemetry_disabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")


# -- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_row_lies_under_its_sweep_also_when_opened_again(root: Storage) -> None:
    for _ in range(2):
        with (
            tracking.open_run(root, **ABOUT) as sweep,
            tracking.open_run(
                root, **ABOUT | {"fingerprint": "row", "name": "row"}, parent=ABOUT["fingerprint"]
            ) as row,
        ):
            pass
        client = tracking.connect(root)
        assert client.get_run(str(row.run_id)).data.tags[tracking.PARENT] == sweep.run_id
        assert tracking.PARENT not in client.get_run(str(sweep.run_id)).data.tags


def test_the_commit_that_began_a_run_stays(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring an old model with newer code does not relabel its training."""
    seen = []
    for commit in ("aaaa", "aaaa", "bbbb", None, "cccc", "aaaa"):
        monkeypatch.setattr(tracking, "git_commit", lambda commit=commit: commit)
        with tracking.open_run(root, **ABOUT):
            pass
        tags = the_run(root).data.tags
        seen.append((tags["mlflow.source.git.commit"], tags.get("latest.mlflow.source.git.commit")))
    newest = (None, None, "bbbb", "bbbb", "cccc", "aaaa")
    assert seen == [("aaaa", commit) for commit in newest]


def test_a_run_that_other_code_has_gone_on_with_says_so(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that only reports on it changes nothing."""
    seen = []
    attempts = [("a", True), ("b", False), ("a", True), (None, True), ("b", True), ("b", True), ("a", True)]
    for commit, computes in attempts:
        monkeypatch.setattr(tracking, "git_commit", lambda commit=commit: commit)
        with tracking.open_run(root, **ABOUT, computes=computes):
            pass
        seen.append(the_run(root).data.tags.get("mis.code_changed"))
    assert seen == [None, None, None, None, "a, b", "a, b", "a, b, a"]


def test_an_error_is_forgotten_when_the_next_attempt_begins(root: Storage) -> None:
    with pytest.raises(RuntimeError), tracking.open_run(root, **ABOUT):
        raise RuntimeError("no memory")
    assert tracking.ERROR in the_run(root).data.tags
    with tracking.open_run(root, **ABOUT):
        pass
    assert tracking.ERROR not in the_run(root).data.tags
    assert the_run(root).info.status == "FINISHED"


def test_a_model_that_is_gone_does_not_hold_up_the_record(root: Storage, tmp_path: Path) -> None:
    with tracking.open_run(root, **ABOUT) as tracker:
        tracker.register_model(Storage(str(tmp_path / "gone")), "mis-test", (224, 224), "")
    assert the_run(root).info.status == "FINISHED"
    assert not list((tmp_path / "mlflow-spool").glob("[!.]*"))


def test_a_model_is_registered_once_for_each_content(root: Storage, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    client, champions = tracking.connect(root), []
    for weights in (b"first", b"first", b"second", b"first"):
        (model / "model.safetensors").write_bytes(weights)
        with tracking.open_run(root, **ABOUT) as tracker:
            tracker.register_model(Storage(str(model)), "mis-test", (224, 448), "CC-BY-NC 4.0")
        champions.append(int(client.get_model_version_by_alias("mis-test", "champion").version))
    assert champions == [1, 1, 2, 1], "the best is who was called so last"
    versions = client.search_model_versions("name = 'mis-test'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert {version.tags["licence"] for version in versions} == {"CC-BY-NC 4.0"}
    about = Path(versions[0].source) / "MLmodel"
    signature = Model.load(str(about)).signature
    assert [each.name for each in signature.inputs.inputs] == ["image", "previous_mask", "points"]
    assert signature.inputs.inputs[0].shape == (-1, 3, 224, 448)
    assert (Path(versions[0].source) / "model.safetensors").exists()
