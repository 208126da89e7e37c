"""The classical methods: seeds, colour models, cuts, walks and geodesics."""

import itertools
import warnings
from collections.abc import Sequence

import maxflow
import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra, maximum_flow

from mis_platform.baselines import graph_cut
from mis_platform.baselines.color_model import log_density
from mis_platform.baselines.methods import build_method
from mis_platform.baselines.seeds import BACKGROUND, FOREGROUND, seed_map
from mis_platform.config import CLASSICAL_METHODS, CLASSICAL_READS, ClassicalConfig
from mis_platform.simulation.clicks import Click


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def two_colors(height: int = 60, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """A photo with a bright blob on dark ground, both a little noisy, and the blob: bool [H, W]."""
    y, x = np.indices((height, width))
    blob = ((y - 30) / 18) ** 2 + ((x - 42) / 24) ** 2 < 1
    image = np.where(blob[..., None], (200, 120, 60), (40, 70, 110)) + noise(height, width) // 16
    return image.astype(np.uint8), blob


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def answer(name: str, image: np.ndarray, clicks: Sequence[Click], config: ClassicalConfig | None = None) -> np.ndarray:
    model = build_method(name, config or ClassicalConfig())
    model.set_image(image)
    return model.predict(clicks, np.zeros(image.shape[:2], np.float32))


def test_seeds_are_discs_and_later_clicks_win() -> None:
    clicks = [Click(10, 10, True), Click(10, 14, False)]
    seeds = seed_map(clicks, 30, 40, radius=5, frame=False)
    y, x = np.indices(seeds.shape)
    near_first, near_second = ((y - 10) ** 2 + (x - column) ** 2 <= 25 for column in (10, 14))
    expected = np.where(near_second, -1, np.where(near_first, 1, 0))
    expected[10, 10] = 1  # the clicked pixel itself stays
    np.testing.assert_array_equal(seeds, expected)


def test_the_frame_is_background_until_a_click_is_negative() -> None:
    framed = seed_map([Click(10, 10, True)], 30, 40, radius=2, frame=True)
    assert (framed[0] == -1).all()
    assert (framed[:, -1] == -1).all()
    assert (framed == -1).sum() == 2 * (30 + 40) - 4
    corner = seed_map([Click(0, 0, True)], 30, 40, radius=2, frame=True)
    assert corner[0, 0] == 1
    assert (seed_map([Click(10, 10, True), Click(20, 20, False)], 30, 40, radius=2, frame=True)[0] == 0).all()


def test_a_radius_of_zero_is_the_clicked_pixel() -> None:
    assert (seed_map([Click(3, 4, True)], 9, 9, radius=0, frame=False) != 0).sum() == 1


def test_a_density_sums_to_one_and_knows_its_colours() -> None:
    seeds = np.random.default_rng(0).normal(0.5, 0.08, (300, 3))
    axis = (np.arange(40) + 0.5) / 40
    cube = np.array(list(itertools.product(axis, axis, axis)))
    density = np.exp(log_density(cube, seeds))
    assert density.mean() == pytest.approx(1, abs=0.02)
    assert density.min() >= 0.05
    ends = log_density(np.array([[0.5, 0.5, 0.5], [0.05, 0.9, 0.1]]), seeds)
    assert ends[0] > 3
    assert ends[1] == pytest.approx(np.log(0.05), abs=1e-3)


def test_a_density_without_seeds_is_uniform_and_one_seed_is_enough() -> None:
    colors = np.random.default_rng(0).random((7, 3))
    np.testing.assert_array_equal(log_density(colors, colors[:0]), np.zeros(7))
    assert log_density(colors, colors[2:3]).argmax() == 2


@pytest.mark.parametrize("kinds", [5, 6])
def test_a_side_has_five_colours(kinds: int) -> None:
    """Five colours have a Gaussian each, as narrow as allowed; of six, two share one."""
    axis = (0.1, 0.9)
    colors = np.array(list(itertools.product(axis, axis, axis)))[:kinds]
    peaks = np.exp(log_density(colors, np.repeat(colors, 100, axis=0)))
    alone = 0.95 / kinds * (2 * np.pi * 1e-3) ** -1.5 + 0.05
    assert np.isclose(peaks, alone, rtol=1e-3).sum() == (5 if kinds == 5 else 4)
    assert np.isclose(peaks, alone, rtol=1e-3).sum() + (peaks < alone / 2).sum() == kinds


def test_neighbours_are_joined_by_contrast() -> None:
    """The graph's minimum cut is that of SciPy on the formula, pixel by pixel."""
    image = noise(6, 7).astype(np.float64) / 255
    gamma = 3.0
    height, width = image.shape[:2]
    pairs = [
        (p, q)
        for p, q in itertools.combinations(np.ndindex(height, width), 2)
        if max(abs(p[0] - q[0]), abs(p[1] - q[1])) == 1
    ]
    squared = {pair: float(((image[pair[0]] - image[pair[1]]) ** 2).sum()) for pair in pairs}
    variance = np.mean(list(squared.values()))
    capacities = np.zeros((height * width, height * width), np.int64)
    for (p, q), value in squared.items():
        weight = gamma * np.exp(-value / (2 * variance)) / np.hypot(p[0] - q[0], p[1] - q[1])
        one, other = np.ravel_multi_index(p, (height, width)), np.ravel_multi_index(q, (height, width))
        capacities[one, other] = capacities[other, one] = round(weight * 1e6)
    expected = maximum_flow(csr_array(capacities.astype(np.int32)), 8, 40).flow_value
    near, far, weights = graph_cut.neighbour_links(image, gamma)
    assert len(near) == len(pairs)
    graph = maxflow.GraphFloat()
    graph.add_nodes(height * width)
    graph.add_edges(near, far, weights, weights)
    graph.add_tedge(8, 1e6, 0)
    graph.add_tedge(40, 0, 1e6)
    assert graph.maxflow() == pytest.approx(expected / 1e6, abs=1e-4)


def test_parents_lead_along_shortest_paths() -> None:
    """Against Dijkstra on the same costs: the way up the parents is as short as any."""
    image = noise(9, 11, seed=3).astype(np.float64) / 255
    seeds = np.zeros((9, 11), bool)
    seeds[2, 3] = seeds[7, 8] = True
    costs = graph_cut._STEP_COST + graph_cut.gradient_magnitude(image)
    flat = costs.ravel()
    graph = np.zeros((99, 99))
    for one, other in itertools.product(range(99), repeat=2):
        down, right = one // 11 - other // 11, one % 11 - other % 11
        if max(abs(down), abs(right)) == 1:
            graph[one, other] = (flat[one] + flat[other]) / 2 * np.hypot(down, right)
    shortest = dijkstra(csr_array(graph), indices=np.flatnonzero(seeds), min_only=True)
    parents = graph_cut.shortest_path_parents(image, seeds).ravel()
    assert (parents[seeds.ravel()] == -1).all()
    for pixel in np.flatnonzero(~seeds):
        length, here = 0.0, pixel
        while parents[here] >= 0:
            length, here = length + graph[here, parents[here]], parents[here]
        assert length == pytest.approx(shortest[pixel], rel=1e-9)


@pytest.mark.parametrize("name", CLASSICAL_METHODS)
def test_an_easy_object_is_found(name: str) -> None:
    image, blob = two_colors()
    found = answer(name, image, [Click(30, 42, True), Click(3, 3, False), Click(30, 70, False)]) > 0.5
    assert iou(found, blob) > 0.9


@pytest.mark.parametrize("name", ["gsc", "esc"])
def test_a_star_shaped_object_is_one_piece(name: str) -> None:
    """Two blobs of one colour, one clicked: the cut takes both, a star around the click cannot jump to the other."""
    image = np.full((40, 90, 3), 40, np.uint8)
    image[10:30, 10:30] = image[10:30, 60:80] = 210
    image += noise(40, 90) // 16
    clicks = [Click(20, 20, True), Click(20, 45, False)]
    assert (answer("graphcut", image, clicks)[15:25, 65:75] == 1).all()
    one = answer(name, image, clicks)
    assert (one[15:25, 65:75] == 0).all()
    assert (one[12:28, 12:28] == 1).all()


@pytest.mark.parametrize("name", ["gsc", "esc"])
@pytest.mark.parametrize("bridge", [0, 3], ids=["apart", "joined"])
def test_no_star_and_no_seed_is_cut_however_much_it_would_save(name: str, bridge: int) -> None:
    """Two large blobs: thousands of pixels of the wrong one would gladly pay for a single edge."""
    image = np.full((120, 240, 3), (40, 40, 200), np.uint8)
    image[10:110, 10:110] = image[10:110, 130:230] = (200, 40, 40)
    image[60 : 60 + bridge, 110:130] = (200, 40, 40)
    image += noise(120, 240) // 32
    clicks = [Click(60, 60, True), Click(60, 120, False)]
    for config in (ClassicalConfig(), ClassicalConfig(seed_radius=0)):
        found = answer(name, image, clicks, config) > 0.5
        seeds = seed_map(clicks, 120, 240, config.seed_radius, config.frame)
        assert found[seeds == FOREGROUND].all()
        assert not found[seeds == BACKGROUND].any()
        flat = image / 255 if name == "gsc" else np.zeros(image.shape)
        parents = graph_cut.shortest_path_parents(flat, seeds == FOREGROUND)
        inside = parents >= 0
        assert (found.ravel()[parents[inside]] >= found[inside]).all(), "an object pixel whose path leaves the object"


def test_a_euclidean_star_is_convex_to_its_centre() -> None:
    """Every object pixel sees the click along a straight line, but for the rasterisation."""
    found = answer("esc", noise(40, 50, seed=5), [Click(20, 25, True), Click(5, 5, False), Click(35, 45, False)]) > 0
    assert 80 < found.sum() < 1900
    for y, x in np.argwhere(found):
        for share in np.linspace(0, 1, 30):
            row, column = round(20 + share * (y - 20)), round(25 + share * (x - 25))
            assert found[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].any()


def test_a_walk_is_the_exact_solution() -> None:
    """Dirichlet problem by a dense solve: every unknown pixel is the weighted mean of its neighbours."""
    image = noise(12, 14, seed=1) // 8  # harder contrasts make weights that vanish, and no solver agrees
    config = ClassicalConfig(seed_radius=1)
    clicks = [Click(4, 4, True), Click(9, 11, False)]
    chances = answer("random_walk", image, clicks, config)
    seeds = seed_map(clicks, 12, 14, 1, config.frame)
    colors = (image / 255).reshape(-1, 3)
    laplacian = np.zeros((168, 168))
    for one, other in itertools.combinations(range(168), 2):
        if abs(one // 14 - other // 14) + abs(one % 14 - other % 14) == 1:
            squared = ((colors[one] - colors[other]) ** 2).sum()
            # scikit-image's scaling: by the spread of the photo and the number of channels
            weight = np.exp(-squared * config.beta / (10 * colors.std()) / np.sqrt(3)) + 1e-10
            laplacian[one, other] = laplacian[other, one] = -weight
    laplacian -= np.diag(laplacian.sum(axis=1))
    known = seeds.ravel() != 0
    values = (seeds.ravel() == 1).astype(float)
    values[~known] = np.linalg.solve(
        laplacian[np.ix_(~known, ~known)], -laplacian[np.ix_(~known, known)] @ values[known]
    )
    np.testing.assert_allclose(chances.ravel(), values, atol=1e-6)


@pytest.mark.parametrize("name", CLASSICAL_METHODS)
def test_the_same_question_has_the_same_answer(name: str) -> None:
    image, _ = two_colors()
    clicks = [Click(30, 42, True), Click(3, 3, False)]
    first, again = answer(name, image, clicks), answer(name, image, clicks)
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32


CHECKERS = np.repeat((np.indices((64, 64)).sum(axis=0) // 8 % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
ODD = {
    "one colour": (np.full((60, 80, 3), 128, np.uint8), [Click(0, 0, True), Click(59, 79, False)]),
    "5x7": (noise(5, 7), [Click(2, 3, True)]),
    "1x1": (noise(1, 1), [Click(0, 0, True)]),
    "1x9": (noise(1, 9), [Click(0, 4, True), Click(0, 8, False)]),
    "2x2": (noise(2, 2), [Click(0, 0, True)]),
    "only negative": (noise(40, 50), [Click(4, 4, False)]),
    "hard contrasts": (CHECKERS, [Click(20, 20, True), Click(50, 50, False)]),
    "neighbouring clicks": (noise(40, 50), [Click(4, 4, True), Click(4, 5, False)]),
    "border": (noise(40, 50), [Click(0, 25, True), Click(39, 0, False)]),
}


@pytest.mark.parametrize("name", CLASSICAL_METHODS)
@pytest.mark.parametrize("case", ODD)
def test_odd_photos_and_clicks_have_an_answer(name: str, case: str) -> None:
    image, clicks = ODD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = answer(name, image, clicks)
    assert found.shape == image.shape[:2]
    assert 0 <= found.min() <= found.max() <= 1
    for click in clicks:
        assert (found[int(click.y), int(click.x)] > 0.5) is np.bool_(click.positive)


@pytest.mark.parametrize("name", CLASSICAL_METHODS)
def test_the_settings_that_a_method_reads_are_named(name: str) -> None:
    read: set[str] = set()

    class Watched(ClassicalConfig):
        def __getattribute__(self, each: str) -> object:
            if each in ClassicalConfig.model_fields:
                read.add(each)
            return super().__getattribute__(each)

    image, _ = two_colors()
    answer(name, image, [Click(30, 42, positive=True)], Watched())
    assert read == set(CLASSICAL_READS[name])


@pytest.mark.parametrize("name", CLASSICAL_METHODS)
@pytest.mark.parametrize("side", [0, 1])
def test_the_ends_of_the_settings_have_an_answer(name: str, side: int) -> None:
    ends = {"seed_radius": (0, 1000), "gamma": (0, 1e6), "beta": (1e-9, 1e6)}
    image, _ = two_colors()
    config = ClassicalConfig(**{each: values[side] for each, values in ends.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = answer(name, image, [Click(30, 42, positive=True), Click(2, 2, positive=False)], config)
    assert np.isfinite(found).all()
    assert 0 <= found.min() <= found.max() <= 1


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="unknown method 'grabcut'; there are: graphcut, random_walk"):
        build_method("grabcut", ClassicalConfig())
