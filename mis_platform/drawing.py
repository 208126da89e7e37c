"""The figures of an experiment, from finished artifacts: each file name with its matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mis_platform import figures, jobs, pipeline
from mis_platform.comparison import Comparison, Outcome
from mis_platform.config import Resources, Run
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.images import read_image
from mis_platform.data.trees import TreeReader
from mis_platform.evaluation.noc import keep_last
from mis_platform.evaluation.predictor import Predictor
from mis_platform.storage import Storage

OBJECTS = 6  # drawn in a sheet of clicks and masks, from the easiest to the hardest
IMAGES = 6  # drawn in a sheet of proposals
REGIONS = (2, 4, 8, 16, 32)  # granularities of a sheet of proposals


def bars(comparison: Comparison) -> dict[str, Any]:
    """NoC of every row with its interval, beside the paper's, one figure a data set."""
    drawn = {}
    for dataset in dict.fromkeys(cell.dataset for cell in comparison.cells if cell.metric == "noc90"):
        cells = [cell for cell in comparison.cells if (cell.dataset, cell.metric) == (dataset, "noc90")]
        known = [cell for cell in cells if cell.mean is not None]
        if known:
            drawn[f"{dataset}-noc90.png"] = figures.noc_bars(
                [cell.row for cell in known],
                [_number(cell.mean) for cell in known],
                [_number(cell.low) for cell in known],
                [_number(cell.high) for cell in known],
                [_number(cell.paper) for cell in known],
            )
    return drawn


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def curves(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean IoU over clicks of every row (Figure 6), one figure a data set; seeds are averaged."""
    by_dataset: dict[str, dict[str, list[np.ndarray]]] = {}
    for outcome in outcomes:
        for dataset, ious in outcome.ious.items():
            by_dataset.setdefault(dataset, {}).setdefault(outcome.row.name, []).append(
                keep_last(ious).mean(axis=0, dtype=np.float64)
            )
    return {
        f"{dataset}-iou.png": figures.iou_curve({name: np.mean(each, axis=0) for name, each in rows.items()})
        for dataset, rows in by_dataset.items()
    }


def objects(
    benchmarks: Sequence[Dataset], model: Storage, clicks: Mapping[str, Storage], run: Run, count: int = OBJECTS
) -> dict[str, Any]:
    """Clicks and masks of some objects of each benchmark, from the easiest to the hardest (Figure 7)."""
    if model.local is None:
        return {}
    drawn = {}
    for benchmark in benchmarks:
        size = pipeline.zoom_size_of(benchmark, run)
        predictor = Predictor.from_pretrained(model.local, zoom_size=size, config=run.eval)
        for rank, figure in enumerate(jobs.draw_objects(benchmark, predictor, clicks[benchmark.name], count)):
            drawn[f"{benchmark.name}-object-{rank}.png"] = figure
    return drawn


def proposals(benchmark: Dataset, run: Run, resources: Resources, root: Storage, row: str) -> dict[str, Any]:
    """Merge trees of a few images at several granularities (Figure 5)."""
    reader = TreeReader(pipeline.trees_stage(benchmark, run, resources).directory(root))
    known = [image_id for image_id in benchmark.image_ids if image_id in reader][:IMAGES]
    return {
        f"{benchmark.name}-{_file(row)}-{number}.png": figures.merge_levels(
            read_image(benchmark.image_path(image_id)), reader.tree(image_id), REGIONS
        )
        for number, image_id in enumerate(known)
    }


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
