"""Progress for people: one line that is rewritten on a terminal, one line every ten seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REDRAWS = 0.2


_listener: ContextVar[Callable[[bool], None] | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def heard_by(listener: Callable[[bool], None]) -> Iterator[None]:
    """`listener` is called at each update of a Progress of this thread, with whether it has got on since the last one.

    What gets on does not hang. What does not may be told to stop: an exception of the listener ends the work.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """Counts units of work and prints rate and time left, to standard error.

    total: units of work; start: units that an earlier attempt had finished (they do not count for the rate).
    """

    def __init__(self, label: str, total: int, unit: str, start: int = 0, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.start = self.done = start
        self.stream = stream or sys.stderr
        self.began = time.monotonic()
        self.printed = 0.0
        self.said: tuple[int, str] | None = None

    def update(self, done: int, note: str = "") -> None:
        """done: units finished so far, of all attempts; note: a few words, e.g. the loss."""
        has_got_on, self.said = self.said != (done, note), (done, note)
        if (listener := _listener.get()) is not None:
            listener(has_got_on)
        was_done, self.done = self.done >= self.total, done
        now = time.monotonic()
        pause = SECONDS_BETWEEN_REDRAWS if self.stream.isatty() else SECONDS_BETWEEN_LINES
        if not was_done and (now - self.printed >= pause or done >= self.total):
            self.printed = now
            self._print(self.line(now, note))

    def line(self, now: float, note: str = "") -> str:
        """What is printed at time `now` (seconds, of time.monotonic): done, rate, time left or, at the end, taken."""
        seconds = max(now - self.began, 1e-6)
        rate = (self.done - self.start) / seconds
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        share = f"{self.done}/{self.total} {self.unit}"
        speed = f"{rate:.1f}" if rate >= 1 or rate == 0 else f"{rate:.2g}"
        pace = f"{speed} {self.unit}/s, {duration(left)} left" if self.done < self.total else f"{duration(seconds)}"
        return f"{self.label}: {share}, {pace}" + (f", {note}" if note else "")

    def close(self) -> None:
        """End the line that a terminal shows; elsewhere every line has ended already."""
        if self.stream.isatty():
            print(file=self.stream, flush=True)

    def _print(self, line: str) -> None:
        if self.stream.isatty():
            print(f"\r\x1b[2K{line}", end="", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)


def say(label: str, text: str) -> None:
    """A line that stays, to standard error."""
    print(f"{label}: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """ "4 s", "3 min 20 s", "5 h 10 min"; "?" when unknown."""
    if seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
