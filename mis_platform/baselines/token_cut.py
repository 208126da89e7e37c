"""TokenCut: one salient object by a normalised cut of the patch graph (Wang et al., CVPR 2022, sections 3.2 and 3.3).

The graph joins patches whose features point in similar directions. Its second smallest generalised eigenvector, cut at
its mean, splits the photo in two; the side with the largest entry is the object. A bilateral solver moves the borders
of patches to those of colours.

Where the authors' code inverts a refined mask that has little in common with the coarse one (and so empties it), the
coarse mask is kept here.
"""

import numpy as np
from scipy import ndimage

from mis_platform.baselines.bilateral import refine
from mis_platform.baselines.spectrum import is_uniform, laplacian_eigenvectors, unit_rows
from mis_platform.config import TokenCutConfig
from mis_platform.data.proposals import Proposals
from mis_platform.simulation.proposals import mask_at_image_size

WEAK_EDGE = 1e-5  # weight between patches that are not similar: the graph stays connected
MIN_AGREEMENT = 0.5  # IoU of the refined mask with the coarse one


def token_cut(image: np.ndarray, features: np.ndarray, config: TokenCutConfig) -> Proposals:
    """The salient object of a photo: one mask with score 1, or none where all patches are alike.

    image: uint8 [H, W, 3] RGB; features: float32 [gh, gw, C], a grid over the whole photo.
    """
    height, width = image.shape[:2]
    patches = salient_patches(features, config.tau)
    if patches is None:
        return Proposals(np.zeros((0, height, width), bool), np.zeros(0, np.float32))
    coarse = mask_at_image_size(patches, height, width)
    soft = refine(
        image,
        coarse.astype(np.float64),
        sigmas=(config.sigma_spatial, config.sigma_luma, config.sigma_chroma),
        smoothness=config.solver_lambda,
        confidence=config.confidence,
    )
    mask = largest_component(ndimage.binary_fill_holes(soft > 0.5))
    if _iou(mask, coarse) < MIN_AGREEMENT:
        mask = coarse
    return Proposals(mask[None], np.ones(1, np.float32))


def salient_patches(features: np.ndarray, tau: float) -> np.ndarray | None:
    """The coarse object, bool [gh, gw]; None if no cut is better than another. features: float32 [gh, gw, C].

    A connected set of patches (4 neighbours), never empty, never all.
    """
    affinity = patch_affinity(features, tau)
    if is_uniform(affinity):
        return None
    vector = laplacian_eigenvectors(affinity, 1)[:, 0]
    seed = int(np.abs(vector).argmax())
    side = vector > vector.mean()
    if not side[seed]:
        side = ~side
    labels, _ = ndimage.label(side.reshape(features.shape[:2]))
    return labels == labels.flat[seed]


def patch_affinity(features: np.ndarray, tau: float) -> np.ndarray:
    """float64 [N, N]: 1 between patches of a cosine similarity above tau, WEAK_EDGE between others."""
    directions = unit_rows(features)
    return np.where(directions @ directions.T > tau, 1.0, WEAK_EDGE)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest connected part (4 neighbours; the first of equals) of a mask, bool [H, W]; an empty one as it is."""
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0
