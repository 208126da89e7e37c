"""Figures: what is drawn, where, and with what words."""

import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.contour import ContourSet
from PIL import Image
from sklearn.cluster import ward_tree
from sklearn.feature_extraction.image import grid_to_graph

from mis_platform import figures
from mis_platform.simulation.clicks import Click
from mis_platform.simulation.tree import MergeTree


def make_tree(grid: tuple[int, int], seed: int = 0) -> MergeTree:
    """scikit-learn's tree over random features."""
    features = np.random.default_rng(seed).normal(size=(grid[0] * grid[1], 3))
    children, *_ = ward_tree(features, connectivity=grid_to_graph(*grid))
    return MergeTree(np.asarray(children, np.int32), np.zeros(len(children), np.float32), grid)


def image_of(panel: Axes) -> np.ndarray:
    (shown,) = panel.images
    return np.asarray(shown.get_array())


def titles(axes: list[Axes]) -> list[str]:
    return [panel.get_title() for panel in axes]


# -- merge trees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 19, 20])
def test_regions_are_scikit_learns_clusters(count: int) -> None:
    from sklearn.cluster._agglomerative import _hc_cut

    tree = make_tree((4, 5))
    expected = _hc_cut(count, tree.children, 20)
    labels = figures.regions_at(tree, count).ravel()
    assert set(labels) == set(range(count))
    np.testing.assert_array_equal(labels[:, None] == labels, expected[:, None] == expected)


@pytest.mark.parametrize("count", [0, 21])
def test_an_impossible_number_of_regions_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 20 regions"):
        figures.regions_at(make_tree((4, 5)), count)


def test_one_patch_is_one_region() -> None:
    tree = MergeTree(np.zeros((0, 2), np.int32), np.zeros(0, np.float32), (1, 1))
    np.testing.assert_array_equal(figures.regions_at(tree, 1), [[0]])


def test_merge_levels_shows_the_photo_and_each_level_in_mean_colours() -> None:
    tree = make_tree((4, 6))
    photo = np.random.default_rng(1).integers(0, 256, (36, 54, 3), np.uint8)
    figure = figures.merge_levels(photo, tree, levels=(2, 5, 1000))
    assert titles(figure.axes) == ["photo", "2 regions", "5 regions"]
    np.testing.assert_array_equal(image_of(figure.axes[0]), photo)
    labels = np.kron(figures.regions_at(tree, 5), np.ones((9, 9), int))  # 36x54 pixels over 4x6 patches
    drawn = image_of(figure.axes[2])
    for region in range(5):
        (colour,) = np.unique(drawn[labels == region], axis=0)
        np.testing.assert_allclose(colour, photo[labels == region].mean(axis=0), atol=0.5001)


def test_outlines_run_between_the_regions() -> None:
    children = np.array([[0, 1], [2, 3], [4, 5]], np.int32)  # 2x2 patches: upper row, lower row, both
    tree = MergeTree(children, np.zeros(3, np.float32), (2, 2))
    figure = figures.merge_levels(np.zeros((20, 40, 3), np.uint8), tree, levels=(2, 4))
    halves, quarters = figure.axes[1:]
    for line in halves.lines:
        xy = line.get_xydata()
        np.testing.assert_allclose(xy[~np.isnan(xy).any(axis=1)], [[-0.5, 9.5], [39.5, 9.5]])
    assert [to_rgb(line.get_color()) for line in halves.lines][-1] == (1.0, 1.0, 1.0)
    xy = quarters.lines[-1].get_xydata()
    np.testing.assert_allclose(xy[~np.isnan(xy).any(axis=1)], [[19.5, -0.5], [19.5, 19.5], [-0.5, 9.5], [39.5, 9.5]])


# -- clicks ----------------------------------------------------------------------------------------------------------

CLICKS = [Click(5, 6, True), Click(9, 20, False), Click(7, 8, True), Click(2, 3, False)]


def drawn_clicks() -> list[Axes]:
    photo = np.full((16, 24, 3), 200, np.uint8)
    target = np.zeros((16, 24), np.int8)
    target[2:10, 2:12] = 1
    masks = []
    for k in range(4):
        mask = np.zeros((16, 24), bool)
        mask[3 : 6 + k, 3 : 8 + k] = True
        masks.append(mask)
    return figures.clicks_and_masks(photo, target, CLICKS, masks, [0.1, 0.25, 0.5, 0.875], shown=(1, 3, 20)).axes


def test_clicks_are_dots_of_their_sign_at_their_place() -> None:
    axes = drawn_clicks()
    assert titles(axes) == ["object", "1 click, IoU 0.100", "3 clicks, IoU 0.500", "4 clicks, IoU 0.875"]
    assert not axes[0].lines
    for panel, count in zip(axes[1:], (1, 3, 4)):
        positive, negative = panel.lines
        assert to_rgb(positive.get_color()) == to_rgb(figures.POSITIVE)
        assert to_rgb(negative.get_color()) == to_rgb(figures.NEGATIVE)
        assert positive.get_marker() != negative.get_marker()
        shown = CLICKS[:count]
        for line, sign in ((positive, True), (negative, False)):
            expected = [(click.x, click.y) for click in shown if click.positive == sign]
            np.testing.assert_array_equal(np.reshape(line.get_xydata(), (-1, 2)), np.reshape(expected, (-1, 2)))


def test_masks_are_outlined_and_the_rest_is_dimmed() -> None:
    axes = drawn_clicks()
    for panel, size in ((axes[1], (3, 5)), (axes[2], (5, 7)), (axes[3], (6, 8))):
        truth, mask = [each for each in panel.collections if isinstance(each, ContourSet)]
        assert to_rgb(mask.get_edgecolor()[0]) == to_rgb(figures.MASK)
        assert to_rgb(truth.get_edgecolor()[0]) == to_rgb(figures.TRUTH)
        box = mask.get_paths()[0].get_extents()
        assert (box.height, box.width) == size  # through the middle between inner and outer pixels
        assert (box.y0, box.x0) == (2.5, 2.5)
        box = truth.get_paths()[0].get_extents()
        assert (box.y0, box.x0, box.height, box.width) == (1.5, 1.5, 8, 10)
        shown = image_of(panel)
        inside = np.zeros((16, 24), bool)
        inside[3 : 3 + size[0], 3 : 3 + size[1]] = True
        assert (shown[inside] == 200).all()
        assert (shown[~inside] < 100).all()


def test_a_mask_up_to_the_border_has_a_closed_outline() -> None:
    everything = np.ones((8, 8), bool)
    axes = figures.clicks_and_masks(
        np.zeros((8, 8, 3), np.uint8), everything.astype(np.int8), [Click(1, 1, True)], [everything], [1.0]
    ).axes
    box = axes[1].collections[1].get_paths()[0].get_extents()
    assert (box.x0, box.y0, box.x1, box.y1) == (-0.5, -0.5, 7.5, 7.5)


def test_an_empty_mask_is_drawn_too() -> None:
    empty = np.zeros((8, 8), bool)
    figure = figures.clicks_and_masks(
        np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.int8), [Click(1, 1, True)], [empty], [0.0]
    )
    assert titles(figure.axes) == ["object", "1 click, IoU 0.000"]
    assert figures.to_png(figure)


def test_the_legend_explains_dots_and_lines() -> None:
    figure = drawn_clicks()[0].figure
    assert figure is not None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "positive click",
        "negative click",
        "the model's mask",
        "the object",
    ]


def test_each_click_needs_its_mask() -> None:
    with pytest.raises(ValueError, match="4 clicks, 1 masks"):
        figures.clicks_and_masks(
            np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.int8), CLICKS, [np.ones((8, 8))], [1]
        )


# -- curves ----------------------------------------------------------------------------------------------------------


def test_iou_curves_can_be_told_apart_without_colours() -> None:
    curves = {
        "ours": np.linspace(0.7, 0.95, 20),
        "paper": np.linspace(0.6, 0.9, 20),
        "other": np.linspace(0.5, 0.8, 20),
    }
    (panel,) = figures.iou_curve(curves).axes
    lines = [line for line in panel.lines if line.get_label() in curves]
    assert [line.get_label() for line in lines] == list(curves)
    for line in lines:
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 21))
        np.testing.assert_array_equal(line.get_ydata(), curves[str(line.get_label())])
    assert len({line.get_marker() for line in lines}) == 3
    assert len({line.get_linestyle() for line in lines}) == 3
    assert len({line.get_color() for line in lines}) == 3
    thresholds = [line for line in panel.lines if line not in lines]
    assert [line.get_ydata()[0] for line in thresholds] == [0.85, 0.90]
    assert [text.get_text() for text in panel.texts] == ["85%", "90%"]
    assert panel.get_xlabel() == "number of clicks"
    legend = panel.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(curves)


@pytest.mark.parametrize(("lowest", "start", "words"), [(0.62, 0.5, "starts at 0.5"), (0.03, 0.0, None)])
def test_a_cut_axis_says_so(lowest: float, start: float, words: str | None) -> None:
    (panel,) = figures.iou_curve({"ours": [lowest, 0.9, 0.95]}).axes
    assert panel.get_ylim() == (start, 1.0)
    assert panel.get_ylabel() == ("mean IoU" if words is None else f"mean IoU (axis {words})")
    np.testing.assert_array_equal(panel.get_xticks(), [1, 2, 3])


def test_each_logged_quantity_has_its_panel() -> None:
    history = [(step, {"loss": 10.0 / step, "iou": step / 100}) for step in range(10, 1010, 10)]
    axes = figures.loss_curve(history).axes
    assert titles(axes) == ["loss", "iou"]
    assert {panel.get_xlabel() for panel in axes} == {"step"}
    raw, smooth = axes[0].lines
    np.testing.assert_allclose(raw.get_xydata(), [(step, 10.0 / step) for step in range(10, 1010, 10)])
    values = np.asarray(raw.get_ydata())
    np.testing.assert_allclose(smooth.get_ydata()[50], values[48:53].mean())
    np.testing.assert_allclose(smooth.get_ydata()[0], values[:3].mean())
    with pytest.raises(ValueError, match="logged nothing"):
        figures.loss_curve([])


def test_a_constant_stays_constant_when_smoothed() -> None:
    raw, smooth = figures.loss_curve([(step, {"loss": 3.0}) for step in range(200)]).axes[0].lines
    np.testing.assert_allclose(smooth.get_ydata(), raw.get_ydata())


def test_figures_become_png_files() -> None:
    figure = figures.iou_curve({"ours": [0.5, 0.6]})
    picture = Image.open(io.BytesIO(figures.to_png(figure)))
    assert picture.format == "PNG"
    assert picture.size == (900, 630)


def test_no_global_state_is_touched() -> None:
    import sys

    figures.to_png(figures.iou_curve({"ours": [0.5, 0.6]}))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


# -- bars ------------------------------------------------------------------------------------------------------------


def test_noc_bars_tell_ours_from_the_papers_without_colour() -> None:
    nan = float("nan")
    figure = figures.noc_bars(["quoted", "ours"], [nan, 2.4], [nan, 2.0], [nan, 3.0], [5.0, 2.32])
    (panel,) = figure.axes
    (bar,) = panel.patches
    assert (bar.get_width(), bar.get_hatch()) == (2.4, "///")
    assert [text.get_text() for text in panel.get_yticklabels()] == ["quoted", "ours"]
    (paper,) = [line for line in panel.lines if line.get_marker() == "D"]
    assert paper.get_markerfacecolor() == "white"
    np.testing.assert_array_equal(paper.get_xdata(), [5.0, 2.32])
    (interval,) = panel.collections[0].get_segments()
    np.testing.assert_allclose(interval[:, 0], [2.0, 3.0])
    assert panel.get_xlabel() == "NoC@90, clicks (fewer is better)"
    assert panel.yaxis_inverted()
    assert figures.to_png(figure).startswith(b"\x89PNG")


def test_noc_bars_without_the_papers_numbers_have_no_mark_for_them() -> None:
    nan = float("nan")
    (legend,) = figures.noc_bars(["mine"], [3.0], [nan], [nan], [nan]).legends
    assert "paper" not in [text.get_text() for text in legend.get_texts()]
    with pytest.raises(ValueError, match="one entry for each row"):
        figures.noc_bars(["mine"], [3.0], [2.0], [4.0], [])


def test_many_curves_differ_in_dash_or_marker() -> None:
    (panel,) = figures.iou_curve({f"row {number}": [0.5, 0.6] for number in range(20)}, thresholds=()).axes
    styles = {(line.get_marker(), str(line._unscaled_dash_pattern)) for line in panel.lines}  # type: ignore[attr-defined]
    assert len(styles) == 20
