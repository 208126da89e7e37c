"""Which worker hangs, and what a GPU that is too small leads to. No Ray."""

import os

import pytest

from mis_platform.config import Resources
from mis_platform.stages.channel import COMPUTING, LOADING, SAVING, Channel, Heard, Sign, Watch, described, kill_worker
from mis_platform.stages.train import HALVINGS, IMAGES_ON_GPU


def heard(rank: int, step: int, doing: str, silence: float = 0.5, unchanged: float = 0.5) -> Heard:
    return Heard(Sign(rank, "ab" * 28, "10.0.0.7", 4000 + rank, step, doing), silence, unchanged)


def watch(seconds: float = 1.0) -> Watch:
    """Of a training whose steps take `seconds`; silence is 100 seconds."""
    made = Watch(100)
    for _ in range(5):
        made.note(seconds)
    return made


def test_a_silent_worker_is_found_and_named() -> None:
    workers = [heard(0, 7, COMPUTING, 0.3, 101), heard(1, 7, COMPUTING, 101, 101)]
    found = watch().hung(workers)
    assert found is workers[1]
    assert described(found) == (
        "rank 1 (node abababab at 10.0.0.7, process 4001, last finished step 7) has given no sign of life for 101 s"
    )


def test_a_worker_that_lives_but_does_not_get_on_is_found() -> None:
    """The others have finished the step and wait for it in the next one."""
    workers = [heard(0, 8, COMPUTING, unchanged=105), heard(1, 7, COMPUTING, unchanged=110)]
    found = watch().hung(workers)
    assert found is workers[1]
    assert described(found).endswith("has not got on with its step for 110 s")


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [heard(0, 7, COMPUTING, 99, 99), heard(1, 7, COMPUTING, 99, 99)],
        [heard(0, 7, COMPUTING, unchanged=500), heard(1, 7, COMPUTING, unchanged=3)],  # the second is not long at it
        [
            heard(0, 7, COMPUTING, unchanged=500),
            heard(1, 7, LOADING, unchanged=500),
        ],  # a slow disk
        [heard(0, 8, SAVING, unchanged=500), heard(1, 8, COMPUTING, unchanged=500)],
    ],
)
def test_what_is_only_slow_is_left_alone(workers: list[Heard]) -> None:
    assert watch().hung(workers) is None


def test_slow_steps_are_measured_against_the_usual_step() -> None:
    stuck = [heard(0, 7, COMPUTING, unchanged=150)]
    assert watch(seconds=1).hung(stuck) is stuck[0]
    assert watch(seconds=10).hung(stuck) is None  # 20 x 10 s
    assert Watch(100).hung([heard(0, 0, COMPUTING, unchanged=3000)]) is None  # the first step: nobody knows


def test_signs_age_until_they_say_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("mis_platform.stages.channel.time.monotonic", lambda: clock[0])
    channel, sign = Channel(8), heard(0, 3, COMPUTING).sign
    channel.beat(sign)
    clock[0] = 130.0
    assert channel.beat(sign) is False
    clock[0] = 135.0
    (found,) = channel.take().heard
    assert (found.silence, found.unchanged) == (5.0, 35.0)
    channel.stop()
    assert channel.beat(sign._replace(step=4)) is True
    assert channel.take().heard[0].unchanged == 0.0
    channel.leave(0, pid=1)  # an earlier process of that rank
    assert channel.take().heard
    channel.leave(0, sign.pid)
    assert not channel.take().heard


def test_too_little_memory_halves_the_images_once() -> None:
    channel = Channel(8)
    for _ in range(2):  # two workers say so
        channel.out_of_memory(8)
    assert channel.images_at_once() == 4
    assert channel.failure() is None
    (note,) = channel.take().notes
    assert "8 images at once; going on with 4" in note
    channel.out_of_memory(4)
    with pytest.raises(ValueError, match=r"4 image\(s\) at once, resources.batch_per_device=8; set it below 4"):
        raise channel.failure() or AssertionError
    single = Channel(1)
    single.out_of_memory(1)
    with pytest.raises(ValueError, match=r"smaller model\.variant or model\.image_size"):
        raise single.failure() or AssertionError


def test_the_images_that_nobody_asked_for_are_halved_more_than_once() -> None:
    """Of the 16 by default, a GPU that holds 4 gets 4, within the restarts that a training has."""
    assert Resources().max_failures >= HALVINGS
    channel = Channel(IMAGES_ON_GPU, HALVINGS)
    for images in (16, 8):
        channel.out_of_memory(images)
        assert channel.images_at_once() == images // 2
        assert channel.failure() is None
    channel.out_of_memory(4)
    with pytest.raises(ValueError, match=r"4 image\(s\) at once, resources.batch_per_device=16; set it below 4"):
        raise channel.failure() or AssertionError


def test_only_training_workers_are_killed() -> None:
    """The number of a process may belong to another one by now."""
    assert kill_worker(os.getpid()) is False
    assert kill_worker(2**22 + 1) is False  # there is none
