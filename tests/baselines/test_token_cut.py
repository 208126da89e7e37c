"""TokenCut: its eigenvector against a dense solver, and objects that are known."""

import numpy as np
import pytest
from scipy.linalg import eigh

from mis_platform.baselines import token_cut as module
from mis_platform.baselines.spectrum import laplacian_eigenvectors
from mis_platform.baselines.token_cut import largest_component, patch_affinity, salient_patches, token_cut
from mis_platform.config import TokenCutConfig


def features_of(labels: np.ndarray, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """float32 [gh, gw, 16]: patches of one label point in one direction, those of others at right angles to it."""
    rng = np.random.default_rng(seed)
    return (np.eye(16)[labels] + noise * rng.standard_normal((*labels.shape, 16))).astype(np.float32)


def square(grid: tuple[int, int]) -> np.ndarray:
    labels = np.zeros(grid, int)
    labels[grid[0] // 4 : grid[0] // 2, grid[1] // 3 : 2 * grid[1] // 3] = 1
    return labels


def random_affinity(size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((size, 3))
    return np.exp(-np.square(points[:, None] - points).sum(axis=2))


@pytest.mark.parametrize(("size", "count"), [(2, 1), (3, 5), (40, 4), (200, 1), (200, 6)])
def test_eigenvectors_are_those_of_the_generalised_problem(size: int, count: int) -> None:
    affinity = random_affinity(size, size)
    degrees = np.diag(affinity.sum(axis=1))
    values, expected = eigh(degrees - affinity, degrees)
    found = laplacian_eigenvectors(affinity, count)
    count = min(count, size - 1)
    assert found.shape == (size, count)
    for k in range(count):
        vector = found[:, k]
        rayleigh = vector @ (degrees - affinity) @ vector / (vector @ degrees @ vector)
        assert rayleigh == pytest.approx(values[k + 1], abs=1e-7)
        assert abs(vector @ degrees @ expected[:, k + 1]) == pytest.approx(1, abs=1e-5)
        assert vector @ degrees @ vector == pytest.approx(1, abs=1e-8)
        assert vector[np.abs(vector).argmax()] > 0


def test_patches_without_neighbours_are_no_error() -> None:
    affinity = np.zeros((100, 100))
    affinity[:50, :50] = random_affinity(50, 0)
    vectors = laplacian_eigenvectors(affinity, 3)
    assert np.isfinite(vectors).all()


def test_weakly_joined_patches_converge() -> None:
    """Every patch is like itself alone: the spectrum is as good as one point."""
    affinity = np.where(np.eye(300) > 0, 1.0, 1e-5)
    assert np.isfinite(laplacian_eigenvectors(affinity, 1)).all()


@pytest.mark.parametrize("grid", [(8, 9), (30, 40)])
def test_coarse_mask_is_the_object(grid: tuple[int, int]) -> None:
    labels = square(grid)
    found = salient_patches(features_of(labels), 0.2)
    np.testing.assert_array_equal(found, labels == 1)


def test_coarse_mask_follows_the_dense_eigenvector() -> None:
    features = np.random.default_rng(3).standard_normal((12, 15, 5)).astype(np.float32)
    flat = features.reshape(-1, 5) / np.linalg.norm(features.reshape(-1, 5), axis=1, keepdims=True)
    affinity = np.where(flat @ flat.T > 0.2, 1.0, 1e-5)
    degrees = np.diag(affinity.sum(axis=1))
    vector = eigh(degrees - affinity, degrees)[1][:, 1]
    seed = np.abs(vector).argmax()
    side = (vector > vector.mean()) == (vector > vector.mean())[seed]
    reached, last = np.zeros((12, 15), bool), None
    reached.flat[seed] = True
    while last is None or (reached != last).any():  # flood fill, 4 neighbours
        last = reached.copy()
        reached[1:] |= last[:-1]
        reached[:-1] |= last[1:]
        reached[:, 1:] |= last[:, :-1]
        reached[:, :-1] |= last[:, 1:]
        reached &= side.reshape(12, 15)
    np.testing.assert_array_equal(salient_patches(features, 0.2), reached)


def test_only_the_part_with_the_seed_is_kept() -> None:
    labels = square((20, 30))
    labels[15:19, 1:4] = 1  # a second, smaller piece of the same kind
    found = salient_patches(features_of(labels, noise=0.02), 0.2)
    assert found is not None
    assert found.sum() in ((labels[:12] == 1).sum(), 12)
    assert (labels[found] == 1).all()


def test_refined_mask_follows_the_photo_between_patches() -> None:
    """The object ends 3 pixels inside its patches; the colours say so."""
    labels = square((20, 30))
    truth = np.zeros((160, 240), bool)
    truth[43:77, 83:157] = True
    image = np.where(truth[:, :, None], np.uint8([220, 40, 40]), np.uint8([30, 60, 120]))
    found = token_cut(image, features_of(labels), TokenCutConfig())
    assert found.masks.shape == (1, 160, 240)
    np.testing.assert_array_equal(found.masks[0], truth)
    assert found.scores.tolist() == [1.0]
    assert found.scores.dtype == np.float32


def test_a_refined_mask_that_lost_the_object_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((80, 120, 3), np.uint8)
    labels = square((10, 15))
    coarse = np.kron(labels, np.ones((8, 8))) > 0
    for soft in (np.zeros((80, 120)), np.ones((80, 120)), np.where(coarse, 0.0, 1.0)):
        monkeypatch.setattr(module, "refine", lambda *_, soft=soft, **__: soft)
        np.testing.assert_array_equal(token_cut(image, features_of(labels), TokenCutConfig()).masks[0], coarse)
    holed = coarse.astype(float)
    holed[25, 50] = 0  # a hole, and a speck that is not of the largest part
    holed[79, 119] = 1
    monkeypatch.setattr(module, "refine", lambda *_, **__: holed)
    np.testing.assert_array_equal(token_cut(image, features_of(labels), TokenCutConfig()).masks[0], coarse)


@pytest.mark.parametrize(("rows", "is_used"), [(11, False), (12, True)])
def test_a_refined_mask_shares_half_with_the_coarse_one(
    rows: int, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coarse mask has 24 rows of pixels."""
    labels = square((10, 15))
    coarse = np.kron(labels, np.ones((8, 8))) > 0
    part = coarse.copy()
    part[16 + rows :] = False
    monkeypatch.setattr(module, "refine", lambda *_, **__: part.astype(float))
    found = token_cut(np.zeros((80, 120, 3), np.uint8), features_of(labels), TokenCutConfig()).masks[0]
    np.testing.assert_array_equal(found, part if is_used else coarse)


def test_unlike_patches_are_joined_weakly() -> None:
    features = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    flat = features.reshape(12, 5).astype(float)
    found = patch_affinity(features, 0.2)
    for i, j in np.ndindex(12, 12):
        cosine = flat[i] @ flat[j] / np.sqrt((flat[i] @ flat[i]) * (flat[j] @ flat[j]))
        assert found[i, j] == (1 if cosine > 0.2 else 1e-5)


def test_tau_decides_which_patches_are_alike() -> None:
    """Two kinds of background with a cosine of 0.5, an object at right angles to both."""
    labels = square((16, 18))
    labels[12:] = 2
    directions = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0, np.sqrt(0.75)]], np.float32)
    features = directions[labels]
    np.testing.assert_array_equal(salient_patches(features, 0.2), labels == 1)
    other = salient_patches(features, 0.9)
    assert other is not None
    assert len(np.unique(labels[other])) == 1


def test_largest_component() -> None:
    mask = np.zeros((6, 8), bool)
    mask[0, :3] = mask[2:5, 4:7] = True
    mask[5, 7] = True  # touches only at a corner
    expected = np.zeros_like(mask)
    expected[2:5, 4:7] = True
    np.testing.assert_array_equal(largest_component(mask), expected)
    np.testing.assert_array_equal(largest_component(np.zeros((3, 3), bool)), np.zeros((3, 3), bool))
