"""Proposals: nodes of a merge tree as masks, on the patch grid and at image size."""

from typing import NamedTuple

import numpy as np
from numba import njit

from mis_platform.simulation.tree import MergeTree


class Proposal(NamedTuple):
    """One node of a merge tree, drawn as a mask."""

    node: int
    mask: np.ndarray  # bool [grid_height, grid_width], the patches below `node`


def mask_at_image_size(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour resize of a bool mask [grid_height, grid_width] to [height, width] pixels.

    Equal to OpenCV's INTER_NEAREST, as in the official MIS code. The photo was rounded up to whole patches, so the mask
    is scaled back by up to 2%, not cropped; the staircase boundaries are left to the smoothness loss.
    """
    rows, columns = _nearest(mask.shape[0], height), _nearest(mask.shape[1], width)
    return mask[rows][:, columns]


def best_overlap(tree: MergeTree, object_mask: np.ndarray) -> tuple[float, int]:
    """The best IoU any node reaches with an object, in [0, 1], and that node (the first of equals).

    object_mask: int8 [height, width] in pixels: 1 object, 0 not, -1 ignored (counted nowhere). Nodes are compared at
    image size, as `mask_at_image_size` draws them, but without drawing: the pixels of each patch are counted once and
    summed up the tree. An object without pixels gives (0.0, 0).
    """
    height, width = object_mask.shape
    patches = _nearest(tree.grid[0], height), _nearest(tree.grid[1], width)
    inside, valid = _count_pixels(object_mask, *patches, tree.num_leaves, tree.grid[1])
    _sum_up(tree.children, inside, valid)
    union = valid + inside[tree.root] - inside
    ious = inside / np.maximum(union, 1)
    node = int(ious.argmax())
    return float(ious[node]), node


def _nearest(source: int, target: int) -> np.ndarray:
    """int64 [target], the source index each target index shows (the arithmetic of OpenCV, roundings included)."""
    scale = 1.0 / (target / source)
    return np.minimum((np.arange(target) * scale).astype(np.int64), source - 1)


@njit(nogil=True, cache=True)
def _count_pixels(
    object_mask: np.ndarray, rows: np.ndarray, columns: np.ndarray, num_leaves: int, grid_width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the object and pixels not ignored in each patch: int64 [2N-1] each, zero for the inner nodes."""
    inside, valid = np.zeros(2 * num_leaves - 1, np.int64), np.zeros(2 * num_leaves - 1, np.int64)
    for y in range(object_mask.shape[0]):
        first = rows[y] * grid_width
        for x in range(object_mask.shape[1]):
            value = object_mask[y, x]
            inside[first + columns[x]] += value == 1
            valid[first + columns[x]] += value != -1
    return inside, valid


@njit(nogil=True, cache=True)
def _sum_up(children: np.ndarray, inside: np.ndarray, valid: np.ndarray) -> None:
    num_leaves = children.shape[0] + 1
    for merge in range(num_leaves - 1):
        first, second = children[merge, 0], children[merge, 1]
        inside[num_leaves + merge] = inside[first] + inside[second]
        valid[num_leaves + merge] = valid[first] + valid[second]
