"""Zoom-in: the network sees a window around the object instead of the whole photo (RITM, SimpleClick, MIS).

SimpleClick and MIS stretch the window to a fixed square from the first click on; RITM keeps its proportions and starts
at the second click. `EvalConfig.zoom_skip_clicks` (-1 or 1) tells the two apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mis_platform.config import EvalConfig
from mis_platform.simulation.clicks import Click

OBJECT_THRESHOLD = 0.5  # what counts as object when a window is placed; not the threshold of the reported mask


class Window(NamedTuple):
    """A rectangle of the image, in pixels; both limits belong to it."""

    row_min: int
    row_max: int
    col_min: int
    col_max: int

    @property
    def height(self) -> int:
        """In pixels; both limits count."""
        return self.row_max - self.row_min + 1

    @property
    def width(self) -> int:
        """In pixels; both limits count."""
        return self.col_max - self.col_min + 1

    def holds(self, click: Click) -> bool:
        """Whether the click lies inside. The last row and column count as outside, as in RITM's code."""
        return self.row_min <= click.y < self.row_max and self.col_min <= click.x < self.col_max


def full_frame(height: int, width: int) -> Window:
    """The window that is the whole image, of `height` x `width` pixels."""
    return Window(0, height - 1, 0, width - 1)


def candidate_window(probability: Tensor, clicks: Sequence[Click], config: EvalConfig) -> Window | None:
    """The window around the predicted object and the positive clicks; None if nothing is predicted yet.

    probability: float [H, W] in [0, 1], the answer to the clicks before the last of `clicks`.
    """
    predicted = probability > OBJECT_THRESHOLD
    rows = predicted.any(dim=1).nonzero().flatten().cpu().numpy()
    if rows.size == 0:
        return None
    cols = predicted.any(dim=0).nonzero().flatten().cpu().numpy()
    positive = [click for click in clicks if click.positive]
    rows = np.append(rows, [int(click.y) for click in positive])
    cols = np.append(cols, [int(click.x) for click in positive])
    height, width = probability.shape
    return Window(*_expand(rows.min(), rows.max(), height, config), *_expand(cols.min(), cols.max(), width, config))


def next_window(stored: Window | None, candidate: Window, clicks: Sequence[Click], config: EvalConfig) -> Window:
    """The window stays where it is until a positive click leaves it or the object outgrows or shrinks away from it."""
    if stored is None or any(click.positive and not stored.holds(click) for click in clicks):
        return candidate
    return candidate if window_iou(candidate, stored) < config.zoom_recompute_iou else stored


def window_iou(first: Window, second: Window) -> float:
    """RITM's box overlap: the product of the overlaps of the two row intervals and the two column intervals."""
    rows = _interval_iou(first.row_min, first.row_max, second.row_min, second.row_max)
    return rows * _interval_iou(first.col_min, first.col_max, second.col_min, second.col_max)


def network_size(window: Window, target: tuple[int, int] | int) -> tuple[int, int]:
    """(height, width) in pixels at which the network sees the window: `target`, or its longest side if an int."""
    if isinstance(target, tuple):
        return target
    scale = target / max(window.height, window.width)
    return max(1, round(window.height * scale)), max(1, round(window.width * scale))


def crop(image: Tensor, probability: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """The window of image and previous answer at network size: float32 [4, h, w], all in [0, 1].

    image: uint8 [3, H, W]; probability: float32 [H, W].
    """
    rows = slice(window.row_min, window.row_max + 1)
    cols = slice(window.col_min, window.col_max + 1)
    planes = torch.cat([image[:, rows, cols].float() / 255, probability[None, rows, cols]])
    return _resize(planes, size)


def paste(probability: Tensor, window: Window, height: int, width: int) -> Tensor:
    """The network's answer [h, w] put back into its place: float32 [height, width], 0 outside the window."""
    frame = probability.new_zeros(height, width)
    patch = _resize(probability[None], (window.height, window.width))[0]
    frame[window.row_min : window.row_max + 1, window.col_min : window.col_max + 1] = patch
    return frame


def to_network(clicks: Sequence[Click], window: Window, size: tuple[int, int]) -> list[Click]:
    """The clicks in pixels of the network input; neither rounded nor shifted by half a pixel, as in RITM's code."""
    return [
        Click(
            size[0] * (click.y - window.row_min) / window.height,
            size[1] * (click.x - window.col_min) / window.width,
            click.positive,
        )
        for click in clicks
    ]


def _resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(planes[None], size=size, mode="bilinear", align_corners=True)[0]


def _expand(low: int, high: int, length: int, config: EvalConfig) -> tuple[int, int]:
    """Grow the interval [low, high] around its centre and cut it to [0, length - 1]; halves round to even."""
    size = max(config.zoom_expansion * (int(high) - int(low) + 1), config.zoom_min_crop)
    centre = 0.5 * (int(low) + int(high))
    return max(0, round(centre - 0.5 * size)), min(length - 1, round(centre + 0.5 * size))


def _interval_iou(low: int, high: int, other_low: int, other_high: int) -> float:
    intersection = max(0, min(high, other_high) - max(low, other_low) + 1)
    union = max(1e-6, max(high, other_high) - min(low, other_low) + 1)
    return intersection / union
