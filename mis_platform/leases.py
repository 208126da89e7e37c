"""One attempt at a time on an artifact, and none that was replaced may go on writing.

On a local disk the kernel's lock says who holds an artifact: it is gone with its process. Object stores have none, and
NFS may keep it to one machine. There the lease itself says so: a small file with a counter that the holder raises every
few seconds. Who wants it watches: a counter that moves belongs to somebody alive, one that stands still for `PATIENCE`
seconds of the watcher's own clock may be taken. No times of two machines are ever compared. Of two that take it at
once, the later write stays (Fischer's algorithm): each looks again after `SETTLE` seconds.

Taking over makes a new attempt, and a `Fence` travels with everything that an attempt writes with, to its workers too:
it reads the lease before each write, and stops an attempt that was replaced while it could not know. Between that look
and the write there is a gap that no store without conditional writes closes; docs/decisions/008 says why what fits
through it does no harm.
"""

import contextlib
import fcntl
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mis_platform.storage import Storage, StorageError, reason_of

LOCK_FILE, LEASE_FILE = ".lock", ".lease"
HEARTBEAT, PATIENCE, SETTLE = 5.0, 40.0, 1.0  # seconds
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Lease:
    """Who works on an artifact."""

    attempt: str  # random
    epoch: int  # 1 for the first attempt at this artifact, and one more for each that follows
    beat: int  # raised while the attempt is alive
    host: str  # for people
    machine: str  # the running kernel and its process numbers: equal only where `process` means the same
    process: int
    is_released: bool = False

    def __str__(self) -> str:
        return f"attempt {self.epoch} ({self.attempt[:8]}, process {self.process} on {self.host})"


@dataclass(frozen=True)
class LeaseFence:
    """Lets one attempt write as long as the lease is its own."""

    uri: str
    mine: Lease

    def check(self, name: str) -> None:
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
        heart = threading.Thread(target=_beat, args=(directory, mine, done), name="lease", daemon=True)
        heart.start()
        try:
            yield directory.fenced(LeaseFence(directory.uri, mine))
        finally:
            done.set()
            heart.join(timeout=HEARTBEAT)
            with contextlib.suppress(OSError):  # then it is free after PATIENCE seconds
                _write_if_mine(directory, replace(mine, is_released=True))


def read_lease(directory: Storage) -> Lease | None:
    """None if nobody ever worked here. Raises StorageError when the store does not answer."""
    try:
        return Lease(**json.loads(directory.read_bytes(LEASE_FILE)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # somebody damaged it: as if there were none
        return None


def is_alive(directory: Storage, patience: float = PATIENCE) -> bool:
    """Whether an attempt works on the directory; takes up to `patience` seconds where only watching tells."""
    lease = read_lease(directory)
    return lease is not None and not lease.is_released and not _is_dead(lease) and _moves(directory, lease, patience)


def _take(directory: Storage) -> Lease:
    before = read_lease(directory)
    is_free = before is None or before.is_released or _is_dead(before) or _was_local(directory, before)
    if before is not None and not is_free and _moves(directory, before, PATIENCE):
        raise StorageError(f"another mis process is working on {directory}: {before}; wait for it or stop it")
    mine = Lease(
        attempt=uuid.uuid4().hex,
        epoch=1 if before is None else before.epoch + 1,
        beat=0,
        host=socket.gethostname(),
        machine=_machine(),
        process=os.getpid(),
    )
    _write(directory, mine)
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


def _moves(directory: Storage, lease: Lease, patience: float) -> bool:
    """Whether the lease changes while we watch: its holder is alive, or another has taken it."""
    began = time.monotonic()
    while time.monotonic() - began < patience:
        time.sleep(min(POLL_SECONDS, patience))
        now = read_lease(directory)
        if now is None or now.is_released:
            return False
        if now != lease:
            return True
    return False


def _beat(directory: Storage, mine: Lease, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT):
        mine = replace(mine, beat=mine.beat + 1)
        with contextlib.suppress(OSError):  # the store is away for a while; so it is for those who watch
            if not _write_if_mine(directory, mine):
                return


def _write_if_mine(directory: Storage, mine: Lease) -> bool:
    now = read_lease(directory)
    if now is None or now.attempt != mine.attempt:
        return False
    _write(directory, mine)
    return True


def _write(directory: Storage, lease: Lease) -> None:
    directory.write_bytes(LEASE_FILE, json.dumps(asdict(lease)).encode())


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
