"""Proposals of other unsupervised methods, from the same patch features as merge trees (Table 1's baselines)."""

from typing import Any

import numpy as np

from mis_platform.config import SourcesConfig, plain
from mis_platform.data.proposals import Proposals

# Raised when a method's masks change. freemask 2: boxes from rows and columns with a pixel, not from ends and pixels.
VERSIONS = {"tokencut": 1, "dsm": 1, "freemask": 2}
DRAWING = ("dsm",)  # those that use the random generator they are given: for the starts of k-means


def propose(
    source: str, image: np.ndarray, features: np.ndarray, config: SourcesConfig, rng: np.random.Generator
) -> Proposals:
    """The masks of one photo; K = 0 is a valid answer.

    source: "tokencut", "dsm" or "freemask"; image: uint8 [H, W, 3] RGB; features: float32 [gh, gw, C], a grid of
    patches over the whole photo, the sides of which need not be multiples of the grid's.
    rng: only those of DRAWING draw.

    Raises ValueError for another source, features that are not finite, or more than 8192 patches (the methods compare
    every patch with every other). The methods are imported here: a training asks this module for settings only.
    """
    from mis_platform.baselines.deep_spectral import deep_spectral
    from mis_platform.baselines.free_mask import free_mask
    from mis_platform.baselines.spectrum import MAX_NODES
    from mis_platform.baselines.token_cut import token_cut

    _check_source(source)
    assert image.dtype == np.uint8, image.dtype
    assert image.ndim == features.ndim == 3, (image.shape, features.shape)
    patches = features.shape[0] * features.shape[1]
    if patches > MAX_NODES:
        raise ValueError(
            f"{features.shape[0]}x{features.shape[1]} patches; target.source={source} compares every patch with every "
            f"other and takes up to {MAX_NODES}: make the photo smaller"
        )
    if not np.isfinite(features).all():
        raise ValueError("the features of the photo are not all finite numbers")
    if source == "tokencut":
        return token_cut(image, features, config.tokencut)
    if source == "dsm":
        return deep_spectral(image, features, config.dsm, rng)
    return free_mask(image, features, config.freemask)


def source_settings(source: str, config: SourcesConfig) -> dict[str, Any]:
    """What decides the masks of a source: its version and its own settings. Raises ValueError for another source."""
    _check_source(source)
    settings: dict[str, Any] = plain(getattr(config, source))
    return {"version": VERSIONS[source], **settings}


def _check_source(source: str) -> None:
    if source not in VERSIONS:
        raise ValueError(f"no proposals of {source!r}; there are: {', '.join(VERSIONS)}")
