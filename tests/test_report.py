"""Tables: the golden NoC values, the paper's numbers beside them, and no table of two protocols."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mis_platform import report
from mis_platform.artifacts import Output, Part, Stage, sha256, write_manifest
from mis_platform.baselines.sources import VERSIONS
from mis_platform.config import EvalConfig, Run, flatten, plain
from mis_platform.data.schemas import CLICKS
from mis_platform.evaluation.clicks import iou
from mis_platform.evaluation.predictor import Predictor
from mis_platform.evaluation.protocol import Sample, evaluate, protocol_fingerprint
from mis_platform.simulation.clicks import Click
from mis_platform.storage import Storage

# Five sessions with at most 20 clicks: NoC@80/85/90 are 8.8, 9.0, 13.0 by RITM's own code; 20 is counted 1, 1, 3 times.
GOLDEN = [
    [0.5, 0.82, 0.86, 0.91],
    [0.92],
    [0.3] * 20,
    [0.7] * 18 + [0.88, 0.90],
    [0.79, 0.85, 0.84] + [0.84] * 17,
]


def rows_of(sessions: list[list[float]], dataset: str = "grabcut") -> list[dict[str, Any]]:
    return [
        {
            **{"dataset": dataset, "image_id": f"photo-{k}", "object_id": "1", "click": number},
            **{"y": 10.0 * k + number, "x": 2.0 * number, "positive": number % 2 == 1, "iou": value, "ms": 500.0},
        }
        for k, ious in enumerate(sessions)
        for number, value in enumerate(ious, 1)
    ]


def protocol(config: EvalConfig | None = None, zoom_size: int = 448) -> dict[str, Any]:
    config = config or EvalConfig()
    settings = {key: value for key, value in plain(config).items() if key not in ("zoom_size", "davis_zoom_size")}
    return {"fingerprint": protocol_fingerprint(config, zoom_size), "zoom_size": zoom_size, **settings}


def write_clicks(directory: Path, rows: list[dict[str, Any]], *, parts: int = 2, **about: Any) -> Storage:
    """A finished clicks artifact, cut into parts."""
    out = Storage(str(directory))
    entries = []
    for number in range(parts):
        sink = pa.BufferOutputStream()
        share = rows[number * len(rows) // parts : (number + 1) * len(rows) // parts]
        pq.write_table(pa.Table.from_pylist(share, schema=CLICKS), sink)
        data = sink.getvalue().to_pybytes()
        out.write_bytes(f"clicks-{number:06d}.parquet", data)
        entries.append(
            Part(name=f"clicks-{number:06d}.parquet", rows=len(share), bytes=len(data), sha256=sha256(data), digest="0")
        )
    summary = {"protocol": protocol(), "excluded": [], **about}
    stage = Stage(name="clicks", version=1, config={}, run=lambda inputs, out: Output(parts=(), digest="0"))
    write_manifest(stage, Output(parts=tuple(entries), digest="0", summary=summary), out)
    return out


def score(tmp_path: Path, model: str, sessions: list[list[float]], dataset: str = "grabcut", **about: Any) -> Any:
    directory = write_clicks(tmp_path / f"{model}-{dataset}", rows_of(sessions, dataset), **about)
    return report.read_score(directory, model)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_score_has_the_golden_values(tmp_path: Path) -> None:
    summary = score(tmp_path, "mine", GOLDEN).summary
    assert [round(summary.at(target).noc, 6) for target in (0.80, 0.85, 0.90)] == [8.8, 9.0, 13.0]
    assert [summary.at(target).at_limit for target in (0.80, 0.85, 0.90)] == [1, 1, 3]
    assert summary.at(0.90).failures == 2  # one of the three succeeds at click 20
    assert summary.seconds == 0.5 * sum(map(len, GOLDEN))


def test_an_altered_or_missing_part_is_refused(tmp_path: Path) -> None:
    directory = write_clicks(tmp_path, rows_of(GOLDEN))
    assert report.read_table(directory).num_rows == sum(map(len, GOLDEN))
    whole = (tmp_path / "clicks-000001.parquet").read_bytes()
    (tmp_path / "clicks-000001.parquet").write_bytes(whole + b" ")
    with pytest.raises(ValueError, match=r"clicks-000001.parquet .* altered"):
        report.read_table(directory)
    (tmp_path / "clicks-000001.parquet").unlink()
    with pytest.raises(ValueError, match=r"clicks-000001.parquet is missing"):
        report.read_table(directory)
    with pytest.raises(ValueError, match="unfinished"):
        report.read_table(Storage(str(tmp_path / "nowhere")))


def test_the_mean_iou_keeps_the_last_value_of_a_stopped_session(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows_of([[0.5, 0.9], [0.1, 0.2, 0.3, 0.4], [0.95]]), schema=CLICKS)
    expected = [(0.5 + 0.1 + 0.95) / 3, (0.9 + 0.2 + 0.95) / 3, (0.9 + 0.3 + 0.95) / 3, (0.9 + 0.4 + 0.95) / 3]
    np.testing.assert_allclose(report.mean_iou(table, 4), expected, atol=1e-7)


def test_clicks_on_one_object_come_in_their_order() -> None:
    rows = rows_of(GOLDEN)
    shuffled = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    clicks, ious = report.clicks_on(pa.Table.from_pylist(shuffled, schema=CLICKS), "photo-0", "1")
    assert clicks == [Click(1.0, 2.0, True), Click(2.0, 4.0, False), Click(3.0, 6.0, True), Click(4.0, 8.0, False)]
    np.testing.assert_allclose(ious, GOLDEN[0], atol=1e-7)
    with pytest.raises(ValueError, match="no clicks on object '2' of photo 'photo-0'"):
        report.clicks_on(pa.Table.from_pylist(rows, schema=CLICKS), "photo-0", "2")


def test_history_keeps_steps_and_values(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 0.7, "iou": 0.1}, {"step": 10, "loss": 0.5, "iou": 0.2}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.read_history(Storage(str(tmp_path))) == [
        (1, {"loss": 0.7, "iou": 0.1}),
        (10, {"loss": 0.5, "iou": 0.2}),
    ]


def discs(image: torch.Tensor, previous: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """A network that draws a disc of 40 pixels around positive clicks and cuts one of 25 around negative ones."""
    height, width = image.shape[2:]
    rows, cols = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    half = points.shape[1] // 2

    def nearest(clicks: torch.Tensor) -> torch.Tensor:
        squared = (rows[None] - clicks[..., 0, None, None]) ** 2 + (cols[None] - clicks[..., 1, None, None]) ** 2
        return squared.masked_fill(clicks[..., 2, None, None] < 0, 1e9).amin(dim=1, keepdim=True).sqrt()

    positive, negative = nearest(points[:, :half]), nearest(points[:, half:])
    return torch.minimum((40 - positive) / 8 + previous, (negative - 25) / 8)


def test_replay_gives_the_masks_that_were_scored() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (90, 120, 3), np.uint8)
    y, x = np.ogrid[:90, :120]
    target = (((y - 40) / 30) ** 2 + ((x - 70) / 40) ** 2 <= 1).astype(np.int8)
    config = EvalConfig(max_clicks=6)
    sample = Sample("synthetic", "photo", image, [("1", target)])
    rows = list(evaluate(discs, [sample], config, zoom_size=224, batch=1))
    assert len(rows) == 6
    clicks, ious = report.clicks_on(pa.Table.from_pylist(rows, schema=CLICKS), "photo", "1")
    masks = report.replay(Predictor(discs, zoom_size=224, config=config), image, clicks)
    assert [iou(target, mask) for mask in masks] == [np.float32(value) for value in ious]
    assert len({mask.sum() for mask in masks}) > 1


# -- tables ----------------------------------------------------------------------------------------------------------


def cells(table: str) -> list[list[str]]:
    """The cells of a markdown table."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_stands_beside_the_papers_numbers(tmp_path: Path) -> None:
    scores = [
        score(tmp_path, "trained", GOLDEN),
        score(tmp_path, "trained", [[0.95], [0.91]], "berkeley"),
        score(tmp_path, "untrained", [[0.3] * 20, [0.2] * 20]),
    ]
    table = report.summary_table(scores, markdown=True)
    header, rule, *rows = cells(table)
    assert header == ["model", "data set", "objects", "NoC@80", "NoC@85", "NoC@90", "never@90", "s/click"]
    assert set(rule) == {"---"}
    assert [row[:3] for row in rows] == [
        ["trained", "grabcut", "5"],
        ["untrained", "grabcut", "2"],
        ["MIS ViT-B (paper)", "grabcut", "50"],
        ["trained", "berkeley", "2"],
        ["MIS ViT-B (paper)", "berkeley", "100"],
    ]
    assert [cell.split(" ")[0] for cell in rows[0][3:6]] == ["8.80", "9.00", "13.00"]
    assert rows[0][6:] == ["2", "0.500"]
    assert rows[1][5] == "20.00 [20.00, 20.00]"
    assert rows[2][3:] == ["", "1.94", "2.32", "", ""]
    assert rows[4][3:] == ["", "3.09", "4.58", "", ""]
    assert "untrained on grabcut: 2 objects whose mask never changed" in table
    assert "trained on grabcut: 5 objects, published are 50" in table


def test_95_percent_is_shown_where_sessions_went_on_for_it(tmp_path: Path) -> None:
    sessions = [[0.5 + 0.025 * k for k in range(20)], [0.2] * 20]
    one = score(tmp_path, "ours", sessions, protocol=protocol(EvalConfig(fixed_clicks=True)))
    header, _, row, _ = cells(report.summary_table([one], markdown=True))
    assert row[header.index("NoC@95")].startswith("19.50 ")  # 0.95 at click 19, and never


def test_intervals_hold_the_mean(tmp_path: Path) -> None:
    target = score(tmp_path, "trained", GOLDEN).summary.at(0.90)
    ((_, *rows),) = [cells(report.summary_table([score(tmp_path, "trained", GOLDEN)], markdown=True))]
    assert rows[1][5] == f"13.00 [{target.low:.2f}, {target.high:.2f}]"
    assert 1 <= target.low < 13 < target.high <= 20


def test_the_text_table_lines_up(tmp_path: Path) -> None:
    text = report.summary_table([score(tmp_path, "trained", GOLDEN), score(tmp_path, "a longer name", GOLDEN)])
    header, rule, *rows = text.splitlines()
    assert set(rule) == {"-"}
    place = header.index("NoC@90")
    assert [row[place:].split()[0] for row in rows[:3]] == ["13.00", "13.00", "2.32"]


def test_without_intervals_the_table_fits_a_terminal(tmp_path: Path) -> None:
    scores = [score(tmp_path, name, GOLDEN, "synthetic") for name in ("untrained", "trained")]
    _, rule, *rows = report.summary_table(scores, intervals=False).splitlines()
    assert len(rule) <= 80
    assert rows[0].split() == ["untrained", "synthetic", "5", "8.80", "9.00", "13.00", "2", "0.500"]
    assert "[" not in "".join(rows)


def test_the_papers_numbers() -> None:
    assert {name: (row.noc85, row.noc90) for name, row in report.PAPER.items()} == {
        "grabcut": (1.94, 2.32),
        "berkeley": (3.09, 4.58),
        "sbd": (6.91, 9.51),
        "davis": (6.33, 8.44),
    }


def test_excluded_objects_are_named_in_the_notes(tmp_path: Path) -> None:
    sessions = [[0.95]] * 49
    one = score(tmp_path, "trained", sessions, excluded=["photo-50, object 1: no pixel of the object"])
    table = report.summary_table([one])
    assert "1 objects without a pixel" in table
    assert "published are" not in table  # 49 and the empty one are all 50


def test_scores_of_two_protocols_do_not_share_a_table(tmp_path: Path) -> None:
    ours = score(tmp_path, "ours", GOLDEN)
    theirs = score(tmp_path, "theirs", GOLDEN, protocol=protocol(EvalConfig(threshold=0.49, flip=False)))
    with pytest.raises(ValueError, match=r"ours on grabcut and theirs.*flip: True -> False; threshold: 0.5 -> 0.49"):
        report.summary_table([ours, theirs])
    older = score(tmp_path, "older", GOLDEN, protocol={**protocol(), "fingerprint": "0" * 16})
    with pytest.raises(ValueError, match="rules of another version"):
        report.summary_table([ours, older])


def test_only_davis_may_have_its_own_zoom(tmp_path: Path) -> None:
    davis = score(tmp_path, "ours", GOLDEN, "davis", protocol=protocol(zoom_size=672))
    report.summary_table([score(tmp_path, "ours", GOLDEN), davis])
    berkeley = score(tmp_path, "ours", GOLDEN, "berkeley", protocol=protocol(zoom_size=672))
    with pytest.raises(ValueError, match="zoom_size: 448 -> 672"):
        report.summary_table([score(tmp_path, "ours", GOLDEN), berkeley])
    strict = score(tmp_path, "strict", GOLDEN, "davis", protocol=protocol(EvalConfig(min_clicks=2), zoom_size=672))
    with pytest.raises(ValueError, match="min_clicks: 1 -> 2"):
        report.summary_table([score(tmp_path, "ours", GOLDEN), strict])


def test_overlaps_as_a_table() -> None:
    about = {
        **{"objects": 50, "mean_best_overlap": 0.7654, "median_best_overlap": 0.8, "excluded": ["x"]},
        **{"proposals": 31.46, "median_proposal_area": 0.1234, "share_of_photos_without": 0.0},
        **{"share_above_0.5": 0.94, "share_above_0.7": 0.7, "share_above_0.85": 0.36},
    }
    *_, row = report.overlap_table([("tree", "grabcut", about)]).splitlines()
    assert row.split() == ["tree", "grabcut", "50", "0.765", "0.800", "94.0%", "70.0%", "36.0%", "31.5", "12.3%", "1"]


@pytest.mark.parametrize(("share", "says"), [(0.5, False), (0.52, True), (1.0, True)])
def test_a_source_that_finds_nothing_is_told_with_its_setting(share: float, says: bool) -> None:
    about = {
        **{"objects": 50, "mean_best_overlap": 0.0, "median_best_overlap": 0.0, "excluded": []},
        **{"proposals": 1.0 - share, "median_proposal_area": 0.0, "share_of_photos_without": share},
        **{"share_above_0.5": 0.0, "share_above_0.7": 0.0, "share_above_0.85": 0.0},
    }
    other = {**about, "proposals": 1.0, "share_of_photos_without": 0.0}
    _, _, _, _, *lines = report.overlap_table([("tokencut", "grabcut", about), ("dsm", "grabcut", other)]).splitlines()
    assert len(lines) == says
    assert all(f"tokencut finds no proposal in {share:.0%} of the photos of grabcut" in line for line in lines)
    assert all("sources.tokencut.tau" in line for line in lines)


def test_settings_that_are_named_exist() -> None:
    settings = flatten(Run())
    assert set(report.DECIDING) == set(VERSIONS)
    for text in report.DECIDING.values():
        assert text.split()[0] in settings


def test_a_protocol_that_is_older_than_a_setting_had_its_default():
    old = {"threshold": 0.5, "fingerprint": "a"}
    assert report.protocol_differences(old, {**old, "precision": "fp32"}) == []
    assert report.protocol_differences(old, {**old, "precision": "bf16"}) == ["precision: 'fp32' -> 'bf16'"]
