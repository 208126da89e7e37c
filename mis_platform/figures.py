"""Pictures: what the merge trees look like, what the model answers to clicks, and the curves of the paper's Figure 6.

Every function returns a matplotlib `Figure` that belongs to nobody else: no pyplot, no global state, no display.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mis_platform.simulation.clicks import Click
from mis_platform.simulation.tree import MergeTree

DPI = 150
PANEL = 3.2  # inches, longer side of one photo
NARROWEST = 1.7  # inches of a panel, so that its title does not meet the next one's
COLUMNS = 3
LEGEND_ENTRY, LEGEND_LINE = 1.35, 0.22  # inches that an entry of a legend takes, across and down
POSITIVE, NEGATIVE, MASK, TRUTH = "#00a651", "#e3242b", "#ffd400", "white"
# Okabe and Ito's colours, which survive colour blindness; markers and dashes survive black-and-white print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "black")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")  # as many as no other cycle divides
MANY = 4  # curves, from which on the legend stands beside them
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


# -- merge trees -----------------------------------------------------------------------------------------------------


def regions_at(tree: MergeTree, count: int) -> np.ndarray:
    """The patches when `count` regions are left: int32 [grid_height, grid_width], labels 0 to count-1.

    That is the state of the bottom-up merging (Algorithm 1) before its last count-1 merges. Raises ValueError unless
    1 <= count <= number of patches.
    """
    leaves = tree.grid[0] * tree.grid[1]
    if not 1 <= count <= leaves:
        raise ValueError(f"a tree over {leaves} patches has 1 to {leaves} regions, not {count}")
    label = np.full(2 * leaves - 1, -1, np.int32)
    used = 0
    for merge in range(leaves - count - 1, -1, -1):  # the newest merge first: parents hand their label down
        node = leaves + merge
        if label[node] < 0:
            label[node] = used
            used += 1
        label[tree.children[merge]] = label[node]
    alone = label[:leaves] < 0
    label[:leaves][alone] = np.arange(used, used + alone.sum(), dtype=np.int32)
    return label[:leaves].reshape(tree.grid)


def merge_levels(image: np.ndarray, tree: MergeTree, levels: Sequence[int] = (2, 4, 8, 16, 32)) -> Figure:
    """The photo, then its regions at each level of the tree, filled with their mean colours and outlined.

    image: uint8 [H, W, 3]; levels: numbers of regions; those above the number of patches are left out.
    """
    levels = [level for level in levels if level <= tree.grid[0] * tree.grid[1]]
    figure, axes = _panels(1 + len(levels), image.shape[0], image.shape[1])
    axes[0].imshow(image)
    axes[0].set_title("photo")
    for panel, level in zip(axes[1:], levels):
        grid = regions_at(tree, level)
        labels = labels_at(tree, level, *image.shape[:2])
        panel.imshow(_fill_with_mean(image, labels))
        _outline_regions(panel, grid, image.shape[0], image.shape[1])
        panel.set_title(f"{level} regions")
    return figure


def labels_at(tree: MergeTree, level: int, height: int, width: int) -> np.ndarray:
    """int32 [height, width] in pixels: which of the `level` regions each pixel belongs to."""
    return cv2.resize(regions_at(tree, level), (width, height), interpolation=cv2.INTER_NEAREST)


def paint(masks: np.ndarray) -> np.ndarray:
    """Masks bool [K, H, W] as one map int32 [H, W] of their numbers, small ones over large ones, -1 where none is."""
    labels = np.full(masks.shape[1:], -1, np.int32)
    for number in np.argsort(-masks.sum(axis=(1, 2)), kind="stable"):
        labels[masks[number]] = number
    return labels


DIMMED = 0.35  # brightness of what no proposal covers


def proposal_panels(image: np.ndarray, panels: Mapping[str, np.ndarray]) -> Figure:
    """The photo, then for each title its regions in their mean colours and outlined; dimmed where there is none.

    image: uint8 [H, W, 3]; panels: title -> int32 [H, W], the number of the region or -1.
    """
    figure, axes = _panels(1 + len(panels), *image.shape[:2])
    axes[0].imshow(image)
    axes[0].set_title("photo")
    for panel, (title, labels) in zip(axes[1:], panels.items()):
        filled = _fill_with_mean(image, labels + 1)
        filled[labels < 0] = (DIMMED * image[labels < 0]).astype(np.uint8)
        panel.imshow(filled)
        _outline_regions(panel, labels, *image.shape[:2])
        panel.set_title(title)
    return figure


def _fill_with_mean(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: every region in the mean colour of its pixels."""
    flat = labels.ravel()
    counts = np.maximum(np.bincount(flat), 1)
    means = [np.bincount(flat, weights=image[..., channel].ravel()) / counts for channel in range(3)]
    return np.stack(means, axis=1).round().astype(np.uint8)[labels]


def _outline_regions(panel: Axes, grid: np.ndarray, height: int, width: int) -> None:
    """Lines along the patch borders between different labels, in pixels of the image."""
    rows, cols = grid.shape
    y = np.arange(rows + 1) * height / rows - 0.5
    x = np.arange(cols + 1) * width / cols - 0.5
    xs: list[float] = []
    ys: list[float] = []
    for col, start, end in _runs((grid[:, 1:] != grid[:, :-1]).T):
        xs += [x[col + 1], x[col + 1], math.nan]
        ys += [y[start], y[end], math.nan]
    for row, start, end in _runs(grid[1:] != grid[:-1]):
        xs += [x[start], x[end], math.nan]
        ys += [y[row + 1], y[row + 1], math.nan]
    for colour, line_width in (("0.1", 2.2), ("white", 1.0)):  # a dark rim, so that it is seen on any ground
        panel.plot(xs, ys, color=colour, linewidth=line_width, solid_capstyle="projecting", snap=False)


def _runs(edges: np.ndarray) -> list[tuple[int, int, int]]:
    """(line, start, end) of every unbroken run of True along the lines of a bool [lines, length]."""
    change = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    lines, starts = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]  # as many in each line, in the same order
    return list(zip(lines.tolist(), starts.tolist(), ends.tolist()))


# -- clicks ----------------------------------------------------------------------------------------------------------


def clicks_and_masks(
    image: np.ndarray,
    target: np.ndarray,
    clicks: Sequence[Click],
    masks: Sequence[np.ndarray],
    ious: Sequence[float],
    shown: Sequence[int] = (1, 3, 5, 10, 20),
) -> Figure:
    """The object, then the model's answer after some of the clicks (the paper's Figures 5 and 7).

    image: uint8 [H, W, 3]; target: int8 [H, W] in {1, 0, -1 ignored}; masks[k]: bool [H, W] and ious[k] after click
    k+1; shown: numbers of clicks, and the last click is always shown. Raises ValueError if the lengths differ.
    """
    if not len(clicks) == len(masks) == len(ious) >= 1:
        raise ValueError(f"{len(clicks)} clicks, {len(masks)} masks, {len(ious)} IoUs; each click needs one of both")
    counts = sorted({count for count in shown if count < len(clicks)} | {len(clicks)})
    legend = _click_legend()
    figure, axes = _panels(1 + len(counts), image.shape[0], image.shape[1], legend=len(legend))
    axes[0].imshow(_highlight(image, target == 1))
    _outline(axes[0], target == 1, TRUTH, "-")
    axes[0].set_title("object")
    for panel, count in zip(axes[1:], counts):
        panel.imshow(_highlight(image, masks[count - 1]))
        _outline(panel, target == 1, TRUTH, (0, (2, 1.5)))
        _outline(panel, masks[count - 1], MASK, "-")
        _dots(panel, clicks[:count])
        panel.set_title(f"{count} click{'s' if count > 1 else ''}, IoU {ious[count - 1]:.3f}")
    look: dict[str, Any] = {"facecolor": "0.2", "edgecolor": "none", "labelcolor": "white", "fontsize": 8}
    ncols = _legend_columns(figure.get_figwidth(), len(legend))
    figure.legend(handles=legend, loc="lower center", ncols=ncols, **look)
    return figure


def _highlight(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photo, darkened and grey outside the mask."""
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return np.where(mask[..., None], image, (0.45 * grey).astype(np.uint8))


def _outline(panel: Axes, mask: np.ndarray, colour: str, dashes: object) -> None:
    if mask.any():  # the frame of zeros closes outlines at the border
        height, width = mask.shape
        panel.contour(
            np.arange(-1, width + 1),
            np.arange(-1, height + 1),
            np.pad(mask, 1).astype(np.float32),
            levels=[0.5],
            colors=[colour],
            linewidths=1.2,
            linestyles=[dashes],
        )


def _dots(panel: Axes, clicks: Sequence[Click]) -> None:
    for positive, colour, marker in ((True, POSITIVE, "o"), (False, NEGATIVE, "X")):
        chosen = [click for click in clicks if click.positive == positive]
        x, y = [click.x for click in chosen], [click.y for click in chosen]
        panel.plot(x, y, marker, color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.9)


def _click_legend() -> list[Line2D]:
    dot: dict[str, Any] = {"linestyle": "none", "markersize": 6, "markeredgecolor": "white"}
    return [
        Line2D([], [], color=POSITIVE, marker="o", label="positive click", **dot),
        Line2D([], [], color=NEGATIVE, marker="X", label="negative click", **dot),
        Line2D([], [], color=MASK, label="the model's mask"),
        Line2D([], [], color=TRUTH, linestyle=(0, (2, 1.5)), label="the object"),
    ]


# -- curves ----------------------------------------------------------------------------------------------------------


def iou_curve(curves: Mapping[str, Sequence[float] | np.ndarray], thresholds: Sequence[float] = (0.85, 0.90)) -> Figure:
    """Mean IoU over the number of clicks, one line a label (the paper's Figure 6).

    curves: label -> mean IoU in [0, 1] after click 1, 2, ...; thresholds: dotted lines. The label of the vertical axis
    says where it starts if that is not 0.
    """
    is_beside = len(curves) > MANY
    figure = Figure(figsize=(6 + 1.8 * is_beside, 4.2), layout="constrained", dpi=DPI)
    panel = figure.add_subplot()
    for (label, values), colour, marker, dash in zip(curves.items(), cycle(COLOURS), cycle(MARKERS), cycle(DASHES)):
        clicks = np.arange(1, len(values) + 1)
        panel.plot(clicks, values, color=colour, marker=marker, linestyle=dash, markersize=4.5, label=label)
    for threshold in thresholds:
        panel.axhline(threshold, color="0.45", linestyle=":", linewidth=1)
        panel.annotate(
            f"{threshold:.0%}", (1, threshold), (3, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left", va="center", fontsize=8, color="0.35", annotation_clip=False,
        )  # fmt: skip
    lowest = min((float(np.nanmin(values)) for values in curves.values()), default=0.0)
    start = max(0.0, math.floor(lowest * 10 - 0.5) / 10)
    panel.set_ylim(start, 1.0)
    longest = max(map(len, curves.values()), default=1)
    panel.set_xticks(range(1, longest + 1) if longest <= 10 else [1, *range(5, longest + 1, 5)])
    panel.set_xlabel("number of clicks")
    panel.set_ylabel("mean IoU" + (f" (axis starts at {start:.1f})" if start > 0 else ""))
    panel.grid(alpha=0.25)
    if is_beside:
        figure.legend(loc="outside right upper", frameon=False)
    else:
        panel.legend(loc="best")
    return figure


def noc_bars(
    names: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    paper: Sequence[float],
) -> Figure:
    """Clicks that each row of a table needs for 90 % IoU, with intervals, and the paper's numbers as hollow diamonds.

    names: one a row, from the top down; values: our means, in clicks; lows, highs: their intervals; paper: its numbers.
    NaN where there is none. Marks, not colours, tell ours from the paper's. Raises ValueError if the lengths differ.
    """
    if len({len(each) for each in (names, values, lows, highs, paper)}) != 1:
        raise ValueError("names, values, lows, highs and paper need one entry for each row")
    ours, low, high, theirs = (np.asarray(each, float) for each in (values, lows, highs, paper))
    figure = Figure(figsize=(6.4, 1.2 + 0.34 * len(names)), layout="constrained", dpi=DPI)
    panel = figure.add_subplot()
    rows = np.arange(len(names))
    here, known = np.isfinite(ours), np.isfinite(theirs)
    panel.barh(rows[here], ours[here], 0.6, color="0.88", edgecolor="black", linewidth=0.8, hatch="///", label="ours")
    reach = np.clip(np.nan_to_num(np.stack([ours - low, high - ours])), 0, None)[:, here]
    panel.errorbar(
        ours[here], rows[here], xerr=reach, fmt="none", ecolor="black", elinewidth=1.6, capsize=4,
        label="95 % over objects",
    )  # fmt: skip
    panel.plot(
        theirs[known], rows[known], linestyle="none", marker="D", markersize=7, markerfacecolor="white",
        markeredgecolor="black", markeredgewidth=1.4, label="paper" if known.any() else None, zorder=4,
    )  # fmt: skip
    panel.set_yticks(rows, names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_xlim(left=0)
    panel.set_xlabel("NoC@90, clicks (fewer is better)")
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def loss_curve(history: Iterable[tuple[int, Mapping[str, float]]]) -> Figure:
    """Everything a training logged over its steps, one panel a quantity: each value, and their running mean.

    history: (step, name -> value). Raises ValueError when nothing was logged.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, values in history:
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    if not curves:
        raise ValueError("the training has logged nothing yet")
    columns = len(curves) if len(curves) <= 3 else math.ceil(len(curves) / 2)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained", dpi=DPI)
    for number, (name, points) in enumerate(curves.items(), 1):
        panel = figure.add_subplot(rows, columns, number)
        steps, values = np.array(points, float).T
        panel.plot(steps, values, color=COLOURS[0], alpha=0.35, linewidth=0.8)
        panel.plot(steps, _running_mean(values), color=COLOURS[0], linewidth=1.6)
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.grid(alpha=0.25)
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve, shorter at its ends."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


# -- shared ----------------------------------------------------------------------------------------------------------


def _legend_columns(width: float, entries: int) -> int:
    """How many entries of a legend fit beside each other on a figure of `width` inches."""
    return max(1, min(entries, int(width / LEGEND_ENTRY)))


def _panels(count: int, height: int, width: int, legend: int = 0) -> tuple[Figure, list[Axes]]:
    """A grid of `count` panels for photos of height x width pixels, and room for a legend of so many entries below."""
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    scale = PANEL / max(height, width)
    across = columns * (max(width * scale, NARROWEST) + 0.1)
    below = LEGEND_LINE * math.ceil(legend / _legend_columns(across, legend)) + 0.1 if legend else 0.0  # inches
    size = (across, rows * (height * scale + 0.35) + below)
    figure = Figure(figsize=size, dpi=DPI)
    axes = []
    for number in range(count):
        panel = figure.add_subplot(rows, columns, number + 1)
        panel.set_axis_off()
        panel.set_anchor("N")
        axes.append(panel)
        panel.title.set_fontsize(10)
    bottom = below / size[1]
    figure.subplots_adjust(0.01, bottom + 0.01, 0.99, 1 - 0.3 / size[1], wspace=0.03, hspace=0.35 / (height * scale))
    return figure, axes
