"""Threads for work that NumPy and OpenCV do outside Python's lock."""

import functools
import os
from collections.abc import Callable
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


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST, os.cpu_count() or 1), "clicks")
