"""Number of clicks (NoC) and what else is read from a table of clicks.

Everything is derived from the clicks, so another IoU target never needs the model again. A session that stopped early
leaves its later clicks unknown (NaN); whatever would need them is NaN or None too, never guessed.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

TARGETS = (0.80, 0.85, 0.90, 0.95)
_DRAWN_AT_ONCE = 2_000_000  # counts of the bootstrap held in memory


def clicks_to_reach(ious: np.ndarray, target: float) -> np.ndarray:
    """Clicks each object needs before its IoU first reaches `target`: float64 [objects], in clicks.

    ious: float32 [objects, max_clicks], column k after click k+1, NaN for clicks not made. An object that never gets
    there counts as max_clicks, as in the published tables; one that stopped before it could is NaN. The comparison is
    in float32, as the published scores were made: in float64 an IoU of exactly 0.9 can miss the target 0.9.
    """
    reached = ious.astype(np.float32) >= np.float32(target)
    needed = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, float(ious.shape[1]))
    needed[~reached.any(axis=1) & np.isnan(ious).any(axis=1)] = np.nan
    return needed


def bootstrap_interval(values: np.ndarray, rng: np.random.Generator, *, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over objects; NaN if a value is.

    values: [objects], e.g. clicks, or differences of two models on the same objects, which makes it the paired
    bootstrap. Objects are the unit, as in the mean itself; where many objects share a photo the interval is a little
    too narrow. Drawing n objects with replacement is drawing how often each value occurs, so with clicks, of which
    there are few different ones, a resample costs the same whatever n is.
    """
    if np.isnan(values).any():
        return np.nan, np.nan
    different, counts = np.unique(values, return_counts=True)
    size = max(1, _DRAWN_AT_ONCE // len(different))
    means = [
        rng.multinomial(len(values), counts / len(values), size=min(size, resamples - start)) @ different / len(values)
        for start in range(0, resamples, size)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def keep_last(ious: np.ndarray) -> np.ndarray:
    """IoU tables [objects, max_clicks] without NaN: a session that stopped keeps its last IoU, as if content."""
    last = np.isfinite(ious).sum(axis=1) - 1
    return np.where(np.isnan(ious), ious[np.arange(len(ious)), last][:, None], ious)


class TargetSummary(NamedTuple):
    """How one IoU target was met. All but `target` are NaN if sessions stopped before it could be known."""

    target: float  # IoU
    noc: float  # clicks, mean over objects
    low: float  # 95 % bootstrap interval of noc
    high: float
    at_limit: float  # objects whose NoC equals the limit: the ">=20@" column of the published tables
    failures: float  # objects that never reached the target


@dataclass(frozen=True)
class Summary:
    """One data set's scores."""

    dataset: str
    objects: int
    clicks: int  # made over all objects
    max_clicks: int
    targets: tuple[TargetSummary, ...]
    mean_iou: tuple[float, ...] | None  # after click 1, 2, ...; None unless every object got max_clicks clicks
    unchanged: int  # objects stuck at one IoU below 1 through all max_clicks: a model that does not react
    seconds: float  # wall time of all clicks

    @property
    def seconds_per_click(self) -> float:
        """Mean over all clicks of all objects."""
        return self.seconds / self.clicks

    def at(self, target: float) -> TargetSummary:
        """The scores at one IoU target; all NaN if it was not asked for."""
        return next((each for each in self.targets if np.isclose(each.target, target)), _unknown(target))


def iou_table(table: Any, max_clicks: int) -> np.ndarray:
    """IoU by object and click: float32 [objects, max_clicks], NaN for clicks not made; objects in order of their names.

    table: columns `image_id`, `object_id`, `click`, `iou` by name (a pyarrow Table or a dict of arrays), rows in any
    order. Raises ValueError unless every object has the clicks 1, 2, ..., n <= max_clicks, once each.
    """
    objects = _object_numbers(table)
    click = np.asarray(table["click"]).astype(np.int64)
    if click.size and (click.min() < 1 or click.max() > max_clicks):
        raise ValueError(f"clicks are numbered 1 to {max_clicks}, found {click.min()} to {click.max()}")
    ious = np.full((objects.max(initial=-1) + 1, max_clicks), np.nan, np.float32)
    made = np.zeros(ious.shape, np.int64)
    np.add.at(made, (objects, click - 1), 1)
    ious[objects, click - 1] = np.asarray(table["iou"], np.float32)
    faulty = np.any((made > 1) | (np.diff(made, axis=1, prepend=1) > 0), axis=1)
    if faulty.any():
        row = int(np.flatnonzero(faulty[objects])[0])
        name = f"{np.asarray(table['image_id'])[row]}, object {np.asarray(table['object_id'])[row]}"
        raise ValueError(f"photo {name}: every click from 1 to the last must be there exactly once")
    return ious


def summarize(table: Any, *, max_clicks: int = 20, targets: Sequence[float] = TARGETS) -> Summary:
    """The scores of one data set.

    table: the columns of `iou_table`, `dataset` and `ms`; rows in any order. The bootstrap is seeded. Raises ValueError
    for an empty table, one with several data sets, or one with missing or repeated clicks.
    """
    datasets = sorted(set(np.asarray(table["dataset"]).tolist()))
    if len(datasets) != 1:
        raise ValueError(f"a summary is of one data set; this table has {datasets or 'no clicks'}")
    ious = iou_table(table, max_clicks)
    complete = not np.isnan(ious).any()
    rng = np.random.default_rng(0)
    return Summary(
        dataset=datasets[0],
        objects=len(ious),
        clicks=int(np.isfinite(ious).sum()),
        max_clicks=max_clicks,
        targets=tuple(_at_target(ious, target, rng) for target in targets),
        mean_iou=tuple(ious.mean(axis=0, dtype=np.float64).tolist()) if complete else None,
        unchanged=int(((ious == ious[:, :1]).all(axis=1) & (ious[:, 0] < 1)).sum()) if max_clicks > 1 else 0,
        seconds=float(np.asarray(table["ms"]).sum(dtype=np.float64)) / 1000,
    )


def text_table(summaries: Sequence[tuple[str, Summary]]) -> str:
    """The table RITM and SimpleClick print, one line per (pipeline name, summary); "-" where a score is unknown.

    NoC@95% is added if any summary knows it. As in the published tables ">=20" includes success at the last click.
    """
    nocs = [0.80, 0.85, 0.90]
    if any(np.isfinite(summary.at(0.95).noc) for _, summary in summaries):
        nocs.append(0.95)
    limits = sorted({summary.max_clicks for _, summary in summaries})
    limit = ">=" + "/".join(map(str, limits))
    header = ["Pipeline", "Dataset", *(f"NoC@{target:.0%}" for target in nocs)]
    header += [f"{limit}@85%", f"{limit}@90%", "SPC,s", "Time"]
    cells = [header, *(_cells(name, summary, nocs) for name, summary in summaries)]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    lines = ["|" + "|".join(cell.center(width) for cell, width in zip(row, widths)) + "|" for row in cells]
    rule = "-" * len(lines[0])
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def _object_numbers(table: Any) -> np.ndarray:
    """int64 [rows]: which object each row belongs to, numbered in the order of (image_id, object_id)."""
    _, images = np.unique(np.asarray(table["image_id"]).astype(str), return_inverse=True)
    names, objects = np.unique(np.asarray(table["object_id"]).astype(str), return_inverse=True)
    return np.unique(images * len(names) + objects, return_inverse=True)[1]


def _at_target(ious: np.ndarray, target: float, rng: np.random.Generator) -> TargetSummary:
    needed = clicks_to_reach(ious, target)
    if np.isnan(needed).any():
        return _unknown(target)
    low, high = bootstrap_interval(needed, rng)
    at_limit = (needed == ious.shape[1]).sum()
    failures = (~(ious >= np.float32(target)).any(axis=1)).sum()
    return TargetSummary(target, float(needed.mean()), low, high, float(at_limit), float(failures))


def _unknown(target: float) -> TargetSummary:
    return TargetSummary(target, np.nan, np.nan, np.nan, np.nan, np.nan)


def _cells(name: str, summary: Summary, nocs: Sequence[float]) -> list[str]:
    scores = [summary.at(target).noc for target in nocs]
    counts = [summary.at(target).at_limit for target in (0.85, 0.90)]
    return [
        name,
        summary.dataset,
        *("-" if np.isnan(score) else f"{score:.2f}" for score in scores),
        *("-" if np.isnan(count) else f"{count:.0f}" for count in counts),
        f"{summary.seconds_per_click:.3f}",
        str(datetime.timedelta(seconds=int(summary.seconds))),
    ]
