"""Segmentation as a minimum cut: GraphCut, and the same with a star-shaped object (GSC, ESC).

Boykov and Jolly, "Interactive Graph Cuts for Optimal Boundary and Region Segmentation" (ICCV 2001); Gulshan et al.,
"Geodesic Star Convexity for Interactive Image Segmentation" (CVPR 2010). The cut is PyMaxflow's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import maxflow
import numpy as np
from skimage.graph import MCP_Geometric

from mis_platform.baselines.color_model import log_density
from mis_platform.baselines.seeds import BACKGROUND, FOREGROUND, seed_map
from mis_platform.config import ClassicalConfig
from mis_platform.simulation.clicks import Click

# Offsets to half of the eight neighbours, each pair of pixels once.
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
_STEP_COST = 1e-3  # of a geodesic through flat colour, so that paths there are straight


class GraphCut:
    """A `ClickModel`; `star` is None (GraphCut), "geodesic" (GSC) or "euclidean" (ESC)."""

    def __init__(self, config: ClassicalConfig, star: str | None = None) -> None:
        assert star in (None, "geodesic", "euclidean")
        self._config = config
        self._star = star

    def set_image(self, image: np.ndarray) -> None:
        """uint8 [H, W, 3] RGB."""
        self._image = image.astype(np.float64) / 255
        self._links = neighbour_links(self._image, self._config.gamma)

    def predict(self, clicks: Sequence[Click], previous: np.ndarray) -> np.ndarray:
        """float32 [H, W]: 1 on the object's side of the cut, else 0."""
        height, width = self._image.shape[:2]
        seeds = seed_map(clicks, height, width, self._config.seed_radius, self._config.frame)
        near, far, weights = self._links
        graph = maxflow.GraphFloat(seeds.size, len(near))
        nodes = graph.add_grid_nodes(seeds.shape)
        never = self._add_regions(graph, nodes, seeds)
        there = back = weights
        if self._star is not None and (seeds == FOREGROUND).any():
            # An object that holds a pixel holds the whole shortest path from it to the nearest positive seed. A step of
            # a path is between neighbours: edges of its own would only be more for the solver to look at.
            image = self._image if self._star == "geodesic" else np.zeros_like(self._image)
            parents = shortest_path_parents(image, seeds == FOREGROUND).ravel()
            there, back = weights + never * (parents[near] == far), weights + never * (parents[far] == near)
        graph.add_edges(near, far, there, back)
        graph.maxflow()
        return np.logical_not(graph.get_grid_segments(nodes)).astype(np.float32)

    def _add_regions(self, graph: maxflow.GraphFloat, nodes: np.ndarray, seeds: np.ndarray) -> float:
        """What each pixel costs on either side: -log p(colour | side), or everything for a seed.

        Returns "everything": more than all that may be cut together, so that no cut separates a seed from its side.
        """
        flat = self._image.reshape(-1, 3)
        costs = {side: -log_density(flat, self._image[seeds == side]) for side in (FOREGROUND, BACKGROUND)}
        least = np.minimum(costs[FOREGROUND], costs[BACKGROUND])  # a density may exceed 1, a capacity is not negative
        dearest = np.abs(costs[FOREGROUND] - costs[BACKGROUND]).sum()
        never = float(1 + dearest + len(_NEIGHBOURS) * self._config.gamma * seeds.size)
        # The source is the object: its edge is cut where a pixel becomes background.
        source = np.where(seeds.ravel() == FOREGROUND, never, costs[BACKGROUND] - least)
        sink = np.where(seeds.ravel() == BACKGROUND, never, costs[FOREGROUND] - least)
        source[seeds.ravel() == BACKGROUND] = 0
        sink[seeds.ravel() == FOREGROUND] = 0
        graph.add_grid_tedges(nodes, source.reshape(seeds.shape), sink.reshape(seeds.shape))
        return never


class Links(NamedTuple):
    """Pairs of neighbouring pixels, as flat indices int64 [E], and what it costs to cut each: float64 [E]."""

    near: np.ndarray
    far: np.ndarray
    weights: np.ndarray


def neighbour_links(image: np.ndarray, gamma: float) -> Links:
    """Each pair of eight neighbours in `image`, float64 [H, W, 3] in [0, 1], once.

    Neighbours p, q are joined by gamma * exp(-|I_p - I_q|^2 / (2 sigma^2)) / |p - q|, where sigma^2 is the mean of
    |I_p - I_q|^2 over the photo. Those of one pixel follow each other: the solver finds them together in memory.
    """
    height, width = image.shape[:2]
    pairs = [_differences(image, offset) for offset in _NEIGHBOURS]
    variance = np.concatenate([squared.ravel() for squared in pairs]).mean() if height * width > 1 else 0.0
    pixels = np.arange(height * width).reshape(height, width)
    far = np.full((height, width, len(_NEIGHBOURS)), -1)
    weights = np.zeros(far.shape)
    for k, ((down, right), squared) in enumerate(zip(_NEIGHBOURS, pairs, strict=True)):
        rows, columns = _overlap(height, down), _overlap(width, right)
        far[rows[0], columns[0], k] = pixels[rows[1], columns[1]]
        weights[rows[0], columns[0], k] = gamma * np.exp(-squared / (2 * variance or 1)) / np.hypot(down, right)
    is_pair = far >= 0
    near = np.broadcast_to(pixels[:, :, None], far.shape)
    return Links(near[is_pair], far[is_pair], weights[is_pair])


def _differences(image: np.ndarray, offset: tuple[int, int]) -> np.ndarray:
    """Squared colour difference of every pixel to the one at `offset`, where there is one."""
    rows, columns = _overlap(image.shape[0], offset[0]), _overlap(image.shape[1], offset[1])
    difference = image[rows[0], columns[0]] - image[rows[1], columns[1]]
    return np.einsum("yxc,yxc->yx", difference, difference)


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """Where pixels have a neighbour `shift` further, and where those neighbours are."""
    if shift >= 0:
        return slice(0, length - shift), slice(shift, length)
    return slice(-shift, length), slice(0, length + shift)


def gradient_magnitude(image: np.ndarray) -> np.ndarray:
    """|grad I| over all channels, float64 [H, W], by central differences; 0 along a side of one pixel."""
    total = np.zeros(image.shape[:2])
    for axis in (0, 1):
        if image.shape[axis] > 1:
            total += (np.gradient(image, axis=axis) ** 2).reshape(*total.shape, -1).sum(axis=2)
    return np.sqrt(total)


def shortest_path_parents(image: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The next pixel on the shortest path to the nearest seed, as a flat index; int64 [H, W], -1 on seeds.

    image: float64 [H, W, 3] in [0, 1], through whose colour changes a path is long; seeds: bool [H, W], not empty. A
    flat image gives Euclidean paths.
    """
    costs = _STEP_COST + gradient_magnitude(image)
    search = MCP_Geometric(costs)
    _, traceback = search.find_costs(np.argwhere(seeds))
    steps = np.asarray(search.offsets)[traceback]  # a seed has no step, -1
    y, x = np.indices(seeds.shape)
    parents = (y - steps[..., 0]) * seeds.shape[1] + x - steps[..., 1]
    parents[seeds] = -1
    return parents
