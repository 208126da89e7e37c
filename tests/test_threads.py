"""Rows that are worked on side by side, and what is made ahead of its use."""

import threading
from itertools import count

import pytest

from mis_platform.threads import in_threads, in_turns, one_ahead


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


def test_tasks_take_turns_and_end_in_order():
    told = []

    def task(name, pauses):
        for turn in range(pauses):
            told.append((name, turn))
            yield
        told.append((name, "end"))
        return name

    assert list(in_turns(task(name, 2) for name in "ab")) == ["a", "b"]
    assert told == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", "end"), ("b", "end")]
    assert list(in_turns([task("c", 0), task("d", 0)])) == ["c", "d"]


def test_what_a_task_returned_is_used_before_the_next_one_goes_on():
    used = []

    def task(name):
        yield
        used.append(f"{name} ends")
        return name

    for name in in_turns(task(name) for name in "ab"):
        used.append(f"{name} used")
    assert used == ["a ends", "a used", "b ends", "b used"]


def counting(last, made):
    """A function that returns 0, 1, ..., `last`, then None; `made` gets what it returned."""
    numbers = count()

    def make():
        made.append(number if (number := next(numbers)) <= last else None)
        return made[-1]

    return make


def test_what_is_made_ahead_comes_in_order_until_there_is_nothing():
    made = []
    assert list(one_ahead(counting(4, made))) == [0, 1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4, None]
    assert list(one_ahead(lambda: None)) == []


def test_the_next_one_is_made_while_this_one_is_in_use():
    threads, is_second = [], threading.Event()

    def make():
        threads.append(threading.current_thread())
        if len(threads) == 2:
            is_second.set()
        return len(threads)

    ahead = one_ahead(make)
    assert next(ahead) == 1
    assert is_second.wait(10)
    ahead.close()
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()


def test_an_error_is_raised_where_its_result_is_asked_for():
    numbers = iter((1, 2))

    def make():
        try:
            return next(numbers)
        except StopIteration:
            raise ValueError("the third") from None

    ahead = one_ahead(make)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(ahead)
    assert list(ahead) == []


def test_closing_waits_for_what_is_being_made_and_makes_no_more():
    made, may_go_on = [], threading.Event()

    def make():
        if made:
            assert may_go_on.wait(10)
        made.append(threading.current_thread())
        return made

    ahead = one_ahead(make)
    next(ahead)
    threading.Timer(0.1, may_go_on.set).start()
    ahead.close()
    assert len(made) == 2
    assert not made[0].is_alive()
