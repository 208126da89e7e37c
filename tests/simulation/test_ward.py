"""Ward merging against scikit-learn, a literal Algorithm 1 and the golden tree; the invariants; odd grids."""

import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from skimage import data
from sklearn.cluster import ward_tree
from sklearn.feature_extraction.image import grid_to_graph

from mis_platform.simulation.tree import MergeTree
from mis_platform.simulation.ward import merge

GOLDEN_PAIRS = [(1, 5), (6, 10), (0, 4), (3, 7), (13, 15), (2, 16), (8, 14), (9, 18), (12, 19), (11, 17), (20, 21)]
GOLDEN_COSTS = [0.40026, 0.40640, 0.46894, 0.72094, 0.56018, 1.30969, 1.42746, 0.95309, 1.89867, 3.22028, 16.28140]


def regions_of(children: np.ndarray, leaves: int) -> set[frozenset[int]]:
    """Every merged region as the set of its patches."""
    below = [frozenset([leaf]) for leaf in range(leaves)]
    for first, second in children:
        below.append(below[first] | below[second])
    return set(below[leaves:])


def scikit_learn_regions(features: np.ndarray) -> set[frozenset[int]]:
    height, width, channels = features.shape
    children, *_ = ward_tree(features.reshape(-1, channels), connectivity=grid_to_graph(height, width))
    return regions_of(children, height * width)


def excess_costs(tree: MergeTree, features: np.ndarray) -> list[float]:
    """Algorithm 1 word by word in float64: how much dearer each merge was than the cheapest pair of neighbours then."""
    patches = features.reshape(tree.num_leaves, -1).astype(np.float64)
    width = tree.grid[1]
    below = {k: [k] for k in range(tree.num_leaves)}
    adjacent = {(k, k + 1) for k in below if (k + 1) % width} | {(k, k + width) for k in below if k + width in below}

    def cost(pair: tuple[int, int]) -> float:
        a, b = (patches[below[node]] for node in pair)
        return len(a) * len(b) / (len(a) + len(b)) * ((a.mean(0) - b.mean(0)) ** 2).sum()

    excess = []
    for node, (first, second) in enumerate(tree.children.tolist(), start=tree.num_leaves):
        pair = (min(first, second), max(first, second))
        assert pair in adjacent
        excess.append(cost(pair) - min(map(cost, adjacent)))
        below[node] = below.pop(first) + below.pop(second)
        renamed = [tuple(sorted(node if end in pair else end for end in edge)) for edge in adjacent]
        adjacent = {edge for edge in renamed if edge[0] != edge[1]}
    return excess


def photo_features(photo: np.ndarray, patch: int) -> np.ndarray:
    """float32 [gh, gw, 24]: mean and spread of colours and their differences, of each patch and its surroundings."""
    pixels = photo.astype(np.float32)
    planes = np.concatenate(
        [pixels, cv2.GaussianBlur(pixels, (0, 0), 6), cv2.Sobel(pixels, -1, 1, 0), cv2.Sobel(pixels, -1, 0, 1)], 2
    )
    height, width = (side // patch * patch for side in photo.shape[:2])
    blocks = planes[:height, :width].reshape(height // patch, patch, width // patch, patch, -1)
    return np.concatenate([blocks.mean((1, 3)), blocks.std((1, 3))], -1)


def test_the_golden_tree():
    k = np.arange(12)
    features = np.stack([np.round(2 * np.sin(1.7 * k + 0.3), 4), np.round(np.cos(2.9 * k), 4)], 1).astype(np.float32)
    tree = merge(features, (3, 4))
    assert [tuple(sorted(pair)) for pair in tree.children.tolist()] == GOLDEN_PAIRS
    np.testing.assert_allclose(tree.costs, GOLDEN_COSTS, atol=6e-6)
    assert tree.costs.sum(dtype=np.float64) == pytest.approx(27.647309, abs=1e-5)


@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("patch", [8, 16])
def test_real_photos_give_the_regions_of_scikit_learn(photo, patch):
    features = photo_features(getattr(data, photo)(), patch)
    height, width, _ = features.shape
    assert regions_of(merge(features).children, height * width) == scikit_learn_regions(features)


def test_unlabelled_photos_give_the_regions_of_scikit_learn(real_data):
    for path in sorted((real_data / "photos").glob("*.jpg"))[::170]:
        features = photo_features(cv2.imread(str(path)), 8)
        height, width, _ = features.shape
        assert regions_of(merge(features).children, height * width) == scikit_learn_regions(features), path.name


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([0.01, 1, 100]))
def test_random_grids_give_the_regions_of_scikit_learn(height, width, channels, seed, scale):
    rng = np.random.default_rng(seed)
    features = (scale * rng.normal(size=(height, width, channels)) + rng.normal(size=channels)).astype(np.float32)
    if height * width > 1:
        assert regions_of(merge(features).children, height * width) == scikit_learn_regions(features)


@pytest.mark.parametrize(("offset", "channels"), [(0, 384), (10, 384), (1000, 24), (1e5, 24)])
def test_the_order_of_merges_is_that_of_float64(offset, channels):
    """With a large common offset float32 centres tell nothing apart, and every cost has to be refined."""
    rng = np.random.default_rng(2)
    features = (offset + gaussian_filter(rng.normal(size=(24, 31, channels)), (2, 2, 0))).astype(np.float32)
    expected, *_ = ward_tree(features.reshape(-1, channels), connectivity=grid_to_graph(24, 31))
    np.testing.assert_array_equal(merge(features).children, np.sort(expected, axis=1))


def test_a_checkerboard_of_nothing_but_ties_is_merged_in_reasonable_time():
    features = np.repeat((np.indices((47, 63)).sum(0) % 2)[..., None], 24, axis=-1).astype(np.float32)
    merge(features[:4, :4])
    began = time.perf_counter()
    tree = merge(features)
    assert time.perf_counter() - began < 10  # 0.2 s alone on one core; minutes if each tie summed its patches anew
    assert tree.costs.sum(dtype=np.float64) == pytest.approx(((features - features.mean((0, 1))) ** 2).sum(), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
def test_among_ties_every_merge_is_one_of_the_cheapest(height, width, channels, seed):
    """Small whole numbers make ties everywhere, where scikit-learn may choose another of the equal pairs."""
    features = np.random.default_rng(seed).integers(0, 3, (height, width, channels)).astype(np.float32)
    assert all(excess <= 1e-9 for excess in excess_costs(merge(features), features))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**32))
def test_invariants(height, width, channels, seed):
    features = np.random.default_rng(seed).normal(size=(height, width, channels)).astype(np.float32)
    tree = merge(features)
    tree.validate()
    graph = csr_matrix(grid_to_graph(height, width))
    for node in range(tree.num_nodes):
        members = np.flatnonzero(tree.mask(node))
        assert connected_components(graph[members][:, members])[0] == 1
    patches = features.reshape(-1, channels).astype(np.float64)
    error = ((patches - patches.mean(0)) ** 2).sum()
    assert tree.costs.sum(dtype=np.float64) == pytest.approx(error, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (2, 2), (5, 6)])
def test_constant_features_give_a_deterministic_tree_of_cost_zero(grid):
    features = np.full((*grid, 5), 3.7, np.float32)
    tree = merge(features)
    tree.validate()
    np.testing.assert_allclose(tree.costs, 0, atol=1e-9)
    np.testing.assert_array_equal(tree.children, merge(features.copy()).children)


def test_costs_may_decrease_from_one_merge_to_the_next():
    features = np.random.default_rng(0).normal(size=(20, 20, 4)).astype(np.float32)
    assert (np.diff(merge(features).costs) < 0).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e16, 3e38])
def test_features_that_are_no_numbers_are_refused(value):
    features = np.zeros((4, 5, 3), np.float32)
    features[2, 3, 1] = value
    with pytest.raises(ValueError, match="NaN"):
        merge(features)


@pytest.mark.parametrize(
    ("shape", "grid"), [((12, 3), None), ((12, 3), (3, 5)), ((3, 4, 2), (4, 3)), ((12,), (3, 4)), ((0, 3), (0, 4))]
)
def test_shapes_that_do_not_fit_are_refused(shape, grid):
    with pytest.raises(ValueError, match=r"grid|shape"):
        merge(np.zeros(shape, np.float32), grid)


def test_other_dtypes_and_layouts_give_the_same_tree():
    features = np.random.default_rng(1).integers(0, 50, (6, 7, 3))
    expected = merge(features.astype(np.float32)).children
    for other in (features.astype(np.float64), np.asfortranarray(features.astype(np.float32)), features):
        np.testing.assert_array_equal(merge(other).children, expected)
