"""Progress lines: rate and time left, few of them in a log, one that is rewritten on a terminal."""

import io

import pytest

from mis_platform.progress import Progress, duration, heard_by


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_few_lines_and_the_last_one_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("mis_platform.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    progress = Progress("trees", 100, "images", stream=log)
    for done in range(1, 101):
        now[0] += 0.5
        progress.update(done, "0 quarantined")
    progress.update(100)
    lines = log.getvalue().splitlines()
    assert lines[1] == "trees: 21/100 images, 2.0 images/s, 40 s left, 0 quarantined"
    assert lines[-1] == "trees: 100/100 images, 50 s, 0 quarantined"
    assert len(lines) == 6


def test_what_an_earlier_attempt_did_does_not_count_as_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mis_platform.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    progress = Progress("trees", 100, "images", start=80, stream=log)
    now[0] = 10.0
    progress.update(90)
    assert log.getvalue() == "trees: 90/100 images, 1.0 images/s, 10 s left\n"


def test_a_slow_rate_is_not_said_to_be_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mis_platform.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    progress = Progress("clicks of grabcut", 50, "images", stream=log)
    now[0] = 60.0
    progress.update(2)
    assert log.getvalue() == "clicks of grabcut: 2/50 images, 0.033 images/s, 24 min 00 s left\n"


def test_a_terminal_gets_one_line_that_is_rewritten():
    terminal = Terminal()
    progress = Progress("train", 2, "images", stream=terminal)
    progress.update(1)
    progress.update(2)
    progress.close()
    assert terminal.getvalue().count("\r") == 2
    assert terminal.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (18_600, "5 h 10 min"), (float("inf"), "?")],
)
def test_durations_read_as_people_say_them(seconds, expected):
    assert duration(seconds) == expected


def test_a_listener_hears_of_each_update_whether_something_got_on():
    heard = []
    progress = Progress("clicks", 3, "images", stream=io.StringIO())
    with heard_by(heard.append):
        for done, note in ((0, "1 clicks"), (0, "1 clicks"), (0, "2 clicks"), (1, "2 clicks"), (1, "2 clicks")):
            progress.update(done, note)
    progress.update(2)
    assert heard == [True, False, True, True, False]
