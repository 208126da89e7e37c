"""Which tests see GPUs."""

import os

from devices import wants_gpus


def test_only_tests_of_gpus_see_them() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    for marks in ("gpu", "slow or gpu", "gpu and not slow"):
        assert wants_gpus(marks)
    for marks in ("", "not gpu and not slow", "slow", "slow and not gpu"):
        assert not wants_gpus(marks)
