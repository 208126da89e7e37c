"""The wish to stop, for work in another thread or process than the one that got the signal.

In the process that people started, a signal becomes an exception of its main thread. The trial of a sweep hears from
that process instead, and its work looks here now and then.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from mis_platform.errors import Preempted

_asked: ContextVar[Callable[[], bool] | None] = ContextVar("asked", default=None)


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
