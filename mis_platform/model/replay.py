"""Functions on a GPU that are recorded once and replayed (CUDA graphs)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Replay:
    """A function of tensors on one GPU, recorded for each combination of their shapes and types.

    Launching the hundreds of small steps of a forward pass takes a CPU about as long as a fast GPU takes to compute
    them; a replay launches them at once. The function must not wait for the GPU, make random numbers or need gradients;
    what it reads besides its arguments, such as weights, may change in place, not move.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        kinds = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if kinds not in self._recorded:
            self._recorded[kinds] = self._record(inputs)
        graph, places, result = self._recorded[kinds]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result.clone()  # its place is written by the next replay

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places = [tensor.clone() for tensor in inputs]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # kernels are chosen and handles made before anything is recorded
            self._function(*places)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be uploading
            result = self._function(*places)
        return graph, places, result
