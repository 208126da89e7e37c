"""Deep Spectral Methods: affinities and clusters against naive versions, and regions that are known."""

import itertools

import numpy as np
import pytest

from mis_platform.baselines.deep_spectral import (
    _lloyd,
    _spread_centres,
    background_label,
    color_neighbours,
    deep_spectral,
    k_means,
    patch_affinity,
)
from mis_platform.config import DeepSpectralConfig


def scene(height: int = 160, width: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(photo, features [20, 30, 8], labels [20, 30]): three areas on a background."""
    labels = np.zeros((20, 30), int)
    labels[2:8, 3:12] = 1
    labels[10:17, 5:11] = 2
    labels[5:15, 16:26] = 3
    rng = np.random.default_rng(0)
    features = 0.4 + np.eye(8)[labels] + 0.02 * rng.standard_normal((20, 30, 8))
    image = (np.kron(labels, np.ones((8, 8)))[:, :, None] * 60).astype(np.uint8).repeat(3, axis=2)
    return image[:height, :width], features.astype(np.float32), labels


def test_regions_are_those_of_the_scene() -> None:
    image, features, labels = scene()
    found = deep_spectral(image, features, DeepSpectralConfig(), np.random.default_rng(0))
    expected = {np.kron(labels == k, np.ones((8, 8), bool)).tobytes() for k in (1, 2, 3)}
    assert {mask.tobytes() for mask in found.masks} == expected
    assert found.masks.dtype == bool
    assert found.scores.tolist() == [1.0, 1.0, 1.0]


def test_two_clusters_give_one_region() -> None:
    image, features, labels = scene()
    features = np.where(labels[:, :, None] == 3, features, features[0, 0])
    found = deep_spectral(image, features, DeepSpectralConfig(clusters=2, eigenvectors=2), np.random.default_rng(0))
    np.testing.assert_array_equal(found.masks, np.kron(labels == 3, np.ones((8, 8), bool))[None])


def test_masks_are_disjoint_and_leave_a_background() -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (101, 77, 3), dtype=np.uint8)
    found = deep_spectral(image, rng.random((13, 10, 6), np.float32), DeepSpectralConfig(clusters=6), rng)
    assert found.masks.any(axis=(1, 2)).all()
    assert found.masks.sum(axis=0).max() == 1
    assert not found.masks.any(axis=0).all()


def test_affinity_without_colours() -> None:
    features = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    flat = features.reshape(12, 5).astype(float)
    found = patch_affinity(np.zeros((24, 32, 3), np.uint8), features, 0.0)
    for i, j in itertools.product(range(12), repeat=2):
        cosine = flat[i] @ flat[j] / np.sqrt((flat[i] @ flat[i]) * (flat[j] @ flat[j]))
        assert found[i, j] == pytest.approx(max(0.0, cosine), abs=1e-12)


def test_colour_neighbours_are_those_of_a_full_search() -> None:
    image = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)  # a pixel is a patch
    expected = np.zeros((48, 48))
    y, x = (each.ravel() for each in np.mgrid[:6, :8])
    for count, weight in ((20, 2.0), (10, 0.1)):
        points = np.column_stack([image.reshape(-1, 3) / 255, weight * x / 7, weight * y / 5])
        for i, point in enumerate(points):
            for j in np.argsort(np.linalg.norm(points - point, axis=1))[:count]:
                expected[i, j] += 1
                expected[j, i] += 1
    found = np.zeros((48, 48))
    rows, columns, counts = color_neighbours(image, (6, 8))
    np.add.at(found, (rows, columns), counts)
    np.testing.assert_array_equal(found, expected)
    features = np.ones((6, 8, 2), np.float32)
    np.testing.assert_allclose(patch_affinity(image, features, 10.0), 1 + 10 * expected)


def test_colours_separate_what_features_do_not() -> None:
    image, _, labels = scene()
    features = np.ones((20, 30, 4), np.float32) + 1e-3 * np.random.default_rng(0).random((20, 30, 4), np.float32)
    settings = DeepSpectralConfig(color_weight=10.0)
    found = deep_spectral(image, features, settings, np.random.default_rng(0))
    regions = [np.kron(labels == k, np.ones((8, 8), bool)) for k in (1, 2, 3)]
    best = [max((m & r).sum() / (m | r).sum() for m in found.masks) for r in regions]
    assert max(best) > 0.9


def test_background_has_most_of_the_border() -> None:
    labels = np.ones((6, 9), int)
    labels[1:-1, 1:-1] = 0  # more patches, none at the border
    labels[0, :3] = 2
    assert background_label(labels) == 1
    assert background_label(np.array([[3]])) == 3


def naive_cost(points: np.ndarray, labels: tuple[int, ...]) -> float:
    total = 0.0
    for label in set(labels):
        own = points[np.array(labels) == label]
        total += np.square(own - own.mean(axis=0)).sum()
    return total


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_the_best_partition(seed: int) -> None:
    points = np.random.default_rng(seed).standard_normal((9, 2))
    best = min(naive_cost(points, labels) for labels in itertools.product(range(3), repeat=9))
    found = k_means(points, 3, np.random.default_rng(seed))
    assert naive_cost(points, tuple(found)) == pytest.approx(best)


def test_k_means_starts_ten_times() -> None:
    points = np.random.default_rng(0).standard_normal((30, 2))
    rng, other = np.random.default_rng(1), np.random.default_rng(1)
    found = k_means(points, 4, rng)
    costs = [_lloyd(points, _spread_centres(points, 4, other))[1] for _ in range(10)]
    assert naive_cost(points, tuple(found)) == pytest.approx(min(costs))
    assert rng.bit_generator.state == other.bit_generator.state


@pytest.mark.parametrize(("clusters", "needed"), [(8, 98), (10, 117)])
def test_k_means_goes_on_until_nothing_moves_or_a_hundred_steps(clusters: int, needed: int) -> None:
    """From crowded starts on a line."""
    points = np.random.default_rng(0).random((1000, 1))
    centres = 1e-3 * np.arange(clusters)[:, None]
    found, _ = _lloyd(points, centres)
    history: list[np.ndarray] = []
    while len(history) < 2 or (history[-1] != history[-2]).any():
        history.append(np.square(points - centres.T).argmin(axis=1))
        centres = centres.copy()
        for label in set(history[-1]):
            centres[label] = points[history[-1] == label].mean()
    assert len(history) == needed
    assert (found == history[min(100, needed) - 1]).all()
    assert (found == history[-1]).all() == (needed <= 100)


def test_k_means_with_fewer_points_than_clusters() -> None:
    points = np.array([[0.0], [0.0], [1.0]])
    found = k_means(points, 5, np.random.default_rng(0))
    assert found[0] == found[1] != found[2]
    assert len(np.unique(k_means(np.zeros((4, 2)), 3, np.random.default_rng(0)))) == 1
