"""Colour augmentation: each operation against its formula on single pixels, and the chances of each."""

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from mis_platform.model.augmentation import augment_colors

GRAY = np.array([0.2989, 0.587, 0.114])  # of torchvision


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(image * factor, 0, 1)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = np.tensordot(GRAY, image, 1).mean()
    return np.clip(factor * image + (1 - factor) * mean, 0, 1)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * image + (1 - factor) * np.tensordot(GRAY, image, 1), 0, 1)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    out = np.empty_like(image)
    for y, x in np.ndindex(image.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x])
        out[:, y, x] = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    return out


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    kernel = np.exp(-(np.arange(-1, 2) ** 2) / (2 * sigma**2))
    for axis in (1, 2):
        image = ndimage.convolve1d(image, kernel / kernel.sum(), axis=axis, mode="mirror")
    return image


ADJUSTMENTS: tuple[Callable[[np.ndarray, float], np.ndarray], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def reference(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[3, H, W] in float64; draws in the order of the module."""
    chances = rng.random(3)
    if chances[0] < 0.3:
        amounts = [*(rng.uniform(0.2, 1.8) for _ in range(3)), rng.uniform(-0.2, 0.2)]
        for which in rng.permutation(4):
            image = ADJUSTMENTS[which](image, amounts[which])
    if chances[1] < 0.2:
        image = np.repeat(np.tensordot(GRAY, image, 1)[None], 3, axis=0)
    if chances[2] < 0.2:
        image = blur(image, rng.uniform(1, 2))
    return image


def photos(count: int, height: int = 6, width: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((count, 3, height, width))).float()


def rngs_of(count: int, first: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([11, i]) for i in range(first, first + count)]


def test_equals_the_formulas() -> None:
    images = photos(120)
    augmented = augment_colors(images, rngs_of(120))
    for image, result, rng in zip(images, augmented, rngs_of(120)):
        np.testing.assert_allclose(result.numpy(), reference(image.numpy().astype(np.float64), rng), atol=2e-5)
    assert augmented.min() >= 0
    assert augmented.max() <= 1


def test_the_chances() -> None:
    images = photos(3000, 3, 3)
    augmented = augment_colors(images, rngs_of(3000))
    untouched = (augmented == images).all(dim=(1, 2, 3))
    assert stats.binomtest(int(untouched.sum()), 3000, 0.7 * 0.8 * 0.8).pvalue > 1e-3
    gray = (augmented.amax(1) - augmented.amin(1)).amax((1, 2)) < 1e-6
    assert stats.binomtest(int(gray.sum()), 3000, 0.2).pvalue > 1e-3


def test_does_not_depend_on_the_batch_or_change_its_input() -> None:
    images = photos(12)
    before = images.clone()
    whole = augment_colors(images, rngs_of(12))
    parts = [augment_colors(images[i : i + 3], rngs_of(3, i)) for i in range(0, 12, 3)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(images, before)
    assert augment_colors(images[:0], []).shape == (0, 3, 6, 7)


def test_autocast_leaves_the_colors_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        augmented = augment_colors(photos(20), rngs_of(20))
    assert augmented.dtype == torch.float32
    assert torch.equal(augmented, augment_colors(photos(20), rngs_of(20)))


def test_one_generator_for_each_image() -> None:
    with pytest.raises(AssertionError, match="2 images need as many generators, got 1"):
        augment_colors(photos(2), rngs_of(1))
