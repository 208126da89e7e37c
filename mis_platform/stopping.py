"""The wish to stop, for work in another thread or process than the one that got the signal.

In the process that people started, a signal becomes an exception of its main thread. The trial of a sweep hears from
that process instead, and its work looks here now and then.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn

from mis_platform.errors import Preempted

SWALLOWED_SECONDS = 0.1  # until a signal whose exception was lost comes again

_asked: ContextVar[Callable[[], bool] | None] = ContextVar("asked", default=None)
_signals: "Signals | None" = None  # that this process is in


@contextlib.contextmanager
def stopped_by(asked: Callable[[], bool]) -> Iterator[None]:
    """Work of this thread stops when `asked()` is true; it is called several times a second."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def check() -> None:
    """Raise Preempted if this thread's work is to stop."""
    asked = _asked.get()
    if asked is not None and asked():
        raise Preempted


def abandon(message: str) -> None:
    """Leave at once, from any thread, as a second Ctrl-C does: what the work needs is lost for good.

    In the process that people started (see `Signals`) the message is told and the exit code is that of a loss. Anywhere
    else, as in a notebook, nothing happens: there the process is not ours to end.
    """
    if _signals is not None:
        _end(_signals.lost(message))


def _end(code: int) -> NoReturn:
    """Leave at once, and end the processes that we started."""
    psutil: Any = sys.modules.get("psutil")  # it comes inside Ray: without it there is nothing to end
    if psutil is not None:  # Ray's processes notice that we are gone, but some of them only after a minute
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    os._exit(code)


class Signals:
    """A context in which signals stop the work instead of the process: after SIGTERM and Ctrl-C it can be resumed.

    SIGTERM raises Preempted, once: whoever sends it may send it again and again. A second Ctrl-C leaves at once with
    the exit code given, also from a stop that takes long, and ends the processes that we started.

    An exception that is raised while Python calls a finaliser or a weak reference's callback, as there are many while
    modules are imported and Ray starts, is printed and forgotten. Ours come again.
    """

    is_stopping = is_preempted = False

    def __init__(self, interrupted: int, lost: Callable[[str], int]) -> None:
        """lost: for `abandon`, tells people its message and returns the exit code; it is called in any thread."""
        self._interrupted, self.lost = interrupted, lost

    def __enter__(self) -> "Signals":
        global _signals
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGTERM, self._preempt), (signal.SIGINT, self._interrupt)):
                self._before[number] = signal.signal(number, handler)
            sys.unraisablehook = self._come_again
        _signals = self
        return self

    def __exit__(self, *_: object) -> None:
        global _signals
        _signals = None
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _preempt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._leave)
        if not self.is_stopping:
            self.is_stopping = self.is_preempted = True
            raise Preempted

    def _interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._leave)
        self.is_stopping = True
        raise KeyboardInterrupt

    def _leave(self, *_: object) -> None:
        _end(self._interrupted)

    def _come_again(self, lost: Any) -> None:
        """What Python calls for an exception that nobody can catch."""
        if lost.exc_type not in (KeyboardInterrupt, Preempted):
            self._hook(lost)
            return
        self.is_stopping = False
        number, handler = signal.SIGINT, self._interrupt
        if lost.exc_type is Preempted:
            number, handler = signal.SIGTERM, self._preempt
        signal.signal(number, handler)
        again = threading.Timer(SWALLOWED_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
