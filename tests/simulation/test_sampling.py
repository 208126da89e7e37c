"""Algorithm 2 against its analytic distribution, and the area rule."""

import numpy as np
import pytest
from scipy import stats

from mis_platform.simulation.sampling import draw_proposal, sample_nodes
from mis_platform.simulation.tree import MergeTree

DRAWS = 40_000


def balanced_tree(levels: int) -> MergeTree:
    """2^levels patches, merged in pairs: every patch is `levels` steps below the root."""
    children, row = [], list(range(2**levels))
    node = 2**levels
    while len(row) > 1:
        children += [[row[k], row[k + 1]] for k in range(0, len(row), 2)]
        row = list(range(node, node + len(row) // 2))
        node += len(row)
    return MergeTree(np.array(children, np.int32), np.zeros(len(children), np.float32), (1, 2**levels))


def steps_below_root(tree: MergeTree, nodes: np.ndarray) -> np.ndarray:
    return (np.log2(tree.num_leaves) - np.log2(tree.sizes[nodes])).round().astype(int)


def descents(alpha: float, most: int) -> np.ndarray:
    """P(K = 1, 2, ..., most) for K descents: step k happens with chance alpha^(k-1), unless an earlier one did not."""
    goes_on = alpha ** np.arange(most)
    chances = np.cumprod(goes_on) * np.append(1 - goes_on[1:], 1.0)
    return chances


@pytest.mark.parametrize(
    ("alpha", "published"),
    [
        (0.9, [0.100, 0.171, 0.198, 0.183, 0.143, 0.096, 0.057, 0.030]),
        (0.8, [0.200, 0.288, 0.250, 0.155, 0.072, 0.026, 0.007, 0.002]),
        (0.95, [0.050, 0.093, 0.122, 0.136, 0.135, 0.123, 0.103, 0.080]),
        (0.0, [1.0]),
    ],
)
def test_descents_follow_the_analytic_distribution(alpha, published):
    tree = balanced_tree(16)
    nodes = sample_nodes(tree, DRAWS, np.random.default_rng(0), alpha=alpha, min_area=0.0)
    found = np.bincount(steps_below_root(tree, nodes), minlength=17)[1:]
    expected = DRAWS * descents(alpha, 16)
    np.testing.assert_allclose(expected[: len(published)] / DRAWS, published, atol=6e-4)
    often = expected > 5
    if often.sum() > 1:
        rest = np.append(expected[often], max(expected[~often].sum(), 1e-9))
        assert stats.chisquare(np.append(found[often], found[~often].sum()), rest * DRAWS / rest.sum()).pvalue > 1e-3
    else:
        assert found[0] == DRAWS


def test_both_children_are_equally_likely():
    tree = balanced_tree(1)
    nodes = sample_nodes(tree, DRAWS, np.random.default_rng(1), alpha=0.9, min_area=0.0)
    assert stats.binomtest(int((nodes == 0).sum()), DRAWS).pvalue > 1e-3


def test_the_root_is_never_drawn():
    tree = balanced_tree(4)
    assert tree.root not in sample_nodes(tree, DRAWS, np.random.default_rng(0), alpha=0.9)


def test_small_proposals_are_drawn_again():
    """The distribution is the one of Algorithm 2 conditioned on more than 5 % of the patches."""
    tree = balanced_tree(10)
    rng = np.random.default_rng(2)
    found = np.bincount(steps_below_root(tree, sample_nodes(tree, DRAWS, rng, alpha=0.9)), minlength=11)
    allowed = descents(0.9, 10)[:4]  # 1/16 of the patches is more than 5 %, 1/32 is not
    assert found[5:].sum() == 0
    assert stats.chisquare(found[1:5], DRAWS * allowed / allowed.sum()).pvalue > 1e-3


def test_the_area_limit_is_strict():
    tree = balanced_tree(2)
    nodes = sample_nodes(tree, 2000, np.random.default_rng(0), alpha=0.9, min_area=0.25)
    assert set(tree.sizes[nodes]) == {2}


def test_after_the_last_redraw_the_draw_is_kept():
    """A chain: one child of every node is a single patch. With one draw only, small ones must come through."""
    leaves = 64
    children = [[0, 1]] + [[leaves + k - 1, k + 1] for k in range(1, leaves - 1)]
    tree = MergeTree(np.array(children, np.int32), np.zeros(leaves - 1, np.float32), (8, 8))
    rng = np.random.default_rng(0)
    once = sample_nodes(tree, 2000, rng, alpha=0.0, max_redraws=1)
    often = sample_nodes(tree, 2000, rng, alpha=0.0, max_redraws=100)
    assert 0.4 < (tree.sizes[once] == 1).mean() < 0.6
    assert (tree.sizes[often] > 1).all()


def test_uniform_sampling_draws_every_merge_equally_often():
    tree = balanced_tree(4)
    nodes = sample_nodes(tree, DRAWS, np.random.default_rng(3), strategy="uniform", min_area=0.0)
    counts = np.bincount(nodes, minlength=tree.num_nodes)
    assert counts[: tree.num_leaves].sum() == 0
    assert stats.chisquare(counts[tree.num_leaves :]).pvalue > 1e-3


def test_single_draws_and_many_draws_are_the_same_stream():
    tree = balanced_tree(6)
    one_by_one = np.random.default_rng(5)
    singles = [draw_proposal(tree, one_by_one).node for _ in range(50)]
    assert singles == sample_nodes(tree, 50, np.random.default_rng(5)).tolist()


def test_a_proposal_is_its_node_as_a_mask():
    tree = balanced_tree(6)
    proposal = draw_proposal(tree, np.random.default_rng(0))
    np.testing.assert_array_equal(proposal.mask, tree.mask(proposal.node))
    assert proposal.mask.sum() == tree.sizes[proposal.node]


def test_one_patch_has_one_proposal():
    tree = MergeTree(np.empty((0, 2), np.int32), np.empty(0, np.float32), (1, 1))
    for strategy in ("top_down", "uniform"):
        assert draw_proposal(tree, np.random.default_rng(0), strategy=strategy).node == 0


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="'top_down' or 'uniform'"):
        draw_proposal(balanced_tree(2), np.random.default_rng(0), strategy="bottom_up")
