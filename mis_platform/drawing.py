"""The figures of an experiment, from finished artifacts: each file name with its matplotlib figure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mis_platform import figures, jobs, pipeline
from mis_platform.comparison import Comparison, Outcome
from mis_platform.config import Resources, Run
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.proposals import ProposalReader
from mis_platform.data.trees import TreeReader
from mis_platform.evaluation.noc import keep_last
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
    drawn = {}
    for benchmark in benchmarks:
        replay = jobs.replay_of(model, benchmark, run)
        for rank, figure in enumerate(jobs.draw_objects(benchmark, replay, clicks[benchmark.name], count)):
            drawn[f"{benchmark.name}-object-{rank}.png"] = figure
    return drawn


def proposals(benchmark: Dataset, runs: Mapping[str, Run], resources: Resources, root: Storage) -> dict[str, Any]:
    """A few images with what each source proposes, side by side (Figure 5). runs: by the name of their row.

    Merge trees are drawn at several granularities, other sources with all their masks.
    """
    readers = {name: _proposal_reader(benchmark, run, resources, root) for name, run in runs.items()}
    known = [image_id for image_id in benchmark.image_ids if all(image_id in each for each in readers.values())]
    return {
        f"{benchmark.name}-{number}.png": figures.proposal_panels(
            benchmark.read_image(image_id),
            {title: labels for name, each in readers.items() for title, labels in _panels(name, each, image_id)},
        )
        for number, image_id in enumerate(known[:IMAGES])
    }


def _proposal_reader(
    benchmark: Dataset, run: Run, resources: Resources, root: Storage
) -> TreeReader | ProposalReader:  # fmt: skip
    ((name, stage),) = pipeline.target_inputs(benchmark, run, resources).items()
    return (TreeReader if name == "trees" else ProposalReader)(stage.directory(root))


def _panels(name: str, reader: TreeReader | ProposalReader, image_id: str) -> Iterator[tuple[str, np.ndarray]]:
    """(title, int32 [H, W]: number of the region, -1 where there is none)."""
    if isinstance(reader, ProposalReader):
        masks = reader.masks(image_id)
        yield f"{name} ({len(masks)})", figures.paint(masks)
        return
    tree, (height, width) = reader.tree(image_id), reader.image_size(image_id)
    for level in REGIONS:
        if level <= tree.num_leaves:
            yield f"{name}, {level} regions", figures.labels_at(tree, level, height, width)
