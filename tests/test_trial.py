"""Work that hangs is given up and told to end; a trial that hangs as a whole is found by the bell that it asks."""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_platform import stopping, trial
from mis_platform.artifacts import Output, Stage
from mis_platform.config import Resources
from mis_platform.progress import Progress
from mis_platform.storage import Storage
from mis_platform.trial import ALIVE, DOING, METRICS, Bell, Say, ensure_watched


def never(metrics: object) -> bool:
    return False


def watch(work: Callable[[Say], None], silence: float = 60.0, look: trial.Look = never) -> None:
    trial._watch(work, "training", silence, look, patience=10.0)


class Hanging:
    """Work that says its signs and then nothing, until it is told to end."""

    def __init__(self, *signs: tuple[str, object], pause: float = 0.0) -> None:
        self._signs, self._pause = signs, pause
        self.was_told = threading.Event()

    def __call__(self, say: Say) -> None:
        for sign in self._signs:
            say(*sign)
            time.sleep(self._pause)
        try:
            while True:
                stopping.check()
                time.sleep(0.01)
        finally:
            self.was_told.set()


def test_work_that_hangs_is_given_up_and_told_to_end() -> None:
    work = Hanging()
    with pytest.raises(
        TimeoutError, match=r"^the training gave no sign of life for 0\.3 seconds \(resources\.trial_silence\)$"
    ):
        watch(work, silence=0.3)
    assert work.was_told.is_set()


def test_every_step_of_a_training_is_a_sign_of_life(tmp_path: Path) -> None:
    """Also the many that are not logged."""

    def learn(_: object, out: Storage) -> Output:
        progress = Progress("train", 3, "images", stream=io.StringIO())
        for done in (1, 2, 3):
            progress.update(done)
        return Output(parts=(), digest="0" * 64)

    class Learning:
        def training(self, *_: object) -> Stage:
            return Stage(name="checkpoint", version=1, config={}, run=learn)

        def clicks(self, *_: object) -> list[Stage]:
            return []

    said: list[str] = []
    trial._train_and_score([Learning()], Storage(str(tmp_path)), Resources(), lambda kind, _: said.append(kind))  # type: ignore[list-item]
    assert said == [ALIVE, ALIVE, ALIVE, DOING]


def test_the_silence_begins_at_the_last_sign() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^the evaluation gave no sign of life"):
        watch(Hanging((ALIVE, None), (ALIVE, None), (DOING, "evaluation"), pause=0.6), silence=1.0)
    assert time.monotonic() - began > 2 * 0.6 + 1.0


def test_metrics_are_passed_on_and_a_look_stops_the_work() -> None:
    seen: list[object] = []

    def look(metrics: object) -> bool:
        seen.append(metrics)
        return metrics == {"step": 2}

    work = Hanging((METRICS, {"step": 1}), (METRICS, {"step": 2}))
    watch(work, look=look)
    assert seen[:2] == [{"step": 1}, {"step": 2}]
    assert work.was_told.is_set()


def test_what_the_work_raises_is_raised() -> None:
    def fail(say: Say) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        watch(fail)


@pytest.mark.parametrize("signal", [KeyboardInterrupt, stopping.Preempted])
def test_work_does_not_outlive_whoever_waits_for_it(signal: type[BaseException]) -> None:
    def interrupt(metrics: object) -> bool:
        raise signal

    work = Hanging((ALIVE, None))
    with pytest.raises(signal):
        watch(work, look=interrupt)
    assert work.was_told.is_set()


def test_work_that_does_not_even_end_when_told_is_left() -> None:
    """As a thread in a system call on a file server that is gone."""
    over = threading.Event()
    with pytest.raises(TimeoutError):
        trial._watch(lambda say: over.wait() and None, "training", 0.1, never, patience=0.2)
    over.set()


def test_a_stage_that_hangs_gives_its_artifact_back(tmp_path: Path) -> None:
    """The next attempt may begin at once, in the same process; what still says the same does not get on."""
    is_stuck = True

    def run(inputs: dict[str, Storage], out: Storage) -> Output:
        progress = Progress("clicks", 2, "images", stream=io.StringIO())
        while is_stuck:
            progress.update(1)
            time.sleep(0.01)
        return Output(parts=(), digest="0")

    root, stage = Storage(str(tmp_path)), Stage(name="clicks/some", version=1, config={}, run=run)
    with pytest.raises(TimeoutError, match=r"^the evaluation gave no sign of life for 0\.5 seconds"):
        ensure_watched(stage, root, "evaluation", 0.5)
    assert not stage.is_done(root)
    is_stuck = False
    ensure_watched(stage, root, "evaluation", 60.0)
    assert stage.is_done(root)


# -- the bell --------------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The bell's clock, in seconds."""
    clock = [1000.0]
    monkeypatch.setattr(trial.time, "monotonic", lambda: clock[0])
    return clock


def test_a_process_that_asks_no_more_is_named_until_it_is_over(now: list[float]) -> None:
    bell = Bell()
    assert bell.enter(0, "process of 0")
    assert bell.enter(1, "process of 1")
    now[0] += 19
    assert bell.silent(20, over=()) == {}
    bell.is_rung(1)
    now[0] += 2
    assert bell.silent(20, over=()) == {}, "a first look alone says nothing"
    now[0] += 5
    assert bell.silent(20, over=()) == {0: "process of 0"}
    assert bell.silent(20, over=()) == {0: "process of 0"}, "the answer before may not have arrived"
    assert bell.silent(20, over={0}) == {}
    assert not bell.is_quiet()
    bell.leave(1)
    assert bell.is_quiet(), "a stop does not wait for what was killed"


def test_processes_that_were_stopped_together_with_the_bell_may_go_on(now: list[float]) -> None:
    bell = Bell()
    bell.enter(0, "process of 0")
    now[0] += 3600
    assert bell.silent(20, over=()) == {}
    bell.is_rung(0)
    now[0] += 5
    assert bell.silent(20, over=()) == {}


def test_a_trial_that_died_without_leaving_is_forgotten(now: list[float]) -> None:
    bell = Bell()
    bell.enter(0, "process of 0")
    now[0] += 100
    for _ in range(3):
        assert bell.silent(20, over={0}) == {}
    assert bell.is_quiet()


def test_no_trial_begins_after_the_bell() -> None:
    bell = Bell()
    bell.ring()
    assert not bell.enter(0, "process of 0")
    assert bell.is_quiet()
    assert bell.is_rung(0)
