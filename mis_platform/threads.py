"""Threads for work outside Python's lock, such as that of NumPy, OpenCV and GPUs."""

import functools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

MOST = 16  # threads: more wait for Python's lock

Result = TypeVar("Result")


def in_threads(function: Callable[..., Result], *columns: Any) -> list[Result]:
    """What `function` makes of each row of `columns`, sequences of one length; in order, on all CPUs.

    The first error is raised.
    """
    if len(columns[0]) == 1:
        return [function(*(column[0] for column in columns))]
    return list(_pool().map(function, *columns))


def in_turns(tasks: Iterable[Generator[None, None, Result]]) -> Iterator[Result]:
    """What each of `tasks` returns, as they end; in order, if all yield as often.

    Each goes on to its next `yield`, where it has to wait for something, before the next one does: in this thread.
    """
    waiting = list(tasks)
    while waiting:
        still = []
        for task in waiting:
            try:
                next(task)
                still.append(task)
            except StopIteration as end:
                yield end.value
        waiting = still


def one_ahead(make: Callable[[], Result | None]) -> Generator[Result, None, None]:
    """What `make` returns, call after call until that is None; each is made while the one before is in use.

    All calls are made by one other thread. An error is raised where its result is asked for; closing the generator
    waits for the call that is under way.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        following = pool.submit(make)
        while (made := following.result()) is not None:
            following = pool.submit(make)
            yield made


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST, os.cpu_count() or 1), "clicks")
