"""Experiments are values: the paper's tables as it prints them, one shared default run, refusals that help."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mis_platform import cli, experiment
from mis_platform.config import Run, flatten, override
from mis_platform.experiment import (
    PROFILES,
    Experiment,
    Row,
    changed,
    four,
    list_experiments,
    load_experiment,
    noc,
    question_of,
    vary,
)

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
NAMES = [
    *("ablation_alpha", "ablation_features", "ablation_fidelity", "ablation_lambda", "ablation_sampling"),
    *("figure5", "figure6", "figure7", "table1", "table2_label_fraction"),
]


def load(name: str) -> Experiment:
    return load_experiment(name, FOLDER)


@pytest.fixture
def alphas() -> Experiment:
    return Experiment("Which alpha?", vary(Run(), "sampling.alpha", [0.8, 0.9]), "Table 4", default="alpha=0.9")


# -- the files -------------------------------------------------------------------------------------------------------


def test_every_experiment_is_listed() -> None:
    assert list(list_experiments(FOLDER)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_loads_and_asks_a_question(name: str) -> None:
    experiment = load(name)
    assert experiment.question == question_of(FOLDER / f"{name}.py")
    assert experiment.question.endswith("?")
    assert experiment.source
    assert any(not row.quoted for row in experiment.rows)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_every_profile_fits_every_experiment(name: str, profile: str) -> None:
    before, after = load(name), load(name).with_profile(profile)
    assert after.asked == tuple(before.varied())
    for setting in before.varied():
        assert [flatten(row.run)[setting] for row in after.rows] == [flatten(row.run)[setting] for row in before.rows]
    assert [row.paper for row in after.rows] == [row.paper for row in before.rows]
    for row in after.rows:
        sized = override(Run(), [f"{key}={value}" for key, value in PROFILES[profile].of(row.run).items()])
        model = row.run.model.model_copy(update={"previous_mask": sized.model.previous_mask})
        assert (row.run.dataset, model, row.run.eval_datasets) == (sized.dataset, sized.model, sized.eval_datasets)


@pytest.mark.parametrize(
    ("name", "row", "metric", "clicks"),
    [
        ("table1", "MIS", "grabcut/noc90", 2.32),
        ("table1", "MIS w/o smoothness", "davis/noc90", 10.08),
        ("table1", "RITM", "berkeley/noc85", 1.87),
        ("table1", "PseudoClick", "sbd/noc90", 5.61),
        ("table1", "IA+SA", "davis/noc85", 5.16),
        ("table1", "Geodesic Matting", "davis/noc90", 19.50),
        ("table1", "FreeMask*", "sbd/noc85", 8.61),
        ("table2_label_fraction", "1% labels from MAE", "sbd/noc85", 8.01),
        ("table2_label_fraction", "5% labels from MIS", "davis/noc90", 6.11),
        ("table2_label_fraction", "10% labels from MIS", "grabcut/noc90", 1.50),
        ("ablation_lambda", "lambda=0", "berkeley/noc90", 5.51),
        ("ablation_lambda", "lambda=3", "sbd/noc90", 9.33),
        ("ablation_lambda", "lambda=15", "davis/noc85", 6.71),
        ("ablation_alpha", "alpha=0.0", "sbd/noc85", 8.71),
        ("ablation_alpha", "alpha=0.95", "davis/noc85", 6.09),
        ("ablation_sampling", "strategy=uniform", "grabcut/noc85", 3.84),
        ("ablation_sampling", "strategy=top_down", "davis/noc90", 8.44),
    ],
)
def test_the_papers_numbers(name: str, row: str, metric: str, clicks: float) -> None:
    assert load(name).row(row).paper[metric] == clicks


def test_a_quoted_row_says_what_would_run_it() -> None:
    """As a command line that is read as ours; one for each, under a name of its own."""
    quoted = [row for row in load("table1").rows if row.quoted]
    found = [re.findall(r"mis ((?:import|eval) [^&]+)", row.quoted) for row in quoted]
    assert len(quoted) == 12
    assert all(found)
    assert len({tuple(commands) for commands in found}) == 12
    for command in itertools.chain(*found):
        cli._check_command(command.split())


@pytest.mark.parametrize("metric", ["berkeley/noc85", "sbd/noc85", "sbd/noc90", "davis/noc90"])
def test_what_the_paper_does_not_report_has_no_number(metric: str) -> None:
    assert metric not in load("table1").row("IA+SA").paper


def test_the_default_row_of_the_tables_is_one_training() -> None:
    tables = [load(name) for name in ("table1", "ablation_lambda", "ablation_alpha", "ablation_sampling")]
    assert [table.row(table.default).run for table in tables] == [Run()] * 4
    for profile in PROFILES:  # settings of a source of proposals are no part of a training on trees
        sized = [table.with_profile(profile).row(table.default).run for table in tables]
        assert len({run.model_copy(update={"sources": Run().sources}).model_dump_json() for run in sized}) == 1
    assert len({tuple(table.row(table.default).paper.items()) for table in tables}) == 1


def test_labels_are_compared_from_both_starts() -> None:
    experiment = load("table2_label_fraction")
    assert [row.run.target.fraction for row in experiment.rows] == [0.01, 0.01, 0.05, 0.05, 0.10, 0.10] * 2
    assert [row.run.target.subset for row in experiment.rows] == ["first"] * 6 + ["random"] * 6
    assert [bool(row.paper) for row in experiment.rows] == [True] * 6 + [False] * 6
    for scratch, tuned in zip(experiment.rows[::2], experiment.rows[1::2]):
        assert scratch.run == tuned.run
        assert scratch.run.target.source == "labels"
        assert scratch.run.train.smooth_weight == 0
        assert not scratch.run.augment.color_augmentation
        assert (scratch.pretraining, tuned.pretraining) == (None, Run())
        assert experiment.reference(scratch) is None
        assert experiment.reference(tuned) == scratch


def test_which_labels_is_no_setting_of_the_pretraining() -> None:
    """It learns from the trees of all photos, which refuse a share of labels."""
    table = load("table2_label_fraction")
    first = dataclasses.replace(table, rows=table.rows[:2], default="")
    drawn = first.with_settings(["target.subset=random", "target.subset_seed=3", "train.seed=4"]).rows[1]
    assert (drawn.run.target.subset, drawn.run.target.subset_seed, drawn.run.train.seed) == ("random", 3, 4)
    assert drawn.pretraining == override(Run(), ["train.seed=4"])
    with pytest.raises(ValueError, match=r"target\.subset: that is what the rows differ in"):
        table.with_settings(["target.subset=random"])
    alphas = load("ablation_alpha").with_settings(["target.source=dsm"])
    assert {row.run.target.source for row in alphas.rows} == {"dsm"}, "without labels it is a setting of every run"
    with pytest.raises(ValueError, match=r"need target\.source=labels"):
        load("ablation_alpha").with_settings(["target.subset=random"])


def test_a_profile_changes_the_pretraining_but_not_what_the_row_sets() -> None:
    row = load("table2_label_fraction").with_profile("small").rows[1]
    assert row.pretraining is not None
    assert (row.run.train.smooth_weight, row.pretraining.train.smooth_weight) == (0, 10)
    assert (row.run.train.batch_size, row.pretraining.train.batch_size) == (16, 16)
    shared = load("ablation_alpha").with_profile("small")
    assert row.pretraining == shared.row(shared.default).run, "which is a row of Tables 1, 3, 4 and 5"


def test_rows_that_learn_from_labels_have_a_data_set_with_labels_and_epochs_of_their_own() -> None:
    table = load("table1").with_profile("small")
    labelled, other = table.row("SimpleClick").run, table.row("MIS").run
    assert (labelled.dataset, labelled.train.epochs, labelled.train.decay_epochs) == ("sbd", 200, (160,))
    assert (other.dataset, other.train.epochs, other.train.decay_epochs) == ("photos", 16, (13,))
    # What a profile varies is not what the experiment asks: one answer for all rows may be given.
    changed = table.with_settings(["dataset=folder:PHOTOS", "train.epochs=3", "train.decay_epochs=[]"])
    assert {(row.run.dataset, row.run.train.epochs) for row in changed.rows if not row.quoted} == {
        ("folder:PHOTOS", 3),
    }
    with pytest.raises(ValueError, match="what the rows differ in"):
        table.with_settings(["train.smooth_weight=1"])


@pytest.mark.parametrize(("profile", "tau"), [("paper", 0.2), ("small", 0.9), ("smoke", 0.9)])
def test_tokencut_suits_the_features_of_the_profile(profile: str, tau: float) -> None:
    for name, row in (("table1", "TokenCut*"), ("figure5", "TokenCut")):
        assert load(name).with_profile(profile).row(row).run.sources.tokencut.tau == tau
    other = load("ablation_alpha").with_profile(profile).rows[0].run
    assert other.sources == Run().sources, "an experiment without TokenCut keeps its identity"


def test_listing_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text('"""Why?\n\nBecause."""\nraise RuntimeError("this file was run")\n')
    (tmp_path / "_helper.py").write_text("raise RuntimeError\n")
    (tmp_path / "silent.py").write_text("x = 1\n")
    files = list_experiments(tmp_path)
    assert list(files) == ["fails", "silent"]
    assert [question_of(file) for file in files.values()] == ["Why?", ""]
    heavy = "{'ray', 'torch', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules)"
    code = f"import sys\nfrom mis_platform.experiment import list_experiments as l\nprint(len(l()), {heavy})"
    environment = {**os.environ, "MIS_EXPERIMENTS": str(FOLDER)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == f"{len(NAMES)} set()", done.stderr


def test_an_unknown_experiment_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown experiment 'tabel1'; did you mean table1\?"):
        load("tabel1")
    (tmp_path / "empty.py").write_text("EXPERIMENT = 3\n")
    with pytest.raises(ValueError, match="has no EXPERIMENT"):
        load_experiment("empty", tmp_path)


# -- experiments -----------------------------------------------------------------------------------------------------


def test_rows_need_different_names_and_references_that_exist(alphas: Experiment) -> None:
    with pytest.raises(AssertionError, match="different names"):
        dataclasses.replace(alphas, rows=(alphas.rows[0], alphas.rows[0]))
    with pytest.raises(AssertionError, match="alpha=1 is no row"):
        dataclasses.replace(alphas, default="alpha=1")
    with pytest.raises(AssertionError, match="nobody is no row"):
        dataclasses.replace(alphas, rows=(*alphas.rows, Row("mine", Run(), against="nobody")))


def test_only_the_first_line_of_a_question_is_kept() -> None:
    assert Experiment("\nWhy?\n\nBecause.\n", (Row("one", Run()),), "").question == "Why?"


def test_a_row_is_found_or_the_nearest_named(alphas: Experiment) -> None:
    assert alphas.row("alpha=0.8").run.sampling.alpha == 0.8
    with pytest.raises(ValueError, match=r"no row is called 'alpa=0.8'; did you mean alpha=0.8\?"):
        alphas.row("alpa=0.8")
    with pytest.raises(ValueError, match=r"there are: alpha=0.8, alpha=0.9"):
        alphas.row("xyz")


def test_a_row_is_compared_with_the_default_or_its_own(alphas: Experiment) -> None:
    low, high = alphas.rows
    assert alphas.reference(low) == high
    assert alphas.reference(high) is None
    own = dataclasses.replace(alphas, rows=(low, high, Row("mine", Run(), against="alpha=0.8")))
    assert own.reference(own.row("mine")) == low
    assert own.select(["mine"]).reference(own.select(["mine"]).rows[0]) is None


def test_select_keeps_the_order_asked_for_and_drops_the_default(alphas: Experiment) -> None:
    assert alphas.select([]) is alphas
    assert [row.name for row in alphas.select(["alpha=0.9", "alpha=0.8", "alpha=0.9"]).rows] == [
        "alpha=0.9",
        "alpha=0.8",
    ]
    assert alphas.select(["alpha=0.9"]).default == "alpha=0.9"
    assert alphas.select(["alpha=0.8"]).default == ""
    with pytest.raises(ValueError, match=r"did you mean alpha=0.9\?"):
        alphas.select(["alpha=0.99"])


def test_varied_looks_only_at_rows_that_run(alphas: Experiment) -> None:
    assert alphas.varied() == ["sampling.alpha"]
    quoted = Row("other", changed(Run(), **{"train.epochs": 3}), quoted="elsewhere")
    assert dataclasses.replace(alphas, rows=(*alphas.rows, quoted)).varied() == ["sampling.alpha"]
    assert alphas.select(["alpha=0.8"]).varied() == []
    assert Experiment("?", (quoted,), "").varied() == []


def test_settings_reach_every_run_and_the_pretraining(alphas: Experiment) -> None:
    tuned = dataclasses.replace(alphas, rows=(*alphas.rows, Row("tuned", Run(), pretraining=Run())))
    after = tuned.with_settings(["train.epochs=3", "train.decay_epochs=[2]"])
    assert {row.run.train.epochs for row in after.rows} == {3}
    assert after.row("tuned").pretraining == override(Run(), ["train.epochs=3", "train.decay_epochs=[2]"])
    assert after.row("alpha=0.8").pretraining is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sampling.alpha=0.5", "that is what the rows differ in; choose among them with --only"),
        ("train.epoch=3", r"unknown setting 'train.epoch'; did you mean train.epochs\?"),
        ("train.learning_rate=NaN", "finite"),
        ("train.epochs", "expected dotted.name=value"),
    ],
)
def test_a_wrong_setting_is_refused(alphas: Experiment, assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alphas.with_settings([assignment])


def test_an_unknown_profile_is_refused(alphas: Experiment) -> None:
    with pytest.raises(ValueError, match="unknown profile 'big'; there are: paper, small, smoke"):
        alphas.with_profile("big")


def test_the_papers_profile_changes_nothing_but_the_benchmarks(alphas: Experiment) -> None:
    run = alphas.with_profile("paper").row("alpha=0.9").run
    assert run.eval_datasets == ("grabcut", "berkeley", "sbd", "davis")
    assert run.model_copy(update={"eval_datasets": Run().eval_datasets}) == Run()


# -- rows ------------------------------------------------------------------------------------------------------------


def test_vary_makes_a_row_for_each_value() -> None:
    rows = vary(Run(), "train.smooth_weight", [0, 10], {10: noc("grabcut", 1.94, 2.32)}, label="lambda")
    assert [row.name for row in rows] == ["lambda=0", "lambda=10"]
    assert rows[0].run == override(Run(), ["train.smooth_weight=0"])
    assert rows[1].run == Run()
    assert [dict(row.paper) for row in rows] == [{}, {"grabcut/noc85": 1.94, "grabcut/noc90": 2.32}]
    assert vary(Run(), "sampling.alpha", [0.8])[0].name == "alpha=0.8"


def test_numbers_for_a_value_without_a_row_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match=r"0\.85"):
        vary(Run(), "sampling.alpha", [0.8], {0.85: {}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling.alfa": 0.8}, r"unknown setting 'sampling.alfa'; did you mean sampling.alpha\?"),
        ({"sampling": 0.8}, "unknown setting 'sampling'"),
        ({"sampling.alpha": float("nan")}, "finite|must lie in"),
        ({"train.learning_rate": float("inf")}, "finite"),
        ({"sampling.alpha": 1.0}, r"must lie in \[0, 1\)"),
        ({"train.loss": "dice"}, "'bce' or 'normalized_focal'"),
    ],
)
def test_changed_refuses_what_is_no_setting(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(Run(), **settings)


def test_changed_leaves_its_run_alone() -> None:
    run = Run()
    assert changed(run, **{"sampling.alpha": 0.8, "train.epochs": 3}).train.epochs == 3
    assert run == Run()


def test_unreported_numbers_are_left_out() -> None:
    assert noc("davis", None, 7.57) == {"davis/noc90": 7.57}
    assert four((1, 2), (None, None), (3, None), (4, 5)) == {
        **{"grabcut/noc85": 1, "grabcut/noc90": 2, "sbd/noc85": 3},
        **{"davis/noc85": 4, "davis/noc90": 5},
    }


def test_a_broken_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "zero.py").write_text("EXPERIMENT = 1 / 0")
    (tmp_path / "torn.py").write_text("def (")
    for name, reason in (("zero", "ZeroDivisionError"), ("torn", "SyntaxError")):
        with pytest.raises(ValueError, match=reason):
            load_experiment(name, tmp_path)
    assert question_of(tmp_path / "torn.py").startswith("(broken")


def test_the_folder_of_an_installed_package_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIS_EXPERIMENTS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "__file__", str(tmp_path / "site-packages" / "mis_platform" / "experiment.py"))
    monkeypatch.setattr(experiment.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert experiment.experiments_folder() == tmp_path / "experiments"  # nothing anywhere: what the error names
    installed = tmp_path / "data" / "share" / "mis-platform" / "experiments"
    installed.mkdir(parents=True)
    assert experiment.experiments_folder() == installed
    beside = tmp_path / "site-packages" / "experiments"
    beside.mkdir(parents=True)
    assert experiment.experiments_folder() == beside
