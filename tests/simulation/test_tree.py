"""The merge tree: leaf order, spans and masks against sets, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_platform.simulation.tree import MergeTree


def random_tree(height: int, width: int, seed: int) -> MergeTree:
    """Any two nodes merge: a tree need not come from neighbours to be a tree."""
    rng = np.random.default_rng(seed)
    alive, children = list(range(height * width)), []
    for node in range(height * width, 2 * height * width - 1):
        pair = [alive.pop(rng.integers(len(alive))) for _ in range(2)]
        children.append(pair)
        alive.append(node)
    costs = np.zeros(len(children), np.float32)
    return MergeTree(np.array(children, np.int32).reshape(-1, 2), costs, (height, width))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_spans_and_masks_are_the_leaves_below_each_node(height, width, seed):
    tree = random_tree(height, width, seed)
    tree.validate()
    below = [{leaf} for leaf in range(tree.num_leaves)]
    for first, second in tree.children:
        below.append(below[first] | below[second])
    assert sorted(tree.leaf_order) == list(range(tree.num_leaves))
    for node in range(tree.num_nodes):
        assert set(tree.leaf_order[slice(*tree.spans[node])]) == below[node]
        assert set(np.flatnonzero(tree.mask(node))) == below[node]
        assert tree.sizes[node] == len(below[node])


def test_node_ids_are_those_of_scikit_learn():
    tree = MergeTree(np.array([[0, 1], [2, 3], [4, 5]], np.int32), np.array([1, 2, 3], np.float32), (1, 4))
    assert (tree.num_leaves, tree.num_nodes, tree.root) == (4, 7, 6)
    assert tree.children_of(6) == (4, 5)
    assert tree.is_leaf(3)
    assert not tree.is_leaf(4)
    np.testing.assert_array_equal(tree.mask(5), [[False, False, True, True]])


def test_one_patch_is_a_tree():
    tree = MergeTree(np.empty((0, 2), np.int32), np.empty(0, np.float32), (1, 1))
    tree.validate()
    assert tree.root == 0
    assert tree.is_leaf(0)
    np.testing.assert_array_equal(tree.mask(0), [[True]])


@pytest.mark.parametrize(
    ("children", "costs", "message"),
    [
        ([[0, 1], [2, 3], [4, 6]], [1, 2, 3], r"not nodes in 0\.\.5"),
        ([[0, 1], [2, -1], [4, 5]], [1, 2, 3], r"not nodes in 0\.\.4"),
        ([[0, 1], [1, 3], [4, 5]], [1, 2, 3], "child of more than one merge"),
        ([[0, 1], [2, 3], [4, 5]], [1, np.nan, 3], "finite"),
    ],
)
def test_a_broken_tree_is_refused(children, costs, message):
    tree = MergeTree(np.array(children, np.int32), np.array(costs, np.float32), (2, 2))
    with pytest.raises(ValueError, match=message):
        tree.validate()


@pytest.mark.parametrize("grid", [(2, 3), (0, 4), (1, 3)])
def test_a_tree_of_another_grid_is_refused(grid):
    with pytest.raises(ValueError, match="grid"):
        MergeTree(np.array([[0, 1], [2, 3], [4, 5]], np.int32), np.zeros(3, np.float32), grid).validate()
