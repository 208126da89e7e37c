"""Iterative clicks: where they may fall, how they are distributed, and which rows they overwrite."""

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor

from mis_platform.model.interaction import _depth, append_clicks, error_click, error_clicks, find_errors

SLOTS = 24


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch_of(objects: np.ndarray, probabilities: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """(points [B, 48, 3] all distinct, probabilities and targets [B, 1, H, W]) from [B, H, W]."""
    points = torch.arange(len(objects) * 2 * SLOTS * 3, dtype=torch.float32).reshape(len(objects), 2 * SLOTS, 3)
    return points, torch.from_numpy(probabilities).float()[:, None], torch.from_numpy(objects).float()[:, None]


def click_on(
    object_mask: np.ndarray, probability: np.ndarray, rng: np.random.Generator
) -> tuple[int, int, bool] | None:
    """Of an object, bool [H, W], and its prediction, float32 [H, W]."""
    _, probabilities, targets = batch_of(object_mask[None], probability[None])
    return error_click(find_errors(probabilities, targets)[0].numpy(), rng)


def rectangle(shape: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


def test_a_missed_object_gets_a_positive_click_in_its_inner_half() -> None:
    object_mask = rectangle((60, 60), slice(10, 31), slice(5, 46))  # 21 x 41 pixels, deepest 11 from the outside
    inner = rectangle((60, 60), slice(15, 26), slice(10, 41))  # depth > 5.5
    draws = [click_on(object_mask, np.zeros((60, 60), np.float32), rng_of(0, i)) for i in range(3000)]
    assert all(draw is not None and draw[2] for draw in draws)
    counts = np.zeros((60, 60), int)
    np.add.at(counts, tuple(np.array([draw[:2] for draw in draws if draw is not None]).T), 1)
    assert not counts[~inner].any()
    assert stats.chisquare(counts[inner]).pvalue > 1e-3  # uniform over the inner pixels


def test_the_deeper_error_decides_the_sign_and_a_tie_is_negative() -> None:
    missed = rectangle((40, 80), slice(5, 20), slice(5, 20))
    for false_side, positive in [(13, True), (15, False), (17, False)]:
        false = rectangle((40, 80), slice(5, 5 + false_side), slice(40, 40 + false_side))
        click = click_on(missed, false.astype(np.float32), rng_of(1))
        assert click is not None
        assert click[2] is positive
        assert (missed if positive else false)[click[:2]]


def test_the_frame_counts_as_no_error() -> None:
    draws = [click_on(np.ones((21, 21), bool), np.zeros((21, 21), np.float32), rng_of(2, i)) for i in range(500)]
    rows = np.array([draw[0] for draw in draws if draw is not None])
    assert (rows.min(), rows.max()) == (5, 15)  # depth 11 in the middle; without the frame all 21 rows would do


def test_depth_is_opencv_s_five_by_five_approximation() -> None:
    """On blobs where the precise distance would allow other pixels, exactly the approximate ones come up."""
    differing = 0
    for seed in range(400):
        blob = ndimage.gaussian_filter(rng_of(3, seed).normal(size=(40, 40)), 3) > 0.02
        padded = np.pad(blob, 1).astype(np.uint8)
        approximate = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
        precise = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
        allowed, other = approximate > approximate.max() / 2, precise > precise.max() / 2
        if (allowed == other).all():
            continue
        differing += 1
        rng = rng_of(4, seed)
        hits = {click_on(blob, np.zeros(blob.shape, np.float32), rng) for _ in range(30 * int(allowed.sum()))}
        assert {hit[:2] for hit in hits if hit is not None} == set(map(tuple, np.argwhere(allowed)))
        if differing == 3:
            return
    pytest.fail(f"only {differing} blobs tell the two transforms apart")


def test_the_depth_within_a_box_is_that_of_the_whole_photo() -> None:
    for seed in range(60):
        rng = rng_of(10, seed)
        blob = ndimage.gaussian_filter(rng.normal(size=(40, 50)), rng.uniform(0.5, 4)) > rng.uniform(0, 0.1)
        (top, bottom), (left, right) = (sorted(rng.integers(0, size + 1, 2)) for size in blob.shape)
        mask = blob & rectangle(blob.shape, slice(top, bottom), slice(left, right))
        padded = np.pad(mask, 1).astype(np.uint8)
        np.testing.assert_array_equal(_depth(mask), cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1])


def test_thresholds_are_strict() -> None:
    object_mask = rectangle((8, 8), slice(0, 8), slice(0, 4))
    at_threshold = np.full((8, 8), 0.49, np.float32)
    assert click_on(object_mask, at_threshold, rng_of(5)) is None
    above = click_on(object_mask, np.nextafter(at_threshold, np.float32(1)), rng_of(5))
    below = click_on(object_mask, np.nextafter(at_threshold, np.float32(0)), rng_of(5))
    assert above is not None
    assert below is not None
    assert (above[2], below[2]) == (False, True)


def with_clicks(
    points: torch.Tensor, probability: torch.Tensor, target: torch.Tensor, index: int, rngs: list[np.random.Generator]
) -> torch.Tensor:
    """As a training does it."""
    return append_clicks(points, error_clicks(find_errors(probability, target).numpy(), rngs), index)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_the_last_rows_are_overwritten(index: int) -> None:
    object_mask = rectangle((32, 32), slice(4, 28), slice(4, 28))
    objects = np.stack([object_mask, np.zeros_like(object_mask), object_mask])
    probabilities = np.stack([np.zeros((32, 32)), object_mask * 1.0, object_mask * 1.0])  # missed, false, perfect
    points, probability, target = batch_of(objects, probabilities)
    before = points.clone()
    updated = with_clicks(points, probability, target, index, [rng_of(6, i) for i in range(3)])
    assert torch.equal(points, before)  # a copy is returned
    changed = (updated != before).any(dim=2).nonzero().tolist()
    assert changed == [[0, SLOTS - index], [1, 2 * SLOTS - index]]
    for image, slot in changed:
        row, column, order = updated[image, slot].tolist()
        assert order == index
        assert object_mask[int(row), int(column)]


def test_clicks_do_not_depend_on_the_batch() -> None:
    rng = rng_of(7)
    objects = np.stack([ndimage.gaussian_filter(rng.normal(size=(48, 64)), 4) > 0 for _ in range(4)])
    points, probability, target = batch_of(objects, rng.random((4, 48, 64)))
    whole = with_clicks(points, probability, target, 1, [rng_of(8, i) for i in range(4)])
    for i in range(4):
        part = slice(i, i + 1)
        alone = with_clicks(points[part], probability[part], target[part], 1, [rng_of(8, i)])
        assert torch.equal(alone, whole[part])


def test_half_precision_probabilities() -> None:
    object_mask = rectangle((32, 32), slice(4, 28), slice(4, 28))
    points, probability, target = batch_of(object_mask[None], np.zeros((1, 32, 32)))
    full = with_clicks(points, probability, target, 1, [rng_of(9)])
    half = with_clicks(points, probability.bfloat16(), target, 1, [rng_of(9)])
    assert torch.equal(full, half)
