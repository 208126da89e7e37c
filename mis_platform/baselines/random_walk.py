"""Random walks: which seed does a walk from a pixel reach first (Grady, IEEE TPAMI 2006).

The solver of the combinatorial Dirichlet problem is scikit-image's, by factorisation: multigrid takes as long at the
contrasts of photos, and does not always converge.
"""

from collections.abc import Sequence

import numpy as np
from skimage.segmentation import random_walker

from mis_platform.baselines.seeds import BACKGROUND, FOREGROUND, seed_map
from mis_platform.config import ClassicalConfig
from mis_platform.simulation.clicks import Click

_OBJECT, _REST = 1, 2  # scikit-image's labels; 0 is unknown


class RandomWalk:
    """A `ClickModel`."""

    def __init__(self, config: ClassicalConfig) -> None:
        self._config = config

    def set_image(self, image: np.ndarray) -> None:
        """uint8 [H, W, 3] RGB."""
        self._image = image.astype(np.float64) / 255
        if not self._image.std():  # by which scikit-image divides; this speck changes no weight
            self._image[0, 0, 0] += 1e-6

    def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
        """float32 [H, W]: the chance that a walk from the pixel reaches the object's seeds first."""
        height, width = self._image.shape[:2]
        seeds = seed_map(clicks, height, width, self._config.seed_radius, self._config.frame)
        labels = np.where(seeds == FOREGROUND, _OBJECT, np.where(seeds == BACKGROUND, _REST, 0))
        if not (labels == _OBJECT).any() or not (labels == _REST).any():  # every walk ends at the one kind of seed
            return np.full((height, width), float((labels == _OBJECT).any()), np.float32)
        if labels.all():
            return (labels == _OBJECT).astype(np.float32)
        chances = random_walker(
            self._image, labels, beta=self._config.beta, mode="bf", return_full_prob=True, channel_axis=-1
        )
        return np.clip(chances[_OBJECT - 1], 0, 1).astype(np.float32)
