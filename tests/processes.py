"""Processes that tests start, kill and look after; and this one without its rights."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NOBODY = 65534


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Python with these arguments, as the leader of a process group of its own; both outputs in one pipe."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def running() -> dict[int, tuple[int, str]]:
    """Process id -> its parent and its start time, of all processes that have not ended."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(entry.name)] = (int(fields[1]), fields[19])
    return found


def descendants(pid: int) -> dict[int, str]:
    """Process id -> start time of the children of a process, and of theirs."""
    family, processes = {pid: ""}, running()
    while more := {k: start for k, (parent, start) in processes.items() if parent in family and k not in family}:
        family |= more
    del family[pid]
    return family


def wait_until_gone(family: dict[int, str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := {pid for pid, (_, start) in running().items() if family.get(pid) == start}:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def wait_until(true: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 90) -> None:
    """Until something is true that a child does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def kill_group(child: subprocess.Popen[str], sent: signal.Signals = signal.SIGKILL, patience: float = 60) -> float:
    """Signal a child and its group; the seconds until it ended. What it had started must end, too.

    patience: seconds that this may take after SIGKILL, when nobody is left who could stop Ray's processes: they end by
    themselves, one that is just starting up after half a minute. 0: nobody looks. After other signals it is 10 s.
    """
    family = descendants(child.pid)
    began = time.monotonic()
    os.killpg(child.pid, sent)
    child.communicate(timeout=60)
    seconds = time.monotonic() - began
    if sent != signal.SIGKILL or patience:
        wait_until_gone(family, patience if sent == signal.SIGKILL else 10)
    return seconds


def named(pids: dict[int, str], part: str) -> list[int]:
    """Those with `part` in their command line."""
    found = []
    for pid in pids:
        try:
            if part in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                found.append(pid)
        except OSError:
            continue
    return found


def memory(pid: int) -> int:
    """Bytes that a process holds now, without what it shares with others; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssFile"))


@contextlib.contextmanager
def common_ground() -> Iterator[Path]:
    """A folder that every user may enter; pytest's are for their owner alone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom the kernel denies what permissions deny: root never is, so where root runs the tests, as nobody.

    What is imported meanwhile must have been imported before: nobody may not read root's Python.
    """
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
