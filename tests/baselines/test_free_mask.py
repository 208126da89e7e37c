"""Free Mask: matrix NMS against loops, bilinear resizing against torch, and objects that are known."""

import numpy as np
import pytest
import torch

from mis_platform.baselines.free_mask import (
    distinct,
    free_mask,
    is_object_like,
    matrix_nms_decay,
    resize,
    soft_masks,
)
from mis_platform.config import FreeMaskConfig


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(photo, features [20, 30, 8], labels [20, 30]): two objects in front of a wide background."""
    labels = np.zeros((20, 30), int)
    labels[6:12, 3:12] = 1
    labels[9:19, 16:26] = 2
    rng = np.random.default_rng(0)
    features = np.eye(8)[labels] + 0.02 * rng.standard_normal((20, 30, 8))
    return np.zeros((160, 240, 3), np.uint8), features.astype(np.float32), labels


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def test_objects_are_found_and_the_background_is_not() -> None:
    image, features, labels = scene()
    found = free_mask(image, features, FreeMaskConfig())
    assert found.scores.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all()
    assert (found.scores >= 0.7).all()
    for label in (1, 2):
        assert max(iou(mask, np.kron(labels == label, np.ones((8, 8), bool))) for mask in found.masks) > 0.9
    assert not any(iou(mask, np.kron(labels == 0, np.ones((8, 8), bool))) > 0.5 for mask in found.masks)


def test_number_of_proposals_is_bounded() -> None:
    features = np.random.default_rng(0).standard_normal((12, 14, 6)).astype(np.float32)
    image = np.zeros((96, 112, 3), np.uint8)
    loose = {"min_maskness": 0.0, "min_center_row": 0.0, "max_box_width": 2.0}
    for keep in (1, 7):
        assert len(free_mask(image, features, FreeMaskConfig(keep=keep, **loose)).masks) == keep
    assert len(free_mask(image, features, FreeMaskConfig(min_maskness=1.0)).masks) == 0


def test_soft_masks_one_by_one() -> None:
    features = np.random.default_rng(0).standard_normal((6, 8, 5)).astype(np.float32)
    found = soft_masks(features, (1.0, 0.5))
    assert found.shape == (48 + 12, 48)
    tensor = torch.from_numpy(features).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(tensor, size=(3, 4), mode="bilinear", align_corners=False)
    queries = np.concatenate([features.reshape(-1, 5), small[0].permute(1, 2, 0).reshape(-1, 5).numpy()])
    keys = features.reshape(-1, 5)
    for query, row in zip(queries, found, strict=True):
        cosines = keys @ query / np.linalg.norm(keys, axis=1) / np.linalg.norm(query)
        expected = (cosines - cosines.min()) / (cosines.max() - cosines.min())
        np.testing.assert_allclose(row, expected, atol=1e-5)


def naive_decay(masks: np.ndarray, sigma: float) -> list[float]:
    def overlap(i: int, j: int) -> float:
        return iou(masks[i], masks[j])

    worst = [max((overlap(k, i) for k in range(i)), default=0.0) for i in range(len(masks))]
    return [
        min((np.exp(-sigma * overlap(i, j) ** 2) / np.exp(-sigma * worst[i] ** 2) for i in range(j)), default=1.0)
        for j in range(len(masks))
    ]


@pytest.mark.parametrize(("count", "sigma"), [(1, 2.0), (2, 2.0), (40, 2.0), (40, 0.5)])
def test_matrix_nms_against_loops(count: int, sigma: float) -> None:
    masks = np.random.default_rng(count).random((count, 60)) > 0.6
    masks[:, 0] = True
    found = matrix_nms_decay(masks, sigma)
    np.testing.assert_allclose(found, naive_decay(masks, sigma), rtol=1e-5)
    assert found.dtype == np.float32
    assert found[0] == 1


def test_matrix_nms_of_nothing() -> None:
    assert matrix_nms_decay(np.zeros((0, 9), bool), 2.0).shape == (0,)


def test_a_repeated_mask_loses_and_masks_of_one_patch_are_dropped() -> None:
    soft = np.zeros((5, 12), np.float32)
    soft[0, :4] = 1.0
    soft[1, :4] = 0.9  # the same again
    soft[2, 6:10] = 0.8
    soft[3, 5] = 1.0  # one patch
    soft[4, 10:] = 0.7  # two are a mask
    found, scores = distinct(soft, FreeMaskConfig())
    np.testing.assert_array_equal(found, soft[[0, 2, 4, 1]])
    np.testing.assert_allclose(scores, [1.0, 0.8, 0.7, 0.9 * np.exp(-2)], rtol=1e-6)


@pytest.mark.parametrize(("contrast", "is_answer"), [(2e-5, True), (5e-6, False)])
def test_rounding_is_no_answer(contrast: float, is_answer: bool) -> None:
    """Two patches whose cosine is 1 - contrast."""
    features = np.array([[[1, 0], [1, np.sqrt(2 * contrast)]]], np.float32)
    assert len(soft_masks(features, (1.0,))) == (2 if is_answer else 0)


@pytest.mark.parametrize(("old", "new"), [((5, 7), (11, 20)), ((8, 6), (4, 3)), ((1, 4), (3, 9)), ((1, 1), (2, 2))])
def test_resize_is_that_of_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((*old, 3), np.float32)
    tensor = torch.from_numpy(values).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, size=new, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize(values, new), expected[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_boxes_that_are_no_objects() -> None:
    config = FreeMaskConfig()
    mask = np.zeros((100, 200), bool)
    assert not is_object_like(mask, config)
    mask[21, 10:199] = True  # 189 of 200 columns, centre in row 21
    assert is_object_like(mask, config)
    mask[21, 9] = True  # 190 columns
    assert not is_object_like(mask, config)
    mask[21] = False
    mask[20, :50] = True
    assert not is_object_like(mask, config)
    mask[21, 0] = True  # how many pixels a row has does not count: the mean of the two is 20.5
    assert is_object_like(mask, config)


def test_a_mask_in_two_parts_is_as_wide_as_both() -> None:
    config = FreeMaskConfig()
    mask = np.zeros((100, 200), bool)
    mask[50:60, :20] = mask[50:60, -20:] = True  # from side to side, but 40 columns
    assert is_object_like(mask, config)
    mask[70, 20:169] = True  # 189 columns
    assert is_object_like(mask, config)
    mask[70, 169] = True  # 190 of 200 columns
    assert not is_object_like(mask, config)


def test_a_proposal_in_two_parts_is_kept() -> None:
    """Both ends of the photo show the same thing."""
    labels = np.zeros((20, 30), int)
    labels[8:14, :6] = labels[8:14, -6:] = 1
    features = np.eye(8, dtype=np.float32)[labels]
    found = free_mask(np.zeros((160, 240, 3), np.uint8), features, FreeMaskConfig())
    expected = np.kron(labels == 1, np.ones((8, 8), bool))
    assert max(iou(mask, expected) for mask in found.masks) > 0.9
