"""What the driver of a training and its workers tell each other: metrics and signs of life one way, wishes the other.

A worker that hangs says nothing, and the others wait for it in the next exchange of gradients. So every worker gives a
sign from a thread of its own every second: a process that was stopped or lost falls silent, and of workers that live
but do not get on, the one that is furthest behind is known.
"""

import contextlib
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SECONDS_BETWEEN_SIGNS = 1.0
SLOW_STEPS = 20  # a step may take this many times the usual one
KNOWN_STEPS = 3  # before it is known what is usual
KILL_SECONDS = 20.0  # for a task on the node of a hung worker
STARTING, LOADING, COMPUTING, SAVING = "starting", "loading", "computing", "saving"


class Sign(NamedTuple):
    """What a worker says about itself."""

    rank: int
    node_id: str
    host: str
    pid: int
    step: int  # finished so far, of the whole training
    doing: str  # one of the four above


class Heard(NamedTuple):
    """The newest sign of a worker, as the driver gets it."""

    sign: Sign
    silence: float  # seconds since it was given
    unchanged: float  # seconds since it said anything new


class News(NamedTuple):
    """What has happened since the driver asked last."""

    rows: list[dict[str, float]]  # metrics of steps, in order
    notes: list[str]  # for people
    starts: list[int]  # the first step of each start of the workers
    heard: list[Heard]


class Channel:
    """An actor beside the driver, which both sides call."""

    def __init__(self, images_at_once: int, halvings: int = 1) -> None:
        """images_at_once: of a forward pass, to begin with; halvings: how often a GPU may be too small for them."""
        self._rows: list[dict[str, float]] = []
        self._notes: list[str] = []
        self._starts: list[int] = []
        self._signs: dict[int, tuple[Sign, float, float]] = {}  # rank -> sign, when given, when new
        self._is_stopping = False
        self._failure: Exception | None = None
        self._images_at_once = self._first_images_at_once = images_at_once
        self._halvings = halvings

    def begin(self, step: int) -> None:
        """The workers start, or start again, with `step`."""
        self._starts.append(step)

    def images_at_once(self) -> int:
        """Of a forward pass, after the halvings so far."""
        return self._images_at_once

    def out_of_memory(self, images_at_once: int) -> None:
        """A worker's GPU is too small for that many: the workers start again with half of them, `halvings` times."""
        if images_at_once > self._images_at_once:
            return  # another worker has said so
        if images_at_once == 1 or self._halvings == 0:
            smaller = "take a smaller model.variant or model.image_size"
            advice = f"set it below {images_at_once}" if images_at_once > 1 else smaller
            given = f"resources.batch_per_device={self._first_images_at_once}"
            self.fail(
                ValueError(f"a GPU has too little memory for {images_at_once} image(s) at once, {given}; {advice}")
            )
            return
        self._halvings -= 1
        self._images_at_once = images_at_once // 2
        self._notes.append(
            f"a GPU has too little memory for {images_at_once} images at once; going on with {self._images_at_once}, "
            "which changes no result (resources.batch_per_device)"
        )

    def report(self, row: dict[str, float]) -> None:
        """The metrics of a step."""
        self._rows.append(row)

    def note(self, text: str) -> None:
        """A line for people."""
        self._notes.append(text)

    def beat(self, sign: Sign) -> bool:
        """A sign of life; whether the driver wants to stop."""
        now = time.monotonic()
        before = self._signs.get(sign.rank)
        changed = before[2] if before is not None and before[0] == sign else now
        self._signs[sign.rank] = (sign, now, changed)
        return self._is_stopping

    def leave(self, rank: int, pid: int) -> None:
        """That worker will give no more signs."""
        if rank in self._signs and self._signs[rank][0].pid == pid:
            del self._signs[rank]

    def stop(self) -> None:
        """The driver wants to stop; the workers learn it with their next sign."""
        self._is_stopping = True

    def fail(self, error: Exception) -> None:
        """Keep an error that another attempt would only meet again."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """The first error that `fail` was told, or None."""
        return self._failure

    def take(self) -> News:
        """The news since the last call."""
        now = time.monotonic()
        heard = [Heard(sign, now - given, now - new) for sign, given, new in self._signs.values()]
        news = News(self._rows, self._notes, self._starts, heard)
        self._rows, self._notes, self._starts = [], [], []
        return news


class Pulse:
    """A worker's signs, given by a thread; a context manager."""

    def __init__(self, channel: Any, rank: int) -> None:
        context = ray.get_runtime_context()
        self._channel = channel
        self._sign = Sign(rank, context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), 0, STARTING)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self.is_stopping = False  # what the driver wanted when it was asked last

    @property
    def rank(self) -> int:
        """Of the worker that gives the signs, from 0."""
        return self._sign.rank

    def note(self, text: str) -> None:
        """A line for people, from the driver."""
        self._channel.note.remote(text)

    def says(self, doing: str, step: int) -> None:
        """step: finished so far."""
        self._sign = self._sign._replace(doing=doing, step=step)

    def __enter__(self) -> "Pulse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._channel.leave.remote(self._sign.rank, self._sign.pid)

    def _beat(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # without the driver nobody listens
            while not self._is_over.is_set():
                self.is_stopping = ray.get(self._channel.beat.remote(self._sign))
                self._is_over.wait(SECONDS_BETWEEN_SIGNS)


class Watch:
    """Finds the worker that hangs: silent for `silence` seconds, or stuck in a step for that and 20 usual steps."""

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._seconds: deque[float] = deque(maxlen=100)  # of each step

    def note(self, seconds: float) -> None:
        """How long a step took."""
        self._seconds.append(seconds)

    @property
    def longest_step(self) -> float:
        """Seconds; infinite as long as it is not known how long a step usually takes."""
        if len(self._seconds) < KNOWN_STEPS:
            return float("inf")
        return max(self._silence, SLOW_STEPS * statistics.median(self._seconds))

    def hung(self, heard: Sequence[Heard]) -> Heard | None:
        """The worker that is to be killed, if any.

        Reading photos and writing a checkpoint may take as long as the storage does: there only silence counts.
        """
        silent = [each for each in heard if each.silence > self._silence]
        if silent:
            return max(silent, key=lambda each: each.silence)
        if not heard or min(each.unchanged for each in heard) <= self.longest_step:
            return None
        behind = min(each.sign.step for each in heard)
        last = [each for each in heard if each.sign.step == behind]  # the others wait for one of these
        return last[0] if all(each.sign.doing == COMPUTING for each in last) else None


def described(heard: Heard) -> str:
    """One line for people."""
    sign = heard.sign
    what = (
        f"rank {sign.rank} (node {sign.node_id[:8]} at {sign.host}, process {sign.pid}, last finished step {sign.step})"
    )
    if heard.silence > 2 * SECONDS_BETWEEN_SIGNS:
        return f"{what} has given no sign of life for {heard.silence:.0f} s"
    return f"{what} has not got on with its step for {heard.unchanged:.0f} s"


def end_process(sign: Sign) -> bool:
    """Kill the process of a worker from a task on its node; False if it is gone already or the node does not answer."""
    there = NodeAffinitySchedulingStrategy(sign.node_id, soft=False)
    kill = ray.remote(kill_worker).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return bool(ray.get(kill.remote(sign.pid), timeout=KILL_SECONDS))
    except ray.exceptions.RayError:
        return False


def kill_worker(pid: int) -> bool:
    """SIGKILL, which ends a stopped process too, to a training worker of this machine; whether it was one."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    if not name.startswith(b"ray::RayTrainWorker"):
        return False  # it is gone, and another process has its number
    os.kill(pid, signal.SIGKILL)
    return True
