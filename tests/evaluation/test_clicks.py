"""The click robot against goldens of the official evaluator, SciPy's distance transform and scikit-learn's Jaccard."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import jaccard_score

from mis_platform.evaluation.clicks import _depth, iou, next_click
from mis_platform.simulation.clicks import Click

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)


@st.composite
def targets_and_predictions(draw):
    shape = draw(SHAPES)
    target = draw(hnp.arrays(np.int8, shape, elements=st.sampled_from([-1, 0, 1]), fill=st.nothing()))
    return target, draw(hnp.arrays(np.bool_, shape, fill=st.nothing()))


def mask(shape, *boxes):
    out = np.zeros(shape, np.int8)
    for top, bottom, left, right in boxes:
        out[top : bottom + 1, left : right + 1] = 1
    return out


@pytest.mark.parametrize("positive", [True, False])
def test_clicked_pixels_are_skipped_and_their_neighbours_are_not(positive):
    error, nothing = mask((20, 30), (5, 14, 8, 21)), np.zeros((20, 30), np.int8)
    target, prediction = (error, nothing == 1) if positive else (nothing, error == 1)
    clicks = []
    for _ in range(5):
        clicks.append(next_click(target, prediction, clicks))
    assert clicks == [Click(9, x, positive) for x in (12, 13, 14, 15, 16)]


def test_the_frame_is_border():
    assert next_click(mask((9, 9), (0, 8, 0, 4)), np.zeros((9, 9), bool), []) == Click(2, 2, True)


def test_equal_errors_give_a_negative_click():
    target = mask((9, 20), (2, 6, 1, 5))
    prediction = mask((9, 20), (2, 6, 12, 16)) == 1
    assert next_click(target, prediction, []) == Click(4, 14, False)


@pytest.mark.parametrize("fill", [1, 0])
def test_a_perfect_prediction_gets_the_first_pixel_as_negative_for_ever(fill):
    target = np.full((6, 7), fill, np.int8)
    for clicked in ([], [Click(0, 0, False)]):
        assert next_click(target, target == 1, clicked) == Click(0, 0, False)


def test_only_ignored_pixels_give_the_same_click_as_no_error():
    target = np.full((6, 7), -1, np.int8)
    assert next_click(target, np.ones((6, 7), bool), []) == Click(0, 0, False)


def test_all_ones_and_one_pixel():
    assert next_click(np.ones((5, 9), np.int8), np.zeros((5, 9), bool), []) == Click(2, 2, True)
    assert next_click(mask((5, 9), (3, 3, 7, 7)), np.zeros((5, 9), bool), []) == Click(3, 7, True)


def test_two_components_start_with_the_deeper_one():
    target = mask((20, 40), (1, 3, 1, 3), (5, 15, 20, 30))
    assert next_click(target, np.zeros(target.shape, bool), []) == Click(10, 25, True)


@settings(max_examples=150, deadline=None)
@given(targets_and_predictions())
def test_the_click_is_the_deepest_error_by_scipys_transform(pair):
    target, prediction = pair
    missed = distance_transform_edt(np.pad((target == 1) & ~prediction, 1))[1:-1, 1:-1]
    added = distance_transform_edt(np.pad((target == 0) & prediction, 1))[1:-1, 1:-1]
    click = next_click(target, prediction, [])
    chosen, other = (missed, added) if click.positive else (added, missed)
    assert chosen[click.y, click.x] >= chosen.max() - 1e-4
    assert chosen.max() >= other.max() - 1e-4
    if missed.max() == added.max():
        assert not click.positive


@settings(max_examples=150, deadline=None)
@given(targets_and_predictions())
def test_iou_is_scikit_learns_jaccard_on_the_valid_pixels(pair):
    target, prediction = pair
    valid = target != -1
    score = iou(target, prediction)
    assert score.dtype == np.float32
    if (target[valid] == 1).any() or prediction[valid].any():
        expected = jaccard_score(target[valid] == 1, prediction[valid], zero_division=0)
        assert score == np.float32(expected)
    else:
        assert score == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(60, 80), (62, 62), (320, 480)])
def test_depths_are_rounded_roots_wherever_the_frame_lies(shape, threads):
    """OpenCV with Intel's IPP fails this: its last bits depend on the address."""
    rng = np.random.default_rng(0)
    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    try:
        for _ in range(20):
            error = cv2.GaussianBlur(rng.random(shape, np.float32), (0, 0), 5) > 0.5
            squared = (distance_transform_edt(np.pad(error, 1))[1:-1, 1:-1] ** 2).round()
            kept = [np.empty(int(rng.integers(1, 200)), np.uint8) for _ in range(50)]  # moves what is allocated next
            assert np.array_equal(_depth(error), np.sqrt(squared).astype(np.float32))
            del kept
    finally:
        cv2.setNumThreads(before)
