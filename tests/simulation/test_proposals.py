"""Masks at image size against OpenCV, and the best overlap against every node drawn out."""

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_platform.simulation.proposals import best_overlap, mask_at_image_size
from mis_platform.simulation.ward import merge


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 600), st.integers(1, 600))
def test_masks_grow_as_opencv_grows_them(rows, cols, height, width):
    mask = np.random.default_rng(rows).random((rows, cols)) < 0.5
    expected = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(mask_at_image_size(mask, height, width), expected.astype(bool))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_the_best_overlap_is_the_best_of_all_masks(rows, cols, height, width, seed):
    rng = np.random.default_rng(seed)
    tree = merge(rng.normal(size=(rows, cols, 3)).astype(np.float32))
    target = rng.choice([1, 0, -1], (height, width), p=[0.3, 0.5, 0.2]).astype(np.int8)
    target[rng.integers(height), rng.integers(width)] = 1
    ious = []
    for node in range(tree.num_nodes):
        mask = mask_at_image_size(tree.mask(node), height, width)
        intersection = (mask & (target == 1)).sum()
        ious.append(intersection / ((mask | (target == 1)) & (target != -1)).sum())
    iou, node = best_overlap(tree, target)
    assert iou == max(ious)
    assert node == int(np.argmax(ious))


def test_an_object_without_pixels_overlaps_with_nothing():
    tree = merge(np.random.default_rng(0).normal(size=(3, 3, 2)).astype(np.float32))
    assert best_overlap(tree, np.full((24, 24), -1, np.int8)) == (0.0, 0)
    assert best_overlap(tree, np.zeros((24, 24), np.int8)) == (0.0, 0)
