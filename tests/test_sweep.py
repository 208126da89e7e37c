"""Sweeps on a real Ray cluster and a real MLflow store: shared work, failures, going on after kills."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pytest
import ray
from commands import mis
from mlflow.tracking import MlflowClient
from processes import descendants, kill_group, wait_until
from ray.exceptions import RayTaskError
from ray.util.state import list_actors

from mis_platform import artifacts, cli, sweep, tracking, trial
from mis_platform.artifacts import Output, Stage, ensure, git_commit, walk, write_manifest
from mis_platform.comparison import Cell, Comparison, Line, State
from mis_platform.config import NETWORK_EXTRACTORS, Resources, Run, fingerprint, flatten, override, plain
from mis_platform.data import synthetic
from mis_platform.errors import FingerprintMismatch
from mis_platform.evaluation.noc import keep_last
from mis_platform.experiment import _WITHOUT_WEIGHTS as WITHOUT_WEIGHTS
from mis_platform.experiment import Row, list_experiments
from mis_platform.leases import hold
from mis_platform.stages import cluster, evaluate
from mis_platform.storage import Storage, StorageError

TINY = """
'''Does it work?'''
from mis_platform.config import Run
from mis_platform.experiment import Experiment, Row, changed

EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 0",
    default="good",
    rows=(
        Row("good", Run(), {"synthetic/noc90": 2.0}),
        Row("twin", Run()),
        Row("diverges", changed(Run(), **{"train.learning_rate": 1e30})),
        Row("elsewhere", Run(), {"synthetic/noc90": 1.0}, quoted="paper, Table 0"),
    ),
)
"""
FOLDER = Path(__file__).resolve().parent.parent / "experiments"
SHORT = ["train.max_steps=3", "eval.max_clicks=2"]


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "tiny.py").write_text(TINY)
    monkeypatch.setenv("MIS_EXPERIMENTS", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def prepare(root: Path, **changes: object) -> sweep.Sweep:
    words = {"profile": "smoke", "data_root": None, "resources": Resources(log_every=1), "assignments": SHORT}
    return sweep.prepare("tiny", root=Storage(str(root)), **words | changes)  # type: ignore[arg-type]


def rows_of(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def test_identity_of_a_sweep(experiments: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path)
    assert [task.name for task in first.tasks] == ["good", "twin", "diverges"]
    assert first.fingerprint == prepare(tmp_path).fingerprint
    assert first.fingerprint != prepare(tmp_path, seeds=2).fingerprint
    assert first.fingerprint != prepare(tmp_path, assignments=["train.max_steps=4", "eval.max_clicks=2"]).fingerprint
    assert first.fingerprint == prepare(tmp_path, resources=Resources(checkpoint_every=7)).fingerprint
    assert [task.name for task in prepare(tmp_path, seeds=2, only=["twin"]).tasks] == ["twin", "twin seed 1"]
    part = prepare(tmp_path, seeds=2, only=["twin"])
    assert first.fingerprint != part.fingerprint, "another report"
    assert first.parent == part.parent, "but the same run above the rows in MLflow"
    assert first.parent != prepare(tmp_path, assignments=["train.max_steps=4", "eval.max_clicks=2"]).parent
    assert "2 training(s), about 12 images" in first.work(), "good and twin share one"


def test_a_row_without_weights_or_data_is_refused_alone(experiments: Path, tmp_path: Path) -> None:
    (experiments / "tiny.py").write_text(
        TINY.replace('Row("twin", Run())', 'Row("twin", changed(Run(), **{"target.source": "labels"}))')
    )
    synthetic.write_photos(tmp_path / "data" / "photos", 2)
    prepared = prepare(tmp_path, assignments=[*SHORT, "dataset=photos"], data_root=tmp_path / "data")
    assert [task.name for task in prepared.tasks] == ["good", "diverges"]
    assert "needs object masks" in prepared.refused["twin", 0]


def test_a_pretraining_has_its_own_photos_and_is_a_row_of_other_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few photos have labels; what a row starts from has learnt from those without."""
    monkeypatch.setenv("MIS_EXPERIMENTS", str(FOLDER))
    table1, table2 = (
        sweep.prepare(name, profile="smoke", root=Storage(str(tmp_path)), data_root=None, resources=Resources())
        for name in ("table1", "table2_label_fraction")
    )
    shared = next(task for task in table1.tasks if task.name == "MIS")
    starts = [task for task in table2.tasks if task.row.pretraining]
    assert len(starts) == 6
    assert {task.pretraining_photos for task in starts} == {shared.photos} != {task.photos for task in starts}
    expected = shared.training(Resources()).fingerprint
    assert {stage.fingerprint for task in starts if (stage := task.pretraining(Resources()))} == {expected}


def test_rows_under_different_protocols_are_refused_before_they_run(experiments: Path, tmp_path: Path) -> None:
    other = 'Row("twin", changed(Run(), **{"eval.threshold": 0.49}))'
    (experiments / "tiny.py").write_text(TINY.replace('Row("twin", Run())', other))
    with pytest.raises(ValueError, match=r"good and twin were scored on synthetic under .*threshold: 0\.5.* 0\.49"):
        prepare(tmp_path)
    assert prepare(tmp_path, only=["twin"]).refused == {}
    method = 'Row("twin", changed(Run(), method="graphcut"))'
    (experiments / "tiny.py").write_text(TINY.replace('Row("twin", Run())', method))
    assert len(prepare(tmp_path).tasks) == 3, "what methods are asked compares with what models are asked"


def scored(row: str, metric: str, mean: float | None, dataset: str = "grabcut") -> Cell:
    return Cell(row, dataset, metric, "done", 1, 50, mean, None, None, None, None, None, "", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cells", "best"),
    [
        ([], None),
        ([("a", "noc90", 20.0), ("b", "noc90", 19.0), ("c", "noc90", None)], "b"),
        ([("a", "noc85", 9.0), ("b", "noc85", 8.0), ("a", "noc90", 20.0), ("b", "noc90", 20.0)], "b"),
        ([("a", "noc90", 20.0), ("b", "noc90", 20.0), ("a", "iou5", 0.2), ("b", "iou5", 0.6)], "b"),
        ([("a", "noc85", 8.0), ("b", "noc85", 9.0), ("a", "noc90", 20.0), ("b", "noc90", 19.5)], "b"),
        ([("quoted", "noc90", 1.0), ("a", "noc90", 20.0)], "a"),
    ],
)
def test_the_best_row_has_the_fewest_clicks_and_of_equals_the_highest_iou(
    cells: list[tuple[str, str, float | None]], best: str | None
) -> None:
    """At small sizes no row reaches 90 %: the first of them is not the best."""
    elsewhere = [scored("a", "noc90", 1.0, "sbd")]
    found = Comparison("", "", "small", "", 0.3, (), (*(scored(*cell) for cell in cells), *elsewhere), (), {})
    if not cells:
        found = dataclasses.replace(found, cells=())
    assert sweep.best_row(found, ["a", "b", "c"]) == best


def test_a_part_of_an_experiment_registers_no_model(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of the rows that were asked for may be worse than the version that is there."""
    registered: list[str] = []
    monkeypatch.setattr(sweep, "_register", lambda _, task, parent: registered.append(task.row.name))
    cells = (scored("good", "noc90", 3.0), scored("twin", "noc90", 2.0))
    found = Comparison("", "", "smoke", "", 0.3, (), cells, (), {})

    def register(prepared: sweep.Sweep, state: State = "done", reason: str = "") -> list[str]:
        registered.clear()
        lines = [Line("good", "done", ""), Line("diverges", state, reason), Line("elsewhere", "quoted", "paper")]
        sweep._register_best(prepared, dataclasses.replace(found, lines=tuple(lines)), None)  # type: ignore[arg-type]
        return registered

    whole = prepare(tmp_path)
    assert register(whole) == ["twin"]
    assert register(prepare(tmp_path, only=["good"])) == []
    assert register(whole, "failed", "made with other settings") == [], "though its artifacts are finished"
    assert register(whole, "missing") == []
    assert register(whole, "refused", "no weights") == []
    assert register(whole, "done", "seed 2: not run yet") == []


def test_a_setting_that_rows_vary_cannot_be_set_for_one_of_them(experiments: Path, tmp_path: Path) -> None:
    """The row would keep its name and the paper's number, and be another run."""
    with pytest.raises(ValueError, match="what the rows differ in"):
        prepare(tmp_path, only=["good"], assignments=["train.learning_rate=1"])


def test_smoke_brings_its_own_benchmark_also_with_a_data_root(experiments: Path, tmp_path: Path) -> None:
    assert prepare(tmp_path, data_root=tmp_path / "data").refused == {}


def test_only_the_untouched_paper_profile_compares_with_the_paper(experiments: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    plain = ["features.extractor=color_texture", "model.variant=vit_xt", "model.init=random"]
    assert prepare(tmp_path, profile="paper", assignments=["eval_datasets=[]"], data_root=data).size == "paper"
    changed = prepare(tmp_path, profile="paper", assignments=plain, data_root=data)
    assert changed.size == "paper with " + ", ".join(plain)
    assert sweep.about(changed)["profile"] == changed.size


def test_other_photos_are_another_sweep(experiments: Path, tmp_path: Path) -> None:
    prints = []
    for seed in (0, 1):
        synthetic.write_photos(tmp_path / f"data{seed}" / "photos", 2, seed)
        words = [*SHORT, "dataset=photos"]
        other = prepare(tmp_path, assignments=words, data_root=tmp_path / f"data{seed}")
        prints.append((other.fingerprint, other.parent))
    assert prints[0][0] != prints[1][0]
    assert prints[0][1] != prints[1][1]


MIXED = """
'''Does it work?'''
from mis_platform.config import Run
from mis_platform.experiment import SUPERVISED, Experiment, Row, changed

COLOR = changed(Run(), **{"features.extractor": "color_texture"})
EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 0",
    measure=MEASURE,
    rows=(
        Row("classical", changed(COLOR, method="graphcut")),
        Row("network", Run()),
        Row("trained", COLOR),
        Row("supervised", changed(COLOR, **SUPERVISED)),
        Row("elsewhere", Run(), quoted="paper, Table 0"),
    ),
)
"""


@pytest.mark.parametrize("measure", [("clicks",), ("overlap", "clicks")])
def test_whatever_is_run_first_lies_under_one_parent(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: tuple[str, ...]
) -> None:
    """Parts of an experiment, and rows that cannot start yet: without weights, without photos, without labels."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (experiments / "tiny.py").write_text(MIXED.replace("MEASURE", repr(measure)))
    words = {"assignments": [*SHORT, "dataset=photos"], "data_root": tmp_path / "data"}
    before = prepare(tmp_path, **words)
    assert [task.name for task in before.tasks] == ["classical"], "there are no photos yet"
    synthetic.write_photos(tmp_path / "data" / "photos", 2)
    whole = prepare(tmp_path, **words)
    found = ["classical", "trained"]
    assert [task.name for task in whole.tasks] == found, "there are neither weights nor labels"
    parts = [prepare(tmp_path, only=[name], **words) for name in found]
    assert {each.parent for each in (before, *parts)} == {whole.parent}


def test_overlaps_lie_under_one_parent_too(experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = MIXED.replace("MEASURE", "('overlap',)").replace("**SUPERVISED", '**{"target.source": "dsm"}')
    (experiments / "tiny.py").write_text(text)
    assert set(prepare(tmp_path).refused) == {("network", 0)}
    parts = [prepare(tmp_path, only=[name]) for name in ("trained", "supervised")]
    assert {each.parent for each in parts} == {prepare(tmp_path).parent}


def test_a_sweep_of_which_no_row_can_start_leaves_no_run(
    experiments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its parent would be another than the one that its rows get when their photos are there."""
    prepared = prepare(tmp_path, assignments=[*SHORT, "dataset=photos"], data_root=tmp_path / "data")
    comparison = sweep.run_sweep(prepared)
    refused = [line for line in comparison.lines if line.state == "refused"]
    assert [line.name for line in refused] == ["good", "twin", "diverges"]
    assert all("photos" in line.reason for line in refused)
    text = Path(str(prepared.directory.local), "report.txt").read_text()
    assert text.split("\n\n")[2].startswith("good, twin, diverges: refused: "), "the reason comes first, once"
    assert "NoC" not in text
    assert "commits" not in text
    assert (Path(str(prepared.directory.local)) / "report.json").is_file()
    assert not (tmp_path / "mlflow.db").exists()


def test_weights_are_found_from_a_trials_own_directory(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SHORT, "features.extractor=dino_vits8", "features.weights=dino.pth"]
    (tmp_path / "dino.pth").write_bytes(b"weights")
    prepared = prepare(tmp_path, assignments=words)
    assert prepared.tasks[0].run.features.weights == str(tmp_path / "dino.pth")


def test_rows_that_share_a_training_share_a_trial(experiments: Path, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, seeds=2)
    groups = sweep._by_training(prepared.tasks, prepared.resources)
    assert [[task.name for task in group] for group in groups] == [
        *([f"good{seed}", f"twin{seed}"] for seed in ("", " seed 1")),
        *([f"diverges{seed}"] for seed in ("", " seed 1")),
    ]


def test_only_trainings_are_repeated_for_seeds() -> None:
    row, method = Row("trained", Run()), Row("method", override(Run(), ["method=graphcut"]))
    assert (row.seeds(3), method.seeds(3), Row("quoted", Run(), quoted="paper").seeds(3)) == (3, 1, 0)
    assert row.seeds(3, ("overlap",)) == 1, "its proposals are the same every time"
    assert row.seeds(3, ("clicks", "overlap")) == 3


def test_seeds_leave_the_first_as_it_is() -> None:
    assert trial.seeded(Run(), 0) == Run()
    assert trial.seeded(Run(), 2).train.seed == 2


def test_seeds_draw_other_labels_where_labels_are_drawn() -> None:
    words = ["target.source=labels", "target.fraction=0.5"]
    drawn = trial.seeded(override(Run(), [*words, "target.subset=random"]), 2)
    assert (drawn.train.seed, drawn.target.subset_seed) == (2, 2)
    assert trial.seeded(override(Run(), words), 2).target.subset_seed == 0


def test_reasons_are_one_line_of_the_innermost_cause() -> None:
    outer = RuntimeError("task failed")
    outer.__cause__ = ValueError("the photo is gone\nfor ever")
    assert sweep.reason_of(outer) == "the photo is gone"
    assert sweep.reason_of(MemoryError()) == "MemoryError"


def test_cpus_that_cannot_be_given_back_end_no_sweep(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's tables of reservations are no public interface: they may look different one day."""
    asked = []

    def fail() -> int:
        asked.append(time.monotonic())
        if len(asked) == 3:
            fit.set_result(None)
        raise AttributeError("no creator_actor_dead")

    fit: Future[None] = Future()
    monkeypatch.setattr(sweep.cluster, "remove_orphans", fail)
    monkeypatch.setattr(sweep, "SECONDS_BETWEEN_ORPHANS", 0.01)
    recorder = sweep._Recorder(prepare(tmp_path), [])
    recorder.has_failures = True
    assert sweep._wait_for(fit, recorder, lambda: {1: "it hangs"}) == {1: "it hangs"}
    assert len(asked) == 3
    (warning,) = caplog.messages
    assert "AttributeError: no creator_actor_dead" in warning


def test_a_model_on_an_object_store_is_not_registered_and_says_so(
    experiments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = dataclasses.replace(prepare(tmp_path), root=Storage("s3://bucket/mis"))
    sweep._register(there, there.tasks[0], None)  # type: ignore[arg-type]
    assert "is not registered in MLflow" in (line := capsys.readouterr().err)
    assert "s3://bucket/mis/checkpoint/" in line


FAILING = TINY.replace('Row("twin", Run())', 'Row("twin", Run(), {"synthetic/noc85": 1.5, "synthetic/noc90": 3.0})')


class Failed(NamedTuple):
    """A sweep of FAILING, and what was said."""

    root: Path
    prepared: sweep.Sweep
    comparison: Comparison
    said: str


@pytest.fixture(scope="module")
def failed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Failed:
    root, folder = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("experiments")
    (folder / "tiny.py").write_text(FAILING)
    (root / "mlflow.db").write_bytes(empty_store.read_bytes())
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setenv("MIS_EXPERIMENTS", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        prepared = prepare(root)
        comparison = sweep.run_sweep(prepared)
    return Failed(root, prepared, comparison, said.getvalue())


@pytest.mark.ray
def test_a_sweep_with_a_failing_row(experiments: Path, failed: Failed, capsys: pytest.CaptureFixture[str]) -> None:
    """One training serves two rows, one row fails alone, and a second run only repeats what failed."""
    (experiments / "tiny.py").write_text(FAILING)
    tmp_path, prepared, comparison, said = failed
    states = {line.name: line.state for line in comparison.lines}
    assert states == {"good": "done", "twin": "done", "diverges": "failed", "elsewhere": "quoted"}
    reason = next(line.reason for line in comparison.lines if line.name == "diverges")
    assert "not finite at step" in reason
    assert len(list((tmp_path / "checkpoint").glob("*/manifest.json"))) == 1
    report = json.loads((Path(str(prepared.directory.local)) / "report.json").read_text())
    assert report["source"] == "Table 0"
    database = tmp_path / "mlflow.db"
    names = (
        "select r.name, t.value is not null from runs r left join tags t "
        "on t.run_uuid = r.run_uuid and t.key = 'mlflow.parentRunId' order by 1"
    )
    assert rows_of(database, names) == [("diverges", 1), ("good", 1), ("tiny smoke", 0), ("twin", 1)]
    of_rows = "join tags t on t.run_uuid = r.run_uuid and t.key = 'mis.row' join metrics m on m.run_uuid = r.run_uuid"
    paper = f"select t.value, m.key, m.value from runs r {of_rows} where m.key like 'paper/%' order by 1, 2"
    assert rows_of(database, paper) == [
        ("good", "paper/synthetic/noc90", 2.0),
        ("twin", "paper/synthetic/noc85", 1.5),
        ("twin", "paper/synthetic/noc90", 3.0),
    ]
    ours = f"select t.value, m.value from runs r {of_rows} where m.key = 'synthetic/noc90' order by 1"
    (good, score), (other, same) = rows_of(database, ours)
    assert (good, other, score) == ("good", "twin", same)
    told = f"select r.end_time <= m.timestamp from runs r {of_rows} where t.value = 'good' and m.key like 'paper/%'"
    assert rows_of(database, told) == [(1,)], "it ended with its trial, not when it was reported on"
    errors = rows_of(database, "select value from tags where key = 'mis.error'")
    assert [reason] == [value for (value,) in errors]
    assert not rows_of(database, "select 1 from metrics group by run_uuid, key, step having count(*) > 1")
    steps = rows_of(database, "select distinct step from metrics where key = 'train/loss' order by 1")
    assert [step for (step,) in steps] == [1, 2, 3]
    assert not rows_of(database, "select * from model_versions"), "of a row that failed nobody knows how good it is"
    ends = "select run_uuid, end_time from runs order by 1"
    ended = rows_of(database, ends)

    before = len(list((tmp_path / "checkpoint").glob("*")))
    assert "commits" not in said
    pretend_commit(next(tmp_path.glob("trees/*/manifest.json")), "f00d" * 10)
    second = sweep.run_sweep(prepare(tmp_path, only=["good", "twin"]))
    assert rows_of(database, ends) == ended, "nothing was computed, and no row was recorded twice"
    assert len(list((tmp_path / "checkpoint").glob("*"))) == before
    both = ", ".join(sorted({git_commit() or "unknown", "f00d" * 10}))
    assert second.about["commits"] == both
    assert f"by the commits {both}; " in capsys.readouterr().err


@pytest.mark.ray
def test_a_row_that_starts_from_another_training(
    experiments: Path, failed: Failed, tmp_path: Path, empty_store: Path
) -> None:
    """From one that is there already, of which a kill has cut off the record. All rows are done: the best is known."""
    root = tmp_path / "root"
    for name in ("wheels", "trees", "checkpoint", "clicks"):
        shutil.copytree(failed.root / name, root / name)
    (root / "mlflow.db").write_bytes(empty_store.read_bytes())
    lines = TINY.splitlines()
    (twin, diverges) = (line for line in lines if "twin" in line or "diverges" in line)
    tuned = diverges.replace(diverges.strip(), 'Row("tuned", Run(), pretraining=Run()),')
    (experiments / "tiny.py").write_text("\n".join(line for line in lines if line != twin).replace(diverges, tuned))
    prepared = prepare(root)
    (task,) = (task for task in prepared.tasks if task.row.pretraining)
    start = sweep._child(prepared, sweep._as_pretraining(task))
    start.log_metrics({"train/loss": 7.0}, 1)
    start.close("KILLED")
    comparison = sweep.run_sweep(prepared)
    assert [(line.name, line.state) for line in comparison.lines[:2]] == [("good", "done"), ("tuned", "done")]
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`mis.fingerprint` = '{prepared.parent}'")
    above = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    runs = {run.data.tags["mis.row"]: run for run in client.search_runs([experiment.experiment_id], above)}
    name = "pretraining vit_xt wheels alpha 0.9 lambda 10"
    assert {row: (run.info.run_name, run.info.status) for row, run in runs.items()} == {
        row: (row, "FINISHED") for row in ("good", "tuned", name)
    }
    assert runs[name].data.tags["mis.start_of"] == "tuned"
    assert [(each.dataset.name, each.tags[0].value) for each in runs[name].inputs.dataset_inputs] == [
        ("folder", "training")
    ]
    points = client.get_metric_history(runs[name].info.run_id, "train/loss")
    assert sorted(point.step for point in points) == [1, 2, 3]
    assert {point.value for point in points if point.step == 1} == {7.0}, "what was there stays, what was missing came"
    fingerprint = task.pretraining(prepared.resources).fingerprint  # type: ignore[union-attr]
    inits = {row: run.data.params["model.init"] for row, run in runs.items()}
    assert inits == {"good": "random", name: "random", "tuned": f"checkpoint/{fingerprint}"}
    changed = [tag for tag in runs["tuned"].data.tags if tag.startswith(tracking.LATEST + "model")]
    assert not changed, "training, scoring and record agree"

    cells = {(cell.row, cell.metric): cell.mean for cell in comparison.cells}
    best = sweep.best_row(comparison, ["good", "tuned"])
    assert cells[best, "noc90"] == min(cells["good", "noc90"], cells["tuned", "noc90"])
    best_task = next(task for task in prepared.tasks if task.row.name == best)
    weights = root / "checkpoint" / best_task.training(prepared.resources).fingerprint / "model.safetensors"
    champion = client.get_model_version_by_alias(f"mis-tiny-smoke-{prepared.parent}", "champion")
    assert champion.tags[tracking.DIGEST] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "licence" in champion.tags


def pretend_commit(manifest: Path, commit: str) -> None:
    """As if the artifact had been computed by that code."""
    content = json.loads(manifest.read_text())
    content["information"]["git_commit"] = commit
    manifest.write_text(json.dumps(content))


@pytest.mark.ray
def test_a_row_of_overlaps_is_recorded_like_any_other(experiments: Path, ray_cluster: None, tmp_path: Path) -> None:
    synthetic.write_benchmark(tmp_path / "objects", 2)
    (experiments / "tiny.py").write_text(MIXED.replace("MEASURE", "('overlap',)"))
    words = [*SHORT, f'eval_datasets=["synthetic:{tmp_path}/objects"]']
    prepared = prepare(tmp_path, only=["trained"], assignments=words)
    comparison = sweep.run_sweep(prepared)
    assert comparison.lines[0].state == "done", comparison.lines
    assert sweep.about(prepared)["machines"] == cluster.machine(), "where it was computed, not where it is read"
    database = tmp_path / "mlflow.db"
    row = "join tags t on t.run_uuid = p.run_uuid and t.key = 'mlflow.parentRunId'"
    params = dict(rows_of(database, f"select p.key, p.value from params p {row}"))
    assert params.keys() == flatten(Run()).keys() | flatten(Resources(), "resources.").keys()
    assert (params["features.extractor"], params["sampling.alpha"]) == ("color_texture", "0.9")
    metrics = dict(rows_of(database, f"select p.key, p.value from metrics p {row}"))
    assert metrics.keys() == {"synthetic/mean_best_overlap"}
    assert rows_of(database, "select name, length(digest) from datasets") == [("synthetic", 36)]
    read = "select g.value from input_tags g join inputs i using (input_uuid) join tags t on t.run_uuid = "
    read += "i.destination_id and t.key = 'mlflow.parentRunId'"
    assert rows_of(database, read) == [("evaluation",)]


def test_rows_whose_pretraining_failed_do_not_start(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (experiments / "tiny.py").write_text(TINY.replace('Row("twin", Run())', 'Row("twin", Run(), pretraining=Run())'))
    prepared = prepare(tmp_path)
    asked = []

    def fail(_: sweep.Sweep, groups: list[list[trial.Task]]) -> dict[str, sweep.Failure]:
        asked.append([task.name for group in groups for task in group])
        return {f"{task.row.name}/{task.seed}": sweep.Failure("no memory") for group in groups for task in group}

    monkeypatch.setattr(sweep, "_fan_out", fail)
    failures = sweep._pretrain(prepared, [task for task in prepared.tasks if task.row.pretraining is not None])
    assert asked == [["pretraining of twin"]]
    assert failures == {"twin/0": sweep.Failure("pretraining: no memory")}
    reasons = {key: failure.reason for key, failure in failures.items()}
    told = [(task.name, failure) for task, failure in sweep._recorded(prepared, reasons) if failure]
    assert told == [("pretraining of twin", "no memory"), ("twin", "pretraining: no memory")]


@pytest.mark.parametrize("words", [("run", "sweep", "tiny", "--dry-run"), ("show", "tiny")])
def test_what_a_sweep_would_do(
    experiments: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    """Nothing is written, although the smoke profile makes its photos."""
    root = tmp_path / "root"
    monkeypatch.setattr(sys, "argv", ["mis", *words, "--profile", "smoke", "--root", str(root)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert not root.exists()
    text = capsys.readouterr().out
    for words in (
        "Does it work?",
        "quoted",
        "train.learning_rate=1e+30",
        "work left: 2 training(s)",
        "3 row(s) to score",
    ):
        assert words in text
    for words in ("profile smoke:", "batch_size=2 (default 32)", "extractor=color_texture (default dino_vits8)"):
        assert text.count(words) == 1, "once for all rows"
    assert " learning_rate=5e-05" not in text, "that is what they differ in"
    prepared = prepare(tmp_path, assignments=[])
    rows = [line.split()[:3] for line in text.splitlines()]
    for task in prepared.tasks:
        assert ["missing", task.name, task.fingerprint(prepared.resources)] in rows


def test_a_report_of_nothing_says_so_and_writes_nothing(
    experiments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    assert mis("report", "tiny", "--profile", "smoke", "--root", root) == cli.DATA
    assert capsys.readouterr().err == f"Error: nothing has been run in {root} yet; is it the right --root?\n"
    assert not root.exists()
    assert mis("report", "tiny", "--profile", "smok", "--root", root) == cli.USAGE
    (root / "trees" / "0123456789abcdef").mkdir(parents=True)  # of whatever else
    capsys.readouterr()
    assert mis("report", "tiny", "--profile", "smoke", "--root", root) == 0
    text = capsys.readouterr().out
    assert "good, twin, diverges: not run yet" in text
    assert "NoC" not in text
    assert [path.name for path in root.iterdir()] == ["trees"]


def test_rows_that_cannot_start_are_no_finished_work(experiments: Path, tmp_path: Path) -> None:
    (experiments / "tiny.py").write_text(MIXED.replace("MEASURE", "('clicks',)"))
    words = {"assignments": [*SHORT, "dataset=photos"], "data_root": tmp_path / "data"}
    assert prepare(tmp_path, **words).work() == (
        "3 row(s) refused, for the reasons above; of the others, work left: 1 row(s) to score"
    )
    nothing = prepare(tmp_path, only=["trained"], **words).work()
    assert nothing == "1 row(s) refused, for the reasons above; no row can start"


def test_a_root_that_cannot_be_written_is_told_in_one_line(
    experiments: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mis", "run", "sweep", "tiny", "--profile", "smoke", "--root", "/proc/nothing"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == cli.USAGE
    assert "choose another --root" in capsys.readouterr().err


@pytest.mark.ray
def test_too_many_trials_are_refused_with_the_arithmetic(
    experiments: Path, ray_cluster: None, tmp_path: Path, empty_store: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"resources\.trials=99 needs a CPU for each"):
        sweep.run_sweep(prepare(tmp_path, resources=Resources(trials=99)))
    assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match=r"resources\.num_workers=32 needs at least 32 x 0\.1 = 3\.2 CPUs"):
        sweep.run_sweep(prepare(tmp_path, resources=Resources(num_workers=32)))
    assert not (tmp_path / "trees").exists(), "before anything is made"


@pytest.mark.ray
def test_a_row_that_hangs_fails_and_frees_the_cluster(experiments: Path, ray_cluster: None, tmp_path: Path) -> None:
    """No training has its first step within half a second: to the watchdog that is one that hangs."""
    before = detached_actors()
    prepared = prepare(tmp_path, only=["good"], resources=Resources(trial_silence=0.5))
    for stage in sweep._shared(prepared.tasks[0], prepared.root, prepared.resources):
        ensure(stage, prepared.root)  # these would be too slow, too
    comparison = sweep.run_sweep(prepared)
    ended = time.monotonic()
    (line,) = comparison.lines
    assert line.state == "failed"
    assert "the training gave no sign of life for 0.5 seconds" in line.reason
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() - ended < 30, "a placement group was left behind"
        time.sleep(0.2)
    assert not detached_actors() - (before | Counter(OF_RAY_DATA))
    began = time.time()
    comparison = sweep.run_sweep(prepare(tmp_path, only=["good"]))
    assert comparison.lines[0].state == "done", "the next attempt goes on"
    first = rows_of(tmp_path / "mlflow.db", "select min(timestamp) from metrics where key = 'train/loss'")
    assert 0 < first[0][0] / 1000 - began < 90, "seconds to the first step of the next trial"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("kills", "state"), [(1, "done"), (2, "failed")])
def test_a_trial_whose_process_is_lost_is_begun_once_more(
    kills: int, state: str, experiments: Path, ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []

    def kill_trials() -> None:
        (task,) = prepared.tasks
        directory = Path(str(task.training(prepared.resources).directory(prepared.root).local))
        while len(killed) < kills and not (directory / "manifest.json").exists():
            for pid in descendants(os.getpid()) if directory.exists() else ():
                if pid not in killed and title_of(pid).startswith("ray::ImplicitFunc.train"):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.05)

    prepared = prepare(tmp_path, only=["good"])
    killer = threading.Thread(target=kill_trials, daemon=True)
    killer.start()
    (line,) = sweep.run_sweep(prepared).lines
    killer.join(timeout=10)
    assert (line.state, len(killed)) == (state, kills), line.reason
    assert "the process of good is gone" in capsys.readouterr().err
    states = rows_of(tmp_path / "mlflow.db", "select status from runs where name = 'good'")
    assert states == [("FINISHED" if state == "done" else "FAILED",)]


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


METHODS = """
'''Does it hang?'''
from mis_platform.config import Run
from mis_platform.experiment import Experiment, Row, changed

EXPERIMENT = Experiment(
    question=__doc__,
    source="Table 0",
    default="hangs",
    rows=(
        Row("hangs", changed(Run(), method="geodesic")),
        Row("fine", changed(Run(), method="graphcut")),
    ),
)
"""


@pytest.fixture
def hanging_method(experiments: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The row "hangs" never gets an answer from its workers. Returns why it fails, but for the seconds."""
    (experiments / "tiny.py").write_text(METHODS)

    class Hanging(evaluate.Answering):  # here, so that it travels to the workers as it is
        def score(self, image_ids: Sequence[str], tell: evaluate.Tell) -> evaluate.Scored:
            if self.method == "geodesic":
                time.sleep(3600)
            return super().score(image_ids, tell)

    monkeypatch.setattr(evaluate, "Answering", Hanging)
    return (
        "clicks/synthetic: TimeoutError: the evaluation gave no sign of life for {} seconds (resources.trial_silence)"
    )


@pytest.mark.ray
def test_a_method_that_hangs_fails_its_row_and_frees_the_cluster(
    hanging_method: str, ray_cluster: None, tmp_path: Path
) -> None:
    (line,) = sweep.run_sweep(prepare(tmp_path, only=["hangs"], resources=Resources(trial_silence=2.0))).lines
    ended = time.monotonic()
    assert (line.state, line.reason) == ("failed", hanging_method.format(2))
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() - ended < 30, "the workers were left behind"
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.slow
def test_rows_behind_a_method_that_hangs_are_scored(hanging_method: str, ray_cluster: None, tmp_path: Path) -> None:
    lines = sweep.run_sweep(prepare(tmp_path, resources=Resources(trial_silence=40.0))).lines
    assert [(line.name, line.state) for line in lines] == [("hangs", "failed"), ("fine", "done")]
    assert lines[0].reason == hanging_method.format(40)


# -- what MLflow has of a sweep --------------------------------------------------------------------------------------

Record = dict[str, tuple[str, str, dict[str, float], int]]  # run id -> parent's, name, metrics, files


def record_of(uri: str) -> Record:
    """Everything in a store that a person would take for a result."""
    client = MlflowClient(uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert not [run for run in runs if run.info.status != "FINISHED"]
    for run in runs:
        for name in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
            assert len(steps) == len(set(steps)), f"{name} is there twice"
    return {
        run.info.run_id: (
            run.data.tags.get("mlflow.parentRunId", ""),
            str(run.info.run_name),
            run.data.metrics,
            sum(file.is_file() for file in Path(run.info.artifact_uri).rglob("*")),
        )
        for run in runs
    }


def of_methods(tmp_path: Path, experiments: Path, empty_store: Path) -> Callable[[], Comparison]:
    """A sweep of one row without training, scored on tmp_path/objects."""
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    (experiments / "tiny.py").write_text(METHODS.replace("hangs", "quick"))
    synthetic.write_benchmark(tmp_path / "objects", 2)
    words = ["eval.max_clicks=2", f'eval_datasets=["synthetic:{tmp_path}/objects"]']
    return lambda: sweep.run_sweep(prepare(tmp_path, only=["quick"], assignments=words))


@pytest.mark.ray
def test_an_exchanged_benchmark_is_another_sweep_in_mlflow(
    experiments: Path, ray_cluster: None, tmp_path: Path, empty_store: Path
) -> None:
    """Of the same name in the same place: its scores are shown once, and the old ones do not pass for them."""
    run, uri = of_methods(tmp_path, experiments, empty_store), f"sqlite:///{tmp_path}/mlflow.db"
    run()
    before = record_of(uri)
    run()
    assert record_of(uri) == before, "without a change nothing is added"
    shutil.rmtree(tmp_path / "objects")
    synthetic.write_benchmark(tmp_path / "objects", 3, seed=7)
    run()
    after = record_of(uri)
    run()
    assert record_of(uri) == after
    assert {run_id: after[run_id] for run_id in before} == before, "what was measured then stays as it was"
    new = {run_id: each for run_id, each in after.items() if run_id not in before}
    assert sorted(name for _, name, _, _ in new.values()) == ["quick", "tiny smoke"]
    assert {above for above, *_ in new.values()} == {"", *(key for key, each in new.items() if not each[0])}
    for record, objects in ((before, 2), (new, 3)):
        assert [each[2]["synthetic/objects"] for each in record.values() if each[0]] == [objects]
    client = MlflowClient(uri)
    read = {key: client.get_run(key).inputs.dataset_inputs for key in after}
    digests = {key: each[0].dataset.digest for key, each in read.items() if len(each) == 1}
    assert digests.keys() == after.keys(), "parents say what their rows were scored on, too"
    assert [len({digests[key] for key in record}) for record in (before, new, after)] == [1, 1, 2]


@pytest.mark.ray
def test_a_store_that_has_nothing_gets_all_of_a_finished_sweep(
    experiments: Path, ray_cluster: None, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second store, and one that was emptied; nothing is computed for them."""
    run = of_methods(tmp_path, experiments, empty_store)
    first, second = f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/second.db"
    (tmp_path / "second.db").write_bytes(empty_store.read_bytes())
    run()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("clicks/*/*/*")}

    def contents(record: Record) -> list[tuple[str, str, dict[str, float], int]]:
        return sorted((above and record[above][1], *rest) for above, *rest in record.values())

    expected = contents(record_of(first))
    assert [(above, name) for above, name, *_ in expected] == [("", "tiny smoke"), ("tiny smoke", "quick")]
    assert all(files > 3 for *_, files in expected), "the report with its figures; tables and pictures of the row"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", second)
        run()
        there = record_of(second)
        run()
        assert record_of(second) == there
    assert contents(there) == expected
    old = record_of(first)
    for run_id in old:
        MlflowClient(first).delete_run(run_id)
    run()
    new = record_of(first)
    run()
    assert record_of(first) == new
    assert contents(new) == expected
    assert not new.keys() & old.keys()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("clicks/*/*/*")} == made

    (manifest,) = tmp_path.glob("clicks/*/*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"geodesic"', '"graphcut"'))
    made_otherwise = f"clicks/synthetic/{manifest.parent.name} was made with other settings: "
    with pytest.raises(FingerprintMismatch, match=made_otherwise):  # of every row
        run()
    (reason,) = json.loads(next(tmp_path.glob("sweeps/*/*/failures.json")).read_text()).values()
    assert reason.startswith(made_otherwise)


@pytest.mark.parametrize("begun", [True, False])
def test_strict_refuses_what_other_code_has_made_or_begun(
    experiments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Before anything runs; both are named. Without the word it is used."""
    prepared = prepare(tmp_path)
    trees = next(stage for stage in walk(prepared.tasks[0].training(Resources())) if stage.name == "trees")
    directory = trees.directory(prepared.root)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "git_commit", lambda: "aaaa")
        patch.setattr(artifacts, "versions", artifacts.versions.__wrapped__)
        if begun:
            artifacts._note_code(directory)
        else:
            write_manifest(trees, Output(parts=(), digest="0" * 64), directory)
        sweep.check_same_code(prepared)
        patch.setattr(artifacts, "git_commit", lambda: "bbbb")
        assert run_tiny(tmp_path, "--strict", "--dry-run") == cli.MISMATCH
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"Error: trees/{trees.fingerprint} was computed by the code aaaa, and this is bbbb; ")
        assert run_tiny(tmp_path, "--dry-run") == 0
        folder = tmp_path / "wheels" / "photos"
        words = ["train", "--dataset", f"folder:{folder}", "--root", tmp_path, "--dry-run"]
        words += [word for name, value in WITHOUT_WEIGHTS.items() for word in ("--set", f"{name}={value}")]
        assert mis(*words) == 0
        capsys.readouterr()
        assert mis(*words, "--strict") == cli.MISMATCH
        assert "by the code aaaa, and this is bbbb; " in capsys.readouterr().err
        patch.setattr(artifacts, "git_commit", lambda: "aaaa+changes")
        with pytest.raises(FingerprintMismatch, match=r"code aaaa, and this is aaaa\+changes"):
            sweep.check_same_code(prepared)
        directory.remove("manifest.json")
        directory.remove(artifacts.CODE_FILE)
        artifacts._note_code(directory)
        with pytest.raises(FingerprintMismatch, match=r"code aaaa\+changes, and this is aaaa\+changes"):
            sweep.check_same_code(prepared)  # perhaps of another edit


# -- what is no row's fault ------------------------------------------------------------------------------------------


def run_tiny(root: Path, *more: str) -> int:
    words = [word for setting in SHORT for word in ("--set", setting)]
    return mis("run", "sweep", "tiny", "--profile", "smoke", "--root", root, *words, *more)


@pytest.mark.ray
def test_what_all_rows_need_and_cannot_have_is_the_exit_code(
    experiments: Path, ray_cluster: None, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    prepared = prepare(tmp_path)
    trees = next(stage for stage in walk(prepared.tasks[0].training(Resources())) if stage.name == "trees")
    directory = trees.directory(Storage(str(tmp_path)))
    with hold(directory):  # another command makes them just now
        assert run_tiny(tmp_path) == cli.LOST
    assert "Error: another mis process is working on" in (said := capsys.readouterr().err)
    assert str(directory) in said.splitlines()[-1]
    other = dataclasses.replace(trees, config={**trees.config, "data": "other"})
    write_manifest(other, Output(parts=(), digest="0" * 64), directory)
    assert run_tiny(tmp_path) == cli.MISMATCH
    assert f"Error: trees/{trees.fingerprint} was made with other settings: " in capsys.readouterr().err
    (report,) = tmp_path.glob("sweeps/*/*/report.txt")
    assert "good, twin, diverges: failed: trees: " in report.read_text(), "it is recorded all the same"
    assert not (tmp_path / "checkpoint").exists()
    (experiments / "tiny.py").write_text(TINY.replace('Row("twin", Run())', 'Row("twin", METHOD)').replace(
        "EXPERIMENT =", "METHOD = changed(Run(), method='geodesic')\nEXPERIMENT ="
    ))  # fmt: skip
    synthetic.write_benchmark(tmp_path / "objects", 1)
    assert run_tiny(tmp_path, "--set", f'eval_datasets=["synthetic:{tmp_path}/objects"]') == cli.FAILURES


@pytest.mark.parametrize(
    ("causes", "raised"),
    [
        ([None, sweep.Failure("gone", StorageError("gone"))], None),  # None: that row is done
        ([sweep.Failure("it diverged"), sweep.Failure("gone", StorageError("gone"))], None),
        ([sweep.Failure("gone", StorageError("gone"))] * 2, StorageError),
        ([sweep.Failure("other", FingerprintMismatch("other"))], FingerprintMismatch),
        ([], None),
    ],
)
def test_a_sweep_is_lost_when_nothing_of_it_can_go_on(causes: list[sweep.Failure | None], raised: type | None) -> None:
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        sweep._raise_if_lost(causes)


def test_the_cause_is_found_behind_rays_errors() -> None:
    inner = StorageError("cannot write to there: No space left on device")
    error = RayTaskError("run_trial", "ray::run_trial() ...", inner).as_instanceof_cause()
    outer = RuntimeError("the trial failed")
    outer.__cause__ = error
    for each in (inner, error, outer):
        assert sweep._failure(each) == sweep.Failure(f"StorageError: {inner}", inner)
    assert sweep._failure(ValueError("as it is")) == sweep.Failure("as it is")


def test_a_ray_that_is_gone_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not row for row, each with an error of Ray's own."""

    def fail(*_: object) -> Output:
        raise ray.exceptions.RaySystemError("no raylet")

    stage = Stage(name="trees", version=1, config={}, run=fail)
    assert sweep._attempt(stage, Storage(str(tmp_path)), 60.0) is not None
    monkeypatch.setattr(cluster, "is_lost", lambda: True)
    with pytest.raises(ConnectionError, match="Ray has ended") as error:
        sweep._attempt(stage, Storage(str(tmp_path)), 60.0)
    assert cli._exit_code(error.value) == cli.LOST


OF_RAY_DATA = ("_StatsActor", "ActorLocationTracker", "_AutoscalingCoordinatorActor")  # one each for a cluster


def detached_actors() -> Counter[str]:
    """Classes of the living actors that no job's end ends."""
    here = ray.get_runtime_context().gcs_address
    actors = list_actors(here, filters=[("state", "=", "ALIVE")], detail=True, raise_on_missing_output=False)
    return Counter(actor.class_name for actor in actors if actor.is_detached)


@pytest.mark.ray
@pytest.mark.slow
def test_an_evaluation_that_hangs_fails_its_row(experiments: Path, ray_cluster: None, tmp_path: Path) -> None:
    assert sweep.run_sweep(prepare(tmp_path, only=["good"])).lines[0].state == "done"
    shutil.rmtree(tmp_path / "clicks")  # trained, but no longer scored: now it is the evaluation that is slow
    comparison = sweep.run_sweep(prepare(tmp_path, only=["good"], resources=Resources(trial_silence=0.5)))
    assert "the evaluation gave no sign of life for 0.5 seconds" in comparison.lines[0].reason


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_seeds_give_a_deviation_and_paired_intervals(experiments: Path, ray_cluster: None, tmp_path: Path) -> None:
    """Four real trainings: two rows, two seeds."""
    (experiments / "tiny.py").write_text(
        TINY.replace('"diverges"', '"other"').replace('"train.learning_rate": 1e30', '"sampling.alpha": 0.0')
    )
    settings = ["train.max_steps=3", "eval.max_clicks=5"]  # five, for an IoU that is not at its limit
    prepared = prepare(tmp_path, only=["good", "other"], seeds=2, assignments=settings)
    comparison = sweep.run_sweep(prepared)
    assert [(line.name, line.state, line.reason) for line in comparison.lines] == [
        ("good", "done", ""),
        ("other", "done", ""),
    ]
    assert len(list((tmp_path / "checkpoint").glob("*/manifest.json"))) == 4
    cells = {(cell.row, cell.metric): cell for cell in comparison.cells}
    found = {(each.row.name, each.seed): each.ious["synthetic"] for each in sweep.outcomes(prepared)}
    for row in ("good", "other"):
        cell = cells[row, "iou5"]
        means = [float(keep_last(found[row, seed])[:, 4].mean(dtype=np.float64)) for seed in (0, 1)]
        assert cell.seeds == 2
        assert (cell.mean, cell.std) == pytest.approx((np.mean(means), np.std(means, ddof=1)))
        assert cell.std > 0, "another seed is another training"
    change = cells["other", "iou5"].change
    assert change is not None
    assert change.mean == pytest.approx(cells["other", "iou5"].mean - cells["good", "iou5"].mean)
    assert change.low < change.mean < change.high
    text = (Path(str(prepared.directory.local)) / "report.txt").read_text()
    assert f"{cells['good', 'iou5'].mean:.3f} +- {cells['good', 'iou5'].std:.3f}" in text
    assert f"[{change.low:+.3f}, {change.high:+.3f}]" in text
    parents = rows_of(tmp_path / "mlflow.db", "select count(*) from tags where key = 'mlflow.parentRunId'")
    assert parents == [(4,)]


# -- every experiment ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for all, so that a row of several experiments is computed once."""
    return tmp_path_factory.mktemp("smoke")


def nightly_unless_short(name: str) -> Any:
    """The experiment that trains nothing takes 20 s on two quiet cores, each of the others minutes."""
    return name if name == "figure5" else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", map(nightly_unless_short, list_experiments(FOLDER)))
def test_every_experiment_runs_at_smoke(
    name: str, ray_cluster: None, smoke_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute a training on two cores; a row that needs weights which are not here says so."""
    monkeypatch.setenv("MIS_EXPERIMENTS", str(FOLDER))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepared = sweep.prepare(
        name,
        profile="smoke",
        root=Storage(str(smoke_root)),
        data_root=None,
        resources=Resources(log_every=1),
        assignments=["train.max_steps=2"],
    )
    comparison = sweep.run_sweep(prepared)
    rows = {row.name: row for row in prepared.experiment.rows}
    for line in comparison.lines:
        if line.state == "refused":
            assert rows[line.name].run.features.extractor in NETWORK_EXTRACTORS
            assert "no weights for features.extractor" in line.reason
        else:
            assert line.state == ("quoted" if rows[line.name].quoted else "done"), line
    folder = Path(str(prepared.directory.local))
    assert list((folder / "figures").glob("*.png"))
    for file in sweep.REPORTS:
        assert prepared.experiment.question.split()[0] in (folder / file).read_text()
    assert not rows_of(
        smoke_root / "mlflow.db", "select 1 from metrics group by run_uuid, key, step having count(*) > 1"
    )


# -- kill -9 of everything, five times -------------------------------------------------------------------------------

KILL_WHEN: dict[str, Callable[[Path, str], bool]] = {
    "trees are made": lambda root, said: "trees: " in said,
    "trainings are about to start": lambda root, said: "sweep: 4 training" in said,
    "a training steps": lambda root, said: ": step 1," in said,
    "a model is scored": lambda root, said: any(root.glob("clicks/*/*/*.parquet")),
    "rows are recorded": lambda root, said: any(root.glob("mlflow-artifacts/*/artifacts/**/*.png")),
}


def start(root: Path, said: IO[str] | None = None) -> subprocess.Popen[str]:
    words = ["run", "sweep", "ablation_alpha", "--profile", "smoke", "--root", str(root)]
    words += ["--set", "resources.checkpoint_every=2", "--set", "resources.log_every=1"]
    return subprocess.Popen(
        [sys.executable, "-m", "mis_platform.cli", *words],
        stdout=subprocess.PIPE if said is None else said,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def kill_everything(child: subprocess.Popen[str]) -> None:
    """The driver's process group, and every Ray process that has it for an ancestor."""
    family, ahead = {child.pid}, True
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    while ahead:
        found = {pid for pid, parent in parents.items() if parent in family} - family
        family |= found
        ahead = bool(found)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    child.wait(timeout=30)


def finish(child: subprocess.Popen[str]) -> None:
    text, _ = child.communicate(timeout=900)
    assert child.returncode == 0, text


def table_of(root: Path) -> dict:
    (path,) = (root / "sweeps" / "ablation_alpha-smoke").glob("*/report.json")
    report = json.loads(path.read_text())
    del report["about"]
    return report


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_whose_ray_is_stopped_with_it_does_not_wait_for_trials(tmp_path: Path) -> None:
    """A signal to the whole process group, as `timeout` sends: nobody is left who could answer, or stop the trials."""
    with start(tmp_path) as child:
        assert child.stdout is not None
        assert any(": step 1" in line for line in child.stdout)
        seconds = kill_group(child, signal.SIGTERM)
    assert child.returncode == 75
    assert seconds < 20, "a machine that is taken away leaves 30"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_five_times_is_the_same_table(tmp_path: Path) -> None:
    """Bounded: five kills and two whole runs take some ten minutes on two cores."""
    root = tmp_path / "killed"
    for number, is_reached in enumerate(KILL_WHEN.values()):
        log = tmp_path / f"{number}.log"
        with log.open("w") as said, start(root, said) as child:
            wait_until(lambda: is_reached(root, log.read_text()), child, seconds=300)  # noqa: B023
            kill_everything(child)
    finish(start(tmp_path / "killed"))
    finish(start(tmp_path / "whole"))
    assert table_of(tmp_path / "killed") == table_of(tmp_path / "whole")
    database = tmp_path / "killed" / "mlflow.db"
    parents = "select count(*) from tags where key = 'mlflow.parentRunId'"
    assert rows_of(database, "select count(*) from runs") == [(5,)], "one parent, a child for each row"
    assert rows_of(database, parents) == [(4,)]
    assert not rows_of(database, "select 1 from metrics group by run_uuid, key, step having count(*) > 1")
    curve = "select step from metrics where key = 'train/loss' group by run_uuid, step"
    assert sorted(step for (step,) in rows_of(database, curve)) == sorted([*range(1, 7)] * 4)


# -- rows that are one model under one protocol ----------------------------------------------------------------------


def test_rows_that_share_a_model_have_a_run_each(experiments: Path, tmp_path: Path) -> None:
    """The first keeps the run that the model has anyway; which one a row has does not depend on what else is run."""
    twins = 'Row("twin", Run()), Row("third", Run())'
    (experiments / "tiny.py").write_text(TINY.replace('Row("twin", Run())', twins))
    here = Resources()
    whole = prepare(tmp_path, seeds=2)
    assert [(task.name, task.is_twin) for task in whole.tasks] == [
        ("good", False),
        ("good seed 1", False),
        ("twin", True),
        ("twin seed 1", True),
        ("third", True),
        ("third seed 1", True),
        ("diverges", False),
        ("diverges seed 1", False),
    ]
    runs = {task.name: task.fingerprint(here) for task in whole.tasks}
    assert len(set(runs.values())) == 8
    assert len({task.training(here).fingerprint for task in whole.tasks}) == 4, "what is trained is shared all the same"
    for task in whole.tasks:
        alone = prepare(tmp_path, seeds=2, only=[task.row.name])
        assert runs[task.name] == alone.tasks[task.seed].fingerprint(here)
    for task in (task for task in whole.tasks if not task.is_twin):
        objects = [["synthetic", task.benchmarks[0].digest(masks=True)]]
        model = task.training(here).fingerprint
        assert runs[task.name] == fingerprint({"model": model, "eval": plain(task.run.eval), "objects": objects})


@pytest.mark.parametrize("change", ["eval.threshold=0.4", "method=graphcut", "dataset=folder:elsewhere"])
def test_rows_that_differ_in_anything_are_no_twins(experiments: Path, tmp_path: Path, change: str) -> None:
    synthetic.write_photos(tmp_path / "elsewhere", 2)
    name, _, value = change.replace("folder:elsewhere", f"folder:{tmp_path / 'elsewhere'}").partition("=")
    other = f'Row("twin", changed(Run(), **{{{name!r}: {value if value[0] == "0" else repr(value)}}}))'
    (experiments / "tiny.py").write_text(TINY.replace('Row("twin", Run())', other))
    assert [task.is_twin for task in prepare(tmp_path, only=["twin"]).tasks] == [False]


def test_rows_whose_proposals_are_measured_are_twins_on_the_same_objects_only(
    experiments: Path, tmp_path: Path
) -> None:
    names = {"good": "objects", "twin": "objects", "other": "fewer"}
    for count, folder in enumerate(("fewer", "objects"), 1):
        synthetic.write_benchmark(tmp_path / folder, count)
    rows = [
        f'Row("{name}", changed(Run(), eval_datasets=("synthetic:{tmp_path / folder}",))),'
        for name, folder in names.items()
    ]
    text = TINY.replace('Row("twin", Run()),', " ".join(rows[1:])).replace("rows=(", 'measure=("overlap",), rows=(')
    (experiments / "tiny.py").write_text(text.replace('Row("good", Run(), {"synthetic/noc90": 2.0}),', rows[0]))
    prepared = prepare(tmp_path, assignments=[], only=["twin", "other"])
    assert {task.name: task.is_twin for task in prepared.tasks} == {"twin": True, "other": False}


def test_twins_among_the_experiments_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features without a network have neither position embeddings nor layers."""
    monkeypatch.setenv("MIS_EXPERIMENTS", str(FOLDER))
    words = {"profile": "smoke", "root": Storage(str(tmp_path)), "data_root": None, "resources": Resources()}
    prepared = sweep.prepare("ablation_fidelity", **words)  # type: ignore[arg-type]
    twins = [task.name for task in prepared.tasks if task.is_twin]
    assert twins == ["position_resize=bilinear", "layer=last_block"]
    assert len({task.fingerprint(Resources()) for task in prepared.tasks}) == len(prepared.tasks)
