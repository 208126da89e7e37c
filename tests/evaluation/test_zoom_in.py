"""Zoom-in against goldens of the official code and SciPy's bilinear interpolation."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from mis_platform.config import EvalConfig
from mis_platform.evaluation.zoom_in import (
    Window,
    candidate_window,
    crop,
    full_frame,
    network_size,
    next_window,
    paste,
    to_network,
    window_iou,
)
from mis_platform.simulation.clicks import Click

CONFIG = EvalConfig()


def box(height, width, top, bottom, left, right, value=0.9):
    probability = torch.zeros(height, width)
    probability[top : bottom + 1, left : right + 1] = value
    return probability


def bilinear(plane, height, width):
    """Corner-aligned bilinear resize by SciPy."""
    rows = np.linspace(0, plane.shape[0] - 1, height)
    cols = np.linspace(0, plane.shape[1] - 1, width)
    return map_coordinates(plane.astype(np.float64), np.meshgrid(rows, cols, indexing="ij"), order=1)


def test_golden_candidate_and_overlap():
    probability = box(375, 500, 100, 160, 200, 300)
    window = candidate_window(probability, [], CONFIG)
    assert window == (30, 230, 150, 350)
    assert window_iou(window, full_frame(375, 500)) == pytest.approx(0.215472, abs=5e-7)
    assert candidate_window(probability, [Click(10, 490, True)], CONFIG) == (0, 191, 141, 499)
    assert candidate_window(probability, [Click(10, 490, False)], CONFIG) == window


def test_no_candidate_without_a_pixel_strictly_above_one_half():
    assert candidate_window(torch.full((30, 40), 0.5), [Click(3, 4, True)], CONFIG) is None
    assert candidate_window(torch.full((30, 40), 0.5001), [], CONFIG) == full_frame(30, 40)


def test_limits_round_halves_to_even():
    config = EvalConfig(zoom_min_crop=201, zoom_expansion=1)  # 300 -+ 100.5 and 301 -+ 100.5
    assert candidate_window(box(600, 600, 300, 300, 301, 301), [], config) == (200, 400, 200, 402)


def test_the_stored_window_stays_until_a_positive_click_leaves_it():
    stored, candidate = Window(100, 200, 100, 200), Window(110, 205, 110, 205)
    assert next_window(None, candidate, [], CONFIG) == candidate
    assert next_window(stored, candidate, [Click(100, 100, True)], CONFIG) == stored
    assert next_window(stored, candidate, [Click(300, 300, False)], CONFIG) == stored
    for outside in (Click(200, 150, True), Click(150, 200, True), Click(99, 150, True), Click(150, 99, True)):
        assert next_window(stored, candidate, [outside, Click(150, 150, True)], CONFIG) == candidate


def test_the_stored_window_gives_way_below_half_overlap():
    stored = Window(0, 99, 0, 99)
    assert next_window(stored, Window(0, 49, 0, 99), [], CONFIG) == stored  # exactly 0.5 is enough
    assert next_window(stored, Window(0, 48, 0, 99), [], CONFIG) == (0, 48, 0, 99)
    assert next_window(stored, Window(0, 69, 0, 69), [], CONFIG) == (0, 69, 0, 69)  # 0.49 as a product


def test_network_size():
    window = Window(5, 239, 75, 319)
    assert network_size(window, (448, 448)) == (448, 448)
    assert network_size(window, 400) == (384, 400)  # 235 x 245
    assert network_size(Window(0, 0, 0, 9999), 400) == (1, 400)


def test_crop_and_paste_interpolate_as_scipy():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 50, 70), np.uint8)
    probability = rng.random((50, 70), np.float32)
    window = Window(4, 40, 11, 69)
    planes = crop(torch.from_numpy(image), torch.from_numpy(probability), window, (64, 48)).numpy()
    assert planes.shape == (4, 64, 48)
    assert planes.dtype == np.float32
    for plane, source in zip(planes, [*(image / 255), probability]):
        np.testing.assert_allclose(plane, bilinear(source[4:41, 11:70], 64, 48), atol=1e-5)
    answer = rng.random((64, 48), np.float32)
    frame = paste(torch.from_numpy(answer), window, 50, 70).numpy()
    np.testing.assert_allclose(frame[4:41, 11:70], bilinear(answer, 37, 59), atol=1e-5)
    frame[4:41, 11:70] = 0
    assert not frame.any()


def test_crop_of_the_whole_image_at_its_size_changes_nothing():
    image = torch.randint(0, 256, (3, 21, 33), dtype=torch.uint8)
    probability = torch.rand(21, 33)
    planes = crop(image, probability, full_frame(21, 33), (21, 33))
    assert torch.equal(planes[:3], image.float() / 255)
    assert torch.equal(planes[3], probability)


def test_clicks_are_scaled_without_rounding_or_half_pixels():
    window = Window(10, 109, 20, 219)
    clicks = [Click(10, 20, True), Click(60, 121, False), Click(9, 220, True)]
    assert to_network(clicks, window, (448, 448)) == [
        (0, 0, True),
        (224, 448 * 101 / 200, False),
        (-4.48, 448, True),
    ]
