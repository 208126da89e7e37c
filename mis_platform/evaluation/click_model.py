"""What anything that answers clicks looks like to the evaluator: the way in for methods and models of other people."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mis_platform.simulation.clicks import Click


class ClickModel(Protocol):
    """An interactive segmentation method, one photo at a time."""

    def set_image(self, image: np.ndarray) -> None:
        """Start on a photo, uint8 [H, W, 3] RGB. What depends on the photo alone is best computed here, once."""

    def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
        """How sure it is of each pixel: float32 [H, W] in [0, 1].

        clicks: all clicks so far, in order, at least one, in pixels of the photo. previous: float32 [H, W] in [0, 1],
        its own answer before the last click, zeros at first. The same arguments must give the same answer.
        """
