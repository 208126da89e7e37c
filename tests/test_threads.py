"""Rows that are worked on side by side."""

import threading

import pytest

from mis_platform.threads import in_threads


def test_results_come_in_the_order_of_the_rows():
    assert in_threads(lambda a, b: (a, b), range(40), "ab" * 20) == [*zip(range(40), "ab" * 20)]


def test_one_row_stays_in_this_thread():
    assert in_threads(lambda _: threading.current_thread(), [0]) == [threading.current_thread()]


def test_an_error_is_raised():
    def refuse(number):
        if number == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        in_threads(refuse, range(5))
