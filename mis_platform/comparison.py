"""From the outcomes of an experiment's rows to its report: our numbers, the paper's, and whether they agree.

Numbers are computed once (`compare`) and written four ways (`render`). Everything comes from tables of IoUs, so a
report can be made anew without a model. Intervals are over objects: they say what another draw of photos would change.
What another training would change is the standard deviation over seeds, beside them.
"""

import dataclasses
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from typing import Any, Literal, NamedTuple

import numpy as np

from mis_platform.evaluation.noc import bootstrap_interval, clicks_to_reach, keep_last
from mis_platform.experiment import PAPER_PROFILE, Experiment, Row
from mis_platform.report import PAPER, markdown_table, plain_table, protocol_differences

State = Literal["done", "missing", "refused", "failed", "quoted"]  # refused: its data or weights are not there
Verdict = Literal["pass", "better", "fail", "not comparable", ""]  # better: fewer clicks, beyond the tolerance
Direction = Literal["agrees", "opposite", "undecided", ""]

STOPPED: tuple[State, ...] = ("failed", "refused")  # of several seeds the first of these counts

FORMATS = ("text", "markdown", "html", "json")
TARGETS = {"noc85": 0.85, "noc90": 0.90}  # IoU
AFTER = {"iou5": 5}  # clicks; tells models apart that never reach a target
TITLES = {
    "noc85": "NoC@85, clicks (fewer is better)",
    "noc90": "NoC@90, clicks (fewer is better)",
    "iou5": "IoU after 5 clicks (more is better)",
    "overlap": "mean best overlap, IoU (more is better)",
}
SLACK = 1e-9  # clicks; a difference of exactly the tolerance passes whatever its rounding


@dataclass(frozen=True)
class Outcome:
    """What became of one row with one training seed."""

    row: Row
    seed: int
    state: State
    reason: str = ""  # why it failed or was refused
    ious: Mapping[str, np.ndarray] = field(default_factory=dict)
    # data set -> float32 [objects, max_clicks], NaN for clicks not made (`evaluation.noc.iou_table`)
    overlaps: Mapping[str, np.ndarray] = field(default_factory=dict)
    # data set -> float32 [objects], best IoU that any node of the tree reaches
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # data set -> the settings it was scored under


@dataclass(frozen=True)
class Change:
    """A row against its reference row, on the same objects: row - reference, in the unit of the metric."""

    against: str
    mean: float
    low: float  # paired 95 % bootstrap interval over objects
    high: float
    paper: float | None  # the same difference in the paper
    direction: Direction  # its sign beside ours; "undecided" where our interval contains 0 or the paper has no sign


@dataclass(frozen=True)
class Cell:
    """One row on one data set by one metric. None is unknown: not run, not published, or stopped too early."""

    row: str
    dataset: str
    metric: str  # a key of TITLES
    state: State
    seeds: int  # trainings behind the mean
    objects: int
    mean: float | None  # clicks or IoU: over objects, then seeds
    std: float | None  # over seeds
    low: float | None  # 95 % bootstrap interval of the mean over objects
    high: float | None
    paper: float | None
    difference: float | None  # mean - paper
    verdict: Verdict
    change: Change | None


@dataclass(frozen=True)
class Line:
    """What became of a row, over its seeds."""

    name: str
    state: State
    reason: str  # why it failed or was refused, where it is quoted from, which seeds are missing


@dataclass(frozen=True)
class Comparison:
    """The report of an experiment, as plain data."""

    question: str
    source: str
    profile: str
    default: str
    tolerance: float  # clicks
    lines: tuple[Line, ...]
    cells: tuple[Cell, ...]  # by data set, metric, row
    notes: tuple[str, ...]
    about: Mapping[str, Any]


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(experiment: Experiment, profile: str, outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> Comparison:
    """The numbers of an experiment. outcomes: in any order, one for each row and seed; a row without one is missing.

    about: what is printed at the foot (commit, machine, duration, settings). Raises ValueError, with what differs, if
    rows were scored under different protocols; also for an outcome of no row of the experiment, two of one row and
    seed, and seeds of one row with different numbers of objects.
    """
    check_protocols(outcomes)
    runs: dict[str, list[Outcome]] = {row.name: [] for row in experiment.rows}
    for outcome in outcomes:
        name = experiment.row(outcome.row.name).name
        if outcome.seed in {each.seed for each in runs[name]}:
            raise ValueError(f"two outcomes of row {name!r} with seed {outcome.seed}")
        runs[name].append(outcome)
    lines = tuple(_line(row, runs[row.name]) for row in experiment.rows)
    states = {line.name: line.state for line in lines}
    cells: list[Cell] = []
    for dataset, metric in _columns(experiment, profile, outcomes):
        scores = {row.name: per_object(runs[row.name], dataset, metric) for row in experiment.rows}
        if metric in AFTER and not any(np.isfinite(each).any() for each in scores.values()):
            continue  # sessions end before so many clicks
        cells += [_cell(experiment, row, states, dataset, metric, profile, scores) for row in experiment.rows]
    return Comparison(
        question=experiment.question,
        source=experiment.source,
        profile=profile,
        default=experiment.default,
        tolerance=experiment.tolerance,
        lines=lines,
        cells=tuple(cells),
        notes=tuple(_notes(experiment, profile, cells)),
        about=dict(about),
    )


def check_protocols(outcomes: Iterable[Outcome]) -> None:
    """Raises ValueError when two outcomes were scored on one data set under different protocols."""
    scored = [(outcome, dataset) for outcome in outcomes for dataset in outcome.protocols]
    for (first, dataset), (second, other) in combinations(scored, 2):
        if dataset != other:
            continue
        if changed := protocol_differences(first.protocols[dataset], second.protocols[dataset]):
            raise ValueError(
                f"{first.row.name} and {second.row.name} were scored on {dataset} under different protocols and do not "
                f"compare: {'; '.join(changed)}"
            )


def per_object(outcomes: Sequence[Outcome], dataset: str, metric: str) -> np.ndarray:
    """The metric of each object in each finished run: float64 [seeds, objects]; NaN where it is unknown.

    Raises ValueError if the runs have different numbers of objects.
    """
    values = []
    for outcome in outcomes:
        tables = outcome.overlaps if metric == "overlap" else outcome.ious
        if outcome.state == "done" and dataset in tables:
            table = np.asarray(tables[dataset])
            values.append(_measured(table, metric))
    if len({len(each) for each in values}) > 1:
        counts = ", ".join(str(len(each)) for each in values)
        raise ValueError(
            f"the seeds of {outcomes[0].row.name} have different numbers of objects on {dataset}: {counts}"
        )
    return np.stack(values) if values else np.empty((0, 0))


def _measured(table: np.ndarray, metric: str) -> np.ndarray:
    """float64 [objects] of one table of IoUs or overlaps. A session that stopped at its target keeps its last IoU."""
    if metric == "overlap":
        return table.astype(np.float64)
    if metric in TARGETS:
        return clicks_to_reach(table, TARGETS[metric])
    if table.shape[1] < AFTER[metric]:
        return np.full(len(table), np.nan)
    return keep_last(table)[:, AFTER[metric] - 1].astype(np.float64)


def _bootstrapped(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of `values`, float64 [objects]; equal values have equal intervals."""
    return bootstrap_interval(values, np.random.default_rng(0))


def _line(row: Row, outcomes: Sequence[Outcome]) -> Line:
    """A row is done when one of its seeds is; the reason then tells of the others."""
    if row.quoted:
        return Line(row.name, "quoted", row.quoted)
    states = {outcome.state for outcome in outcomes}
    if "done" in states:
        rest = [each for each in outcomes if each.state != "done"]
        reasons = [f"seed {each.seed} {each.state}{f': {each.reason}' if each.reason else ''}" for each in rest]
        return Line(row.name, "done", "; ".join(reasons))
    for state in STOPPED:
        if state in states:
            reasons = [outcome.reason for outcome in outcomes if outcome.state in STOPPED and outcome.reason]
            return Line(row.name, state, "; ".join(dict.fromkeys(reasons)))
    return Line(row.name, "missing", "")


def _columns(experiment: Experiment, profile: str, outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(data set, metric) of every table: what was measured; what the paper measured too, if that is what was asked for.

    With nothing measured there is nothing to compare, and no table.
    """
    done = [outcome for outcome in outcomes if outcome.state == "done"]
    if not done:
        return []
    clicked = [dataset for outcome in done for dataset in outcome.ious]
    columns = [(dataset, metric) for dataset in dict.fromkeys(clicked) for metric in (*TARGETS, *AFTER)]
    columns += [(dataset, "overlap") for dataset in dict.fromkeys(name for each in done for name in each.overlaps)]
    if profile == PAPER_PROFILE:
        keys = (key.rpartition("/") for row in experiment.rows for key in row.paper)
        columns += [(dataset, metric) for dataset, _, metric in keys]
    order = list(dict.fromkeys(dataset for dataset, _ in columns))
    return sorted(dict.fromkeys(columns), key=lambda column: (order.index(column[0]), list(TITLES).index(column[1])))


def _cell(
    experiment: Experiment,
    row: Row,
    states: Mapping[str, State],
    dataset: str,
    metric: str,
    profile: str,
    scores: Mapping[str, np.ndarray],
) -> Cell:
    values = scores[row.name]
    runs, objects = values.shape
    known = values.size > 0 and bool(np.isfinite(values).all())
    means = values.mean(axis=1) if known else np.empty(0)
    low, high = _bootstrapped(values.mean(axis=0)) if known else (None, None)
    mean, paper = float(means.mean()) if known else None, row.paper.get(f"{dataset}/{metric}")
    difference = mean - paper if mean is not None and paper is not None else None
    return Cell(
        row=row.name,
        dataset=dataset,
        metric=metric,
        state=states[row.name],
        seeds=runs,
        objects=objects,
        mean=mean,
        std=float(means.std(ddof=1)) if len(means) > 1 else None,
        low=low,
        high=high,
        paper=paper,
        difference=difference,
        verdict=_verdict(difference, experiment.tolerance, profile == PAPER_PROFILE and _is_whole(dataset, objects)),
        change=_change(row, experiment.reference(row), f"{dataset}/{metric}", scores),
    )


def _is_whole(dataset: str, objects: int) -> bool:
    """Whether so many objects are the benchmark that the paper's numbers are of, as far as its size is known."""
    return dataset not in PAPER or PAPER[dataset].objects == objects


def _verdict(difference: float | None, tolerance: float, is_comparable: bool) -> Verdict:
    if difference is None:
        return ""
    if not is_comparable:
        return "not comparable"
    if difference < -tolerance - SLACK:
        return "better"
    return "pass" if difference <= tolerance + SLACK else "fail"


def _change(row: Row, reference: Row | None, key: str, scores: Mapping[str, np.ndarray]) -> Change | None:
    """None without a reference, or where either side is unknown, or where they do not share their objects."""
    if reference is None:
        return None
    ours, theirs = scores[row.name], scores[reference.name]
    if not len(ours) or not len(theirs) or ours.shape[1] != theirs.shape[1]:
        return None
    gains = ours.mean(axis=0) - theirs.mean(axis=0)
    if not np.isfinite(gains).all():
        return None
    low, high = _bootstrapped(gains)
    paper = row.paper[key] - reference.paper[key] if key in row.paper and key in reference.paper else None
    return Change(reference.name, float(gains.mean()), low, high, paper, _direction(low, high, paper))


def _direction(low: float, high: float, paper: float | None) -> Direction:
    if paper is None:
        return ""
    if low <= 0 <= high or abs(paper) < SLACK:
        return "undecided"
    return "agrees" if (low > 0) == (paper > 0) else "opposite"


def _notes(experiment: Experiment, profile: str, cells: Sequence[Cell]) -> list[str]:
    """What a reader has to know before comparing."""
    notes = [experiment.note] if experiment.note else []
    if profile != PAPER_PROFILE and any(cell.paper is not None for cell in cells):
        notes.append(
            f"Profile {profile} has other sizes than the paper: the paper's numbers are shown for orientation and are "
            "not comparable with ours. What may compare is the direction of a change between two rows."
        )
    trained = [cell for cell in cells if cell.metric != "overlap"]
    if any(cell.low is not None for cell in cells):
        brackets = "Brackets: 95 % bootstrap intervals over objects (differences: paired, on the same objects)."
        seeds = (
            " They leave out what another training seed would change; that is the number after the +-, given two "
            "seeds or more."
        )
        notes.append(brackets + (seeds if trained else ""))
    if any(cell.state == "done" and cell.seeds == 1 for cell in trained):
        notes.append("Where a row has one seed, a small difference may be the seed's.")
    return notes + _notes_on_objects(experiment, profile, cells)


def _notes_on_objects(experiment: Experiment, profile: str, cells: Sequence[Cell]) -> list[str]:
    notes: dict[str, None] = {}  # each once
    found = {(cell.row, cell.dataset, cell.metric): cell for cell in cells}
    for cell in cells:
        if cell.paper is not None and cell.objects and not _is_whole(cell.dataset, cell.objects):
            verdict = ": no verdict" if profile == PAPER_PROFILE else ""
            published = f"published are {PAPER[cell.dataset].objects}{verdict}"
            notes[f"{cell.row} on {cell.dataset}: {cell.objects} objects, {published}."] = None
        reference = experiment.reference(experiment.row(cell.row))
        other = found[reference.name, cell.dataset, cell.metric] if reference else cell
        if cell.objects and other.objects and cell.objects != other.objects:
            notes[
                f"{cell.row} and {other.row} on {cell.dataset}: {cell.objects} and {other.objects} objects; no pairs."
            ] = None
    return list(notes)


# -- writing ---------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of a report, in cells of text."""

    title: str
    rows: list[list[str]]  # the first is the head


def render(comparison: Comparison, format: str) -> str:
    """The report as text, markdown, html (one file without scripts) or json. Raises ValueError for another format."""
    writers = {"text": _as_text, "markdown": _as_markdown, "html": _as_html, "json": _as_json}
    if format not in writers:
        raise ValueError(f"unknown format {format!r}; there are: {', '.join(FORMATS)}")
    return writers[format](comparison)


def _as_text(comparison: Comparison) -> str:
    heading = comparison.question
    parts = [f"{heading}\n{'=' * len(heading)}", _setting(comparison), "\n".join(_states(comparison))]
    parts += [f"{table.title}\n\n{plain_table(table.rows)}" for table in _tables(comparison)]
    parts += ["\n".join(lines) for lines in (_remarks(comparison), _foot(comparison))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _as_markdown(comparison: Comparison) -> str:
    parts = [f"# {_tame(comparison.question)}", _tame(_setting(comparison)), _markdown_list(_states(comparison))]
    for table in _tables(comparison):
        cells = [[_tame(cell) for cell in row] for row in table.rows]
        parts.append(f"## {_tame(table.title)}\n\n{markdown_table(cells)}")
    parts += [_markdown_list(lines) for lines in (_remarks(comparison), _foot(comparison))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_tame(line)}" for line in lines)


def _tame(text: str) -> str:
    """One line without HTML, so that a reason or a row's name cannot break the page; `|` is the table's to escape.

    `&` stays, so that a command can be copied from the file: without `<` it begins no element.
    """
    return " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*")


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #111; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: .25em .8em; text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid #111; } tbody th { font-weight: normal; }
tbody tr { border-bottom: 1px solid #ccc; }
tr.default { font-weight: bold; } tr.default th { font-weight: bold; } footer { color: #444; font-size: .9em; }
div { overflow-x: auto; } @media print { body { margin: 0; max-width: none; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded and no script runs


def _as_html(comparison: Comparison) -> str:
    title = html.escape(comparison.question)
    tables = "\n".join(_html_table(table, comparison.default) for table in _tables(comparison))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{html.escape(_setting(comparison))}</p>
{_html_list(_states(comparison))}
{tables}
{_html_list(_remarks(comparison))}
<footer>
{_html_list(_foot(comparison))}
</footer>
</body>
</html>
"""


def _html_table(table: Table, default: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.rows[0])
    lines = []
    for name, *cells in table.rows[1:]:
        mark = ' class="default"' if name == default else ""
        data = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{mark}><th scope="row">{html.escape(name)}</th>{data}</tr>')
    body = "\n".join(lines)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _html_list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in lines) + "\n</ul>" if lines else ""


def _as_json(comparison: Comparison) -> str:
    return json.dumps(_finite(dataclasses.asdict(comparison)), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON types: NaN and infinities become null, numpy's numbers Python's, anything else its text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# -- words -----------------------------------------------------------------------------------------------------------


def _setting(comparison: Comparison) -> str:
    parts = [f"Source: {comparison.source}", f"profile: {comparison.profile}"]
    if comparison.default:
        parts.append(f"change: against {comparison.default}")
    if comparison.profile == PAPER_PROFILE:
        parts.append(f"reproduced within: {comparison.tolerance:g} clicks")
    return "; ".join(parts) + "."


def _tables(comparison: Comparison) -> list[Table]:
    """One table a data set and metric; one of the rows that are done where that gave no number at all."""
    if not comparison.cells:
        done = [[line.name, line.state] for line in comparison.lines if line.state == "done"]
        return [Table("rows", [["row", "state"], *done])] if done else []
    tables = []
    for (dataset, metric), group in groupby(comparison.cells, key=lambda cell: (cell.dataset, cell.metric)):
        cells = list(group)
        objects = "/".join(str(count) for count in dict.fromkeys(cell.objects for cell in cells) if count)
        title = f"{dataset}: {TITLES[metric]}" + (f", {objects} objects" if objects else "")
        shown = [each for each in cells if each.state != "quoted" or each.paper is not None]
        tables.append(Table(title, _without_empty([_head(comparison), *(_texts(comparison, each) for each in shown)])))
    return tables


def _head(comparison: Comparison) -> list[str]:
    verdict = ["verdict"] if comparison.profile == PAPER_PROFILE else []
    change = ["change", "95 % of the change", "against", "paper's change", "direction"]
    return ["row", "ours", "95 %", "seeds", "paper", "ours - paper", *verdict, *change]


def _texts(comparison: Comparison, cell: Cell) -> list[str]:
    digits = 2 if cell.metric in TARGETS else 3
    ours = _number(cell.mean, digits) or ("-" if cell.state == "done" else str(cell.state))
    if cell.std is not None:
        ours += f" +- {cell.std:.{digits}f}"
    paper = _number(cell.paper, digits) + (" (quoted)" if cell.state == "quoted" and cell.paper is not None else "")
    change = cell.change
    texts = [cell.row, ours, _interval(cell.low, cell.high, digits), str(cell.seeds or ""), paper]
    texts.append(_number(cell.difference, digits, "+"))
    if comparison.profile == PAPER_PROFILE:
        texts.append(cell.verdict)
    if change is None:
        return [*texts, "", "", "", "", ""]
    against = change.against if change.against != comparison.default else ""  # the default is named above the tables
    texts += [_number(change.mean, digits, "+"), _interval(change.low, change.high, digits, "+"), against]
    return [*texts, _number(change.paper, digits, "+"), change.direction]


def _without_empty(rows: list[list[str]]) -> list[list[str]]:
    """Columns that say something below their head; those of the row and of our number always."""
    kept = [k for k in range(len(rows[0])) if k < 2 or any(row[k] for row in rows[1:])]
    return [[row[k] for k in kept] for row in rows]


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


def _interval(low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    return "" if low is None or high is None else f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _states(comparison: Comparison) -> list[str]:
    """Why rows have no number or not all of them; a reason that several share is told once."""
    told: dict[str, list[str]] = {}
    for line in comparison.lines:
        words = {"done": line.reason, "missing": "not run yet"}
        words |= {state: f"{state}: {line.reason or 'no reason given'}" for state in STOPPED}
        if words.get(line.state):
            told.setdefault(" ".join(words[line.state].split()), []).append(line.name)
    return [f"{', '.join(names)}: {what}" for what, names in told.items()]


def _remarks(comparison: Comparison) -> list[str]:
    """Where quoted rows are from, then the notes."""
    sources: dict[str, list[str]] = {}
    for line in comparison.lines:
        if line.state == "quoted":
            sources.setdefault(line.reason, []).append(line.name)
    remarks = [f"Not run here: {', '.join(names)}. Quoted from {source}." for source, names in sources.items()]
    return remarks + list(comparison.notes)


def _foot(comparison: Comparison) -> list[str]:
    """`name: value` for all that is known about the run."""
    about = _finite(dict(comparison.about))
    return [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in about.items()]
