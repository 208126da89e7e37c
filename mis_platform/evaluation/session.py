"""A click session as a value: the photo, the clicks and the network's last answer (RITM's predictor without its state).

Many sessions, also of different photos, go through the network together; each gets the answer it would get alone.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mis_platform.config import EvalConfig, check_fbrs
from mis_platform.errors import DataError
from mis_platform.evaluation import zoom_in
from mis_platform.evaluation.zoom_in import Window
from mis_platform.simulation.clicks import Click, points_array

# image float32 [B, 3, h, w] in [0, 1], previous answer float32 [B, 1, h, w] in [0, 1], points float32 [B, 2N, 3] with
# rows (row, column, order), N positive then N negative, unused rows -1  ->  logits float32 [B, 1, h, w]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class Refiner(Protocol):
    """A Network that works on its answer to one session at a time, and may remember what it found."""

    def refine(self, inputs: Tensor, clicks: list[Click], config: EvalConfig, memory: Any) -> tuple[Tensor, Any]:
        """(Probabilities float32 [h, w], what to remember until the next click).

        inputs: float32 [4, h, w], image and previous answer. clicks: all, in pixels of `inputs`. memory: of the click
        before; None at first.
        """


@dataclass(frozen=True)
class Session:
    """One object being clicked. A new click makes a new session, so undo is keeping the old one."""

    image: Tensor  # uint8 [3, H, W], on the network's device
    clicks: tuple[Click, ...] = ()
    answer: Tensor | None = None  # float32 [h, w] in [0, 1], at network size; None before the first click
    window: Window | None = None  # the part of the image that `answer` covers
    stored: Window | None = None  # the window zoom-in holds on to; None until it zooms
    memory: Any = None  # a Refiner's

    @property
    def height(self) -> int:
        """Of the photo, in pixels."""
        return self.image.shape[1]

    @property
    def width(self) -> int:
        """Of the photo, in pixels."""
        return self.image.shape[2]


def upload(image: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """The photo, uint8 [H, W, 3] RGB, as the uint8 [3, H, W] tensor that any number of sessions can share.

    Raises ValueError for any other dtype or shape.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = f"{image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"the image must be a numpy array of uint8 in [0, 255], not {kind}; "
            "for floats in [0, 1] pass (255 * image).round().astype('uint8')"
        )
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"the image must have shape [height, width, 3] (RGB), not {list(image.shape)}; "
            "for grey pass np.repeat(image[..., None], 3, axis=2), for RGBA image[..., :3]"
        )
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(device)


def probability(session: Session) -> Tensor:
    """The answer at image size: float32 [H, W] in [0, 1]; 0 outside the zoom-in window and before the first click."""
    if session.answer is None or session.window is None:
        return torch.zeros(session.height, session.width, device=session.image.device)
    return zoom_in.paste(session.answer, session.window, session.height, session.width)


@torch.inference_mode()
def advance(
    network: Network, sessions: Sequence[Session], clicks: Sequence[Click], config: EvalConfig, zoom_size: int
) -> list[Session]:
    """Add one click to each session and ask the network; sessions of equal network size share one forward.

    A Refiner is asked for one session after the other.
    zoom_size: side of the square network input in pixels, or, with RITM's zoom-in (config.zoom_skip_clicks=1), its
    longest side. Raises DataError if the network answers NaN, ValueError for a Refiner with another config.precision
    than "fp32".
    """
    if isinstance(network, Refiner):
        check_fbrs(config)
    previous = [probability(session) for session in sessions]
    moved: list[Session] = []
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (session, click) in enumerate(zip(sessions, clicks, strict=True)):
        placed, size = _place(session, click, previous[index], config, zoom_size)
        moved.append(placed)
        by_size[size].append(index)
    for size, indices in by_size.items():
        inputs = [zoom_in.crop(moved[i].image, previous[i], _window(moved[i]), size) for i in indices]
        on_input = [zoom_in.to_network(moved[i].clicks, _window(moved[i]), size) for i in indices]
        if isinstance(network, Refiner):
            for i, planes, on_planes in zip(indices, inputs, on_input):
                answer, memory = network.refine(planes, on_planes, config, moved[i].memory)
                moved[i] = replace(moved[i], answer=answer, memory=memory)
            continue
        with _arithmetic(config.precision, inputs[0].device.type):
            answers = _ask(network, torch.stack(inputs), on_input, config.flip)
        for index, answer in zip(indices, answers):
            moved[index] = replace(moved[index], answer=answer.clone())  # not a view that keeps the batch alive
    return moved


def _place(
    session: Session, click: Click, previous: Tensor, config: EvalConfig, zoom_size: int
) -> tuple[Session, tuple[int, int]]:
    """The session with the click added and its window moved, still unanswered, and the size the network sees it at."""
    frame = zoom_in.full_frame(session.height, session.width)
    clicks = (*session.clicks, click)
    candidate = None
    if len(clicks) > config.zoom_skip_clicks:
        candidate = zoom_in.candidate_window(previous, clicks, config)
    stretch = config.zoom_skip_clicks < 0
    if candidate is None and not stretch:  # RITM has nothing to zoom in on: the photo as it is
        return replace(session, clicks=clicks, window=frame), (session.height, session.width)
    stored = zoom_in.next_window(session.stored, candidate or frame, clicks, config)
    size = zoom_in.network_size(stored, (zoom_size, zoom_size) if stretch else zoom_size)
    return replace(session, clicks=clicks, window=stored, stored=stored), size


def _window(session: Session) -> Window:
    assert session.window is not None, "a session has a window from its first click on"
    return session.window


@contextlib.contextmanager
def _arithmetic(precision: str, device: str) -> Iterator[None]:
    """That of matrix products and convolutions within; `precision` as EvalConfig has it. device: "cpu" or "cuda"."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn) if device == "cuda" else ()
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def _ask(network: Network, inputs: Tensor, clicks: list[list[Click]], flip: bool) -> Tensor:
    """Probabilities [B, h, w] for inputs [B, 4, h, w]; with flip, of the mean logits of input and mirror image."""
    if flip:
        inputs, clicks = with_mirror(inputs, clicks)
    logits = network(inputs[:, :3], inputs[:, 3:], points_of(clicks).to(inputs.device)).float()
    assert logits.shape == (len(inputs), 1, *inputs.shape[2:]), f"the network returned logits of {tuple(logits.shape)}"
    return to_probabilities(logits, flip)


def with_mirror(inputs: Tensor, clicks: list[list[Click]]) -> tuple[Tensor, list[list[Click]]]:
    """Inputs [B, C, h, w] and their clicks, followed by their mirror images: [2B, C, h, w]."""
    width = inputs.shape[3]
    mirrored = [[Click(click.y, width - 1 - click.x, click.positive) for click in each] for each in clicks]
    return torch.cat([inputs, inputs.flip(3)]), clicks + mirrored


def points_of(clicks: Sequence[Sequence[Click]]) -> Tensor:
    """The clicks as a Network takes them, float32 [B, 2N, 3]."""
    slots = max(1, *(max(_count(each, True), _count(each, False)) for each in clicks))
    return torch.from_numpy(np.stack([points_array(each, slots) for each in clicks]))


def to_probabilities(logits: Tensor, flip: bool) -> Tensor:
    """[B, h, w] from logits [B, 1, h, w], or [2B, 1, h, w] of `with_mirror`. Raises DataError for NaN."""
    if torch.isnan(logits).any():
        raise DataError("the network answered NaN: its weights are damaged or its training diverged")
    if flip:
        straight, mirror = logits.chunk(2)
        logits = 0.5 * (straight + mirror.flip(3))
    return torch.sigmoid(logits[:, 0])


def _count(clicks: Sequence[Click], positive: bool) -> int:
    return sum(click.positive == positive for click in clicks)
