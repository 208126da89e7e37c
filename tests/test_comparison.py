"""Reports of experiments: numbers by hand, the paired bootstrap against SciPy's, and what may not share a table."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mis_platform.comparison import (
    FORMATS,
    Cell,
    Comparison,
    Outcome,
    compare,
    render,
)
from mis_platform.config import Run
from mis_platform.evaluation import noc as scores
from mis_platform.experiment import Experiment, Row, changed, load_experiment, noc

ALPHA = Row("alpha=0.9", Run(), noc("grabcut", 2.0, 3.0))
FLAT = Row("alpha=0", changed(Run(), **{"sampling.alpha": 0.0}), noc("grabcut", 2.5, 3.5))
STEEP = Row("alpha=0.5", changed(Run(), **{"sampling.alpha": 0.5}), noc("grabcut", 2.5, 3.5))
OTHER = Row("Other*", Run(), noc("grabcut", 5.0, 6.0), quoted="paper, Table 1")
EXPERIMENT = Experiment("Which alpha?", (FLAT, ALPHA, OTHER), "Table 4", default="alpha=0.9", tolerance=0.25)
PROTOCOL = {"fingerprint": "f1", "threshold": 0.5, "max_clicks": 4}


def sessions(*clicks: int, reach: float = 0.9, limit: int = 4) -> np.ndarray:
    """An IoU table of objects that come to `reach` at these clicks and stop: float32 [objects, limit]."""
    table = np.full((len(clicks), limit), np.nan, np.float32)
    for row, count in zip(table, clicks):
        row[:count] = 0.5
        row[count - 1] = reach
    return table


def done(row: Row, *clicks: int, seed: int = 0, dataset: str = "grabcut", **more: Any) -> Outcome:
    known = {"ious": {dataset: sessions(*clicks)}, "protocols": {dataset: PROTOCOL}, **more}
    return Outcome(row, seed, "done", **known)


def interval(values: np.ndarray) -> tuple[float, float]:
    return scores.bootstrap_interval(values, np.random.default_rng(0))


def cell(comparison: Comparison, row: str, metric: str = "noc90", dataset: str = "grabcut") -> Cell:
    (found,) = [each for each in comparison.cells if (each.row, each.dataset, each.metric) == (row, dataset, metric)]
    return found


def state_of(comparison: Comparison, row: str) -> tuple[str, str]:
    (line,) = [line for line in comparison.lines if line.name == row]
    return line.state, line.reason


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_means_deviations_and_differences_by_hand() -> None:
    outcomes = [done(ALPHA, 1, 2, 3, 4), done(ALPHA, 2, 3, 4, 4, seed=1), done(FLAT, 4, 4, 4, 4)]
    comparison = compare(EXPERIMENT, "paper", outcomes, {})
    ours = cell(comparison, "alpha=0.9")
    assert (ours.state, ours.seeds, ours.objects) == ("done", 2, 4)
    assert ours.mean == pytest.approx((2.5 + 3.25) / 2)
    assert ours.std == pytest.approx(0.75 / math.sqrt(2))
    assert ours.difference == pytest.approx(2.875 - 3.0)
    assert ours.change is None
    change = cell(comparison, "alpha=0").change
    assert change is not None
    assert change.against == "alpha=0.9"
    assert change.mean == pytest.approx(np.mean([4 - 1.5, 4 - 2.5, 4 - 3.5, 4 - 4.0]))
    assert change.low == pytest.approx(0.25, abs=0.15)
    assert change.paper == pytest.approx(0.5)
    assert cell(comparison, "alpha=0").std is None


def test_an_object_that_never_gets_there_counts_as_the_limit() -> None:
    table = sessions(4, 4, reach=0.6)
    comparison = compare(EXPERIMENT, "paper", [Outcome(ALPHA, 0, "done", ious={"grabcut": table})], {})
    assert cell(comparison, "alpha=0.9").mean == 4


def test_what_early_stopping_left_unknown_is_not_guessed() -> None:
    outcome = Outcome(ALPHA, 0, "done", ious={"grabcut": sessions(1, 2, reach=0.86)})
    comparison = compare(EXPERIMENT, "paper", [outcome, done(FLAT, 1, 2)], {})
    assert cell(comparison, "alpha=0.9", "noc85").mean == 1.5
    unknown = cell(comparison, "alpha=0.9", "noc90")
    assert (unknown.mean, unknown.low, unknown.difference, unknown.verdict) == (None, None, None, "")
    assert cell(comparison, "alpha=0", "noc90").change is None
    line = next(line for line in render(comparison, "text").split("NoC@90")[1].splitlines() if "alpha=0.9" in line)
    assert line.split()[1] == "-"


def test_the_overlap_of_trees_has_a_table_of_its_own() -> None:
    values = np.array([0.5, 0.75, 1.0], np.float32)
    outcomes = [
        Outcome(ALPHA, 0, "done", overlaps={"davis": values}),
        Outcome(FLAT, 0, "done", overlaps={"davis": values - 0.25}),
    ]
    comparison = compare(EXPERIMENT, "small", outcomes, {})
    assert {(each.dataset, each.metric) for each in comparison.cells} == {("davis", "overlap")}
    assert cell(comparison, "alpha=0.9", "overlap", "davis").mean == pytest.approx(0.75)
    change = cell(comparison, "alpha=0", "overlap", "davis").change
    assert change is not None
    assert (change.mean, change.low, change.high) == pytest.approx((-0.25, -0.25, -0.25))
    assert change.direction == ""
    assert "0.750" in render(comparison, "text")


def test_tables_come_in_the_order_of_the_data_sets() -> None:
    outcome = Outcome(ALPHA, 0, "done", ious={name: sessions(1, 2) for name in ("davis", "grabcut")})
    cells = compare(EXPERIMENT, "small", [outcome], {}).cells
    tables = list(dict.fromkeys((each.dataset, each.metric) for each in cells))
    assert tables == [(name, metric) for name in ("davis", "grabcut") for metric in ("noc85", "noc90")]
    assert [each.row for each in cells[:3]] == ["alpha=0", "alpha=0.9", "Other*"]


# -- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [12, 50, 345])
def test_the_paired_interval_is_scipys(objects: int) -> None:
    rng = np.random.default_rng(objects)
    ours = rng.integers(1, 21, objects).astype(float)
    theirs = np.clip(ours + rng.integers(-2, 5, objects), 1, 20)
    found = interval(ours - theirs)
    scipys = stats.bootstrap(
        (ours, theirs), lambda a, b, axis: (a - b).mean(axis=axis), paired=True, vectorized=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found == pytest.approx(scipys, abs=0.06 * (scipys.high - scipys.low))
    alone = [interval(each) for each in (ours, theirs)]
    assert found[1] - found[0] < max(high - low for low, high in alone)


def test_intervals_do_not_depend_on_chunks_or_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=200)
    expected = interval(values)
    assert interval(values) == expected
    monkeypatch.setattr(scores, "_DRAWN_AT_ONCE", 10_000)
    assert interval(values) == pytest.approx(expected, rel=1e-12), "the same draws in other portions"


# -- judgements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clicks", "profile", "verdict"),
    [
        ((3, 3, 3, 3), "paper", "pass"),
        ((3, 3, 3, 4), "paper", "pass"),  # exactly the tolerance
        ((2, 3, 3, 3), "paper", "pass"),
        ((3, 3, 4, 4), "paper", "fail"),
        ((1, 1, 1, 1), "paper", "better"),  # other than published
        ((3, 3, 3, 3), "small", "not comparable"),
    ],
)
def test_the_verdict_is_the_tolerances(clicks: tuple[int, ...], profile: str, verdict: str) -> None:
    row = dataclasses.replace(ALPHA, paper=noc("berkeley", 2.0, 3.0))
    experiment = dataclasses.replace(EXPERIMENT, rows=(row,))
    comparison = compare(experiment, profile, [done(row, *clicks * 25, dataset="berkeley")], {})
    assert cell(comparison, "alpha=0.9", dataset="berkeley").verdict == verdict


@pytest.mark.parametrize(("dataset", "published"), [("grabcut", 50), ("berkeley", 100), ("sbd", 6671), ("davis", 345)])
def test_a_benchmark_that_was_cut_gets_no_verdict_and_says_why(dataset: str, published: int) -> None:
    """Neither do more objects than published; nothing is known of the size of other benchmarks."""
    row = dataclasses.replace(ALPHA, paper=noc(dataset, 2.0, 3.0))
    experiment = dataclasses.replace(EXPERIMENT, rows=(row, dataclasses.replace(FLAT, paper={})))

    def verdict(objects: int) -> tuple[str, list[str]]:
        comparison = compare(experiment, "paper", [done(row, *[3] * objects, dataset=dataset)], {})
        return cell(comparison, "alpha=0.9", dataset=dataset).verdict, [
            note for note in comparison.notes if "published" in note
        ]

    assert verdict(published) == ("pass", [])
    for objects in (published - 1, published + 1, 3):
        why = f"alpha=0.9 on {dataset}: {objects} objects, published are {published}: no verdict."
        assert verdict(objects) == ("not comparable", [why])


def test_other_sizes_are_called_not_comparable_once() -> None:
    text = render(compare(EXPERIMENT, "smoke", [done(ALPHA, 3, 3)], {}), "text")
    assert text.count("not comparable") == 1
    assert "ours - paper" in text
    assert "verdict" not in text
    text = render(compare(EXPERIMENT, "paper", [done(ALPHA, *[3] * 50)], {}), "text")
    assert "not comparable" not in text
    assert "verdict" in text


@pytest.mark.parametrize(
    ("flat", "direction"),
    [((4, 4, 4, 4), "agrees"), ((1, 1, 1, 1), "opposite"), ((1, 4, 2, 3), "undecided")],
)
def test_the_sign_of_a_change_is_held_against_the_papers(flat: tuple[int, ...], direction: str) -> None:
    change = cell(compare(EXPERIMENT, "small", [done(ALPHA, 2, 3, 2, 3), done(FLAT, *flat)], {}), "alpha=0").change
    assert change is not None
    assert change.direction == direction


def test_without_a_published_change_there_is_no_direction() -> None:
    silent = dataclasses.replace(FLAT, paper={})
    experiment = dataclasses.replace(EXPERIMENT, rows=(silent, ALPHA))
    change = cell(compare(experiment, "paper", [done(ALPHA, 1, 1), done(silent, 4, 4)], {}), "alpha=0").change
    assert change is not None
    assert (change.paper, change.direction) == (None, "")
    same = dataclasses.replace(FLAT, paper=ALPHA.paper)
    experiment = dataclasses.replace(EXPERIMENT, rows=(same, ALPHA))
    change = cell(compare(experiment, "paper", [done(ALPHA, 1, 1), done(same, 4, 4)], {}), "alpha=0").change
    assert change is not None
    assert (change.paper, change.direction) == (0, "undecided")


def test_a_row_may_have_a_reference_of_its_own() -> None:
    tuned = Row("tuned", Run(), against="alpha=0")
    experiment = dataclasses.replace(EXPERIMENT, rows=(FLAT, ALPHA, tuned))
    comparison = compare(experiment, "small", [done(FLAT, 4, 4), done(ALPHA, 1, 1), done(tuned, 2, 2)], {})
    change = cell(comparison, "tuned").change
    assert change is not None
    assert (change.against, change.mean) == ("alpha=0", -2)
    assert "against" in render(comparison, "text").split("row", 1)[1].splitlines()[0]


def test_rows_with_other_objects_are_not_paired() -> None:
    comparison = compare(EXPERIMENT, "small", [done(ALPHA, 1, 2, 3), done(FLAT, 1, 2)], {})
    assert cell(comparison, "alpha=0").change is None
    assert "alpha=0 and alpha=0.9 on grabcut: 2 and 3 objects; no pairs." in comparison.notes
    assert "alpha=0 on grabcut: 2 objects, published are 50." in comparison.notes


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "what"),
    [
        ({**PROTOCOL, "threshold": 0.49, "fingerprint": "f2"}, "threshold: 0.5 -> 0.49"),
        ({**PROTOCOL, "fingerprint": "f2"}, "rules of another version"),
    ],
)
def test_protocols_do_not_mix(protocol: dict[str, Any], what: str) -> None:
    outcomes = [done(ALPHA, 1, 2), done(FLAT, 1, 2, protocols={"grabcut": protocol})]
    with pytest.raises(ValueError, match=f"alpha=0.9 and alpha=0 were scored on grabcut .* do not compare: {what}"):
        compare(EXPERIMENT, "paper", outcomes, {})


def test_each_data_set_may_have_its_protocol() -> None:
    ious = {"grabcut": sessions(1, 2), "davis": sessions(2, 3)}
    protocols = {"grabcut": PROTOCOL, "davis": {**PROTOCOL, "zoom_size": 672}}
    outcomes = [Outcome(row, 0, "done", "", ious, {}, protocols) for row in (ALPHA, FLAT)]
    comparison = compare(EXPERIMENT, "paper", outcomes, {})
    assert cell(comparison, ALPHA.name).mean == 1.5
    assert cell(comparison, ALPHA.name, dataset="davis").mean == 2.5


def test_outcomes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no row is called 'alpha=0.95'; did you mean"):
        compare(EXPERIMENT, "paper", [Outcome(Row("alpha=0.95", Run()), 0, "missing")], {})
    with pytest.raises(ValueError, match=r"two outcomes of row 'alpha=0\.9' with seed 0"):
        compare(EXPERIMENT, "paper", [done(ALPHA, 1), done(ALPHA, 1)], {})
    with pytest.raises(ValueError, match=r"seeds of alpha=0\.9 have different numbers of objects on grabcut: 1, 2"):
        compare(EXPERIMENT, "paper", [done(ALPHA, 1), done(ALPHA, 1, 2, seed=1)], {})


# -- states ----------------------------------------------------------------------------------------------------------


def test_every_row_stays_with_its_state() -> None:
    experiment = dataclasses.replace(EXPERIMENT, rows=(*EXPERIMENT.rows, STEEP))
    outcomes = [Outcome(FLAT, 0, "failed", "no weights\nfor it"), Outcome(FLAT, 1, "missing"), done(STEEP, 2)]
    comparison = compare(experiment, "paper", outcomes, {})
    assert state_of(comparison, "alpha=0") == ("failed", "no weights\nfor it")
    assert state_of(comparison, "alpha=0.9") == ("missing", "")
    assert state_of(comparison, "Other*") == ("quoted", "paper, Table 1")
    text = render(comparison, "text")
    lines = [line.split() for line in text.splitlines()]
    assert ["alpha=0", "failed", "3.50"] in lines
    assert ["alpha=0.9", "missing", "3.00"] in lines
    assert ["Other*", "quoted", "6.00", "(quoted)"] in lines
    assert "alpha=0: failed: no weights for it\nalpha=0.9: not run yet\n" in text
    assert text.index("not run yet") < text.index("grabcut: "), "before the tables"
    assert "Not run here: Other*. Quoted from paper, Table 1." in text


def test_a_row_whose_weights_are_missing_has_not_failed() -> None:
    outcomes = [*(Outcome(FLAT, seed, "refused", "no weights") for seed in (0, 1)), done(ALPHA, 1)]
    comparison = compare(EXPERIMENT, "paper", outcomes, {})
    assert state_of(comparison, "alpha=0") == ("refused", "no weights")
    text = render(comparison, "text")
    assert ["alpha=0", "refused", "3.50"] in [line.split() for line in text.splitlines()]
    assert text.count("no weights") == 1
    assert "alpha=0: refused: no weights\n" in text
    mixed = compare(EXPERIMENT, "paper", [outcomes[0], Outcome(FLAT, 1, "failed", "no memory")], {})
    assert state_of(mixed, "alpha=0") == ("failed", "no weights; no memory")


def test_a_failed_seed_does_not_hide_the_others() -> None:
    outcomes = [done(ALPHA, 3, 3), Outcome(ALPHA, 1, "failed", "out of memory")]
    comparison = compare(EXPERIMENT, "paper", outcomes, {})
    assert state_of(comparison, "alpha=0.9") == ("done", "seed 1 failed: out of memory")
    assert cell(comparison, "alpha=0.9").seeds == 1
    assert "alpha=0.9: seed 1 failed: out of memory" in render(comparison, "markdown")


@pytest.mark.parametrize("profile", ["paper", "smoke"])
@pytest.mark.parametrize("format", FORMATS)
def test_without_any_number_there_is_no_table_and_a_reason_once(format: str, profile: str) -> None:
    outcomes = [Outcome(row, 0, "refused", "no photos") for row in (FLAT, ALPHA)]
    comparison = compare(EXPERIMENT, profile, outcomes, {})
    assert comparison.cells == ()
    text = render(comparison, format)
    if format == "json":
        assert [line["state"] for line in json.loads(text)["lines"]] == ["refused", "refused", "quoted"]
        return
    assert "alpha=0, alpha=0.9: refused: no photos" in text
    assert text.count("refused") == 1
    assert "NoC" not in text


@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_are_done_without_a_number_are_named(format: str) -> None:
    comparison = compare(EXPERIMENT, "smoke", [Outcome(ALPHA, 0, "done")], {})
    assert comparison.cells == ()
    text = render(comparison, format)
    assert "done" in text
    assert "alpha=0: not run yet" in text or format == "json"


# -- formats ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nasty() -> Comparison:
    """Names and reasons that would break a page."""
    row = Row("<script>alert(1)</script> | a & b", Run(), noc("grabcut", 2, 3))
    experiment = Experiment("Is 1 < 2?", (row, ALPHA), "Table <4>", default="alpha=0.9", note="say \"no\" & 'yes'")
    outcomes = [Outcome(row, 0, "failed", "<img src=x onerror=alert(2)>\n# not a heading"), done(ALPHA, 1, 2)]
    about = {"commit": "abc", "seconds": float("nan"), "settings": {"train.epochs": np.int64(3)}, "machine": "<b>"}
    return compare(experiment, "small", outcomes, about)


class Page(HTMLParser):
    """Which elements a page has, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_escaped_and_stands_alone(nasty: Comparison) -> None:
    text = render(nasty, "html")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.tags.isdisjoint({"script", "img", "b", "link", "iframe"})
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "&lt;script&gt;" in text
    assert "<h1>Is 1 &lt; 2?</h1>" in text
    assert '<tr class="default"><th scope="row">alpha=0.9</th>' in text


def test_markdown_cannot_be_broken_by_names(nasty: Comparison) -> None:
    text = render(nasty, "markdown")
    assert "<" not in text
    assert "\n# not a heading" not in text
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1


def test_json_is_valid_and_complete(nasty: Comparison) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(render(nasty, "json"), parse_constant=refuse)
    assert found["about"] == {"commit": "abc", "seconds": None, "settings": {"train.epochs": 3}, "machine": "<b>"}
    assert [line["state"] for line in found["lines"]] == ["failed", "done"]
    assert {each["mean"] for each in found["cells"]} == {None, 1.5}
    assert found["cells"][1]["verdict"] == "not comparable"
    assert found["question"] == "Is 1 < 2?"


@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_the_foot_says_how_it_was_made(nasty: Comparison, format: str) -> None:
    text = render(nasty, format)
    assert "commit: abc" in text
    assert "nan" not in text.lower()
    assert text.index("1.50") < text.index("commit: abc")


def test_an_unknown_format_is_refused(nasty: Comparison) -> None:
    with pytest.raises(ValueError, match="unknown format 'pdf'; there are: text, markdown, html, json"):
        render(nasty, "pdf")


def test_iou_after_five_clicks() -> None:
    """A session that stopped keeps its last IoU; with fewer clicks than five it is unknown."""
    ious = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.9], [0.6, 0.95, *[np.nan] * 4]], np.float32)
    outcome = Outcome(ALPHA, 0, "done", ious={"grabcut": ious, "short": ious[:, :3]})
    all_cells = compare(EXPERIMENT, "small", [outcome], {}).cells
    cells = {(each.dataset, each.metric): each for each in all_cells if each.row == ALPHA.name}
    assert cells["grabcut", "iou5"].mean == pytest.approx((0.5 + 0.95) / 2)
    assert ("short", "iou5") not in cells, "no table of unknowns"


def test_quoted_rows_are_named_once_where_the_paper_has_no_number_for_them() -> None:
    outcomes = [done(ALPHA, 1, 2, dataset="own"), done(ALPHA, 1, 2, seed=1)]
    text = render(compare(EXPERIMENT, "small", outcomes, {}), "text")
    grabcut, own = (text.split(f"{name}: NoC@90")[1].split("\n\n")[1] for name in ("grabcut", "own"))
    assert "Other*" in grabcut
    assert "Other*" not in own
    assert "Not run here: Other*. Quoted from" in text


@pytest.mark.parametrize("format", ["text", "markdown"])
def test_the_commands_of_quoted_rows_can_be_copied_from_the_report(format: str) -> None:
    table1 = load_experiment("table1")
    ran = Outcome(table1.row("ESC"), 0, "done", ious={"grabcut": sessions(1, 2, limit=20)})
    text = render(compare(table1, "paper", [ran], {}), format)
    tables, _, below = text.rpartition("NoC@90")
    assert "mis import" not in tables
    commands = {row.name: re.findall(r"mis (?:import|eval) .*", row.quoted) for row in table1.rows if row.quoted}
    assert sum(map(len, commands.values())) == 12
    for name, found in commands.items():
        (line,) = [line for line in below.splitlines() if "Not run here" in line and name in re.split(r"[:,.] ", line)]
        assert all(command in line for command in found), name
