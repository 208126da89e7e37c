"""Clicks: the simulated ones of training (RITM's point sampler) and the array in which a model receives them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from mis_platform.config import ClickConfig

EROSIONS = 3  # by a 3x3 square; keeps most positive clicks off the boundary
MIN_ERODED_PIXELS = 10  # the eroded object must have more, else the whole object is used
BACKGROUND, OTHER, BORDER = range(3)  # where a negative click lies
SAMPLED_ORDER = 100  # the "index" of every sampled click; training does not use it


class Click(NamedTuple):
    """One user click, in pixels of the image it was placed on; the origin is the top left."""

    y: float
    x: float
    positive: bool


def points_array(clicks: Sequence[Click], num: int | None = None) -> np.ndarray:
    """The clicks as a model takes them: float32 [2 * num, 3], rows (row, column, index in `clicks`).

    The first `num` rows are the positive clicks, the others the negative ones, unused rows are (-1, -1, -1).
    num: clicks per sign; by default just enough, and at least one. ValueError if `num` is too small.
    """
    signs = [
        [(index, click) for index, click in enumerate(clicks) if bool(click.positive) is sign] for sign in (True, False)
    ]
    needed = max(map(len, signs))
    num = max(needed, 1) if num is None else num
    if needed > num:
        raise ValueError(f"{needed} clicks of one sign do not fit into {num} rows")
    points = np.full((2 * num, 3), -1, np.float32)
    for offset, chosen in zip((0, num), signs):
        for row, (index, click) in enumerate(chosen, start=offset):
            points[row] = click.y, click.x, index
    return points


def sample_clicks(
    mask: np.ndarray,
    rng: np.random.Generator,
    config: ClickConfig,
    other: np.ndarray | None = None,
    parts: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Random clicks on one training object (RITM, with SimpleClick's settings).

    mask: bool [height, width], the object; other: the same for all other objects of the image, if there are any.
    parts: the same for each of the objects, none of them empty, whose union `mask` is, if it is one of several.
    Returns float32 [2 * max_clicks, 3], rows (row, column, 100): positive clicks first, then from row max_clicks the
    negative ones; unused rows are (-1, -1, -1). An empty mask gets no positive clicks and all negative ones on the
    background.
    """
    mask = np.ascontiguousarray(mask, dtype=bool)
    positive = _merged_pixels(parts, rng, config) if len(parts) > 1 else _positive_pixels(mask, rng, config)
    negative = _negative_pixels(mask, rng, config, other)
    points = np.full((2 * config.max_clicks, 3), -1, np.float32)
    for first, clicked in ((0, positive), (config.max_clicks, negative)):
        rows = slice(first, first + len(clicked))
        points[rows, 0], points[rows, 1] = np.divmod(clicked, mask.shape[1])
        points[rows, 2] = SAMPLED_ORDER
    return points


def _click_count(largest: int, gamma: float, rng: np.random.Generator) -> int:
    """k in 0..largest with probability proportional to gamma^k."""
    cumulative = np.cumsum(gamma ** np.arange(largest + 1))
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def _positive_pixels(mask: np.ndarray, rng: np.random.Generator, config: ClickConfig) -> np.ndarray:
    """Flat pixel indices of positive clicks on one object; none on an empty one."""
    count = 1 + _click_count(config.max_clicks - 1, config.gamma, rng)
    erode = rng.random() < config.erosion_probability
    if not mask.any():
        return np.empty(0, np.int64)
    return _pixels(_clickable(mask) if erode else mask, rng.random(count))


def _merged_pixels(parts: Sequence[np.ndarray], rng: np.random.Generator, config: ClickConfig) -> np.ndarray:
    """Flat pixel indices of clicks on several objects: one on each, then as many as one object gets, each on any."""
    count = 1 + _click_count(config.max_clicks - 1, config.gamma, rng)
    areas = [_clickable(part) if rng.random() < config.erosion_probability else part for part in parts]
    owners = np.concatenate([np.arange(len(parts)), rng.integers(len(parts), size=count)])[: config.max_clicks]
    positions = rng.random(len(owners))
    clicked = np.empty(len(owners), np.int64)
    for owner, area in enumerate(areas):
        clicked[owners == owner] = _pixels(area, positions[owners == owner])
    return clicked


def _clickable(mask: np.ndarray) -> np.ndarray:
    """The eroded object, or the whole one if hardly anything would be left."""
    eroded = erode(mask, EROSIONS)
    return eroded if np.count_nonzero(eroded) > MIN_ERODED_PIXELS else mask


def _negative_pixels(
    mask: np.ndarray, rng: np.random.Generator, config: ClickConfig, other: np.ndarray | None
) -> np.ndarray:
    """Flat pixel indices of negative clicks; each picks its region anew and is dropped where that region is empty."""
    count = _click_count(config.max_clicks, config.gamma, rng)
    regions = np.searchsorted(
        np.cumsum([config.background_probability, config.other_probability]), rng.random(count), side="right"
    )
    others = None if other is None else other & ~mask
    if others is None or not others.any():
        regions[regions == OTHER] = BACKGROUND
    if not mask.any():
        regions[:] = BACKGROUND
    positions = rng.random(count)
    clicked = np.full(count, -1, np.int64)
    for region in np.unique(regions):
        if region == BACKGROUND:
            area = ~mask
        elif region == OTHER:
            assert others is not None, "without other objects these clicks were moved to the background"
            area = others
        else:
            area = border(mask, config.expand_ratio)
        clicked[regions == region] = _pixels(area, positions[regions == region])
    return clicked[clicked >= 0]


def _pixels(area: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The pixels of `area` at these positions in [0, 1): int64, flat indices; -1 where there is no pixel."""
    pixels = np.flatnonzero(area)
    if len(pixels) == 0:
        return np.full(len(positions), -1)
    return pixels[(positions * len(pixels)).astype(np.int64)]


def border(mask: np.ndarray, expand_ratio: float) -> np.ndarray:
    """The zone around an object: bool [height, width], ceil(expand_ratio * sqrt(area)) pixels wide."""
    return dilate(mask, math.ceil(expand_ratio * math.sqrt(np.count_nonzero(mask)))) & ~mask


def dilate(mask: np.ndarray, iterations: int) -> np.ndarray:
    """`iterations` dilations of bool [height, width] by a 3x3 square; nothing comes in from outside (as in OpenCV)."""
    return _reach(np.ascontiguousarray(mask, dtype=bool), iterations)


def erode(mask: np.ndarray, iterations: int) -> np.ndarray:
    """`iterations` erosions of bool [height, width] by a 3x3 square; the image frame does not erode (as in OpenCV)."""
    return ~_reach(np.ascontiguousarray(~np.asarray(mask, dtype=bool)), iterations)


@njit(nogil=True, cache=True)
def _reach(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels with a set pixel at most `distance` rows and `distance` columns away: along rows, then along columns."""
    height, width = mask.shape
    near = np.zeros((height, width), np.bool_)
    for y in range(height):
        free = 0  # the first column not yet written
        for x in range(width):
            if mask[y, x]:
                end = min(x + distance + 1, width)
                for column in range(max(x - distance, free), end):
                    near[y, column] = True
                free = end
    reached = np.zeros((height, width), np.bool_)
    last, following = np.full(width, -distance - 1), np.full(width, height + distance)
    for y in range(height):
        for x in range(width):
            last[x] = y if near[y, x] else last[x]
            reached[y, x] = y - last[x] <= distance
    for y in range(height - 1, -1, -1):
        for x in range(width):
            following[x] = y if near[y, x] else following[x]
            reached[y, x] |= following[x] - y <= distance
    return reached
