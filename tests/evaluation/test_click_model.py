"""The click protocol for anything that answers clicks at image size."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_platform.baselines.methods import build_method
from mis_platform.config import ClassicalConfig, EvalConfig
from mis_platform.errors import DataError
from mis_platform.evaluation.protocol import Excluded, Sample, evaluate_click_model
from mis_platform.simulation.clicks import Click


class Discs:
    """Paints a disc of the click's sign around each click, later ones over earlier ones, and keeps what it was told."""

    def __init__(self, radius: float = 6.0) -> None:
        self.radius = radius
        self.photos: list[np.ndarray] = []
        self.told: list[tuple[int, np.ndarray]] = []

    def set_image(self, image: np.ndarray) -> None:
        self.photos.append(image)

    def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
        self.told.append((len(clicks), previous.copy()))
        answer = previous.copy()
        y, x = np.indices(answer.shape)
        last = clicks[-1]
        answer[(y - last.y) ** 2 + (x - last.x) ** 2 <= self.radius**2] = 0.75 if last.positive else 0.25
        return answer


def square(height: int = 40, width: int = 50) -> np.ndarray:
    mask = np.zeros((height, width), np.int8)
    mask[10:30, 15:40] = 1
    return mask


def sample(*objects: np.ndarray) -> Sample:
    image = np.random.default_rng(0).integers(0, 255, (*objects[0].shape, 3), dtype=np.uint8)
    return Sample("toy", "photo", image, [(str(k), mask) for k, mask in enumerate(objects)])


def test_the_example_of_the_documentation_can_be_scored() -> None:
    page = Path(__file__).parents[2] / "docs" / "click-models.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    clicks = list(evaluate_click_model(names["Nearest"](), [sample(square())], EvalConfig()))
    assert clicks[0]["iou"] < 0.5, "one click: all of the photo"
    assert clicks[-1]["iou"] > 0.8, "a rectangle, by its nearest clicks"


def test_clicks_fall_on_the_largest_error_and_the_answer_is_handed_back() -> None:
    model = Discs()
    rows = list(evaluate_click_model(model, [sample(square())], EvalConfig(max_clicks=4)))
    assert [row["click"] for row in rows] == [1, 2, 3, 4]
    assert (rows[0]["y"], rows[0]["x"], rows[0]["positive"]) == (19, 24, True)
    answer = np.zeros((40, 50), np.float32)
    target = square() == 1
    for row, (count, previous) in zip(rows, model.told, strict=True):
        assert count == row["click"]
        np.testing.assert_array_equal(previous, answer)
        y, x = np.indices(answer.shape)
        answer[(y - row["y"]) ** 2 + (x - row["x"]) ** 2 <= 36] = 0.75 if row["positive"] else 0.25
        predicted = answer > 0.5
        assert row["iou"] == np.float32((predicted & target).sum() / (predicted | target).sum())
    assert all(later["iou"] > earlier["iou"] for earlier, later in itertools.pairwise(rows))


@pytest.mark.parametrize(
    ("config", "clicks"),
    [
        (EvalConfig(target_iou=0.59), 3),
        (EvalConfig(target_iou=0.4, min_clicks=3), 3),
        (EvalConfig(target_iou=0.5, fixed_clicks=True, max_clicks=6), 6),
        (EvalConfig(threshold=0.8, max_clicks=5), 5),  # its answers never reach 0.8: nothing is predicted
    ],
)
def test_when_a_session_ends(config: EvalConfig, clicks: int) -> None:
    rows = list(evaluate_click_model(Discs(9), [sample(square())], config))
    assert len(rows) == clicks
    if config.threshold == 0.8:
        assert {row["iou"] for row in rows} == {0}


def test_a_photo_is_set_once_for_all_its_objects_and_each_starts_afresh() -> None:
    other = square()
    other[:] = 0
    other[5:9, 5:9] = 1
    model = Discs()
    rows = list(evaluate_click_model(model, [sample(square(), other)], EvalConfig(max_clicks=2)))
    assert len(model.photos) == 1
    assert [row["object_id"] for row in rows] == ["0", "0", "1", "1"]
    assert not model.told[2][1].any()


def test_objects_without_a_pixel_are_left_out_and_told() -> None:
    empty, ignored = np.zeros((40, 50), np.int8), np.full((40, 50), -1, np.int8)
    told: list[Excluded] = []
    rows = list(
        evaluate_click_model(
            Discs(), [sample(empty, ignored, square())], EvalConfig(max_clicks=1), on_excluded=told.append
        )
    )
    assert [row["object_id"] for row in rows] == ["2"]
    assert [(each.object_id, each.reason) for each in told] == [
        ("0", "no pixel of the object"),
        ("1", "no pixel of the object, only ignored ones"),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        np.full((40, 49), 0.5, np.float32),
        np.full((40, 50), np.nan, np.float32),
        np.full((40, 50), 1.5, np.float32),
        np.full((40, 50), -3.0, np.float32),
        np.full((40, 50), 0.5, np.complex64),
        np.full((40, 50), "0.5"),
        np.full((40, 50), 0.5, object),
        [[0.5]],
        None,
    ],
)
def test_an_answer_that_is_none(answer: Any) -> None:
    class Broken(Discs):
        def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
            return answer

    with pytest.raises(DataError, match=r"toy: photo photo, object 0: the answer must"):
        list(evaluate_click_model(Broken(), [sample(square())], EvalConfig()))


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float16, np.float64])
def test_an_answer_of_any_real_kind(kind: type) -> None:
    class Sure(Discs):
        def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
            return (square() == 1).astype(kind)

    (row,) = evaluate_click_model(Sure(), [sample(square())], EvalConfig())
    assert row["iou"] == 1


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, KeyError, FileNotFoundError, ValueError, MemoryError])
@pytest.mark.parametrize("method", ["set_image", "predict"])
def test_an_error_of_somebody_elses_class_says_where_it_was(kind: type[Exception], method: str) -> None:
    error = kind() if kind is MemoryError else kind("no such layer")

    class Failing(Discs):
        def set_image(self, image: np.ndarray) -> None:
            if method == "set_image":
                raise error
            super().set_image(image)

        def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
            if len(clicks) == 2:
                raise error
            return super().predict(clicks, previous)

    with pytest.raises(DataError) as caught:
        list(evaluate_click_model(Failing(), [sample(square())], EvalConfig()))
    asked = "" if method == "set_image" else ", object 0, click 2"
    said = str(caught.value)
    assert said.startswith(f"toy: photo photo{asked}: {Failing.__module__}:{Failing.__qualname__}.{method}: ")
    assert kind.__name__ in said
    assert str(error) in said
    assert "test_click_model.py, line " in said
    assert caught.value.__cause__ is error


def test_an_error_of_a_method_of_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    model = build_method("graphcut", ClassicalConfig())
    monkeypatch.setattr(type(model), "predict", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(evaluate_click_model(model, [sample(square())], EvalConfig()))
