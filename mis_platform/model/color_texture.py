"""Patch features without a network: colour and texture histograms, smoothed within regions.

A stand-in for self-supervised features where no weights are at hand. Ward merging minimises squared distances, so the
channels are built to make those meaningful: square roots of histograms (squared distance = Hellinger), in CIELAB.

The constants were chosen by the best overlap of tree regions with objects on GrabCut's 50 photos and 50 photos of
COCO; results on GrabCut are therefore not independent of them.
"""

import cv2
import numpy as np

PATCH = 8  # pixels
BINS = 10  # of L, of a and of b
GRADIENT_BINS = 6
DIM = 3 * BINS + GRADIENT_BINS + 5

CHROMA_LIMIT = 50.0  # CIELAB units; a and b beyond count as this
GRADIENT_LIMIT = 2.5  # log(1 + CIELAB units per pixel)
LIGHTNESS_WEIGHT = 50.0  # of a histogram's square root, whose norm is 1; the mean colours are in CIELAB units
CHROMA_WEIGHT = 75.0
GRADIENT_WEIGHT = 30.0
POSITION_WEIGHT = 0.5  # per patch
BLUR = 0.7  # patches, standard deviation
DIFFUSION_STEPS = 10
DIFFUSION_SCALE = 30.0  # feature distance at which neighbours stop to mix


def describe(image: np.ndarray) -> np.ndarray:
    """Features of all 8x8 patches: float32 [N, 41], N in row-major order.

    image: uint8 [H, W, 3] RGB, H and W multiples of 8. Channels: the square roots of the soft histograms of L, a, b and
    of the gradient of L; mean L, a, b; row and column.
    """
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    grid = (image.shape[0] // PATCH, image.shape[1] // PATCH)
    lightness, a, b = (_histogram(np.ascontiguousarray(lab[:, :, k]), low, high, BINS) for k, low, high in _LAB_RANGES)
    gradient = _histogram(_gradient(np.ascontiguousarray(lab[:, :, 0])), 0, GRADIENT_LIMIT, GRADIENT_BINS)
    mean = cv2.resize(lab, (grid[1], grid[0]), interpolation=cv2.INTER_AREA)
    features = np.concatenate(
        [
            LIGHTNESS_WEIGHT * np.sqrt(_blur(lightness)),
            CHROMA_WEIGHT * np.sqrt(_blur(a)),
            CHROMA_WEIGHT * np.sqrt(_blur(b)),
            GRADIENT_WEIGHT * np.sqrt(_blur(gradient)),
            _blur(mean),
            POSITION_WEIGHT * np.moveaxis(np.mgrid[: grid[0], : grid[1]], 0, -1),
        ],
        axis=-1,
        dtype=np.float32,
    )
    return _diffuse(features).reshape(-1, DIM)


_LAB_RANGES = ((0, 0.0, 100.0), (1, -CHROMA_LIMIT, CHROMA_LIMIT), (2, -CHROMA_LIMIT, CHROMA_LIMIT))


def _gradient(lightness: np.ndarray) -> np.ndarray:
    """log(1 + gradient magnitude) of a slightly blurred image, float32 [H, W]."""
    smooth = cv2.GaussianBlur(lightness, (0, 0), 1.0)
    across = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8)  # 1/8: CIELAB units per pixel
    down = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8)
    # Not cv2.magnitude: its last bit depends on where in memory the arrays happen to lie.
    return np.log1p(np.sqrt(across * across + down * down))


def _histogram(values: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    """Soft histogram of each patch: float32 [h, w, bins], sums to 1. A value is shared by the two nearest bin centres.

    values: float32 [H, W]. The first and the last centre are `low` and `high`; values outside count as those.
    """
    height, width = values.shape[0] // PATCH, values.shape[1] // PATCH
    position = np.clip((values - low) * ((bins - 1) / (high - low)), 0, bins - 1)
    lower = np.minimum(position.astype(np.int32), bins - 2)
    share = (position - lower).ravel()
    patch = np.arange(height).repeat(PATCH)[:, None] * width + np.arange(width).repeat(PATCH)
    index = (patch * bins + lower).ravel()
    size = height * width * bins
    counts = np.bincount(index, 1 - share, size) + np.bincount(index + 1, share, size)
    return (counts / PATCH**2).reshape(height, width, bins).astype(np.float32)


def _blur(channels: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(channels, (0, 0), BLUR).reshape(channels.shape)


def _diffuse(features: np.ndarray) -> np.ndarray:
    """Average every patch with its four neighbours, each weighted by exp(-(distance / DIFFUSION_SCALE)^2), repeatedly.

    Evens out regions and leaves their borders alone (Perona and Malik, 1990). features: float32 [h, w, C].
    """
    for _ in range(DIFFUSION_STEPS):
        total = features.copy()
        weights = np.ones(features.shape[:2], np.float32)
        for first, second in (_ROWS, _COLUMNS):
            difference = features[first] - features[second]
            affinity = np.exp(np.einsum("ijc,ijc->ij", difference, difference) * np.float32(-(DIFFUSION_SCALE**-2)))
            total[first] += affinity[:, :, None] * features[second]
            total[second] += affinity[:, :, None] * features[first]
            weights[first] += affinity
            weights[second] += affinity
        features = total / weights[:, :, None]
    return features


_ROWS = (slice(None, -1), slice(1, None))  # pairs of neighbours below each other
_COLUMNS = ((slice(None), slice(None, -1)), (slice(None), slice(1, None)))
