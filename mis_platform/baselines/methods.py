"""The classical methods of Table 1 by the name that `method` gives them."""

from mis_platform.config import CLASSICAL_METHODS, ClassicalConfig
from mis_platform.evaluation.click_model import ClickModel

METHODS_VERSION = 2  # raised when one of them answers differently; 2: no star is cut, however large


def build_method(name: str, config: ClassicalConfig) -> ClickModel:
    """One of CLASSICAL_METHODS, ready for `set_image`.

    They are imported here, because every process that scores a trained model imports this module, and no solver.
    """
    stars = {"graphcut": None, "gsc": "geodesic", "esc": "euclidean"}
    if name in stars:
        from mis_platform.baselines.graph_cut import GraphCut

        return GraphCut(config, star=stars[name])
    if name == "random_walk":
        from mis_platform.baselines.random_walk import RandomWalk

        return RandomWalk(config)
    if name == "geodesic":
        from mis_platform.baselines.geodesic import Geodesic

        return Geodesic(config)
    raise ValueError(f"unknown method {name!r}; there are: {', '.join(CLASSICAL_METHODS)}")
