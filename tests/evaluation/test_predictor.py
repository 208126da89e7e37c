"""The notebook's predictor: what it answers, takes back and refuses."""

import numpy as np
import pytest
import torch
from stub_networks import distance_network, seeing_network

from mis_platform import tracking
from mis_platform.config import EvalConfig
from mis_platform.evaluation.predictor import Predictor
from mis_platform.evaluation.protocol import Sample, evaluate
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import save_model
from mis_platform.storage import Storage


@pytest.fixture
def photo():
    image = np.random.default_rng(0).integers(0, 120, (70, 90, 3), np.uint8)
    image[20:50, 30:60] += 130
    return image


@pytest.fixture
def predictor(photo):
    predictor = Predictor(seeing_network, zoom_size=64, config=EvalConfig(zoom_min_crop=20))
    predictor.set_image(photo)
    return predictor


def same(first, second):
    return np.array_equal(first.mask, second.mask) and np.array_equal(first.probability, second.probability)


def test_it_answers_as_the_protocol_does(predictor, photo):
    target = np.zeros(photo.shape[:2], np.int8)
    target[20:50, 30:60] = 1
    config = EvalConfig(zoom_min_crop=20, max_clicks=5, fixed_clicks=True)
    rows = list(evaluate(seeing_network, [Sample("d", "i", photo, [("1", target)])], config, zoom_size=64, batch=1))
    for row in rows:
        mask, probability = predictor.click(row["y"], row["x"], row["positive"])
        assert mask.dtype == bool
        assert probability.dtype == np.float32
        assert mask.shape == probability.shape == (70, 90)
        assert np.array_equal(mask, probability > 0.5)
        assert (mask & (target == 1)).sum() / (mask | (target == 1)).sum() == pytest.approx(row["iou"])


def test_undo_restores_every_earlier_state_exactly(predictor):
    clicks = [(35, 45, True), (22, 33, True), (5, 5, False), (68, 88, True), (40, 80, False), (0, 0, True)]
    answers = [predictor.click(*click) for click in clicks]
    windows = [state.stored for state in predictor._states[1:]]
    assert len(set(windows)) > 1, "the clicks should move the zoom-in window"
    for kept in range(len(clicks) - 1, 0, -1):
        assert same(predictor.undo(), answers[kept - 1])
        assert len(predictor.clicks) == kept
        assert same(predictor.click(*clicks[kept]), answers[kept])  # from there the way on is the same
        predictor.undo()
    mask, probability = predictor.undo()
    assert not mask.any()
    assert not probability.any()
    with pytest.raises(RuntimeError, match=r"click\(y, x\)"):
        predictor.undo()


def test_reset_keeps_the_photo_and_a_new_photo_forgets_the_clicks(predictor, photo):
    first = predictor.click(35, 45)
    predictor.click(5, 5, positive=False)
    predictor.reset()
    assert predictor.clicks == ()
    assert same(predictor.click(35, 45), first)
    predictor.set_image(photo[:50])
    assert predictor.clicks == ()
    assert predictor.click(35, 45).mask.shape == (50, 90)


@pytest.mark.parametrize("call", [lambda p: p.click(1, 1), lambda p: p.undo(), lambda p: p.reset(), lambda p: p.clicks])
def test_nothing_works_before_an_image(call):
    with pytest.raises(RuntimeError, match=r"call set_image\(image\) first"):
        call(Predictor(seeing_network, zoom_size=64))


@pytest.mark.parametrize(
    ("y", "x", "message"),
    [
        (-1, 3, r"y must lie in \[0, 70\)"),
        (70, 3, r"y must lie in \[0, 70\)"),
        (3, 90, r"x must lie in \[0, 90\)"),
        (3, -0.5, r"x must lie in \[0, 90\)"),
        (float("nan"), 3, "nan"),
        (3, float("inf"), "inf"),
    ],
)
def test_clicks_outside_the_photo_are_refused_and_change_nothing(predictor, y, x, message):
    before = predictor.click(35, 45)
    with pytest.raises(ValueError, match=message):
        predictor.click(y, x)
    assert len(predictor.clicks) == 1
    predictor.click(0, 89.9)
    assert same(predictor.undo(), before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 6, 3)), r"float64.*\(255 \* image\)"),
        (np.zeros((5, 6), np.uint8), r"\[5, 6\].*np.repeat"),
        (np.zeros((5, 6, 4), np.uint8), r"\[\.\.\., :3\]"),
        (np.zeros((0, 6, 3), np.uint8), r"\[0, 6, 3\]"),
        ([[1, 2, 3]], "numpy array of uint8.*list"),
        (None, "NoneType"),
    ],
)
def test_bad_images_are_refused_with_the_fix(image, message):
    with pytest.raises(ValueError, match=message):
        Predictor(seeing_network, zoom_size=64).set_image(image)


def test_a_read_only_or_reversed_photo_works(predictor, photo):
    expected = predictor.click(35, 45)
    view = photo[:, ::-1][:, ::-1]
    view.flags.writeable = False
    predictor.set_image(view)
    assert same(predictor.click(35, 45), expected)


def test_a_thousand_clicks():
    predictor = Predictor(distance_network, zoom_size=16, config=EvalConfig(flip=False))
    predictor.set_image(np.zeros((40, 50, 3), np.uint8))
    rng = np.random.default_rng(0)
    for y, x in rng.integers(0, (40, 50), (1000, 2)):  # many pixels are clicked twice
        mask, probability = predictor.click(y, x, positive=bool(rng.random() < 0.7))
    assert len(predictor.clicks) == 1000
    assert mask.shape == (40, 50)
    assert np.isfinite(probability).all()


def test_a_saved_model_answers_as_the_model_itself(tmp_path, photo):
    torch.manual_seed(0)
    model = SimpleClick("vit_xt", 224).eval()
    save_model(tmp_path, model, {})
    loaded, original = Predictor.from_pretrained(tmp_path), Predictor(model, zoom_size=224)
    for each in (loaded, original):
        each.set_image(photo)
    assert same(loaded.click(35, 45), original.click(35, 45))
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "elsewhere", "model.safetensors"):
        with pytest.raises(ValueError, match=rf"no single model is called .*{missing}': it is no directory with"):
            Predictor.from_pretrained(tmp_path / missing)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        Predictor.from_pretrained(tmp_path)


def test_a_training_is_found_by_its_fingerprint(tmp_path, photo, monkeypatch):
    monkeypatch.setenv("MIS_ROOT", str(tmp_path))
    model = SimpleClick("vit_xt", 224).eval()
    for name in ("ab12", "ab34", "unfinished"):
        save_model(tmp_path / "checkpoint" / name, model, {})
        if name != "unfinished":
            (tmp_path / "checkpoint" / name / "manifest.json").write_text("{}")
    predictor = Predictor.from_pretrained("ab3", zoom_size=448, config=EvalConfig(flip=False))
    predictor.set_image(photo)
    predictor.click(35, 45)
    for ambiguous in ("ab", "unfin"):
        with pytest.raises(ValueError, match=r"the trainings in .* are: ab12, ab34"):
            Predictor.from_pretrained(ambiguous)


def test_a_run_in_mlflow_is_found_by_its_id(tmp_path, photo, monkeypatch, empty_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MIS_ROOT", str(tmp_path))
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    torch.manual_seed(0)
    model = SimpleClick("vit_xt", 224).eval()
    save_model(tmp_path / "model", model, {})
    about = {"experiment": "mis", "name": "a run", "fingerprint": "0123456789abcdef", "params": {}}
    with tracking.open_run(Storage(str(tmp_path)), **about) as tracker:
        tracker.set_model(Storage(str(tmp_path / "model")))
    expected = Predictor(model, zoom_size=224)
    expected.set_image(photo)
    answer = expected.click(35, 45)
    for name in (tracker.run_id, "01234"):
        loaded = Predictor.from_pretrained(name)
        loaded.set_image(photo)
        assert same(loaded.click(35, 45), answer)
    with pytest.raises(ValueError, match="no run with a model"):
        Predictor.from_pretrained("f" * 32)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval"):
        Predictor(torch.nn.Identity().train())
