"""How a click becomes seed pixels: one rule for all classical methods."""

from collections.abc import Sequence

import numpy as np

from mis_platform.simulation.clicks import Click

FOREGROUND, UNKNOWN, BACKGROUND = 1, 0, -1


def seed_map(clicks: Sequence[Click], height: int, width: int, radius: float, frame: bool) -> np.ndarray:
    """int8 [height, width]: 1 object, -1 background, 0 unknown.

    Each click seeds the pixels whose centres lie within `radius` pixels of it, later clicks over earlier ones; the
    clicked pixel is always a seed. frame: while no click is negative, the outermost pixels of the photo are background,
    because a method that needs both kinds of seeds cannot begin with the object alone.
    """
    seeds = np.zeros((height, width), np.int8)
    if frame and all(click.positive for click in clicks):
        seeds[[0, -1], :] = BACKGROUND
        seeds[:, [0, -1]] = BACKGROUND
    for click in clicks:
        _paint_disc(seeds, click, radius)
    for click in clicks:  # a disc of a later click must not cover the pixel of an earlier one
        seeds[round(click.y), round(click.x)] = FOREGROUND if click.positive else BACKGROUND
    return seeds


def _paint_disc(seeds: np.ndarray, click: Click, radius: float) -> None:
    height, width = seeds.shape
    rows = slice(max(0, int(click.y - radius)), min(height, int(click.y + radius) + 2))
    columns = slice(max(0, int(click.x - radius)), min(width, int(click.x + radius) + 2))
    y, x = np.ogrid[rows, columns]
    inside = (y - click.y) ** 2 + (x - click.x) ** 2 <= radius**2
    seeds[rows, columns][inside] = FOREGROUND if click.positive else BACKGROUND
