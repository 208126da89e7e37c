"""The number-of-clicks protocol: a simulated user clicks every object of a benchmark until its IoU is good enough.

The published evaluators take one object at a time. Here up to `batch` objects, also of different photos, are under way
together, and a new one starts as soon as one is done; clicks and order of the rows are those of one at a time.
"""

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mis_platform.config import ROBOT_SETTINGS, EvalConfig, fingerprint, plain
from mis_platform.errors import DataError
from mis_platform.evaluation.click_model import ClickModel
from mis_platform.evaluation.clicks import iou, next_click
from mis_platform.evaluation.session import Network, Session, advance, probability, upload
from mis_platform.model.transfer import download
from mis_platform.simulation.clicks import Click
from mis_platform.threads import in_threads

logger = logging.getLogger(__name__)

_PACKAGE_FOLDER = f"{Path(__file__).parent.parent}{os.sep}"

Row = dict[str, Any]  # dataset, image_id, object_id, click (from 1), y, x (pixels), positive, iou, ms


class Sample(NamedTuple):
    """One benchmark photo with its objects."""

    dataset: str
    image_id: str
    image: np.ndarray  # uint8 [H, W, 3], RGB
    objects: Sequence[tuple[str, np.ndarray]]  # (object_id, int8 [H, W]: 1 object, 0 background, -1 ignore)


class Excluded(NamedTuple):
    """An object that cannot be scored."""

    dataset: str
    image_id: str
    object_id: str
    reason: str


def log_excluded(excluded: Excluded) -> None:
    """Warn of an object that is not scored."""
    logger.warning("%s: photo %s, object %s is not scored: %s", *excluded)


def evaluate(
    network: Network,
    samples: Iterable[Sample],
    config: EvalConfig,
    *,
    zoom_size: int,
    batch: int,
    device: torch.device | str = "cpu",
    on_excluded: Callable[[Excluded], None] = log_excluded,
) -> Iterator[Row]:
    """One row per simulated click, object after object in the order of `samples`, whatever `batch` is.

    A session ends at `config.target_iou` (unless `config.fixed_clicks`) or after `config.max_clicks`; a model that does
    not react ends there too. Objects without a pixel of their own go to `on_excluded` instead. Samples are drawn only
    when there is room for another object, and a photo is uploaded once for all its objects. `ms` is the click's share
    of the wall time of its round, reading and simulated user included, so that the sum over all rows is the time taken.

    network: in eval mode, on `device`, its position embedding already fitting `zoom_size` (pixels). batch: objects
    under way together, >= 1. Raises ValueError for a network in training mode, DataError for a malformed sample or a
    network that answers NaN.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1 object, not {batch}")
    if getattr(network, "training", False):
        raise ValueError("the network is in training mode; call network.eval() first")
    waiting = enumerate(_objects(samples, device, on_excluded))
    active: list[_Object] = []
    done: dict[int, list[Row]] = {}  # finished before an earlier object was
    turn = 0
    while True:
        started = time.perf_counter()
        active += [replace(each, order=order) for order, each in islice(waiting, batch - len(active))]
        if not active:
            return
        active = _click_once(network, active, config, zoom_size)
        share = 1000 * (time.perf_counter() - started) / len(active)
        active = [replace(each, ms=(*each.ms, share)) for each in active]
        done |= {each.order: each.rows() for each in active if _finished(each, config)}
        active = [each for each in active if not _finished(each, config)]
        while turn in done:
            yield from done.pop(turn)
            turn += 1


def evaluate_click_model(
    model: ClickModel,
    samples: Iterable[Sample],
    config: EvalConfig,
    *,
    on_excluded: Callable[[Excluded], None] = log_excluded,
) -> Iterator[Row]:
    """`evaluate` for anything that answers clicks at image size, one object at a time: no zoom-in, no flips.

    The mask is the answer above `config.threshold`. `ms` is the model's own time for the click; what it does once for
    a photo counts for the first click of the photo's first object. Raises DataError as `evaluate` does, for an answer
    of another shape, with NaN, or outside [0, 1], and for any error of a model that is not of this package.
    """
    for sample in samples:
        started = time.perf_counter()
        with _told(model, f"{sample.dataset}: photo {sample.image_id}", "set_image"):
            model.set_image(sample.image)
        preparing = time.perf_counter() - started
        for object_id, target in _targets(sample, on_excluded):
            yield from _click_through(model, sample, object_id, target, config, preparing)
            preparing = 0.0


def _click_through(
    model: ClickModel, sample: Sample, object_id: str, target: np.ndarray, config: EvalConfig, preparing: float
) -> Iterator[Row]:
    """All clicks on one object. preparing: seconds that the model took for the photo."""
    answer = np.zeros(target.shape, np.float32)
    clicks: list[Click] = []
    where = f"{sample.dataset}: photo {sample.image_id}, object {object_id}"
    while True:
        click = next_click(target, answer > config.threshold, clicks)
        clicks.append(click)
        started = time.perf_counter()
        with _told(model, f"{where}, click {len(clicks)}", "predict"):
            answer = model.predict(tuple(clicks), answer)
        ms = 1000 * (time.perf_counter() - started + (preparing if len(clicks) == 1 else 0))
        _check_answer(answer, target, where)
        score = iou(target, answer > config.threshold)
        yield _row((sample.dataset, sample.image_id, object_id), len(clicks), click, score, ms)
        if _is_over(len(clicks), score, config):
            return


@contextlib.contextmanager
def _told(model: ClickModel, where: str, method: str) -> Iterator[None]:
    """An error of somebody else's class is told with what it was asked; one of this package is ours and stays."""
    try:
        yield
    except Exception as error:
        kind = type(model)
        if kind.__module__.startswith("mis_platform."):
            raise
        raise DataError(f"{where}: {kind.__module__}:{kind.__qualname__}.{method}: {told(error)}") from error


def told(error: BaseException) -> str:
    """Kind and text of an error that somebody else's code raised, and the deepest line of the file that we called."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    theirs = list(dropwhile(lambda frame: frame.filename.startswith(_PACKAGE_FOLDER), frames))
    lines = [frame for frame in theirs if frame.filename == theirs[0].filename]
    return f"{text} ({lines[-1].filename}, line {lines[-1].lineno})" if lines else text


def _check_answer(answer: Any, target: np.ndarray, where: str) -> None:
    if not isinstance(answer, np.ndarray) or answer.shape != target.shape:
        raise DataError(f"{where}: the answer must be an array of {target.shape}, not {getattr(answer, 'shape', None)}")
    if answer.dtype.kind not in "bfui":
        raise DataError(f"{where}: the answer must hold real numbers, not {answer.dtype}")
    if not (answer.min() >= 0 and answer.max() <= 1):  # also true for NaN
        raise DataError(f"{where}: the answer must lie in [0, 1], it is in [{answer.min()}, {answer.max()}]")


def protocol_fingerprint(config: EvalConfig, zoom_size: int) -> str:
    """Sixteen hexadecimal digits that name the protocol: scores of one family of models with different ones must not
    share a table."""
    settings = {name: value for name, value in plain(config).items() if name not in ("zoom_size", "davis_zoom_size")}
    feedback = "soft previous answer, mean of flipped logits, zero outside the window"
    return fingerprint({"settings": settings, "zoom_size": zoom_size, "feedback": feedback, **_ROBOT})


def robot_settings(config: EvalConfig) -> dict[str, Any]:
    """The settings that count for a ClickModel, which is asked at image size."""
    return {name: value for name, value in plain(config).items() if name in (*ROBOT_SETTINGS, "threshold")}


def click_model_fingerprint(config: EvalConfig) -> str:
    """As `protocol_fingerprint`, for `evaluate_click_model`."""
    return fingerprint({"settings": robot_settings(config), "feedback": "answer at image size", **_ROBOT})


_ROBOT = {
    "click": "precise L2 transform, frame is border, clicked pixels removed, ties negative, first in row order",
    "iou": "ignored pixels in neither term, float32",
    "empty objects": "excluded",
    "failures": "count as max_clicks",
}


@dataclass(frozen=True)
class _Object:
    """An object on its way through the protocol."""

    dataset: str
    image_id: str
    object_id: str
    target: np.ndarray  # int8 [H, W]
    prediction: np.ndarray  # bool [H, W]
    session: Session
    ious: tuple[np.float32, ...] = ()
    ms: tuple[float, ...] = ()
    order: int = -1

    def rows(self) -> list[Row]:
        name = self.dataset, self.image_id, self.object_id
        made = zip(self.session.clicks, self.ious, self.ms, strict=True)
        return [_row(name, number, click, score, ms) for number, (click, score, ms) in enumerate(made, 1)]


def _row(name: tuple[str, str, str], number: int, click: Click, score: np.float32, ms: float) -> Row:
    about = dict(zip(("dataset", "image_id", "object_id"), name))
    return {**about, "click": number, "y": click.y, "x": click.x, "positive": click.positive, "iou": score, "ms": ms}


def _objects(
    samples: Iterable[Sample], device: torch.device | str, on_excluded: Callable[[Excluded], None]
) -> Iterator[_Object]:
    """The objects that can be scored, not yet clicked."""
    for sample in samples:
        try:
            image = upload(sample.image, device)
        except ValueError as error:
            raise DataError(f"{sample.dataset}: photo {sample.image_id}: {error}") from None
        for object_id, target in _targets(sample, on_excluded):
            prediction = np.zeros(target.shape, bool)
            yield _Object(sample.dataset, sample.image_id, object_id, target, prediction, Session(image))


def _targets(sample: Sample, on_excluded: Callable[[Excluded], None]) -> Iterator[tuple[str, np.ndarray]]:
    """(object id, int8 [H, W]) of the objects that have a pixel."""
    for object_id, mask in sample.objects:
        where = f"{sample.dataset}: photo {sample.image_id}, object {object_id}"
        target = _checked(mask, sample.image.shape[:2], where)
        if (target == 1).any():
            yield object_id, target
        else:
            reason = "no pixel of the object" + (", only ignored ones" if (target == -1).any() else "")
            on_excluded(Excluded(sample.dataset, sample.image_id, object_id, reason))


def _checked(mask: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    if mask.shape != shape:
        raise DataError(f"{where}: the mask is {list(mask.shape)} pixels, the photo {list(shape)}")
    if mask.min() < -1 or mask.max() > 1:
        raise DataError(f"{where}: a mask holds 1 object, 0 background, -1 ignore; found {np.unique(mask)[:9]}")
    return mask.astype(np.int8, copy=False)


def _click_once(network: Network, active: list[_Object], config: EvalConfig, zoom_size: int) -> list[_Object]:
    seen = [(each.target, each.prediction, each.session.clicks) for each in active]
    clicks: list[Click] = in_threads(next_click, *zip(*seen, strict=True))
    sessions = advance(network, [each.session for each in active], clicks, config, zoom_size)
    coming = [download(probability(session) > config.threshold) for session in sessions]
    masks = [arrived() for arrived in coming]
    ious = in_threads(iou, [each.target for each in active], masks)
    return [
        replace(each, session=session, prediction=mask, ious=(*each.ious, score))
        for each, session, mask, score in zip(active, sessions, masks, ious)
    ]


def _finished(each: _Object, config: EvalConfig) -> bool:
    return _is_over(len(each.ious), each.ious[-1], config)


def _is_over(made: int, score: np.float32, config: EvalConfig) -> bool:
    """Whether a session ends after `made` clicks with this IoU."""
    good = made >= config.min_clicks and bool(score >= np.float32(config.target_iou))
    return made >= config.max_clicks or (good and not config.fixed_clicks)
