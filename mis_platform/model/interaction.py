"""Iterative training clicks (RITM, with SimpleClick's settings): one more per image where the model errs."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from mis_platform.threads import in_threads

THRESHOLD = 0.49  # of probabilities, RITM's; the evaluation protocol has its own
MISSED, FALSE = 1, 2  # kinds of errors: pixels of the object, and others


def append_clicks(points_B2M3: Tensor, clicks: Sequence["ErrorClick | None"], index: int) -> Tensor:
    """A copy of `points` with the `index`-th iterative click (1, 2, ...) of every image; does not wait for a GPU.

    points: M positive then M negative rows (row, column, order) in pixels. The click goes into row M - index or
    2M - index (from 0) with order `index`: it overwrites a sampled click that reached that far, as in RITM. An image
    without a click (without error) keeps its rows.
    """
    assert len(clicks) == len(points_B2M3), f"{len(points_B2M3)} images need as many clicks, got {len(clicks)}"
    limit = points_B2M3.shape[1] // 2
    assert 1 <= index <= limit, f"index {index} is outside 1..{limit}"
    found = [(image, click) for image, click in enumerate(clicks) if click is not None]
    slots = [(limit if click.positive else 2 * limit) - index for _, click in found]
    where = torch.tensor([[image for image, _ in found], slots], dtype=torch.int64)
    values = torch.tensor([[click.row, click.column, index] for _, click in found], dtype=points_B2M3.dtype)
    where, values = (each.to(points_B2M3.device, non_blocking=True) for each in (where, values.reshape(-1, 3)))
    updated = points_B2M3.clone()
    updated[where[0], where[1]] = values
    return updated


def find_errors(probabilities_B1HW: Tensor, targets_B1HW: Tensor) -> Tensor:
    """uint8 [B, H, W]: MISSED, FALSE, or 0 where the prediction is right.

    probabilities in [0, 1]; targets above 0.5 are object, all else is not.
    """
    probabilities, objects = probabilities_B1HW.detach()[:, 0].float(), targets_B1HW[:, 0] > 0.5
    missed, false = objects & (probabilities < THRESHOLD), ~objects & (probabilities > THRESHOLD)
    return MISSED * missed.byte() + FALSE * false.byte()


class ErrorClick(NamedTuple):
    """A click on an error of the model."""

    row: int  # pixels
    column: int
    positive: bool  # on the object


def error_clicks(errors_BHW: np.ndarray, rngs: Sequence[np.random.Generator]) -> list[ErrorClick | None]:
    """`error_click` for each image, on all CPUs.

    rngs: one generator per image, so a click does not depend on which images share the batch.
    """
    assert len(rngs) == len(errors_BHW), f"{len(errors_BHW)} images need as many generators, got {len(rngs)}"
    return in_threads(error_click, errors_BHW, rngs)


def error_click(errors: np.ndarray, rng: np.random.Generator) -> ErrorClick | None:
    """Uniform over the inner half of the deeper kind of error, or None without error.

    errors: uint8 [H, W], see `find_errors`. The depth of an error pixel is its distance in pixels to the nearest pixel
    without that error (OpenCV's 5x5 approximation; the frame counts as no error). The click is positive iff the deepest
    missed object pixel is deeper than the deepest false one; pixels deeper than half of it qualify.
    """
    missed, false = _depth(errors == MISSED), _depth(errors == FALSE)
    deepest_missed, deepest_false = missed.max(), false.max()
    positive = bool(deepest_missed > deepest_false)
    depth, deepest = (missed, deepest_missed) if positive else (false, deepest_false)
    candidates = np.flatnonzero(depth > deepest / 2)
    if len(candidates) == 0:
        return None
    row, column = divmod(int(rng.choice(candidates)), depth.shape[1])
    return ErrorClick(row, column, positive)


def _depth(mask: np.ndarray) -> np.ndarray:
    """float32 [H, W]. Only the box around the mask is looked at: no way out of it leads past a nearer frame of it."""
    depth = np.zeros(mask.shape, np.float32)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        padded = np.pad(mask[box], 1).astype(np.uint8)
        depth[box] = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    return depth
