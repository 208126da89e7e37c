"""The classical methods of Table 1 by the name that `method` gives them."""

from mis_platform.baselines.geodesic import Geodesic
from mis_platform.baselines.graph_cut import GraphCut
from mis_platform.baselines.random_walk import RandomWalk
from mis_platform.config import CLASSICAL_METHODS, ClassicalConfig
from mis_platform.evaluation.click_model import ClickModel

METHODS_VERSION = 1  # raised when one of them answers differently


def build_method(name: str, config: ClassicalConfig) -> ClickModel:
    """One of CLASSICAL_METHODS, ready for `set_image`."""
    match name:
        case "graphcut":
            return GraphCut(config)
        case "gsc":
            return GraphCut(config, star="geodesic")
        case "esc":
            return GraphCut(config, star="euclidean")
        case "random_walk":
            return RandomWalk(config)
        case "geodesic":
            return Geodesic(config)
    raise ValueError(f"unknown method {name!r}; there are: {', '.join(CLASSICAL_METHODS)}")
