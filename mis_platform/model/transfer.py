"""From a device to the host."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """What the tensor holds, in the memory of the host.

    From a GPU it goes through page-locked memory, which is several times as fast as `tensor.cpu()`.
    """
    return download(tensor)()


def download(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Starts what `to_numpy` does; what is returned waits for it, but not for what the GPU is given afterwards."""
    if not tensor.is_cuda:
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> np.ndarray:
        arrived.synchronize()
        return host.numpy()

    return wait
