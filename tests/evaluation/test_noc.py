"""NoC on hand-written IoU sequences with the official evaluator's results, and the bootstrap against SciPy's."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from mis_platform.evaluation.noc import bootstrap_interval, clicks_to_reach, iou_table, summarize, text_table

GOLDEN = [
    [0.5, 0.82, 0.86, 0.91],
    [0.92],
    [0.3] * 20,
    [0.7] * 18 + [0.88, 0.90],
    [0.79, 0.85, 0.84] + [0.84] * 17,
]


def click_table(sequences, dataset="grabcut", ms=250.0, shuffle=None):
    rows = [
        (dataset, f"photo{number // 2}", str(number % 2), click, 3, 4, True, score, ms)
        for number, scores in enumerate(sequences)
        for click, score in enumerate(scores, 1)
    ]
    if shuffle is not None:
        rows = [rows[i] for i in shuffle.permutation(len(rows))]
    names = ("dataset", "image_id", "object_id", "click", "y", "x", "positive", "iou", "ms")
    table = {name: np.array(column) for name, column in zip(names, zip(*rows))}
    return table | {"iou": table["iou"].astype(np.float32), "ms": table["ms"].astype(np.float32)}


def test_golden_noc_and_counts():
    summary = summarize(click_table(GOLDEN, shuffle=np.random.default_rng(1)))
    assert [summary.at(target).noc for target in (0.80, 0.85, 0.90)] == pytest.approx([8.8, 9.0, 13.0])
    assert [summary.at(target).at_limit for target in (0.80, 0.85, 0.90)] == [1, 1, 3]
    assert [summary.at(target).failures for target in (0.80, 0.85, 0.90)] == [1, 1, 2]  # one succeeds at click 20
    assert (summary.objects, summary.clicks, summary.dataset) == (5, 65, "grabcut")
    assert summary.seconds_per_click == pytest.approx(0.25)
    assert summary.unchanged == 1


def test_an_iou_of_exactly_nine_tenths_reaches_the_target_however_it_is_spelt():
    ious = np.array([[np.float32(9 / 10)]])
    for target in (0.9, np.float64(0.9), 0.80 + 2 * 0.05, np.float32(0.9)):
        assert clicks_to_reach(ious, target).tolist() == [1]
    failed = np.array([[np.nextafter(np.float32(0.9), np.float32(0))]] * 2)
    assert (failed < np.float32(0.9)).all()
    assert clicks_to_reach(np.repeat(failed, 3, axis=1), 0.9).tolist() == [3, 3]


def test_what_an_early_stop_hides_is_unknown():
    stopped = summarize(click_table([[0.5, 0.91], [0.97]]))
    assert stopped.at(0.90).noc == 1.5
    assert np.isnan(stopped.at(0.95)[1:]).all()
    assert stopped.mean_iou is None
    assert "NoC@95%" not in text_table([("MIS", stopped)])
    known = summarize(click_table([[0.96], [0.97]]))
    assert known.at(0.95).noc == 1


def test_the_mean_iou_curve_needs_every_click():
    sequences = np.random.default_rng(0).random((6, 20)).astype(np.float32)
    summary = summarize(click_table(sequences))
    np.testing.assert_allclose(summary.mean_iou, sequences.astype(np.float64).mean(axis=0))
    assert np.isfinite(summary.at(0.95).noc)


def test_a_pyarrow_table_and_other_limits():
    table = pa.table(click_table([[0.2, 0.95], [0.3, 0.4, 0.5]]))
    summary = summarize(table, max_clicks=3, targets=(0.9,))
    assert summary.at(0.9).noc == 2.5
    assert summary.at(0.9).failures == 1
    assert np.isnan(summary.at(0.8).noc)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), min_size=1, max_size=8), st.integers(0, 99)
)
def test_noc_is_the_loop_of_its_definition(sequences, seed):
    sequences = [scores + [scores[-1]] * (20 - len(scores)) for scores in sequences]
    ious = iou_table(click_table(sequences, shuffle=np.random.default_rng(seed)), 20)
    for target in (0.0, 0.8, 0.9, 1.0):
        expected = [
            next((k for k, score in enumerate(scores, 1) if np.float32(score) >= np.float32(target)), 20)
            for scores in sequences
        ]
        assert sorted(clicks_to_reach(ious, target)) == sorted(expected)


def test_the_interval_is_scipys_percentile_bootstrap():
    clicks = np.random.default_rng(3).geometric(0.2, 150).clip(max=20).astype(float)
    ours = bootstrap_interval(clicks, np.random.default_rng(0), resamples=20_000)
    theirs = bootstrap((clicks,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1))
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.06)
    assert ours == bootstrap_interval(clicks, np.random.default_rng(0), resamples=20_000)
    assert bootstrap_interval(np.full(9, 4.0), np.random.default_rng(0)) == (4, 4)


def test_the_interval_covers_the_truth_at_its_rate():
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.binomial(19, 0.3, 200) + 1.0, rng, resamples=600)
        inside += low <= 1 + 19 * 0.3 <= high
    assert 0.90 <= inside / 300 <= 0.985  # 95 % nominal; +-3 standard errors, and a little below nominal is expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: {name: column[:0] for name, column in table.items()}, "no clicks"),
        (lambda table: table | {"dataset": np.array(["a", "b", "b", "b"])}, r"\['a', 'b'\]"),
        (lambda table: table | {"click": np.array([1, 3, 1, 2])}, "photo photo0, object 0: every click"),
        (lambda table: table | {"click": np.array([1, 2, 1, 1])}, "photo photo0, object 1: every click"),
        (lambda table: table | {"click": np.array([2, 3, 1, 2])}, "photo photo0, object 0: every click"),
        (lambda table: table | {"click": np.array([0, 1, 1, 2])}, "numbered 1 to 20, found 0 to 2"),
        (lambda table: table | {"click": np.array([1, 21, 1, 2])}, "numbered 1 to 20, found 1 to 21"),
    ],
)
def test_damaged_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        summarize(change(click_table([[0.1, 0.2], [0.3, 0.4]])))


def test_the_text_table():
    fixed = [scores + [scores[-1]] * (20 - len(scores)) for scores in GOLDEN]
    lines = text_table(
        [("MIS", summarize(click_table(GOLDEN))), ("RW", summarize(click_table(fixed, "sbd", ms=9e4)))]
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells == [
        ["Pipeline", "Dataset", "NoC@80%", "NoC@85%", "NoC@90%", "NoC@95%", ">=20@85%", ">=20@90%", "SPC,s", "Time"],
        ["MIS", "grabcut", "8.80", "9.00", "13.00", "-", "1", "3", "0.250", "0:00:16"],
        ["RW", "sbd", "8.80", "9.00", "13.00", "20.00", "1", "3", "90.000", "2:30:00"],
    ]
    plain = text_table([("MIS", summarize(click_table(GOLDEN)))])
    assert "NoC@95%" not in plain
