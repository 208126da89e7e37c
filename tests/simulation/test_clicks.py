"""Simulated clicks: where they fall, how many there are, and the arrays that networks take."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mis_platform.config import ClickConfig
from mis_platform.simulation.clicks import Click, dilate, erode, points_array, sample_clicks

CONFIG = ClickConfig()


def square(size: int = 64, low: int = 16, high: int = 48) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[low:high, low:high] = True
    return mask


def placed(points: np.ndarray, positive: bool) -> np.ndarray:
    """int64 [clicks, 2], the pixels of the rows in use."""
    half = len(points) // 2
    rows = points[:half] if positive else points[half:]
    return rows[rows[:, 0] >= 0, :2].astype(int)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 10**6))
def test_growing_and_shrinking_are_opencvs(height, width, steps, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.2
    kernel = np.ones((3, 3), np.uint8)
    grown = cv2.dilate(mask.astype(np.uint8), kernel, iterations=steps) if steps else mask
    shrunk = cv2.erode((~mask).astype(np.uint8), kernel, iterations=steps) if steps else ~mask
    np.testing.assert_array_equal(dilate(mask, steps), grown.astype(bool))
    np.testing.assert_array_equal(erode(~mask, steps), shrunk.astype(bool))


def test_numbers_of_clicks_follow_the_truncated_geometric():
    rng = np.random.default_rng(0)
    points = [sample_clicks(square(), rng, CONFIG) for _ in range(6000)]
    positives = np.array([len(placed(each, True)) for each in points])
    negatives = np.array([len(placed(each, False)) for each in points])
    for counts, outcomes, mean in ((positives - 1, 24, 3.89), (negatives, 25, 3.91)):
        chances = CONFIG.gamma ** np.arange(outcomes)
        chances /= chances.sum()
        assert chances @ np.arange(outcomes) == pytest.approx(mean, abs=0.005)
        assert stats.chisquare(np.bincount(counts, minlength=outcomes), chances * len(counts)).pvalue > 1e-3


def test_positive_clicks_lie_uniformly_on_the_eroded_object():
    rng = np.random.default_rng(1)
    always = CONFIG.model_copy(update={"erosion_probability": 1.0})
    clicks = np.concatenate([placed(sample_clicks(square(), rng, always), True) for _ in range(2000)])
    inner = square(low=19, high=45)
    assert inner[tuple(clicks.T)].all()
    counts = np.histogram2d(*clicks.T, bins=2, range=[[19, 45], [19, 45]])[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_an_object_that_erosion_would_leave_nothing_of_is_not_eroded():
    thin = square(low=20, high=26)  # 6x6: nothing is left after 3 steps
    points = sample_clicks(thin, np.random.default_rng(0), CONFIG.model_copy(update={"erosion_probability": 1.0}))
    assert len(placed(points, True)) >= 1
    assert thin[tuple(placed(points, True).T)].all()


def test_negative_clicks_choose_their_region_by_the_published_chances():
    rng = np.random.default_rng(2)
    mask = square()
    other = np.zeros_like(mask)
    other[:10, :10] = True  # beyond the border zone, which is ceil(0.1 * 32) = 4 pixels wide
    clicks = np.concatenate([placed(sample_clicks(mask, rng, CONFIG, other), False) for _ in range(4000)])
    assert not mask[tuple(clicks.T)].any()
    on_other = other[tuple(clicks.T)].sum()
    on_border = (dilate(mask, 4) & ~mask)[tuple(clicks.T)].sum()
    background = ~(mask | other)
    by_chance = (dilate(mask, 4) & ~mask).sum() / background.sum()  # background clicks that happen to lie there
    expected = np.array([0.4, 0.5 + 0.1 * by_chance, 0.1 * (1 - by_chance)]) * len(clicks)
    assert stats.chisquare([on_other, on_border, len(clicks) - on_other - on_border], expected).pvalue > 1e-3


def test_without_other_objects_half_of_the_negative_clicks_are_on_the_border():
    rng = np.random.default_rng(3)
    mask = square(256, 100, 140)
    clicks = np.concatenate([placed(sample_clicks(mask, rng, CONFIG), False) for _ in range(3000)])
    zone = dilate(mask, 4) & ~mask
    share = 0.5 + 0.5 * zone.sum() / (~mask).sum()
    assert stats.binomtest(int(zone[tuple(clicks.T)].sum()), len(clicks), share).pvalue > 1e-3


def test_an_empty_object_gets_negative_clicks_only():
    rng = np.random.default_rng(4)
    points = np.concatenate([sample_clicks(np.zeros((20, 20), bool), rng, CONFIG) for _ in range(20)])
    halves = points.reshape(20, 2, 24, 3)
    assert (halves[:, 0] == -1).all()
    assert (halves[:, 1, :, 0] >= 0).any()


def test_a_full_object_has_no_room_for_negative_clicks():
    points = sample_clicks(np.ones((20, 20), bool), np.random.default_rng(5), CONFIG)
    assert (points[24:] == -1).all()
    assert points[0, 2] == 100


def test_merged_objects_get_a_click_each_and_then_equal_chances():
    """However much larger one of them is."""
    small, large = square(high=24), square(low=32, high=64)
    rng = np.random.default_rng(7)
    points = [placed(sample_clicks(small | large, rng, CONFIG, parts=(small, large)), True) for _ in range(3000)]
    assert all(small[tuple(each[0])] and large[tuple(each[1])] for each in points)
    assert {len(each) for each in points} == set(range(3, 25))  # two first, 1 + k more, 24 at most
    on_small = np.concatenate([small[tuple(each[2:].T)] for each in points])
    assert stats.binomtest(int(on_small.sum()), len(on_small)).pvalue > 1e-3
    counts = np.bincount([len(each) - 3 for each in points])[:10]
    chances = CONFIG.gamma ** np.arange(24)
    expected = 3000 * chances[:10] / chances.sum()
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_equal_generators_give_equal_clicks():
    first, second = (sample_clicks(square(), np.random.default_rng(6), CONFIG) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_points_keep_their_places_in_the_session():
    clicks = [Click(1.5, 2, True), Click(3, 4, False), Click(5, 6, True)]
    expected = [[1.5, 2, 0], [5, 6, 2], [-1, -1, -1], [3, 4, 1], [-1, -1, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(points_array(clicks, 3), expected)
    assert points_array(clicks).shape == (4, 3)
    assert points_array([]).shape == (2, 3)
