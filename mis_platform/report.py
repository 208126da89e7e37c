"""From tables of clicks to the numbers people compare: NoC with its uncertainty, beside the paper's.

Reads finished artifacts only; needs neither a GPU nor Ray.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mis_platform.artifacts import read_manifest, sha256
from mis_platform.config import ROBOT_SETTINGS, EvalConfig, differences, plain
from mis_platform.evaluation.click_model import ClickModel
from mis_platform.evaluation.noc import Summary, iou_table, keep_last, summarize, text_table
from mis_platform.simulation.clicks import Click
from mis_platform.storage import Storage

if TYPE_CHECKING:
    from mis_platform.evaluation.predictor import Predictor

HISTORY_FILE = "history.jsonl"  # of a checkpoint: one JSON object per logged step
MOST_CLICKS = 10_000  # on an object, that a manifest may claim


class Published(NamedTuple):
    """A row of the paper's Table 1: MIS with ViT-B, alpha 0.9, lambda 10."""

    noc85: float  # clicks
    noc90: float
    objects: int  # of the whole benchmark


PAPER = {
    "grabcut": Published(1.94, 2.32, 50),
    "berkeley": Published(3.09, 4.58, 100),
    "sbd": Published(6.91, 9.51, 6671),
    "davis": Published(6.33, 8.44, 345),
}


class Score(NamedTuple):
    """One model on one benchmark."""

    model: str  # what people call it
    summary: Summary
    protocol: Mapping[str, Any]  # the settings it was scored under, and their `fingerprint`
    excluded: tuple[str, ...] = ()  # objects that could not be scored


# -- reading ---------------------------------------------------------------------------------------------------------


def read_table(directory: Storage) -> pa.Table:
    """All rows of a finished artifact, as its manifest lists them: clicks in the order of the data set.

    Raises ValueError when there is no manifest or a part is missing or altered.
    """
    tables = []
    for part in read_manifest(directory)["parts"]:
        try:
            content = directory.read_bytes(part["name"])
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"part {part['name']} is missing from {directory}") from None
        if sha256(content) != part["sha256"]:
            raise ValueError(f"part {part['name']} of {directory} was altered: its SHA-256 is not the manifest's")
        tables.append(pq.read_table(io.BytesIO(content)).replace_schema_metadata(None))
    if not tables:
        raise ValueError(f"{directory} has no rows")
    return pa.concat_tables(tables)


def read_score(directory: Storage, model: str) -> Score:
    """The scores of a finished `clicks` artifact; model: its name in tables. Raises ValueError if it is damaged."""
    about = read_manifest(directory).get("summary", {})
    protocol, excluded = about.get("protocol"), about.get("excluded")
    limit = protocol.get("max_clicks") if isinstance(protocol, dict) else None
    if type(limit) is not int or not 1 <= limit <= MOST_CLICKS or not isinstance(excluded, list):
        raise ValueError(f"{directory} has a damaged manifest: it says nothing sensible about its click protocol")
    return Score(model, summarize(read_table(directory), max_clicks=limit), protocol, tuple(excluded))


def read_overlaps(directory: Storage) -> np.ndarray:
    """Of a finished `overlap` artifact: float32 [objects], the best IoU any node reaches, in the order of the objects'
    names."""
    table = read_table(directory)
    keys = list(zip(table["image_id"].to_pylist(), table["object_id"].to_pylist(), strict=True))
    values = np.asarray(table["best_iou"], np.float32)
    return values[sorted(range(len(keys)), key=keys.__getitem__)]


def read_history(directory: Storage) -> list[tuple[int, dict[str, float]]]:
    """What a training logged: (step, name -> value) in the order of the steps."""
    rows = [json.loads(line) for line in directory.read_bytes(HISTORY_FILE).decode().splitlines()]
    return [(row["step"], {name: value for name, value in row.items() if name != "step"}) for row in rows]


def mean_iou(table: pa.Table, max_clicks: int = 20) -> np.ndarray:
    """Mean IoU over objects after click 1, 2, ...: float64 [max_clicks], the curve of the paper's Figure 6.

    A session that stopped at its target keeps its last IoU, as if the user had been content; with
    `eval.fixed_clicks=true` none stops and the curve is the published evaluators'.
    """
    ious = iou_table(table, max_clicks)
    return keep_last(ious).mean(axis=0, dtype=np.float64)


def clicks_on(table: pa.Table, image_id: str, object_id: str) -> tuple[list[Click], list[float]]:
    """The clicks on one object in their order, and the IoU after each. Raises ValueError if it has none."""
    rows = [row for row in table.to_pylist() if (row["image_id"], row["object_id"]) == (image_id, object_id)]
    if not rows:
        raise ValueError(f"no clicks on object {object_id!r} of photo {image_id!r}")
    rows.sort(key=lambda row: row["click"])
    return [Click(row["y"], row["x"], row["positive"]) for row in rows], [row["iou"] for row in rows]


def replay(predictor: "Predictor", image: np.ndarray, clicks: Iterable[Click]) -> list[np.ndarray]:
    """The model's masks, bool [H, W], after each of the recorded clicks. image: uint8 [H, W, 3] RGB."""
    predictor.set_image(image)
    return [predictor.click(*click).mask for click in clicks]


def replay_answers(
    model: ClickModel, threshold: float, image: np.ndarray, clicks: Sequence[Click]
) -> list[np.ndarray]:  # fmt: skip
    """As `replay`, of a ClickModel, whose mask is its answer above `threshold`."""
    model.set_image(image)
    answers = [np.zeros(image.shape[:2], np.float32)]
    for count in range(1, len(clicks) + 1):
        answers.append(model.predict(tuple(clicks[:count]), answers[-1]))
    return [answer > threshold for answer in answers[1:]]


# -- tables ----------------------------------------------------------------------------------------------------------


def summary_table(scores: Sequence[Score], markdown: bool = False, intervals: bool = True) -> str:
    """One line a model and benchmark, the paper's number under each benchmark it has one for; notes below.

    In brackets the 95 % bootstrap interval of the mean over objects; "-" is what early stopping left unknown.
    intervals: without them the table is a third narrower, 80 columns or less for short names. Raises ValueError,
    with what differs, for scores of different protocols.
    """
    check_protocols(scores)
    wide = any(score.protocol["fixed_clicks"] or score.protocol["target_iou"] >= 0.95 for score in scores)
    targets = (0.80, 0.85, 0.90, 0.95) if wide else (0.80, 0.85, 0.90)
    header = ["model", "data set", "objects", *(f"NoC@{target:.0%}"[:-1] for target in targets)]
    header += ["never@90", "s/click"]
    rows = []
    for dataset in dict.fromkeys(score.summary.dataset for score in scores):
        rows += [_cells(score, targets, intervals) for score in scores if score.summary.dataset == dataset]
        if dataset in PAPER:
            rows.append(_paper_cells(dataset, targets))
    table = markdown_table([header, *rows]) if markdown else plain_table([header, *rows])
    notes = _notes(scores)
    return "\n".join([table, *([""] if notes else []), *notes])


def published_table(scores: Sequence[Score]) -> str:
    """The same scores in the table that RITM and SimpleClick print, for comparing with their logs."""
    return text_table([(score.model, score.summary) for score in scores])


def overlap_table(overlaps: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """How well proposals could name the objects. overlaps: (source, data set, summary of its `overlap` artifact)."""
    header = ["proposals", "data set", "objects", "mean best IoU", "median", "above .5", "above .7", "above .85"]
    header += ["per photo", "median size", "left out"]
    shares = ("share_above_0.5", "share_above_0.7", "share_above_0.85")
    rows = [
        [source, dataset, str(about["objects"])]
        + [f"{about[name]:.3f}" for name in ("mean_best_overlap", "median_best_overlap")]
        + [f"{about[share]:.1%}" for share in shares]
        + [f"{about['proposals']:.1f}", f"{about['median_proposal_area']:.1%}", str(len(about["excluded"]))]
        for source, dataset, about in overlaps
    ]
    return "\n".join([plain_table([header, *rows]), *_hints(overlaps)])


# What decides how many proposals a method makes; trees always have some.
DECIDING = {
    "tokencut": "sources.tokencut.tau (0.2 suits DINO's features, 0.9 color_texture's)",
    "dsm": "sources.dsm.color_weight",
    "freemask": "sources.freemask.min_maskness",
}


def _hints(overlaps: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """A line for each source that says nothing about most photos: low numbers then are those of a setting."""
    return [
        f"{source} finds no proposal in {about['share_of_photos_without']:.0%} of the photos of {dataset}; "
        f"what decides is {DECIDING[source]}"
        for source, dataset, about in overlaps
        if source in DECIDING and about["share_of_photos_without"] > 0.5
    ]


def check_protocols(scores: Sequence[Score]) -> None:
    """Raises ValueError when two scores were made under different protocols and may not share a table.

    DAVIS alone is scored at another size of the network input than the other benchmarks.
    """
    for first, second in combinations(scores, 2):
        one, other = dict(first.protocol), dict(second.protocol)
        if (first.summary.dataset == "davis") != (second.summary.dataset == "davis"):
            for protocol in (one, other):
                protocol.pop("zoom_size", None)
                protocol.pop("fingerprint", None)
        if changed := protocol_differences(one, other):
            raise ValueError(
                f"{first.model} on {first.summary.dataset} and {second.model} on {second.summary.dataset} were scored "
                f"under different protocols and do not compare: {'; '.join(changed)}"
            )


OWN_FAMILY = "simpleclick"


def protocol_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two protocols that has to be the same; nothing for scores that may share a table.

    A family of models (the entry `family`; none is SimpleClick, as in MIS) is asked in its own way: threshold, zoom-in
    and flips are part of the model. Within a family they must agree, between two of them only the robot's rules.
    """
    younger = {name: EvalConfig.model_fields[name].default for name in EvalConfig.younger}
    first, second = younger | plain(dict(one)), younger | plain(dict(other))
    if first.pop("family", OWN_FAMILY) != second.pop("family", OWN_FAMILY):
        first, second = ({name: each.get(name) for name in ROBOT_SETTINGS} for each in (first, second))
    if first == second:
        return []
    for protocol in (first, second):
        protocol.pop("fingerprint", None)
    return list(differences(first, second)) or ["rules of another version"]


def _cells(score: Score, targets: Sequence[float], intervals: bool) -> list[str]:
    summary = score.summary
    cells = [score.model, summary.dataset, str(summary.objects)]
    for target in targets:
        at = summary.at(target)
        interval = f" [{at.low:.2f}, {at.high:.2f}]" if intervals else ""
        cells.append("-" if np.isnan(at.noc) else f"{at.noc:.2f}{interval}")
    failures = summary.at(0.90).failures
    return [*cells, "-" if np.isnan(failures) else f"{failures:.0f}", f"{summary.seconds_per_click:.3f}"]


def _paper_cells(dataset: str, targets: Sequence[float]) -> list[str]:
    paper = PAPER[dataset]
    known = {0.85: f"{paper.noc85:.2f}", 0.90: f"{paper.noc90:.2f}"}
    return ["MIS ViT-B (paper)", dataset, str(paper.objects), *(known.get(target, "") for target in targets), "", ""]


def _notes(scores: Sequence[Score]) -> list[str]:
    """What a reader has to know before comparing."""
    notes = []
    for score in scores:
        summary, where = score.summary, f"{score.model} on {score.summary.dataset}"
        paper = PAPER.get(summary.dataset)
        if paper and summary.objects + len(score.excluded) != paper.objects:
            notes.append(
                f"{where}: {summary.objects} objects, published are {paper.objects}; the paper's row is no peer."
            )
        if score.excluded:
            notes.append(f"{where}: {len(score.excluded)} objects without a pixel are not scored.")
        if summary.unchanged:
            objects = "object" if summary.unchanged == 1 else "objects"
            notes.append(f"{where}: {summary.unchanged} {objects} whose mask never changed; the model may be stuck.")
    return notes


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first row above a rule."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table of GitHub's Markdown, the first row as its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
