"""Eigenvectors of graph Laplacians on patches (normalised cuts, Shi and Malik, 2000)."""

import numpy as np
from scipy.linalg import eigh
from scipy.sparse.linalg import LinearOperator, eigsh

DENSE_NODES = 64  # up to here all eigenvectors are computed
TOLERANCE = 1e-8  # relative, of the eigenvalues
MAX_NODES = 8192  # a dense affinity of 0.5 GiB; a photo of 720x720 pixels has 8100 patches
_START_SEED = 0  # of the first Krylov vector: the same affinity has the same eigenvectors


def unit_rows(features: np.ndarray) -> np.ndarray:
    """float64 [N, C]: features [..., C] with norm 1; features of norm 0 stay 0."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)


def is_uniform(affinity: np.ndarray) -> bool:
    """Whether all patches are alike to each other, so that no cut is better than another. affinity: float64 [N, N]."""
    low, high = affinity.min(), affinity.max()
    return bool(high - low <= 1e-6 * abs(high))


def laplacian_eigenvectors(affinity: np.ndarray, count: int) -> np.ndarray:
    """The `count` smallest non-trivial solutions of (D - A) v = lambda D v: float64 [N, min(count, N - 1)].

    affinity: A, float64 [N, N], symmetric, not negative; D: its row sums, 1 where they are 0. The trivial solution is
    the constant one, of eigenvalue 0; the others follow, eigenvalues ascending, each with v' D v = 1 and the sign that
    makes its largest entry (by magnitude) positive.

    Found as the largest eigenvectors of D^-1/2 A D^-1/2 with the known trivial one removed, by Lanczos iterations from
    a fixed start: the same affinity gives the same vectors.
    """
    degrees = affinity.sum(axis=1)
    root = np.sqrt(np.where(degrees > 1e-12, degrees, 1.0))
    trivial = root / np.linalg.norm(root)
    count = min(count, len(root) - 1)
    if count < 1:
        return np.empty((len(root), 0))
    vectors = _largest(affinity, root, trivial, count) / root[:, None]
    strongest = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[strongest, np.arange(count)])


def _largest(affinity: np.ndarray, root: np.ndarray, trivial: np.ndarray, count: int) -> np.ndarray:
    """The eigenvectors of M - 2 t t' of the largest eigenvalues, descending: float64 [N, count].

    M = D^-1/2 A D^-1/2 has eigenvalues in [-1, 1] and 1 for t, the trivial one, which becomes -1.
    """
    size = len(root)
    if size <= max(DENSE_NODES, 2 * count + 2):
        dense = affinity / root[:, None] / root - 2 * np.outer(trivial, trivial)
        return eigh(dense)[1][:, : -count - 1 : -1]

    def multiply(vector: np.ndarray) -> np.ndarray:
        flat = vector.ravel()
        return (affinity @ (flat / root)) / root - 2 * trivial * (trivial @ flat)

    start = np.random.default_rng(_START_SEED).standard_normal(size)
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    values, vectors = eigsh(operator, count, which="LA", v0=start, tol=TOLERANCE, ncv=min(size, max(2 * count + 1, 40)))
    return vectors[:, np.argsort(-values, kind="stable")]
