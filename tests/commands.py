"""`mis` for tests: in this process, or as a process of its own that is watched, signalled and never left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mis_platform import cli

MARK = "MIS_TEST_PROCESS"  # in the environment of the command and of everything that it starts
REPOSITORY = Path(__file__).resolve().parent.parent

TINY = [
    *("--set", "features.extractor=color_texture"),
    *("--set", "model.variant=vit_xt", "--set", "model.init=random", "--set", "model.image_size=224"),
    *("--set", "train.batch_size=2", "--set", "train.learning_rate=1e-4", "--set", "resources.log_every=1"),
]


def mis(*arguments: str | Path) -> int:
    """Exit code of `mis ARGUMENTS`, run in this process."""
    argv, sys.argv = sys.argv, ["mis", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = argv
    return int(stop.value.code or 0)


class Command:
    """A running `mis ARGUMENTS`; its standard error goes to a file."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.errors = folder / f"{self.mark}.err"
        paths = [str(REPOSITORY), str(REPOSITORY / "tests"), *sys.path]
        with open(self.errors, "wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from mis_platform.cli import main; main()", *arguments],
                env={**os.environ, MARK: self.mark, "PYTHONPATH": os.pathsep.join(paths), **environment},
                cwd=folder,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )

    def said(self) -> str:
        return self.errors.read_text(encoding="utf8", errors="replace")

    def wait_until(self, is_so: Callable[[], bool], seconds: float) -> None:
        """Fails with what the command said when it ends, or when it takes longer than `seconds`."""
        until = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said()}"
            assert time.monotonic() < until, f"not within {seconds} s: {self.said()}"
            time.sleep(0.05)

    def wait_for_step(self, out: Path, step: int, seconds: float = 150) -> None:
        """Until a checkpoint of that step or a later one is there; out: the folder of checkpoint artifacts."""
        self.wait_until(lambda: newest_step(out) >= step, seconds)

    def send(self, number: int, *, to_all: bool = False) -> None:
        """to_all: to the whole group of processes, as a terminal does with Ctrl-C."""
        (os.killpg if to_all else os.kill)(self.process.pid, number)

    def end(self, seconds: float) -> tuple[int, float]:
        """Wait for the end: exit code and how long it took."""
        began = time.monotonic()
        try:
            return self.process.wait(seconds), time.monotonic() - began
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said()}") from None

    def survivors(self) -> list[tuple[int, str]]:
        """(process id, name) of all that the command started and that lives."""
        return marked(self.mark)

    def wait_alone(self, seconds: float) -> float:
        """Until nothing that the command started lives; how long that took."""
        began = time.monotonic()
        while left := self.survivors():
            assert time.monotonic() - began < seconds, f"left behind after {seconds} s: {left}"
            time.sleep(0.2)
        return time.monotonic() - began

    def kill(self) -> None:
        """End it and all that it started."""
        until = time.monotonic() + 10
        while (left := [pid for pid, _ in self.survivors()]) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        self.process.wait(10)


def marked(mark: str) -> list[tuple[int, str]]:
    """(process id, name) of all processes with this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(folder.name), name[:100]))
    return found


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator[Command]:
    command = Command(folder, *arguments, **environment)
    try:
        yield command
    finally:
        command.kill()


def newest_step(out: Path) -> int:
    """Of the whole checkpoints below a folder of checkpoint artifacts; 0 if there is none."""
    return max((int(file.parent.name) for file in out.glob("*/steps/*/complete.json")), default=0)
