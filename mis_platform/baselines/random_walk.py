"""Random walks: which seed does a walk from a pixel reach first (Grady, IEEE TPAMI 2006).

The solver of the combinatorial Dirichlet problem is scikit-image's, preconditioned by pyamg's multigrid.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from skimage.segmentation import random_walker

from mis_platform.baselines.seeds import BACKGROUND, FOREGROUND, seed_map
from mis_platform.config import ClassicalConfig
from mis_platform.simulation.clicks import Click

_TOLERANCE = 1e-5  # of the residual: the answer then stays within a few thousandths of the exact one
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
        try:
            chances = self._walk(labels, "cg_mg")
        except UserWarning:  # multigrid can fail on extreme contrasts; factorising takes three times as long
            chances = self._walk(labels, "bf")
        return np.clip(chances, 0, 1).astype(np.float32)

    def _walk(self, labels: np.ndarray, mode: str) -> np.ndarray:
        """float64 [H, W]. Raises UserWarning where the solver did not reach the tolerance."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Conjugate gradient convergence", category=UserWarning)
            chances: np.ndarray = random_walker(
                self._image,
                labels,
                beta=self._config.beta,
                mode=mode,
                tol=_TOLERANCE,
                return_full_prob=True,
                channel_axis=-1,
            )
        return chances[_OBJECT - 1]
