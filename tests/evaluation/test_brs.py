"""f-BRS-B on small networks: clicked pixels become right, sessions stay values, and the settings are those of RITM."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mis_platform.config import EvalConfig
from mis_platform.errors import DataError
from mis_platform.evaluation import brs
from mis_platform.evaluation.brs import ClickMaps, FeatureRefinement, Search, click_maps
from mis_platform.evaluation.predictor import Predictor, load_network
from mis_platform.evaluation.protocol import Sample, evaluate
from mis_platform.evaluation.session import Refiner, Session, advance, points_of, upload
from mis_platform.model import simpleclick
from mis_platform.model.ritm import Ritm
from mis_platform.model.weights import save_model
from mis_platform.simulation.clicks import Click

CONFIG = EvalConfig(threshold=0.49, zoom_skip_clicks=1, zoom_min_crop=20)
CLICKS = [Click(20, 30, True), Click(40, 60, False), Click(8, 70, True), Click(30, 10, False)]


class Small(nn.Module):
    """A few convolutions that can be cut in two."""

    image_size = (64, 64)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second, self.last = nn.Conv2d(6, 24, 3, 2, 1), nn.Conv2d(24, 16, 3, 1, 1), nn.Conv2d(16, 1, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.asked: list[Tensor] = []

    def features(self, image: Tensor, previous: Tensor, points: Tensor) -> Tensor:
        self.asked.append(points)
        maps = simpleclick.click_maps(points, *image.shape[2:])
        features: Tensor = self.first(torch.cat([image, previous, maps], dim=1)).relu()
        return features

    def decode(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        logits = self.last(self.second(features).relu())
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)

    def forward(self, image: Tensor, previous: Tensor, points: Tensor) -> Tensor:
        return self.decode(self.features(image, previous, points), (image.shape[2], image.shape[3]))


@pytest.fixture
def network() -> Small:
    return Small().eval()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)


def planes(photo: np.ndarray) -> Tensor:
    return torch.cat([upload(photo).float() / 255, torch.zeros(1, *photo.shape[:2])])


def wrong(answer: Tensor, clicks: list[Click], threshold: float = 0.49) -> float:
    """Share of the clicked pixels on the wrong side of the threshold."""
    maps = click_maps(clicks, (answer.shape[0], answer.shape[1]), flip=False)
    soft = answer[None, None]
    missed = maps.positive * (soft <= threshold) + maps.negative * (soft >= threshold)
    return float(missed.sum() / (maps.positive + maps.negative).sum())


def unrefined(network: Small, inputs: Tensor, clicks: list[Click]) -> Tensor:
    with torch.inference_mode():
        logits = network(inputs[None, :3], inputs[None, 3:], points_of([clicks]))
    return torch.sigmoid(logits)[0, 0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_clicked_pixels_become_right(seed: int, flip: bool, photo: np.ndarray) -> None:
    network = Small(seed).eval()
    config = CONFIG.model_copy(update={"flip": flip})
    before = wrong(unrefined(network, planes(photo), CLICKS), CLICKS)
    answer, _ = FeatureRefinement(network).refine(planes(photo), CLICKS, config, None)
    assert before >= 0.25
    assert wrong(answer, CLICKS) < 0.1


def test_the_first_click_is_the_network_s_own(network: Small, photo: np.ndarray) -> None:
    config = CONFIG.model_copy(update={"flip": False})
    answer, memory = FeatureRefinement(network).refine(planes(photo), CLICKS[:1], config, None)
    assert torch.equal(answer, unrefined(network, planes(photo), CLICKS[:1]))
    assert not memory.tuning.any()


def test_a_search_goes_on_from_the_last(network: Small, photo: np.ndarray) -> None:
    refinement = FeatureRefinement(network)
    _, first = refinement.refine(planes(photo), CLICKS[:3], CONFIG, None)
    assert first.tuning.any()
    again, same = refinement.refine(planes(photo), CLICKS[:3], CONFIG, None)
    assert np.array_equal(first.tuning, same.tuning)
    warm, _ = refinement.refine(planes(photo), CLICKS, CONFIG, first)
    cold, _ = refinement.refine(planes(photo), CLICKS, CONFIG, None)
    assert not torch.equal(warm, cold)
    assert torch.equal(again, refinement.refine(planes(photo), CLICKS[:3], CONFIG, None)[0])


def test_the_optimiser_is_asked_as_published(
    network: Small, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def minimise(function: Callable[[np.ndarray], object], start: np.ndarray, **settings: float) -> tuple:
        asked.update(settings, size=len(start))
        return start, 0.0, {}

    monkeypatch.setattr(brs, "fmin_l_bfgs_b", minimise)
    FeatureRefinement(network).refine(planes(photo), CLICKS, CONFIG, None)
    assert asked == {"m": 20, "factr": 0, "pgtol": 1e-8, "maxfun": 20, "maxiter": 40, "size": 2 * 24}


def test_loss_and_gradient(network: Small, photo: np.ndarray) -> None:
    """The loss by hand, and the gradient by differences."""
    inputs = planes(photo)[None].double()
    network.double()
    with torch.no_grad():
        features = network.features(inputs[:, :3], inputs[:, 3:], points_of([CLICKS]).double()).double()
        maps = ClickMaps(*(each.double() for each in click_maps(CLICKS, (50, 80), flip=False)))
    tuning = 0.1 * np.random.default_rng(0).normal(size=48)

    def search() -> Search:
        return Search(network, features, maps, threshold=0.49)

    value, gradient = search()(tuning)
    soft = torch.sigmoid(search().logits(torch.from_numpy(tuning))).detach().numpy()[0, 0]
    expected = 0.0
    for positive in (True, False):
        squares = [
            (positive - soft[y, x]) ** 2
            for click in CLICKS
            if click.positive == positive
            for y in range(int(click.y) - 1, int(click.y) + 2)
            for x in range(int(click.x) - 1, int(click.x) + 2)
        ]
        expected += sum(squares) / (len(squares) + 1e-5)
    expected += 1e-3 * ((tuning[:24] ** 2).sum() + 10 * (tuning[24:] ** 2).sum())
    assert value == pytest.approx(expected, rel=1e-9)
    for k in (0, 5, 24, 40):
        step = np.zeros(48)
        step[k] = 1e-6
        difference = (search()(tuning + step)[0] - search()(tuning - step)[0]) / 2e-6
        assert gradient[k] == pytest.approx(difference, rel=1e-4, abs=1e-8)


def test_when_a_search_ends(network: Small, photo: np.ndarray) -> None:
    inputs, zeros = planes(photo)[None], np.zeros(48)
    with torch.no_grad():
        features = network.features(inputs[:, :3], inputs[:, 3:], points_of([CLICKS]))
        soft = torch.sigmoid(network.decode(features, (50, 80)))
    right = ClickMaps((soft > 0.6).float(), (soft < 0.3).float())
    assert not Search(network, features, right, 0.49)(zeros)[1].any()
    swapped = ClickMaps(right.negative, right.positive)
    search = Search(network, features, swapped, 0.49)
    assert search(zeros)[1].any()
    assert not search(zeros + 1e-9)[1].any()  # the mask has settled
    assert search(zeros + 2.0)[1].any()  # and moves again


@pytest.mark.parametrize(("kept", "is_settled"), [(989, False), (991, True)])
def test_a_mask_settles_when_less_than_a_hundredth_changes(kept: int, is_settled: bool, network: Small) -> None:
    """Of 1000 pixels."""
    before, after = torch.zeros(1, 1, 40, 50), torch.zeros(1, 1, 40, 50)
    before.view(-1)[:1000] = after.view(-1)[:kept] = 1
    search = Search(network, torch.zeros(1, 24, 20, 25), ClickMaps(before, 1 - before), 0.49)
    assert not search._is_settled(before)
    assert search._is_settled(after) == is_settled


def test_click_maps() -> None:
    maps = click_maps([Click(0, 0, True), Click(2.5, 4, False), Click(9, 6.2, False)], (10, 8), flip=True)
    assert maps.positive.shape == maps.negative.shape == (2, 1, 10, 8)
    expected = np.zeros((2, 10, 8))
    expected[0, :2, :2] = 1
    expected[1, 1:4, 3:6] = 1  # 2.5 rounds to even
    expected[1, 8:, 5:8] = 1
    np.testing.assert_array_equal(maps.positive[0, 0], expected[0])
    np.testing.assert_array_equal(maps.negative[0, 0], expected[1])
    np.testing.assert_array_equal(maps.positive[1, 0], expected[0, :, ::-1])
    np.testing.assert_array_equal(maps.negative[1, 0], expected[1, :, ::-1])


def test_the_network_sees_eight_clicks(network: Small, photo: np.ndarray) -> None:
    """The ninth only counts for the refinement, which keeps the features while the image is the same."""
    rng = np.random.default_rng(3)
    clicks = [Click(int(rng.integers(50)), int(rng.integers(80)), k % 2 == 0) for k in range(10)]
    refinement, memory = FeatureRefinement(network), None
    for count in range(1, 10):
        _, memory = refinement.refine(planes(photo), clicks[:count], CONFIG, memory)
        assert (memory.seen is not None) == (count >= 8)
    assert len(network.asked) == 8
    moved = planes(photo).flip(1)
    refinement.refine(moved, clicks, CONFIG, memory)
    assert len(network.asked) == 9
    assert int((network.asked[-1][0, :, 0] >= 0).sum()) == 8


# -- as part of the protocol -----------------------------------------------------------------------------------------


def test_sessions_are_values(network: Small, photo: np.ndarray) -> None:
    """Undo and another session in between change nothing."""
    refinement = FeatureRefinement(network)
    assert isinstance(refinement, Refiner)
    assert not isinstance(network, Refiner)

    def play(sessions: list[Session], clicks: list[Click]) -> list[Session]:
        return advance(refinement, sessions, clicks, CONFIG, 60)

    alone = Session(upload(photo))
    history = [alone]
    for click in CLICKS:
        (alone,) = play([alone], [click])
        history.append(alone)
    again = history[2]
    other = Session(upload(photo[::-1].copy()))
    for click in CLICKS[2:]:
        again, other = play([again, other], [click, click])
    assert torch.equal(again.answer, alone.answer)
    assert not torch.equal(other.answer, alone.answer)


def test_the_protocol_with_refinement(network: Small, photo: np.ndarray) -> None:
    masks = [np.zeros((50, 80), np.int8) for _ in range(3)]
    for k, mask in enumerate(masks):
        mask[5 + 5 * k : 30 + 5 * k, 10 + 10 * k : 50 + 10 * k] = 1
    samples = [Sample("toy", "a", photo, [(str(k), mask) for k, mask in enumerate(masks)])]
    config = CONFIG.model_copy(update={"max_clicks": 10, "fixed_clicks": True})

    def scores(asked: object, batch: int = 1) -> list[tuple]:
        rows = evaluate(asked, samples, config, zoom_size=60, batch=batch)  # type: ignore[arg-type]
        return [(row["object_id"], row["y"], row["x"], float(row["iou"])) for row in rows]

    found = scores(FeatureRefinement(network))
    assert found == scores(FeatureRefinement(network))
    assert found == scores(FeatureRefinement(network), batch=3)
    assert len(found) == 30
    plain = scores(network)
    assert found != plain
    assert np.mean([row[3] for row in found]) > np.mean([row[3] for row in plain])


def test_a_damaged_network(network: Small, photo: np.ndarray) -> None:
    nn.init.constant_(network.last.weight, torch.nan)
    with pytest.raises(DataError, match="NaN"):
        FeatureRefinement(network).refine(planes(photo), CLICKS, CONFIG, None)
    with pytest.raises(ValueError, match="training mode"):
        Predictor(FeatureRefinement(Small().train()))


def test_a_saved_model_that_refines(photo: np.ndarray, tmp_path) -> None:
    torch.manual_seed(0)
    model = Ritm("hrnet18s").eval()
    with torch.no_grad():
        model.feature_extractor.cls_head.weight *= 0.01  # new weights saturate the sigmoid, which has no gradient then
    own = {"threshold": 0.49, "zoom_skip_clicks": 1, "zoom_size": 64, "zoom_min_crop": 20}
    for name, more in (("plain", {}), ("refined", {"refine": "fbrs"})):
        save_model(tmp_path / name, model, {"eval": own, **more})
    assert not isinstance(load_network(tmp_path / "plain", 64), Refiner)
    assert isinstance(load_network(tmp_path / "refined", 64), Refiner)
    predictors = [Predictor.from_pretrained(tmp_path / name, zoom_size=64) for name in ("plain", "refined")]
    for predictor in predictors:
        predictor.set_image(photo)
    first = [predictor.click(20, 30).probability for predictor in predictors]
    assert np.array_equal(*first)
    second = [predictor.click(40, 60, positive=False).probability for predictor in predictors]
    assert not np.array_equal(*second)
    assert np.array_equal(predictors[1].undo().probability, first[1])
    assert np.array_equal(predictors[1].click(40, 60, positive=False).probability, second[1])
