"""Geodesic matting: which seed is nearer along paths of like colour (Bai and Sapiro, IJCV 2009).

The distance of two neighbours is the change of the likelihood of being object, |grad P|. Fast marching is
scikit-image's minimum-cost-path search.
"""

from collections.abc import Sequence

import numpy as np
from skimage.graph import MCP_Geometric

from mis_platform.baselines.color_model import log_density
from mis_platform.baselines.graph_cut import gradient_magnitude
from mis_platform.baselines.seeds import BACKGROUND, FOREGROUND, seed_map
from mis_platform.config import ClassicalConfig
from mis_platform.simulation.clicks import Click

_STEP_COST = 1e-6  # among pixels without any change of likelihood the nearer seed wins


class Geodesic:
    """A `ClickModel`."""

    def __init__(self, config: ClassicalConfig) -> None:
        self._config = config

    def set_image(self, image: np.ndarray) -> None:
        """uint8 [H, W, 3] RGB."""
        self._image = image.astype(np.float64) / 255

    def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
        """float32 [H, W]: share of the background's distance in the sum of both, above a half where the object's is
        the smaller."""
        height, width = self._image.shape[:2]
        seeds = seed_map(clicks, height, width, self._config.seed_radius, self._config.frame)
        if not (seeds == FOREGROUND).any() or not (seeds == BACKGROUND).any():
            return np.full((height, width), float((seeds == FOREGROUND).any()), np.float32)
        costs = _STEP_COST + gradient_magnitude(self._likelihood(seeds))
        to_object, to_rest = (_distances(costs, seeds == side) for side in (FOREGROUND, BACKGROUND))
        return (to_rest / (to_object + to_rest)).astype(np.float32)

    def _likelihood(self, seeds: np.ndarray) -> np.ndarray:
        """P(object | colour), float64 [H, W]."""
        flat = self._image.reshape(-1, 3)
        lead = log_density(flat, self._image[seeds == BACKGROUND]) - log_density(flat, self._image[seeds == FOREGROUND])
        return (1 / (1 + np.exp(np.clip(lead, -50, 50)))).reshape(seeds.shape)


def _distances(costs: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Length of the cheapest path from every pixel to a seed, float64 [H, W]."""
    distances: np.ndarray = MCP_Geometric(costs).find_costs(np.argwhere(seeds))[0]
    return distances
