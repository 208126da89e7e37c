"""The whole evaluator against traces of the official one, and batched evaluation against one object at a time."""

import numpy as np
import pytest
import torch
from stub_networks import distance_network, seeing_network
from synthetic_samples import ellipse, synthetic_samples

from mis_platform.config import EvalConfig
from mis_platform.evaluation import protocol
from mis_platform.evaluation.clicks import iou, next_click
from mis_platform.evaluation.noc import summarize
from mis_platform.evaluation.protocol import Excluded, Sample, evaluate, protocol_fingerprint
from mis_platform.evaluation.session import Session, advance, probability, upload

FULL = (0, 239, 0, 319)


def golden_sample():
    return Sample("golden", "zeros", np.zeros((240, 320, 3), np.uint8), [("1", ellipse(240, 320, 130, 200, 60, 45))])


GOLDENS = {
    "A": (
        EvalConfig(threshold=0.49, max_clicks=8, fixed_clicks=True),
        448,
        "+(130,200) -(122,146) -(124,257) -(153,148) -(155,251) +(121,165) -(86,152) -(100,115)",
        [0.683983, 0.665445, 0.684732, 0.683969, 0.677095, 0.551019, 0.565027, 0.611245],
        [9880, 10171, 9034, 8046, 7026, 9348, 8332, 7523],
        [FULL] * 8,
    ),
    "B": (
        EvalConfig(threshold=0.5, flip=False, max_clicks=8, fixed_clicks=True),
        448,
        "+(130,200) -(124,146) -(125,257) +(124,165) -(89,150) -(160,145) -(110,109) -(142,111)",
        [0.685582, 0.668595, 0.685814, 0.551489, 0.559285, 0.588647, 0.645177, 0.686244],
        None,
        [FULL] * 8,
    ),
    "C": (
        EvalConfig(threshold=0.49, zoom_skip_clicks=1, max_clicks=8, fixed_clicks=True),
        400,
        "+(130,200) -(119,133) -(119,254) -(147,148) +(143,164) -(184,159) -(170,122) -(92,154)",
        [0.327050, 0.672635, 0.740792, 0.743640, 0.618950, 0.638708, 0.687605, 0.688781],
        None,
        [None] + [(5, 239, 75, 319)] * 7,
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_trace(name):
    config, zoom_size, clicks, ious, areas, stored = GOLDENS[name]
    sample = golden_sample()
    target = sample.objects[0][1]
    assert target.sum() == 8467
    session, mask = Session(upload(sample.image)), np.zeros(target.shape, bool)
    sessions, masks = [], []
    for _ in range(8):
        click = next_click(target, mask, session.clicks)
        (session,) = advance(distance_network, [session], [click], config, zoom_size)
        mask = (probability(session) > config.threshold).numpy()
        sessions.append(session)
        masks.append(mask)
    assert " ".join(f"{'-+'[c.positive]}({c.y},{c.x})" for c in session.clicks) == clicks
    np.testing.assert_allclose([iou(target, mask) for mask in masks], ious, rtol=0, atol=6e-7)
    assert [session.stored for session in sessions] == stored
    if areas is not None:
        assert [int(mask.sum()) for mask in masks] == areas
    rows = list(evaluate(distance_network, [sample], config, zoom_size=zoom_size, batch=1))
    assert " ".join(f"{'-+'[row['positive']]}({row['y']},{row['x']})" for row in rows) == clicks
    np.testing.assert_array_equal([row["iou"] for row in rows], [iou(target, mask) for mask in masks])


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "ms"} for row in rows]


@pytest.mark.parametrize("zoom", [(-1, 96), (1, 64)], ids=["square", "longest_side"])
@pytest.mark.parametrize("batch", [3, 7, 100])
def test_objects_together_make_the_clicks_of_one_at_a_time(zoom, batch):
    config = EvalConfig(zoom_skip_clicks=zoom[0], max_clicks=6, zoom_min_crop=20)
    alone, together = (
        without_time(evaluate(seeing_network, synthetic_samples(7), config, zoom_size=zoom[1], batch=size))
        for size in (1, batch)
    )
    lengths = np.unique([row["image_id"] + row["object_id"] for row in alone], return_counts=True)[1]
    assert len(set(lengths)) > 1, "objects should end after different numbers of clicks"
    assert together == alone


def test_a_new_object_starts_as_soon_as_one_is_done():
    widths = []

    def network(image, previous, points):
        widths.append(len(image) // 2)  # photo and mirror image
        return seeing_network(image, previous, points)

    config = EvalConfig(max_clicks=6)
    rows = list(evaluate(network, synthetic_samples(9), config, zoom_size=64, batch=4))
    assert widths == sorted(widths, reverse=True)  # full until there is nothing left to start
    assert widths[0] == 4
    assert sum(widths) == len(rows)


def test_photos_are_read_when_needed_and_uploaded_once(monkeypatch):
    read, uploaded = [], []

    def samples():
        for sample in synthetic_samples(6):
            read.append(sample.image_id)
            yield sample

    monkeypatch.setattr(protocol, "upload", lambda image, device: uploaded.append(1) or upload(image, device))
    rows = evaluate(seeing_network, samples(), EvalConfig(max_clicks=2), zoom_size=64, batch=2)
    assert next(rows)["image_id"] == "000"
    assert len(read) < 6
    assert {row["image_id"] for row in rows} <= set(read)
    assert len(uploaded) == len(read) == 6


def test_sessions_end_at_the_target_the_limit_or_the_minimum():
    def perfect(image, previous, points):
        return torch.where(image[:, :1] > 0.5, 9.0, -9.0)

    target = ellipse(60, 60, 30, 30, 12, 12)
    image = np.repeat(255 * (target[..., None] == 1).astype(np.uint8), 3, axis=2)
    sample = Sample("d", "i", image, [("1", target)])

    def clicks(**settings):
        return list(evaluate(perfect, [sample], EvalConfig(**settings), zoom_size=60, batch=1))

    assert [row["click"] for row in clicks()] == [1]
    assert [row["click"] for row in clicks(min_clicks=3)] == [1, 2, 3]
    fixed = clicks(fixed_clicks=True)
    assert [row["click"] for row in fixed] == list(range(1, 21))
    assert all(row["iou"] == 1 for row in fixed)
    assert {(row["y"], row["x"], row["positive"]) for row in fixed[1:]} == {(0, 0, False)}


def test_a_model_that_does_not_react_ends_at_the_limit_and_is_counted():
    def stuck(image, previous, points):
        return torch.ones_like(previous)

    rows = list(evaluate(stuck, synthetic_samples(2), EvalConfig(), zoom_size=64, batch=2))
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    summary = summarize(table)
    assert set(table["click"]) == set(range(1, 21))
    assert summary.unchanged == summary.objects == summary.at(0.9).failures == summary.at(0.9).at_limit


def test_objects_without_a_pixel_are_listed_and_not_scored():
    empty, ignored = np.zeros((30, 40), np.int8), np.full((30, 40), -1, np.int8)
    one = empty.copy()
    one[3, 4] = 1
    objects = [("empty", empty), ("one", one), ("ignored", ignored)]
    excluded = []
    rows = list(
        evaluate(
            distance_network,
            [Sample("d", "i", np.zeros((30, 40, 3), np.uint8), objects)],
            EvalConfig(max_clicks=2),
            zoom_size=64,
            batch=8,
            on_excluded=excluded.append,
        )
    )
    assert [row["object_id"] for row in rows] == ["one", "one"]
    assert excluded == [
        Excluded("d", "i", "empty", "no pixel of the object"),
        Excluded("d", "i", "ignored", "no pixel of the object, only ignored ones"),
    ]


def test_the_times_of_all_clicks_add_up_to_the_time_of_the_rounds(monkeypatch):
    rounds = []

    def network(image, previous, points):
        rounds.append(len(image))
        return seeing_network(image, previous, points)

    clock = iter(np.arange(0, 100, 0.5))  # half a second between two looks
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: next(clock))
    rows = list(evaluate(network, synthetic_samples(3), EvalConfig(max_clicks=3), zoom_size=64, batch=4))
    assert len(rounds) < len(rows)
    assert sum(row["ms"] for row in rows) == pytest.approx(500 * len(rounds))


def test_a_probability_of_exactly_the_threshold_is_background():
    rows = evaluate(
        lambda image, previous, points: 0 * previous, [golden_sample()], EvalConfig(), zoom_size=64, batch=1
    )
    assert next(rows)["iou"] == 0


def test_an_iou_of_exactly_the_target_is_enough():
    target = np.zeros((10, 10), np.int8)
    target[0] = 1  # ten pixels

    def nine_of_ten(image, previous, points):
        logits = torch.full_like(previous, -9)
        logits[:, :, 0, :9] = 9
        return logits

    sample = Sample("d", "i", np.zeros((10, 10, 3), np.uint8), [("1", target)])
    rows = list(evaluate(nine_of_ten, [sample], EvalConfig(flip=False), zoom_size=10, batch=1))
    assert [row["iou"] for row in rows] == [np.float32(0.9)]


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((8, 9, 3), np.float32), np.ones((8, 9), np.int8), r"i7: the image must be .* uint8 .* not float32"),
        (np.zeros((8, 9), np.uint8), np.ones((8, 9), np.int8), r"shape \[height, width, 3\]"),
        (np.zeros((8, 9, 3), np.uint8), np.ones((9, 8), np.int8), r"object o: the mask is \[9, 8\]"),
        (np.zeros((8, 9, 3), np.uint8), np.full((8, 9), 255, np.uint8), r"-1 ignore; found \[255\]"),
    ],
)
def test_malformed_samples_are_refused_by_name(image, mask, message):
    with pytest.raises(ValueError, match=message):
        list(evaluate(distance_network, [Sample("d", "i7", image, [("o", mask)])], EvalConfig(), zoom_size=64, batch=1))


def test_training_mode_no_room_and_nan_are_refused():
    with pytest.raises(ValueError, match="eval"):
        list(evaluate(torch.nn.Identity().train(), [], EvalConfig(), zoom_size=64, batch=1))
    with pytest.raises(ValueError, match="at least 1 object"):
        list(evaluate(distance_network, [], EvalConfig(), zoom_size=64, batch=0))

    def broken(image, previous, points):
        return previous / 0

    with pytest.raises(ValueError, match="NaN"):
        list(evaluate(broken, [golden_sample()], EvalConfig(), zoom_size=64, batch=1))


def test_the_fingerprint_names_what_decides_the_protocol():
    default = protocol_fingerprint(EvalConfig(), 448)
    assert default == protocol_fingerprint(EvalConfig(davis_zoom_size=896), 448)
    others = [
        protocol_fingerprint(EvalConfig(), 672),
        protocol_fingerprint(EvalConfig(threshold=0.49), 448),
        protocol_fingerprint(EvalConfig(flip=False), 448),
        protocol_fingerprint(EvalConfig(max_clicks=10), 448),
        protocol_fingerprint(EvalConfig(fixed_clicks=True), 448),
        protocol_fingerprint(EvalConfig(zoom_skip_clicks=1), 448),
        protocol_fingerprint(EvalConfig(precision="tf32"), 448),
        protocol_fingerprint(EvalConfig(precision="bf16"), 448),
    ]
    assert len({default, *others}) == 9
