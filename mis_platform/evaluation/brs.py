"""f-BRS-B: at every click, make a network right about the clicks by scaling and shifting its features.

Sofiiuk et al., "f-BRS: Rethinking Backpropagating Refinement for Interactive Segmentation" (CVPR 2020), with the
settings of RITM's evaluation. It is for convolutional networks that can be cut in two: `features` and `decode`. On an
HRNet RITM's code puts variant B where A is, between the backbone and the object context; so does this.

The optimisation starts where that of the last click ended. Like the rest of a click session, that is a value and no
state of the network: undo and any order of sessions are safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

from mis_platform.config import EvalConfig
from mis_platform.evaluation.session import points_of, to_probabilities, with_mirror
from mis_platform.simulation.clicks import Click

LBFGS = {"m": 20, "factr": 0, "pgtol": 1e-8, "maxfun": 20, "maxiter": 40}
NETWORK_CLICKS = 8  # the network sees no more; all count for the refinement
FREE_CLICKS = 1  # answered without refinement
SCALE_WEIGHT = 1e-3  # of the regulariser
BIAS_WEIGHT = 10  # times SCALE_WEIGHT
SETTLED_IOU = 0.99  # the mask has stopped to change
CLICK_REACH = 1  # network pixels: a click stands for 3x3


class Divisible(Protocol):
    """A network in two parts; `decode(features(...), size)` is its answer."""

    def features(self, image: Tensor, previous: Tensor, points: Tensor) -> Tensor:
        """Network inputs to float32 [B, C, h, w]."""

    def decode(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B, 1, *size]."""


@dataclass(frozen=True)
class Memory:
    """What a session keeps from click to click."""

    tuning: np.ndarray  # float64 [2C]: scales minus 1, then biases
    # From the last click on that the network sees: image, float32 [3, h, w], and its features, float32 [B, C, h, w].
    seen: tuple[Tensor, Tensor] | None = None


class FeatureRefinement:
    """A Network that is refined by f-BRS-B: a `Refiner` for `session.advance`. network: in eval mode."""

    def __init__(self, network: Divisible) -> None:
        self.network = network

    @property
    def training(self) -> bool:
        """Whether the network is in training mode, in which nobody may ask it."""
        return bool(getattr(self.network, "training", False))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the network is set up for."""
        size: tuple[int, int] = self.network.image_size  # type: ignore[attr-defined]
        return size

    def __call__(self, image: Tensor, previous: Tensor, points: Tensor) -> Tensor:
        """Logits [B, 1, h, w] without refinement."""
        size = (image.shape[2], image.shape[3])
        return self.network.decode(self.network.features(image, previous, points), size)

    def refine(
        self, inputs: Tensor, clicks: list[Click], config: EvalConfig, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        """(Probabilities float32 [h, w], memory for the next click); see `session.Refiner`.

        Raises DataError if the network answers NaN.
        """
        # Gradients need tensors from outside of inference mode, in which sessions advance.
        with torch.inference_mode(False), torch.no_grad():
            features = self._features(inputs.clone(), clicks, config.flip, memory)
            channels, size = features.shape[1], (inputs.shape[1], inputs.shape[2])
            tuning = np.zeros(2 * channels) if memory is None else memory.tuning
            search = Search(self.network, features, click_maps(clicks, size, config.flip), config.threshold)
            if len(clicks) > FREE_CLICKS:
                tuning, _, _ = fmin_l_bfgs_b(search, tuning, **LBFGS)
            logits = search.logits(torch.from_numpy(tuning)) if search.best is None else search.best
            answer = to_probabilities(logits.float(), config.flip)[0]
            is_last = len(clicks) >= NETWORK_CLICKS
            kept = (inputs[:3].clone(), features) if is_last else None
        return answer, Memory(tuning, kept)

    def _features(self, inputs: Tensor, clicks: list[Click], flip: bool, memory: Memory | None) -> Tensor:
        """[B, C, h, w], B=2 with flip; those of the last click if the network would see nothing new."""
        if memory is not None and memory.seen is not None and torch.equal(memory.seen[0], inputs[:3]):
            return memory.seen[1]
        batch, seen = inputs[None], [clicks[:NETWORK_CLICKS]]
        if flip:
            batch, seen = with_mirror(batch, seen)
        return self.network.features(batch[:, :3], batch[:, 3:], points_of(seen).to(batch.device))


class ClickMaps(NamedTuple):
    """Where the answer is known, float32 [B, 1, h, w] in {0, 1}."""

    positive: Tensor
    negative: Tensor


def click_maps(clicks: Sequence[Click], size: tuple[int, int], flip: bool) -> ClickMaps:
    """Squares around the clicks, cut off at the frame; with flip, followed by their mirror images.

    A pixel may be in both maps. RITM's code drops clicks on the first row or column; here they count.
    """
    maps = np.zeros((2, *size), np.float32)
    for click in clicks:
        row, column = round(click.y), round(click.x)
        rows = slice(max(0, row - CLICK_REACH), row + CLICK_REACH + 1)
        columns = slice(max(0, column - CLICK_REACH), column + CLICK_REACH + 1)
        maps[0 if click.positive else 1, rows, columns] = 1
    positive, negative = torch.from_numpy(maps)[:, None, None]
    if not flip:
        return ClickMaps(positive, negative)
    # The mirror image of the clicks, not of the maps: they may differ by a pixel where clicks are not whole numbers.
    mirrored = [Click(click.y, size[1] - 1 - click.x, click.positive) for click in clicks]
    other = click_maps(mirrored, size, flip=False)
    return ClickMaps(torch.cat([positive, other.positive]), torch.cat([negative, other.negative]))


class Search:
    """The function that L-BFGS-B minimises: tuning -> loss and gradient; it keeps the best answer on its way."""

    def __init__(self, network: Divisible, features: Tensor, maps: ClickMaps, threshold: float) -> None:
        """features: float32 [B, C, h, w]; maps: on any device; threshold: above it a pixel is object."""
        self.network = network
        self.features = features
        self.maps = ClickMaps(*(each.to(features.device) for each in maps))
        self.threshold = threshold
        self.best: Tensor | None = None  # logits [B, 1, h, w]
        self.best_loss = float("inf")
        self.last_mask: Tensor | None = None

    def __call__(self, tuning: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss and gradient at `tuning`; a gradient of 0, which ends the search, once there is nothing left to do."""
        variables = torch.from_numpy(tuning).to(self.features).requires_grad_()
        with torch.enable_grad():
            logits = self.logits(variables)
            soft = torch.sigmoid(logits)
            loss = self._click_loss(soft) + _regulariser(variables)
        value = float(loss.detach())
        if self.best is None or value < self.best_loss:
            self.best, self.best_loss = logits.detach(), value
        if self._is_right(soft.detach()) or self._is_settled(soft.detach()):
            return value, np.zeros_like(tuning)
        (gradient,) = torch.autograd.grad(loss, variables)
        return value, gradient.cpu().numpy().astype(np.float64)

    def logits(self, tuning: Tensor) -> Tensor:
        """[B, 1, h, w] with each channel of the features scaled and shifted."""
        scale, bias = tuning.to(self.features).chunk(2)
        size = (self.maps.positive.shape[2], self.maps.positive.shape[3])
        return self.network.decode(self.features * (1 + scale)[:, None, None] + bias[:, None, None], size)

    def _click_loss(self, soft: Tensor) -> Tensor:
        """Mean squared error at positive clicks plus that at negative ones."""
        positive = ((1 - soft) * self.maps.positive).square().sum() / (self.maps.positive.sum() + 1e-5)
        return positive + (soft * self.maps.negative).square().sum() / (self.maps.negative.sum() + 1e-5)

    def _is_right(self, soft: Tensor) -> bool:
        """Whether every clicked pixel is on its side of the threshold."""
        wrong_positive = ((1 - soft) * self.maps.positive).max() >= 1 - self.threshold
        return not bool(wrong_positive) and not bool((soft * self.maps.negative).max() >= self.threshold)

    def _is_settled(self, soft: Tensor) -> bool:
        """Whether the mask is that of the evaluation before, but for a hundredth."""
        mask = (soft > self.threshold).flatten(1)
        if self.last_mask is not None:
            union = (mask | self.last_mask).sum(dim=1)
            overlaps = (mask & self.last_mask).sum(dim=1)[union > 0] / union[union > 0]
            if len(overlaps) and float(overlaps.mean()) > SETTLED_IOU:
                return True
        self.last_mask = mask
        return False


def _regulariser(tuning: Tensor) -> Tensor:
    scale, bias = tuning.chunk(2)
    return SCALE_WEIGHT * (scale.square().sum() + BIAS_WEIGHT * bias.square().sum())
