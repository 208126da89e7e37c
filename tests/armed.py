"""Storages that do harm at a chosen moment, in whichever process they are then: for faults inside training workers."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle

from mis_platform.storage import Storage

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import this module


@dataclass(frozen=True)
class Killing(Storage):
    """SIGKILL to the own process when `moment` comes, the first time only.

    moment: "write PATH", right before a file is written, or "remove PATH", when half of a directory is deleted; PATH
    ends the path below the storage. flag: a file that is there afterwards.
    """

    moment: str = ""
    flag: str = ""

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri, "moment": self.moment, "flag": self.flag}

    def __setstate__(self, state: dict[str, str]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def child(self, *names: str) -> "Killing":
        return Killing(super().child(*names).uri, moment=self.moment, flag=self.flag)

    def write_bytes(self, name: str, data: bytes) -> None:
        if self._is_now("write", name):
            self._end()
        super().write_bytes(name, data)

    def remove(self, name: str) -> None:
        if self._is_now("remove", name):
            Path(self.uri, name, sorted(os.listdir(Path(self.uri, name)))[0]).unlink()
            self._end()
        super().remove(name)

    def _is_now(self, verb: str, name: str) -> bool:
        wanted, _, path = self.moment.partition(" ")
        return verb == wanted and f"{self.uri}/{name}".endswith(path) and not os.path.exists(self.flag)

    def _end(self) -> None:
        Path(self.flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def do_nothing() -> None:
    """The action of an Arming that was given none."""


@dataclass(frozen=True)
class Arming(Storage):
    """Calls `action` wherever it arrives."""

    action: Callable[[], None] = do_nothing

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "action": self.action}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.action()


# -- what Arming can call --------------------------------------------------------------------------------------------

NAN_STEP, NAN_RANK = 5, 1
MOST_IMAGES = 2  # that fit into the memory of a simulated GPU


def spoil_a_loss() -> None:
    """The loss of the first image that rank NAN_RANK sees in step NAN_STEP (counted from 1) becomes NaN."""
    import torch
    import torch.distributed as dist

    from mis_platform.stages.training_loop import Learner

    original = Learner._backward

    def backward(self: Learner, step: int, batch: Any) -> torch.Tensor:
        values = original(self, step, batch)
        if step + 1 == NAN_STEP and dist.get_rank() == NAN_RANK:
            values[0, 0] = float("nan")
        return values

    if original.__name__ == "_backward":  # not yet done in this process
        Learner._backward = backward  # type: ignore[method-assign]


def shrink_memory() -> None:
    """A forward pass of more than MOST_IMAGES images ends as it does on a GPU that is too small."""
    import torch

    from mis_platform.stages.training_loop import Learner

    original = Learner._forward

    def forward(self: Learner, network: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs[0]) > MOST_IMAGES:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, network, *inputs)

    if original.__name__ == "_forward":  # not yet done in this process
        Learner._forward = forward  # type: ignore[method-assign]
