"""One attempt at a time on an artifact, and none that was replaced may go on writing.

On a local disk the kernel's lock says who holds an artifact: it is gone with its process. Object stores have none, and
NFS may keep it to one machine. There a lease says so: a small file that each attempt writes once, and beside it a
counter that its holder raises every few seconds. Who wants it watches: a counter that moves belongs to somebody alive,
one that stands still for `PATIENCE` seconds of the watcher's own clock may be taken. No times of two machines are ever
compared. Of two that take it at once, the later write stays (Fischer's algorithm): each looks again after `SETTLE`
seconds. The counter has a file of its own so that a holder that fell asleep just before raising it, and wakes up when
it was replaced, overwrites a counter and not the lease.

Taking over makes a new attempt, and a `Fence` travels with everything that an attempt writes with, to its workers too:
it reads the lease before each write, and stops an attempt that was replaced while it could not know. Between that look
and the write there is a gap that no store without conditional writes closes; docs/decisions/008 says why what fits
through it does no harm.
"""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from mis_platform.storage import Storage, StorageError, reason_of

LOCK_FILE, LEASE_FILE, BEAT_FILE = ".lock", ".lease", ".beat"
HEARTBEAT, PATIENCE, SETTLE = 5.0, 40.0, 1.0  # seconds
POLL_SECONDS = 0.5

T = TypeVar("T", "Lease", "Beat")


@dataclass(frozen=True)
class Lease:
    """Who works on an artifact."""

    attempt: str  # random
    epoch: int  # 1 for the first attempt at this artifact, and one more for each that follows
    host: str  # for people
    machine: str  # the running kernel and its process numbers: equal only where `process` means the same
    process: int

    def __str__(self) -> str:
        return f"attempt {self.epoch} ({self.attempt[:8]}, process {self.process} on {self.host})"


@dataclass(frozen=True)
class Beat:
    """A sign of life of the attempt that has the lease; those of other attempts say nothing."""

    attempt: str
    count: int  # raised while the attempt is alive
    is_last: bool = False  # the attempt has given the lease back


@dataclass(frozen=True)
class LeaseFence:
    """Lets one attempt write as long as the lease is its own."""

    uri: str
    mine: Lease

    def check(self, name: str) -> None:
        """Raises StorageError once the lease is gone or another attempt's. name: what is about to be written."""
        now = read_lease(_opened(self.uri))
        if now is None or now.attempt != self.mine.attempt:
            other = "its lease was removed" if now is None else f"{now} has taken over"
            raise StorageError(f"{self.mine} must not write {name} in {_opened(self.uri)} any more: {other}")


@contextlib.contextmanager
def hold(directory: Storage) -> Iterator[Storage]:
    """The directory, to write with, while nobody else works on it; given back at the end or with our death.

    Raises StorageError when somebody else does. What was taken from us raises StorageError at the next write.
    """
    with _kernel_lock(directory):
        mine = _take(directory)
        done = threading.Event()
        heart = threading.Thread(target=_keep_beating, args=(directory, mine, done), name="lease", daemon=True)
        heart.start()
        try:
            yield directory.fenced(LeaseFence(directory.uri, mine))
        finally:
            done.set()
            heart.join(timeout=HEARTBEAT)
            with contextlib.suppress(OSError):  # then it is free after PATIENCE seconds
                _beat_if_mine(directory, mine, Beat(mine.attempt, count=0, is_last=True))


def read_lease(directory: Storage) -> Lease | None:
    """Of the last attempt; None if nobody ever worked here. Raises StorageError when the store does not answer."""
    return _read(directory, LEASE_FILE, Lease)


def last_holder(directory: Storage) -> Lease | None:
    """The last attempt, unless it has given the lease back."""
    lease = read_lease(directory)
    return None if lease is None or _is_released(directory, lease) else lease


def _take(directory: Storage) -> Lease:
    before = read_lease(directory)
    is_free = before is None or _is_dead(before) or _was_local(directory, before) or _is_released(directory, before)
    if before is not None and not is_free and _moves(directory, before):
        raise StorageError(f"another mis process is working on {directory}: {before}; wait for it or stop it")
    mine = Lease(
        attempt=uuid.uuid4().hex,
        epoch=1 if before is None else before.epoch + 1,
        host=socket.gethostname(),
        machine=_machine(),
        process=os.getpid(),
    )
    directory.write_bytes(LEASE_FILE, _text(mine))
    if directory.local is None:
        time.sleep(SETTLE)
    now = read_lease(directory)
    if now is None or now.attempt != mine.attempt:
        raise StorageError(f"another mis process began to work on {directory} just now: {now}; wait for it or stop it")
    return mine


def _was_local(directory: Storage, before: Lease) -> bool:
    """The kernel's lock, which we hold, tells of all processes of this machine."""
    return directory.local is not None and before.machine == _machine()


def _is_dead(lease: Lease) -> bool:
    """For certain; a process elsewhere is never known to be."""
    return lease.machine == _machine() and not Path(f"/proc/{lease.process}").exists()


def _is_released(directory: Storage, lease: Lease) -> bool:
    beat = _beat_of(directory, lease)
    return beat is not None and beat.is_last


def _moves(directory: Storage, lease: Lease) -> bool:
    """Whether the lease's holder gives a sign of life while we watch, or another attempt takes it."""
    before, began = _beat_of(directory, lease), time.monotonic()
    while time.monotonic() - began < PATIENCE:
        time.sleep(POLL_SECONDS)
        if read_lease(directory) != lease:
            return True
        now = _beat_of(directory, lease)
        if now is not None and now != before:
            return not now.is_last
    return False


def _keep_beating(directory: Storage, mine: Lease, done: threading.Event) -> None:
    for count in itertools.count(1):
        if done.wait(HEARTBEAT):
            return
        with contextlib.suppress(OSError):  # the store is away for a while; so it is for those who watch
            if not _beat_if_mine(directory, mine, Beat(mine.attempt, count)):
                return


def _beat_if_mine(directory: Storage, mine: Lease, beat: Beat) -> bool:
    now = read_lease(directory)
    if now is None or now.attempt != mine.attempt:
        return False
    directory.write_bytes(BEAT_FILE, _text(beat))
    return True


def _beat_of(directory: Storage, lease: Lease) -> Beat | None:
    beat = _read(directory, BEAT_FILE, Beat)
    return beat if beat is not None and beat.attempt == lease.attempt else None


def _read(directory: Storage, name: str, kind: type[T]) -> T | None:
    try:
        return kind(**json.loads(directory.read_bytes(name)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # somebody damaged it: as if there were none
        return None


def _text(record: Lease | Beat) -> bytes:
    return json.dumps(asdict(record)).encode()


@functools.lru_cache(maxsize=64)
def _opened(uri: str) -> Storage:
    """Opening a file system anew for every write would take longer than the look."""
    return Storage(uri)


@functools.cache
def _machine() -> str:
    with contextlib.suppress(OSError):  # not Linux
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return uuid.uuid4().hex


@contextlib.contextmanager
def _kernel_lock(directory: Storage) -> Iterator[None]:
    """Hold a local directory against other processes; released by the kernel if we are killed."""
    if directory.local is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            directory.local.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(directory.local / LOCK_FILE, "w"))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = read_lease(directory)
            raise StorageError(
                f"another mis process is working on {directory}: {holder or 'just started'}; wait for it or stop it"
            ) from None
        except OSError as error:
            raise StorageError(f"cannot lock {directory}: {reason_of(error)}") from error
        yield
