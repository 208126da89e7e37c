"""Photos and a small benchmark that need no download: made from the photos that scikit-image and scikit-learn install.

Every photo is cut in two. Training images are crops of the left half; the benchmark's objects and backgrounds are crops
of the right half, so that no pixel of it was trained on. (They still show the same scenes: this shows that the platform
works, not how well a model generalises.)
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from mis_platform.data.images import read_image

_PHOTOS = {  # package, folder in it -> files: CC0 or public domain; CC BY 2.0
    ("skimage", "data"): ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg"),
    ("sklearn", "datasets/images"): ("china.jpg", "flower.jpg"),
}
_LONG, _SHORT = 320, 240  # pixels
_MIN_AREA, _MAX_AREA = 0.05, 0.40  # share of the image that an object covers
_MIN_CONTRAST = 16.0  # CIELAB distance of the two sides of a contour that a person sees at a glance
_CLEAR_SHARE = 0.9  # of the contour must have that contrast
_MIN_SPREAD, _MAX_SPREAD = 7.0, 24.0  # CIELAB standard deviation inside the object: neither flat nor several things
_MAX_MEAN_DISTANCE = 60.0  # CIELAB distance of object and background: above, their mean colours alone tell them apart
_MAX_TRIES = 400


def wheel_photos() -> dict[str, np.ndarray]:
    """The photographs that are on disk with scikit-image and scikit-learn: name -> uint8 [H, W, 3], RGB, 0.1-0.4 MP.

    Raises ValueError when one is missing: then the package is not installed from its wheel.
    """
    photos = {}
    for (package, folder), files in _PHOTOS.items():
        for file in files:
            path = _package_folder(package) / folder / file
            if not path.is_file():
                raise ValueError(f"{package} comes without {folder}/{file}; reinstall it from its wheel")
            photos[Path(file).stem] = read_image(path)
    return photos


def write_photos(out: Path, count: int = 36, seed: int = 0) -> None:
    """Unlabelled training images: `count` PNG files of 320x240 or 240x320 pixels, directly in `out`.

    Crops at random places and scales, half of them mirrored, the photos in turn.
    """
    rng = np.random.default_rng(seed)
    halves = [photo[:, : photo.shape[1] // 2] for photo in wheel_photos().values()]
    out.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        crop = _random_crop(halves[k % len(halves)], _size(k), (0.6, 1.0), rng)
        Image.fromarray(crop).save(out / f"{k:03d}.png")


def write_benchmark(out: Path, count: int = 16, seed: int = 0) -> None:
    """A benchmark in the generic folder layout: out/images/NNN.png, and out/masks/NNN.png with 255 on the object.

    Each image shows one object, of 5 to 40 % of its area, with a photo as texture on another photo as background: a
    smooth blob, a group of merged balls, a ring, or two parts. The masks are exact. Equal seeds give equal pixels.
    """
    rng = np.random.default_rng(seed)
    halves = [photo[:, photo.shape[1] // 2 :] for photo in wheel_photos().values()]
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for k in range(count):
        image, mask = _compose(halves, k, rng)
        Image.fromarray(image).save(out / "images" / f"{k:03d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(out / "masks" / f"{k:03d}.png")


class Material(NamedTuple):
    """Folders that `write_material` makes."""

    photos: Path  # to learn from, without labels
    benchmark: Path
    labelled: Path  # to learn from, with masks; other objects than the benchmark's


def write_material(root: Path, photos: int = 36, objects: int = 16) -> Material:
    """Folders in `root`, made by `write_photos` and `write_benchmark` unless they are there. objects: in each of two.

    Whole or not at all: a process that is killed leaves nothing that the next one would take for finished.
    """
    made = Material(root / "photos", root / "benchmark", root / "labelled")
    writers: tuple[Callable[[Path], None], ...] = (
        lambda out: write_photos(out, photos),
        lambda out: write_benchmark(out, objects),
        lambda out: write_benchmark(out, objects, seed=1),
    )
    for folder, write in zip(made, writers, strict=True):
        if not folder.is_dir():
            unfinished = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
            write(unfinished)
            with contextlib.suppress(OSError):  # another process was faster; its files are the same
                unfinished.rename(folder)
            shutil.rmtree(unfinished, ignore_errors=True)
    return made


def _package_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)  # does not import it
    if found is None or found.origin is None:
        raise ValueError(f"the quickstart takes its photos from {package}, which is not installed")
    return Path(found.origin).parent


def _size(k: int) -> tuple[int, int]:
    """(height, width) of the k-th image: every third is upright."""
    return (_LONG, _SHORT) if k % 3 == 2 else (_SHORT, _LONG)


def _random_crop(
    photo: np.ndarray, size: tuple[int, int], scales: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A window of the photo, resized to `size`. scales: its size, relative to the largest window that fits."""
    largest = min(photo.shape[0] / size[0], photo.shape[1] / size[1])
    factor = largest * rng.uniform(*scales)
    height, width = int(size[0] * factor), int(size[1] * factor)
    y, x = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
    window = photo[y : y + height, x : x + width]
    if rng.random() < 0.5:
        window = window[:, ::-1]
    method = cv2.INTER_AREA if factor > 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(window), (size[1], size[0]), interpolation=method)


def _compose(halves: list[np.ndarray], k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The k-th image, uint8 [H, W, 3], and its object, bool [H, W]. Draws until the object can be told apart."""
    size = _size(k)
    shape = _SHAPES[k % len(_SHAPES)]
    for _ in range(_MAX_TRIES):
        background = k % len(halves)
        texture = (background + rng.integers(1, len(halves))) % len(halves)
        mask = shape(size, rng.uniform(_MIN_AREA + 0.01, _MAX_AREA - 0.01), rng)
        below = _random_crop(halves[background], size, (0.7, 1.0), rng)
        above = _random_crop(halves[texture], size, (0.3, 0.7), rng)
        if _MIN_AREA <= mask.mean() <= _MAX_AREA and _is_distinct(above, below, mask):
            return np.where(mask[:, :, None], above, below), mask
    raise AssertionError(f"no distinct object in {_MAX_TRIES} tries")


# -- shapes: level sets of smooth functions, cut where they enclose the wanted area -----------------------------------


def _grid(size: tuple[int, int], centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and x of every pixel, from a centre given as a share of the image; one unit is the image's shorter side."""
    y, x = np.mgrid[: size[0], : size[1]] / min(size)
    return y - size[0] / min(size) * centre[0], x - size[1] / min(size) * centre[1]


def _turned(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same coordinates, turned and stretched at random: round things become oblong."""
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.6)
    return stretch * (np.cos(angle) * y - np.sin(angle) * x), np.sin(angle) * y + np.cos(angle) * x


def _near_centre(size: tuple[int, int], spread: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return _turned(*_grid(size, 0.5 + rng.uniform(-spread, spread, 2)), rng)


def _star(y: np.ndarray, x: np.ndarray, rng: np.random.Generator, waviness: float = 0.38) -> np.ndarray:
    """Distance from the centre, relative to a radius that waves with the direction."""
    direction = np.arctan2(y, x)
    waves = np.arange(2, 7)
    heights, phases = rng.normal(0, waviness, len(waves)) / waves, rng.uniform(0, 2 * np.pi, len(waves))
    radius = 1 + np.tensordot(heights, np.cos(waves[:, None, None] * direction + phases[:, None, None]), axes=1)
    return np.hypot(y, x) / np.maximum(radius, 0.25)


def _blob(size: tuple[int, int], area: float, rng: np.random.Generator) -> np.ndarray:
    level = _star(*_near_centre(size, 0.15, rng), rng)
    return level <= np.quantile(level, area)


def _balls(size: tuple[int, int], area: float, rng: np.random.Generator) -> np.ndarray:
    y, x = _near_centre(size, 0.1, rng)
    level = np.zeros(size)
    for _ in range(rng.integers(3, 7)):
        centre, width = rng.normal(0, 0.22, 2), rng.uniform(0.08, 0.2)
        level -= np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * width**2))
    _, parts, statistics, _ = cv2.connectedComponentsWithStats((level <= np.quantile(level, area)).astype(np.uint8))
    return parts == 1 + statistics[1:, cv2.CC_STAT_AREA].argmax()  # the largest part: drops specks


def _ring(size: tuple[int, int], area: float, rng: np.random.Generator) -> np.ndarray:
    """A blob with a hole of 15 to 30 % of it."""
    y, x = _near_centre(size, 0.1, rng)
    outer = _star(y, x, rng)
    share = rng.uniform(0.15, 0.3)
    mask = outer <= np.quantile(outer, min(area / (1 - share), 0.5))
    hole = _star(y + rng.uniform(-0.03, 0.03), x + rng.uniform(-0.03, 0.03), rng, waviness=0.15)
    return mask & (hole > np.quantile(hole, mask.mean() * share))


def _pair(size: tuple[int, int], area: float, rng: np.random.Generator) -> np.ndarray:
    """Two blobs, one behind the other along the longer side."""
    axis = int(size[1] > size[0])
    levels = []
    for side in (-0.24, 0.24):
        centre = 0.5 + rng.uniform(-0.08, 0.08, 2)
        centre[axis] = 0.5 + side
        levels.append(_star(*_grid(size, centre), rng) * rng.uniform(1.0, 1.4))
    level = np.minimum(*levels)
    return level <= np.quantile(level, area)


_SHAPES: tuple[Callable[[tuple[int, int], float, np.random.Generator], np.ndarray], ...] = (_blob, _balls, _ring, _pair)


def _is_distinct(above: np.ndarray, below: np.ndarray, mask: np.ndarray) -> bool:
    """Whether it reads as one object with a visible contour, and mean colours alone do not already give it away."""
    lab = _lab(above)[mask]
    if not _MIN_SPREAD <= np.linalg.norm(lab.std(axis=0)) <= _MAX_SPREAD:
        return False
    object_colour, background_colour = _local_colour(above, mask), _local_colour(below, ~mask)
    inner = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    contrast = np.linalg.norm(object_colour - background_colour, axis=2)[inner]
    distance = np.linalg.norm(lab.mean(axis=0) - _lab(below)[~mask].mean(axis=0))
    return bool((contrast > _MIN_CONTRAST).mean() >= _CLEAR_SHARE and distance <= _MAX_MEAN_DISTANCE)


def _local_colour(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """CIELAB [H, W, 3], averaged around each pixel over those pixels that lie in `where`."""
    weight = where.astype(np.float32)
    blurred = cv2.GaussianBlur(_lab(image) * weight[:, :, None], (0, 0), 3)
    return blurred / np.maximum(cv2.GaussianBlur(weight, (0, 0), 3), 1e-6)[:, :, None]


def _lab(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
