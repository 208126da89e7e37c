"""Leases: one attempt at a time on an artifact, told by counters and the kernel, never by the time of day."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3_server import CREDENTIALS, s3_server, uri
from training_material import tiny_run

from mis_platform import leases
from mis_platform.leases import BEAT_FILE, LEASE_FILE, Beat, hold, last_holder, read_lease
from mis_platform.stages import training_loop
from mis_platform.stages.training_loop import Learner, Schedule, complete_steps, save_checkpoint
from mis_platform.storage import Storage, StorageError

HOLDER = """
    import sys, time
    from mis_platform import leases
    from mis_platform.storage import Storage, StorageError
    leases.HEARTBEAT, leases.PATIENCE, leases.SETTLE = 0.2, float(sys.argv[2]), 0.3
    wrong = float(sys.argv[3])  # seconds that the clock of this process is off
    time.time = lambda now=time.time: now() + wrong
    try:
        with leases.hold(Storage(sys.argv[1])) as held:
            print("holds", flush=True)
            while sys.stdin.readline() == "write\\n":
                held.write_bytes("part", b"1")
                print("wrote", flush=True)
    except StorageError as error:
        print(error, flush=True)
    """


class Holder:
    """A process that holds a directory and writes when it is told to."""

    def __init__(self, storage: Storage, patience: float = 3.0, clock: float = 0.0) -> None:
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), storage.uri, str(patience), str(clock)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as address:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield address


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "stage"))
    return Storage(uri(request.getfixturevalue("store"), tmp_path.name))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEARTBEAT", 0.2), ("PATIENCE", 3.0), ("SETTLE", 0.3), ("POLL_SECONDS", 0.1)):
        monkeypatch.setattr(leases, name, seconds)


def as_elsewhere(storage: Storage) -> None:
    """Make the lease look as if its holder were on another machine, of which nothing is known."""
    lease = read_lease(storage)
    assert lease is not None
    storage.write_bytes(LEASE_FILE, json.dumps({**dataclasses.asdict(lease), "machine": "other"}).encode())


def test_the_second_process_is_refused_and_told_who_holds_it(storage: Storage) -> None:
    first, second = Holder(storage), None
    try:
        assert first.line() == "holds"
        second = Holder(storage)
        assert f"another mis process is working on {storage.uri}: attempt 1 (" in (said := second.line())
        assert f"process {first.process.pid} on " in said
        assert last_holder(storage) is not None
        assert first.tell("write") == "wrote"
    finally:
        first.end()
        if second:
            second.end()
    assert last_holder(storage) is None
    with hold(storage) as held:  # given back: no waiting
        held.write_bytes("part", b"2")
    lease = read_lease(storage)
    assert lease is not None
    assert lease.epoch == 2
    assert last_holder(storage) is None


def test_the_lease_of_a_killed_process_is_free_at_once(storage: Storage) -> None:
    holder = Holder(storage)
    assert holder.line() == "holds"
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    began = time.monotonic()
    with hold(storage):
        assert time.monotonic() - began < leases.PATIENCE


@pytest.mark.parametrize("clock", [-3600.0, 3600.0])
def test_a_living_holder_elsewhere_is_seen_whatever_the_clocks_say(store: str, tmp_path: Path, clock: float) -> None:
    storage = Storage(uri(store, tmp_path.name))
    holder = Holder(storage, clock=clock)
    try:
        assert holder.line() == "holds"
        lease = read_lease(storage)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "_machine", lambda: "another machine")
            with pytest.raises(StorageError, match="another mis process"), hold(storage):
                pass
        assert lease is not None
        assert holder.tell("write") == "wrote"
    finally:
        holder.end()


def test_a_holder_that_was_asleep_is_replaced_and_cannot_write_any_more(store: str, tmp_path: Path) -> None:
    """A machine that was suspended, or cut off: its process wakes up and knows nothing."""
    storage = Storage(uri(store, tmp_path.name))
    first = Holder(storage, patience=1.0)
    try:
        assert first.line() == "holds"
        assert first.tell("write") == "wrote"
        first.process.send_signal(signal.SIGSTOP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "_machine", lambda: "another machine")
            patch.setattr(leases, "PATIENCE", 1.0)
            with hold(storage) as held:
                held.write_bytes("part", b"2")
                first.process.send_signal(signal.SIGCONT)
                said = first.tell("write")
                assert "attempt 1 (" in said
                assert "must not write part" in said
                assert "attempt 2 (" in said
                assert "has taken over" in said
                held.write_bytes("part", b"3")  # and the zombie's end took nothing from us
    finally:
        first.process.send_signal(signal.SIGCONT)
        first.end()
    assert storage.read_bytes("part") == b"3"


def test_a_sign_of_life_that_arrives_late_takes_nothing_from_the_next(storage: Storage) -> None:
    """Its sender fell asleep after it had seen that the lease was its own, and was replaced before it wrote."""
    with hold(storage):
        first = read_lease(storage)
    assert first is not None
    with hold(storage) as held:
        for late in (Beat(first.attempt, 5), Beat(first.attempt, 0, is_last=True)):
            storage.write_bytes(BEAT_FILE, json.dumps(dataclasses.asdict(late)).encode())
            held.write_bytes("part", b"2")
            holder = last_holder(storage)
            assert holder is not None
            assert holder != first
            assert leases._moves(storage, holder)  # seen by the next beat of its own
    assert last_holder(storage) is None


def test_the_fence_travels_with_children_and_to_other_processes(storage: Storage) -> None:
    with hold(storage) as held:
        worker = pickle.loads(pickle.dumps(held)).child("steps", "0001")  # noqa: S301
        worker.write_bytes("weights", b"1")
        as_elsewhere(storage)  # whoever took it from us
        lease = read_lease(storage)
        assert lease is not None
        taken = dataclasses.replace(lease, attempt="f" * 32, epoch=2)
        storage.write_bytes(LEASE_FILE, json.dumps(dataclasses.asdict(taken)).encode())
        for forbidden in (lambda: worker.write_bytes("weights", b"2"), lambda: worker.remove("weights")):
            with pytest.raises(StorageError, match=r"attempt 2 \(ffffffff, .* has taken over"):
                forbidden()
    assert storage.child("steps", "0001").read_bytes("weights") == b"1"
    assert read_lease(storage) == taken  # not given back either


def test_a_training_that_was_replaced_damages_no_checkpoint(tmp_path: Path) -> None:
    """Saving removes marks and old checkpoints: an attempt of yesterday must not."""
    run = tiny_run()
    model = training_loop.initial_model(run)
    optimizer = training_loop.optimizer_of(model, run.train)
    learner = Learner(run, Schedule(4, run.train), model, model, optimizer, torch.device("cpu"), images_at_once=1)
    storage = Storage(str(tmp_path))
    with hold(storage) as zombie:
        save_checkpoint(zombie, 1, learner, [{"step": 1}])
    with hold(storage) as held:
        for step in (1, 2):
            save_checkpoint(held, step, learner, [{"step": step}])
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "steps").rglob("*")}
        for step in (1, 2, 3):
            with pytest.raises(StorageError, match=r"attempt 1 .* must not write complete.json .* attempt 2 "):
                save_checkpoint(zombie, step, learner, [{"step": step}])
        assert complete_steps(held) == [1, 2]
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "steps").rglob("*")} == files


def test_a_lease_that_stands_still_may_be_taken(storage: Storage) -> None:
    with hold(storage):
        pass
    lease = read_lease(storage)
    assert lease is not None
    forgotten = dataclasses.replace(lease, machine="a machine that is gone")
    storage.write_bytes(LEASE_FILE, json.dumps(dataclasses.asdict(forgotten)).encode())
    storage.remove(BEAT_FILE)  # it did not give the lease back
    began = time.monotonic()
    with hold(storage):
        assert time.monotonic() - began >= leases.PATIENCE


def test_of_many_that_start_at_once_on_an_object_store_one_wins(store: str, tmp_path: Path) -> None:
    storage = Storage(uri(store, tmp_path.name))
    inside, most, refused = [], [], []

    def start() -> None:
        try:
            with hold(storage) as held:
                inside.append(1)
                most.append(len(inside))
                held.write_bytes("part", b"1")
                time.sleep(1.0)
                inside.pop()
        except StorageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1]
    assert len(refused) == 4
    assert all("another mis process" in each for each in refused)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"attempt": 1}'])
def test_a_damaged_lease_stops_nobody(tmp_path: Path, content: bytes) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(LEASE_FILE, content)
    with hold(storage) as held:
        held.write_bytes("part", b"1")
    assert storage.read_bytes("part") == b"1"


def test_a_local_lock_outlives_no_process_even_if_its_children_live_on(tmp_path: Path) -> None:
    code = """
        import subprocess, sys, time
        from mis_platform.leases import hold
        from mis_platform.storage import Storage
        with hold(Storage(sys.argv[1])):
            child = subprocess.Popen(["sleep", "20"])
            print(child.pid, flush=True)
            time.sleep(60)
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        grandchild = int(holder.stdout.readline())
        with pytest.raises(StorageError), hold(Storage(str(tmp_path))):
            pass
        holder.kill()
        holder.wait()
        try:
            with hold(Storage(str(tmp_path))):
                pass
        finally:
            os.kill(grandchild, signal.SIGKILL)
