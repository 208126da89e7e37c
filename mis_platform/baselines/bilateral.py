"""The fast bilateral solver: smooths a map along the colours of a photo (Barron and Poole, ECCV 2016).

Pixels that are near in place and colour share a vertex of a sparse grid in five dimensions: x, y, luma and two chroma.
Smoothing and fitting are a linear system on the vertices, a few thousand for a photo, not on the pixels.

Names: P pixels, V vertices.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg

BISTOCHASTIC_ROUNDS = 10
ITERATIONS = 25
TOLERANCE = 1e-5  # residual relative to the right side
DIAGONAL_FLOOR = 1e-5

# JPEG's colour space (JFIF): rows Y, Cb, Cr for columns R, G, B; the chroma are shifted by 128.
_YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_YUV_SHIFT = np.array([0.0, 128.0, 128.0])


class Grid(NamedTuple):
    """The vertices that the pixels of a photo use."""

    vertex: np.ndarray  # int64 [P], of each pixel, row-major
    counts: np.ndarray  # float64 [V], pixels of each vertex
    blur: sparse.csr_array  # float64 [V, V], symmetric: 10 on the diagonal, 1 between neighbours along a dimension

    def splat(self, values: np.ndarray) -> np.ndarray:
        """Sums over the pixels of each vertex: float64 [P] -> [V]."""
        return np.bincount(self.vertex, values, len(self.counts))

    def slice(self, values: np.ndarray) -> np.ndarray:
        """The value of each pixel's vertex: float64 [V] -> [P]."""
        return values[self.vertex]


def refine(
    image: np.ndarray,
    target: np.ndarray,
    *,
    sigmas: tuple[float, float, float],
    smoothness: float,
    confidence: float,
) -> np.ndarray:
    """`target` with its borders moved to those of the photo: float64 [H, W], about the range of `target`.

    image: uint8 [H, W, 3] RGB; target: float64 [H, W]; sigmas: cells of the grid in pixels, levels of luma, levels of
    chroma; smoothness: lambda of the paper's Equation 1; confidence: in (0, 1], of every pixel of the target.
    """
    grid = build_grid(image, *sigmas)
    return grid.slice(solve(grid, target.ravel(), confidence, smoothness)).reshape(target.shape)


def build_grid(image: np.ndarray, sigma_spatial: float, sigma_luma: float, sigma_chroma: float) -> Grid:
    """The bilateral grid of a photo, uint8 [H, W, 3] RGB."""
    height, width = image.shape[:2]
    yuv = image.reshape(-1, 3) @ _YUV.T + _YUV_SHIFT
    rows, columns = np.divmod(np.arange(height * width), width)
    scaled = [columns / sigma_spatial, rows / sigma_spatial, *(yuv / (sigma_luma, sigma_chroma, sigma_chroma)).T]
    cells = [each.astype(np.int64) for each in scaled]
    key, steps = np.zeros(height * width, np.int64), list[int]()
    for cell in cells:  # one number per cell; the free cells at both ends keep rows of the grid apart
        radix = int(cell.max()) + 3
        steps = [step * radix for step in steps] + [1]
        key = key * radix + cell + 1
    keys, vertex = np.unique(key, return_inverse=True)
    return Grid(vertex, np.bincount(vertex).astype(np.float64), _blur_matrix(keys, steps))


def _blur_matrix(keys: np.ndarray, steps: list[int]) -> sparse.csr_array:
    """keys: int64 [V], ascending; steps: difference of the keys of neighbours, per dimension."""
    size = len(keys)
    matrix = sparse.diags_array(np.full(size, 2.0 * len(steps)), format="csr")
    for step in steps:
        place = np.minimum(np.searchsorted(keys, keys + step), size - 1)
        here = np.flatnonzero(keys[place] == keys + step)
        forward = sparse.csr_array((np.ones(len(here)), (here, place[here])), shape=(size, size))
        matrix = matrix + forward + forward.T
    return matrix.tocsr()


def bistochastic_scaling(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(n, m), float64 [V] each: diag(n) blur diag(n) has row sums near the pixel counts, and exactly m."""
    scale, sums = np.ones(len(grid.counts)), grid.counts
    for _ in range(BISTOCHASTIC_ROUNDS):
        scale = np.sqrt(scale * sums / (grid.blur @ scale))
    return scale, scale * (grid.blur @ scale)


def system(grid: Grid, target: np.ndarray, confidence: float, smoothness: float) -> tuple[sparse.csr_array, np.ndarray]:
    """The matrix [V, V] and right side [V] whose solution is the smoothed target. target: float64 [P]."""
    scale, sums = bistochastic_scaling(grid)
    scaling = sparse.diags_array(scale)
    laplacian = sparse.diags_array(sums) - scaling @ grid.blur @ scaling
    matrix = smoothness * laplacian + sparse.diags_array(confidence * grid.counts)
    return matrix.tocsr(), confidence * grid.splat(target)


def solve(grid: Grid, target: np.ndarray, confidence: float, smoothness: float) -> np.ndarray:
    """The smoothed target on the vertices, float64 [V]: conjugate gradients with Jacobi's preconditioner.

    Starts from the mean of each vertex and stops after 25 iterations, as the authors of TokenCut do.
    """
    matrix, right = system(grid, target, confidence, smoothness)
    inverse = 1.0 / np.maximum(matrix.diagonal(), DIAGONAL_FLOOR)
    precondition = LinearOperator(matrix.shape, matvec=lambda vector: inverse * vector.ravel(), dtype=np.float64)
    start = right / (confidence * grid.counts)
    solution, _ = cg(matrix, right, start, rtol=TOLERANCE, maxiter=ITERATIONS, M=precondition)
    return solution
