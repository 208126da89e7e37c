"""Small made-up benchmarks."""

from collections.abc import Iterator

import numpy as np

from mis_platform.evaluation.protocol import Sample


def ellipse(height: int, width: int, y: float, x: float, radius_y: float, radius_x: float) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width]
    return (((rows - y) / radius_y) ** 2 + ((cols - x) / radius_x) ** 2 <= 1).astype(np.int8)


def synthetic_samples(
    count: int, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((60, 80), (90, 70), (41, 130))
) -> Iterator[Sample]:
    """Bright ellipses on noise, one to three an image, with an ignored rim."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        image = rng.integers(0, 140, (height, width, 3), np.uint8)
        objects = []
        for object_id in range(rng.integers(1, 4)):
            centre = rng.uniform(0.2, 0.8, 2) * (height, width)
            radii = rng.uniform(0.1, 0.35, 2) * (height, width)
            target = ellipse(height, width, *centre, *(radii + 3))
            inner = ellipse(height, width, *centre, *radii) == 1
            target[(target == 1) & ~inner] = -1
            image[inner] += 110
            objects.append((str(object_id), target))
        yield Sample("synthetic", f"{number:03}", image, objects)
