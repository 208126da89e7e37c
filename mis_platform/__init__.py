"""Unsupervised interactive segmentation: Multi-granularity Interaction Simulation (Li et al., ICCV 2023) on Ray.

The names a notebook needs are here; each is imported when it is first used, so that `import mis_platform` is cheap.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "MergeTree": "mis_platform.simulation.tree",
    "merge": "mis_platform.simulation.ward",
    "Predictor": "mis_platform.evaluation.predictor",
    "Run": "mis_platform.config",
}

__all__ = ["MergeTree", "Predictor", "Run", "__version__", "merge"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'mis_platform' has no attribute {name!r}; it offers: {', '.join(sorted(_PUBLIC))}"
        )
    return getattr(importlib.import_module(_PUBLIC[name]), name)
