"""The merge tree of one photo: which patches belong together, from single patches up to the whole image."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit


@dataclass(frozen=True, eq=False)
class MergeTree:
    """Binary tree over N = grid_height * grid_width patches (the paper's T, counted from 0).

    Nodes 0..N-1 are the patches in row-major order; node N+k is the k-th merge, so children[k] holds ids smaller than
    N+k and the root is node 2N-2. A single patch is its own root. Costs need not increase from one merge to the next:
    only neighbours may merge, so a union can be closer to a third region than its parts were to each other.
    """

    children: np.ndarray  # int32 [N-1, 2], the older node of each merge first
    costs: np.ndarray  # float32 [N-1], added squared error of each merge (Equation 4), in squared feature units
    grid: tuple[int, int]  # (height, width), in patches

    @property
    def num_leaves(self) -> int:
        """N, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def num_nodes(self) -> int:
        """2N-1, patches and merges."""
        return 2 * self.num_leaves - 1

    @property
    def root(self) -> int:
        """Id of the node that covers the whole image, 2N-2."""
        return self.num_nodes - 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 [2N-1], number of patches below each node (1 for a patch)."""
        return self._layout[0]

    @cached_property
    def spans(self) -> np.ndarray:
        """int32 [2N-1, 2], (start, end) of each node in `leaf_order`; the patches of a node are one interval of it."""
        return self._layout[1]

    @cached_property
    def leaf_order(self) -> np.ndarray:
        """int32 [N], the patches in the order in which a walk through the tree, first child first, meets them."""
        return self._layout[2]

    @cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _lay_out(self.children, self.num_leaves)

    def is_leaf(self, node: int) -> bool:
        """Whether `node` is a single patch. Ids are not checked."""
        return node < self.num_leaves

    def children_of(self, node: int) -> tuple[int, int]:
        """The two nodes that were merged into `node`; ValueError for a patch."""
        if not self.num_leaves <= node < self.num_nodes:
            raise ValueError(f"node {node} has no children: inner nodes are {self.num_leaves}..{self.num_nodes - 1}")
        first, second = self.children[node - self.num_leaves]
        return int(first), int(second)

    def mask(self, node: int) -> np.ndarray:
        """bool [grid_height, grid_width], the patches below `node`."""
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"no node {node}: the tree has nodes 0..{self.num_nodes - 1}")
        start, end = self.spans[node]
        mask = np.zeros(self.num_leaves, dtype=bool)
        mask[self.leaf_order[start:end]] = True
        return mask.reshape(self.grid)

    def validate(self) -> None:
        """Raises ValueError, naming the first fault, for arrays that are no merge tree of the grid (damaged files)."""
        height, width = self.grid
        if height < 1 or width < 1:
            raise ValueError(f"a grid needs at least one patch on each side, got {height}x{width}")
        merges = self.num_leaves - 1
        if self.children.shape != (merges, 2) or self.costs.shape != (merges,):
            raise ValueError(
                f"a {height}x{width} grid needs children of shape ({merges}, 2) and {merges} costs, "
                f"got {self.children.shape} and {self.costs.shape}"
            )
        if self.children.dtype != np.int32 or self.costs.dtype != np.float32:
            raise ValueError(
                f"children must be int32 and costs float32, got {self.children.dtype} and {self.costs.dtype}"
            )
        ids = np.arange(self.num_leaves, self.num_nodes)
        if (self.children < 0).any() or (self.children >= ids[:, None]).any():
            merge = int(np.argmax(((self.children < 0) | (self.children >= ids[:, None])).any(axis=1)))
            raise ValueError(f"merge {merge} joins {self.children[merge].tolist()}, not nodes in 0..{ids[merge] - 1}")
        used, counts = np.unique(self.children, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"node {used[counts > 1][0]} is child of more than one merge")
        if not np.isfinite(self.costs).all() or (self.costs < 0).any():
            raise ValueError("the costs of merges must be finite and not negative")


@njit(nogil=True, cache=True)
def _lay_out(children: np.ndarray, num_leaves: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, spans and leaf order: children come before parents, so one pass up and one pass down suffice."""
    num_nodes = 2 * num_leaves - 1
    sizes = np.ones(num_nodes, np.int32)
    for merge in range(num_leaves - 1):
        sizes[num_leaves + merge] = sizes[children[merge, 0]] + sizes[children[merge, 1]]
    spans = np.zeros((num_nodes, 2), np.int32)
    spans[num_nodes - 1, 1] = num_leaves
    for merge in range(num_leaves - 2, -1, -1):
        first, second, parent = children[merge, 0], children[merge, 1], num_leaves + merge
        middle = spans[parent, 0] + sizes[first]
        spans[first, 0], spans[first, 1] = spans[parent, 0], middle
        spans[second, 0], spans[second, 1] = middle, spans[parent, 1]
    leaf_order = np.empty(num_leaves, np.int32)
    for leaf in range(num_leaves):
        leaf_order[spans[leaf, 0]] = leaf
    return sizes, spans, leaf_order
