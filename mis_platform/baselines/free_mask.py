"""Free Mask, the mask proposals of FreeSOLO (Wang et al., CVPR 2022, section 3.1).

Every patch of a pyramid asks which patches look like it; each answer is a soft mask. Matrix NMS (SOLOv2, Wang et al.,
2020) lowers the scores of masks that repeat better ones.

Names: Q queries, N = gh * gw patches, K masks.
"""

import numpy as np
from scipy.linalg.blas import ssyrk

from mis_platform.baselines.spectrum import unit_rows
from mis_platform.config import FreeMaskConfig
from mis_platform.data.proposals import Proposals

MIN_PATCHES = 2  # a mask of fewer is no mask
MIN_CONTRAST = 1e-5  # range of a query's cosines: below it is rounding, not an answer


def free_mask(image: np.ndarray, features: np.ndarray, config: FreeMaskConfig) -> Proposals:
    """Masks of a photo, best first, at most `config.keep`, maybe none; scores are their decayed maskness.

    image: uint8 [H, W, 3] RGB, of which only the size is used; features: float32 [gh, gw, C], a grid over all of it.
    """
    height, width = image.shape[:2]
    soft = soft_masks(features, config.scales)
    soft, scores = distinct(soft, config)
    masks, kept = np.zeros((len(soft), height, width), bool), np.zeros(len(soft), bool)
    for k, each in enumerate(soft):
        masks[k] = resize(each.reshape(*features.shape[:2], 1), (height, width))[:, :, 0] >= config.mask_threshold
        kept[k] = scores[k] >= config.min_maskness and is_object_like(masks[k], config)
    return Proposals(masks[kept], scores[kept])


def soft_masks(features: np.ndarray, scales: tuple[float, ...]) -> np.ndarray:
    """Cosines of queries with patches, each query's stretched to [0, 1]: float32 [Q, N].

    The queries are the features, resized by each of the scales. Those that see no difference between patches are left
    out.
    """
    sides = [tuple(max(1, int(side * scale)) for side in features.shape[:2]) for scale in scales]
    queries = [unit_rows(resize(features, (rows, columns))) for rows, columns in sides]
    keys = unit_rows(features).astype(np.float32)
    soft = np.concatenate(queries).astype(np.float32) @ keys.T
    low, high = soft.min(axis=1, keepdims=True), soft.max(axis=1, keepdims=True)
    is_answer = (high - low)[:, 0] >= MIN_CONTRAST
    soft, low, high = soft[is_answer], low[is_answer], high[is_answer]
    soft -= low
    soft /= high - low
    return soft


def distinct(soft: np.ndarray, config: FreeMaskConfig) -> tuple[np.ndarray, np.ndarray]:
    """The best soft masks after non-maximum suppression: (float32 [K, N], their scores float32 [K], descending)."""
    binary = soft >= config.mask_threshold
    areas = binary.sum(axis=1)
    maskness = (soft * binary).sum(axis=1) / np.maximum(areas, 1)
    order = np.argsort(-maskness, kind="stable")
    order = order[areas[order] >= MIN_PATCHES]
    scores = maskness[order] * matrix_nms_decay(binary[order], config.nms_sigma)
    best = np.argsort(-scores, kind="stable")[: config.keep]
    return soft[order[best]], scores[best].astype(np.float32)


def matrix_nms_decay(masks: np.ndarray, sigma: float) -> np.ndarray:
    """Factor in (0, 1] for the score of each mask: float32 [K]. masks: bool [K, N], best first, none empty.

    Equations 5 and 6 of SOLOv2 with the Gaussian penalty: mask j keeps min over better i of
    exp(-sigma iou_ij^2) / exp(-sigma c_i^2), where c_i is the largest IoU of i with a mask better than i.
    """
    if not len(masks):
        return np.zeros(0, np.float32)
    pixels = masks.astype(np.float32)
    areas = pixels.sum(axis=1)
    # Half of a matrix product. The transpose of a C array is the Fortran array that BLAS wants: nothing is copied.
    ious = ssyrk(1.0, pixels.T, trans=1, lower=0)  # intersections above the diagonal, 0 below; exact in float32
    ious /= areas[:, None] + areas - ious
    np.fill_diagonal(ious, 0.0)
    worst = ious.max(axis=0)
    np.square(ious, out=ious)
    ious -= np.square(worst)[:, None]
    # Below the diagonal is -c_i^2 <= 0, never above the entry of the best of all, which is not negative.
    return np.exp(-sigma * ious.max(axis=0))


def is_object_like(mask: np.ndarray, config: FreeMaskConfig) -> bool:
    """Whether a mask, bool [H, W], is not at the top, as sky is, and not as wide as the photo, as background is.

    The authors' box: as wide as there are columns with a pixel, around the mean of the rows and columns with one. A
    mask in two parts is no wider than both together, however far apart they are.
    """
    if not mask.any():
        return False
    height, width = mask.shape
    center_row = np.flatnonzero(mask.any(axis=1)).mean()
    box_width = np.count_nonzero(mask.any(axis=0))
    return bool(center_row > config.min_center_row * height and box_width < config.max_box_width * width)


def resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, pixel centres at half numbers, borders repeated: float32 [h, w, C] -> [*size, C]."""
    rows, columns = (_linear_weights(old, new) for old, new in zip(values.shape[:2], size))
    height, width, channels = values.shape
    tall = (rows @ values.reshape(height, -1)).reshape(size[0], width, channels)
    return np.matmul(columns, tall)


def _linear_weights(source: int, target: int) -> np.ndarray:
    """float32 [target, source], rows sum to 1."""
    position = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    lower = np.minimum(position.astype(np.int64), max(source - 2, 0))
    share = position - lower
    weights = np.zeros((target, source))
    weights[np.arange(target), lower] = 1 - share
    weights[np.arange(target), np.minimum(lower + 1, source - 1)] += share
    return weights.astype(np.float32)
