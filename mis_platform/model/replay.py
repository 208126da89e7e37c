"""Functions on a GPU that are recorded once and replayed (CUDA graphs)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Replay:
    """A function of tensors on one GPU, recorded for each combination of their shapes and types.

    Launching the hundreds of small steps of a forward pass takes a CPU about as long as a fast GPU takes to compute
    them; a replay launches them at once. The function must not wait for the GPU or make random numbers, and its result
    has no gradient; what it reads besides its arguments, such as weights, may change in place, not move.

    accumulated: what the function adds to, such as the gradients of a backward pass inside it; it must not move either,
    and is not changed by recording. constants: other arguments, recorded as they are.
    """

    def __init__(self, function: Callable[..., Tensor], accumulated: Sequence[Tensor] = ()) -> None:
        self._function = function
        self._accumulated = accumulated
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor, **constants: Any) -> Tensor:
        kinds = (*((tensor.shape, tensor.dtype) for tensor in inputs), *sorted(constants.items()))
        if kinds not in self._recorded:
            self._recorded[kinds] = self._record(inputs, constants)
        graph, places, result = self._recorded[kinds]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result.clone()  # its place is written by the next replay

    def _record(
        self, inputs: Sequence[Tensor], constants: dict[str, Any]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places = [tensor.detach().clone() for tensor in inputs]
        before = [tensor.clone() for tensor in self._accumulated]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # kernels are chosen and handles made before anything is recorded
            self._function(*places, **constants)
        current.wait_stream(side)
        for tensor, value in zip(self._accumulated, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be uploading
            result = self._function(*places, **constants)
        return graph, places, result
