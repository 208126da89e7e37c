"""Deep Spectral Methods: regions from the spectrum of a patch graph (Melas-Kyriazi et al., CVPR 2022, section 3).

The multi-region variant: the patches are clustered by their entries in the first eigenvectors of the graph's Laplacian;
all clusters but the background are proposals. The optional CRF of the authors' code is left out.
"""

import cv2
import numpy as np
from scipy.spatial import cKDTree

from mis_platform.baselines.spectrum import is_uniform, laplacian_eigenvectors, unit_rows
from mis_platform.config import DeepSpectralConfig
from mis_platform.data.proposals import Proposals
from mis_platform.simulation.proposals import mask_at_image_size

COLOR_NEIGHBOURS = ((20, 2.0), (10, 0.1))  # neighbours of a patch; how much places in [0, 1] count beside colours
ATTEMPTS = 10  # of k-means, the best is kept
LLOYD_STEPS = 100  # at most


def deep_spectral(
    image: np.ndarray, features: np.ndarray, config: DeepSpectralConfig, rng: np.random.Generator
) -> Proposals:
    """The regions of a photo that are not its background, score 1 each: at most clusters - 1 disjoint masks.

    image: uint8 [H, W, 3] RGB; features: float32 [gh, gw, C], a grid over the whole photo. None are found where all
    patches are alike. The authors crop the photo to whole patches; here the grid covers all of it.
    """
    height, width = image.shape[:2]
    grid = features.shape[:2]
    affinity = patch_affinity(image, features, config.color_weight)
    labels = np.zeros(grid, np.int64)
    if not is_uniform(affinity):
        vectors = laplacian_eigenvectors(affinity, config.eigenvectors - 1)
        labels = k_means(vectors, config.clusters, rng).reshape(grid)
    regions = [labels == label for label in np.unique(labels) if label != background_label(labels)]
    masks = np.zeros((len(regions), height, width), bool)
    for k, region in enumerate(regions):
        masks[k] = mask_at_image_size(region, height, width)
    masks = masks[masks.any(axis=(1, 2))]  # a photo smaller than its grid does not show every patch
    return Proposals(masks, np.ones(len(masks), np.float32))


def patch_affinity(image: np.ndarray, features: np.ndarray, color_weight: float) -> np.ndarray:
    """float64 [N, N], symmetric: cosine similarities without the negative ones, the largest is 1, plus colours."""
    directions = unit_rows(features)
    affinity = np.maximum(directions @ directions.T, 0.0)
    affinity /= max(affinity.max(), 1e-12)
    if color_weight > 0:
        rows, columns, counts = color_neighbours(image, features.shape[:2])
        np.add.at(affinity, (rows, columns), color_weight * counts)
    return affinity


def color_neighbours(image: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of patches that are near in colour and place: (rows int64 [E], columns int64 [E], counts float64 [E]).

    image: uint8 [H, W, 3]. A pair counts once for each list of neighbours that it is in, from either side, so the pairs
    are symmetric; a patch is among its own neighbours (Chen et al., KNN Matting, CVPR 2012).
    """
    colors = cv2.resize(image, (grid[1], grid[0]), interpolation=cv2.INTER_AREA).reshape(-1, 3) / 255.0
    y, x = (each.ravel() for each in np.meshgrid(*(np.linspace(0, 1, side) for side in grid), indexing="ij"))
    rows, columns = [], []
    for count, weight in COLOR_NEIGHBOURS:
        points = np.column_stack([colors, weight * x, weight * y])
        count = min(count, len(points))
        nearest = cKDTree(points).query(points, list(range(1, count + 1)))[1]
        rows.append(np.repeat(np.arange(len(points)), count))
        columns.append(nearest.ravel())
    here, there = np.concatenate(rows), np.concatenate(columns)
    return np.concatenate([here, there]), np.concatenate([there, here]), np.ones(2 * len(here))


def background_label(labels: np.ndarray) -> int:
    """The label that most of the border has (the smallest of equals). labels: int64 [gh, gw], from 0; corners count
    twice."""
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return int(np.bincount(border).argmax())


def k_means(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The cluster of each point, int64 [N] from 0: the best of ten runs of Lloyd's algorithm from k-means++ starts.

    points: float64 [N, C]. Some clusters are empty where there are fewer different points. Not scikit-learn's KMeans:
    its threads add up in any order, and a photo must have the same masks to the bit on every machine.
    """
    best, best_cost = np.zeros(len(points), np.int64), np.inf
    for _ in range(ATTEMPTS):
        labels, cost = _lloyd(points, _spread_centres(points, clusters, rng))
        if cost < best_cost:
            best, best_cost = labels, cost
    return best


def _spread_centres(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii, 2007): new centres are points, drawn by squared distance to the others."""
    centres = points[rng.integers(len(points))][None]
    while len(centres) < clusters:
        mass = np.cumsum(_squared_distances(points, centres).min(axis=1))
        chosen = min(int(np.searchsorted(mass, rng.random() * mass[-1], side="right")), len(points) - 1)
        centres = np.concatenate([centres, points[chosen][None]])
    return centres


def _lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """(labels, sum of squared distances). A centre that loses all its points stays where it was."""
    labels = np.full(len(points), -1)
    for _ in range(LLOYD_STEPS):
        distances = _squared_distances(points, centres)
        nearest = distances.argmin(axis=1)
        if (nearest == labels).all():
            break
        labels = nearest
        counts = np.bincount(labels, minlength=len(centres))
        sums = np.stack([np.bincount(labels, column, len(centres)) for column in points.T], axis=1)
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
    return labels, float(distances.min(axis=1).sum())


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """float64 [N, K]."""
    return np.stack([np.square(points - centre).sum(axis=1) for centre in centres], axis=1)
