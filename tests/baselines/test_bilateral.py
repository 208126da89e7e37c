"""The bilateral solver against dense linear algebra and against what it is for."""

import numpy as np
import pytest

from mis_platform.baselines import bilateral
from mis_platform.baselines.bilateral import bistochastic_scaling, build_grid, refine, solve, system

SIGMAS = (16.0, 16.0, 8.0)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Three smooth areas with a little noise: few vertices, many neighbours."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    areas = np.stack([120 + 2 * x, 90 + y, np.where(x > width // 2, 200, 60)], axis=2)
    return np.clip(areas + rng.normal(0, 6, areas.shape), 0, 255).astype(np.uint8)


def dense_blur(image: np.ndarray, sigmas: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """(vertex of each pixel, blur matrix) pixel by pixel, with the textbook formula of YCbCr."""
    red, green, blue = np.moveaxis(image.astype(float), 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    # Cb = 128 + (B - Y) / 1.772, Cr = 128 + (R - Y) / 1.402
    chroma = 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402
    cells = {}
    vertex = np.zeros(image.shape[:2], int)
    for y, x in np.ndindex(*image.shape[:2]):
        cell = (
            int(x / sigmas[0]),
            int(y / sigmas[0]),
            int(luma[y, x] / sigmas[1]),
            *(int(c[y, x] / sigmas[2]) for c in chroma),
        )
        vertex[y, x] = cells.setdefault(cell, len(cells))
    blur = np.zeros((len(cells), len(cells)))
    for first, i in cells.items():
        for second, j in cells.items():
            distance = sum(abs(a - b) for a, b in zip(first, second, strict=True))
            blur[i, j] = 10.0 if distance == 0 else float(distance == 1)
    return vertex.ravel(), blur


def test_grid_is_that_of_the_pixels_one_by_one() -> None:
    image = photo(37, 41)
    grid = build_grid(image, *SIGMAS)
    vertex, blur = dense_blur(image, SIGMAS)
    assert len(np.unique(vertex)) == len(grid.counts) > 20
    number = np.zeros(len(blur), int)
    number[vertex] = grid.vertex  # their number of each of ours
    np.testing.assert_array_equal(number[vertex], grid.vertex)
    np.testing.assert_array_equal(grid.blur.toarray()[np.ix_(number, number)], blur)
    np.testing.assert_array_equal(grid.counts, np.bincount(grid.vertex))


def test_rows_of_the_grid_do_not_touch_around_their_ends() -> None:
    """White and black columns alternate: cells at opposite ends of a dimension are no neighbours."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    blur = build_grid(image, *SIGMAS).blur.toarray()
    _, expected = dense_blur(image, SIGMAS)
    assert sorted(blur.sum(axis=1)) == sorted(expected.sum(axis=1))


def test_scaling_is_bistochastic() -> None:
    grid = build_grid(photo(60, 80), *SIGMAS)
    scale, sums = bistochastic_scaling(grid)
    balanced = scale[:, None] * grid.blur.toarray() * scale
    np.testing.assert_allclose(balanced.sum(axis=1), sums, rtol=1e-10)
    np.testing.assert_allclose(sums, grid.counts, rtol=0.1)
    assert np.abs(sums / grid.counts - 1).mean() < 0.02


def test_solution_is_that_of_a_dense_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = build_grid(photo(60, 80), *SIGMAS)
    target = (np.random.default_rng(1).random(4800) > 0.4).astype(float)
    matrix, right = system(grid, target, 0.999, 256.0)
    exact = np.linalg.solve(matrix.toarray(), right)
    monkeypatch.setattr(bilateral, "ITERATIONS", 1000)
    monkeypatch.setattr(bilateral, "TOLERANCE", 1e-12)
    np.testing.assert_allclose(solve(grid, target, 0.999, 256.0), exact, atol=1e-8)


def test_twenty_five_steps_come_near_the_dense_solution() -> None:
    grid = build_grid(photo(60, 80), *SIGMAS)
    target = np.repeat(np.arange(60) > 30, 80).astype(float)
    matrix, right = system(grid, target, 0.999, 256.0)
    exact = np.linalg.solve(matrix.toarray(), right)
    assert np.abs(solve(grid, target, 0.999, 256.0) - exact).max() < 0.02


def written_again(image: np.ndarray, target: np.ndarray, confidence: float, smoothness: float) -> tuple:
    """(solution of each pixel, steps) with dense matrices and the published numbers, step by step."""
    vertex, blur = dense_blur(image, SIGMAS)
    counts = np.bincount(vertex).astype(float)
    scale = np.ones(len(counts))
    for _ in range(10):
        scale = np.sqrt(scale * counts / (blur @ scale))
    balanced = scale[:, None] * blur * scale
    matrix = smoothness * (np.diag(balanced.sum(axis=1)) - balanced) + np.diag(confidence * counts)
    right = confidence * np.bincount(vertex, target.ravel())
    found = np.bincount(vertex, target.ravel()) / counts
    residual = right - matrix @ found
    weighted = residual / np.maximum(np.diag(matrix), 1e-5)
    direction, steps = weighted, 0
    while steps < 25 and np.linalg.norm(residual) >= 1e-5 * np.linalg.norm(right):
        length = (residual @ weighted) / (direction @ matrix @ direction)
        found = found + length * direction
        smaller = residual - length * (matrix @ direction)
        reweighted = smaller / np.maximum(np.diag(matrix), 1e-5)
        direction = reweighted + (smaller @ reweighted) / (residual @ weighted) * direction
        residual, weighted, steps = smaller, reweighted, steps + 1
    return found[vertex], steps


@pytest.mark.parametrize(
    ("confidence", "smoothness", "steps"),
    [(0.999, 256.0, 25), (0.999, 16.0, 16), (1e-6, 1e-5, 16)],
    ids=["all steps", "until the residual is small", "a diagonal below its floor"],
)
def test_the_published_solver_step_by_step(confidence: float, smoothness: float, steps: int) -> None:
    image = photo(60, 80)
    target = (np.random.default_rng(1).random((60, 80)) > 0.4).astype(float)
    expected, made = written_again(image, target, confidence, smoothness)
    assert made == steps
    found = refine(image, target, sigmas=SIGMAS, smoothness=smoothness, confidence=confidence)
    np.testing.assert_allclose(found.ravel(), expected, rtol=0, atol=1e-9)


def test_without_smoothness_each_vertex_keeps_its_mean() -> None:
    image = photo(20, 30)
    grid = build_grid(image, *SIGMAS)
    target = np.random.default_rng(0).random((20, 30))
    found = refine(image, target, sigmas=SIGMAS, smoothness=0.0, confidence=0.5)
    means = np.array([target.ravel()[grid.vertex == k].mean() for k in range(len(grid.counts))])
    np.testing.assert_allclose(found.ravel(), means[grid.vertex], atol=1e-6)


def test_a_constant_target_stays() -> None:
    found = refine(photo(40, 50), np.full((40, 50), 0.7), sigmas=SIGMAS, smoothness=256.0, confidence=0.999)
    np.testing.assert_allclose(found, 0.7, atol=1e-6)


def test_borders_move_to_those_of_colours() -> None:
    """The target is off by 5 pixels; the photo shows where the object ends."""
    truth = np.zeros((96, 128), bool)
    truth[29:70, 37:91] = True
    image = np.where(truth[:, :, None], np.uint8([200, 60, 40]), np.uint8([40, 90, 160]))
    coarse = np.roll(truth, (5, -5), axis=(0, 1))
    found = refine(image, coarse.astype(float), sigmas=SIGMAS, smoothness=256.0, confidence=0.999) > 0.5
    assert (coarse != truth).mean() > 0.05
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_smallest_photos(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 255, np.uint8)
    found = refine(image, np.ones(size), sigmas=SIGMAS, smoothness=256.0, confidence=0.999)
    np.testing.assert_allclose(found, 1.0, atol=1e-6)
