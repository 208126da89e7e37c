"""Top-down sampling of a merge tree (Algorithm 2) and the uniform sampling it is compared with (Table 5)."""

from typing import Literal

import numpy as np
from numba import njit

from mis_platform.simulation.proposals import Proposal
from mis_platform.simulation.tree import MergeTree

Strategy = Literal["top_down", "uniform"]


def draw_proposal(
    tree: MergeTree,
    rng: np.random.Generator,
    *,
    strategy: Strategy = "top_down",
    alpha: float = 0.9,
    min_area: float = 0.05,
    max_redraws: int = 100,
) -> Proposal:
    """One node large enough to be a target, with its mask. Arguments as in `sample_nodes`."""
    node = sample_nodes(tree, 1, rng, strategy=strategy, alpha=alpha, min_area=min_area, max_redraws=max_redraws)[0]
    return Proposal(node=int(node), mask=tree.mask(node))


def sample_nodes(
    tree: MergeTree,
    count: int,
    rng: np.random.Generator,
    *,
    strategy: Strategy = "top_down",
    alpha: float = 0.9,
    min_area: float = 0.05,
    max_redraws: int = 100,
) -> np.ndarray:
    """`count` independent draws: int32 [count], nodes.

    Top-down, a walk goes down from the root, one fair coin per step, until a draw says stop (Algorithm 2). The chance
    of going deeper is 1 at the root and shrinks by `alpha`, in [0, 1), per level, so the root itself is never drawn and
    alpha=0 gives one of its two children. Uniform, any merge has the same chance, the root included (our reading of
    Table 5; single patches are never drawn). A tree of one patch gives that patch.

    A node must cover more than `min_area` of the patches, in [0, 0.5]; a smaller one is thrown away and drawn again
    from the root. After `max_redraws` draws the last one is kept whatever its size (official MIS code). So the
    distribution is that of the walk, conditioned on size; it is not a walk that stops before regions become too small.
    Raises ValueError for an unknown strategy and for alpha, min_area or max_redraws out of range.
    """
    if strategy not in ("top_down", "uniform"):
        raise ValueError(f"sampling strategy must be 'top_down' or 'uniform', not {strategy!r}")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}: at 1 every walk ends in a single patch")
    if not 0 <= min_area <= 0.5 or max_redraws < 1:
        raise ValueError(f"min_area must lie in [0, 0.5] and max_redraws be at least 1, got {min_area}, {max_redraws}")
    nodes = np.empty(count, np.int32)
    _draw(nodes, tree.children, tree.sizes, rng, strategy == "top_down", alpha, min_area, max_redraws)
    return nodes


@njit(nogil=True, cache=True)
def _draw(
    nodes: np.ndarray,
    children: np.ndarray,
    sizes: np.ndarray,
    rng: np.random.Generator,
    top_down: bool,
    alpha: float,
    min_area: float,
    max_redraws: int,
) -> None:
    num_leaves = children.shape[0] + 1
    for draw in range(nodes.size):
        node = 0
        for _ in range(max_redraws):
            if top_down:
                node = _walk(children, rng, alpha)
            else:
                node = num_leaves + int(rng.random() * (num_leaves - 1)) if num_leaves > 1 else 0
            if sizes[node] / num_leaves > min_area:
                break
        nodes[draw] = node


@njit(nogil=True, cache=True)
def _walk(children: np.ndarray, rng: np.random.Generator, alpha: float) -> int:
    num_leaves = children.shape[0] + 1
    node, descend = 2 * num_leaves - 2, 1.0
    while node >= num_leaves and rng.random() <= descend:
        node = children[node - num_leaves, 0 if rng.random() <= 0.5 else 1]
        descend *= alpha
    return node
