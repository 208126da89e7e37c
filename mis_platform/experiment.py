"""An experiment is a value: a question, the runs that answer it, and the numbers the paper gives for them.

A new one is a file of about 25 lines under experiments/ with a module-level `EXPERIMENT`. Nothing here imports Ray or
torch, so `mis list` and a typo answer at once.
"""

import ast
import dataclasses
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mis_platform.config import TRAINED, Run, check_simpleclick, flatten, nearest, override, with_values

PAPER_PROFILE = "paper"  # the only profile whose numbers may be measured against the paper's
Measure = Literal["clicks", "overlap"]

# Settings of SimpleClick's training on labels (models/iter_mask/plainvit_base448_sbd_itermask.py); schedule as MIS's.
SUPERVISED = {
    "target.source": "labels",
    "train.loss": "normalized_focal",
    "train.smooth_weight": 0,
    "augment.color_augmentation": False,
}


@dataclass(frozen=True)
class Row:
    """One line of a table: a run, and what the paper measured for it."""

    name: str
    run: Run
    paper: Mapping[str, float] = field(default_factory=dict)  # "grabcut/noc85" -> clicks
    pretraining: Run | None = None  # start from the model of this run (fine-tuning, Table 2)
    quoted: str = ""  # where the numbers come from, for a row that does not run here
    against: str = ""  # the row that it is compared with, where that is not the experiment's default

    def __post_init__(self) -> None:
        if self.run.method == TRAINED:
            check_simpleclick(self.run.eval)

    def seeds(self, asked: int, measure: Sequence[Measure] = ("clicks",)) -> int:
        """How often it is run: what is measured without a training is the same every time."""
        if self.quoted:
            return 0
        return asked if self.run.method == TRAINED and "clicks" in measure else 1


@dataclass(frozen=True)
class Experiment:
    """A table or a figure of the paper.

    question: only its first line is kept, so that a file can pass its `__doc__`. rows: with different names. default:
    the row that the others are compared with. measure: "clicks" trains each row and lets the click robot score it,
    "overlap" scores its merge trees (mean best overlap) without training, or both. tolerance: clicks by which our NoC
    may differ from the paper's and still count as reproduced.
    """

    question: str
    rows: tuple[Row, ...]
    source: str  # "Table 4"
    default: str = ""
    measure: tuple[Measure, ...] = ("clicks",)
    figure: Literal["bars", "curves", "objects", "proposals"] = "bars"
    tolerance: float = 0.3
    note: str = ""  # what a reader has to know before comparing
    asked: tuple[str, ...] | None = None  # settings that the rows vary as written, where a profile varies more

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        assert len(set(names)) == len(names) > 0, f"rows need different names: {names}"
        for name in (self.default, *(row.against for row in self.rows)):
            assert name in {"", *names}, f"{name} is no row: {names}"
        object.__setattr__(self, "question", self.question.strip().partition("\n")[0])

    def row(self, name: str) -> Row:
        """Raises ValueError that names the nearest row, or lists them."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"no row is called {name!r}{nearest(name, [row.name for row in self.rows])}")

    def reference(self, row: Row) -> Row | None:
        """The row that this one is compared with; None for the default row itself, or where there is none."""
        name = row.against or self.default
        return self.row(name) if name and name != row.name else None

    def select(self, names: Sequence[str]) -> "Experiment":
        """Only these rows; rows that are not named are nobody's reference. All of them for no names."""
        if not names:
            return self
        chosen = (self.row(name) for name in dict.fromkeys(names))
        rows = tuple(row if row.against in names else dataclasses.replace(row, against="") for row in chosen)
        return dataclasses.replace(self, rows=rows, default=self.default if self.default in names else "")

    def with_settings(self, assignments: Iterable[str]) -> "Experiment":
        """Every run with each `dotted.name=value` applied. Raises ValueError as `config.override` does, and where the
        setting is what the rows vary: then they would all be one.

        Where runs learn from labels, `target.*` is theirs alone: it says which labels, not what their pretraining is.
        """
        assignments = list(assignments)
        asked = self.varied() if self.asked is None else self.asked
        for name in {text.partition("=")[0].strip() for text in assignments} & set(asked):
            raise ValueError(f"--set {name}: that is what the rows differ in; choose among them with --only")
        others = [text for text in assignments if not text.strip().startswith("target.")]
        are_labels = any(row.run.target.source == "labels" for row in self.rows)

        def applied(run: Run) -> Run:
            is_other = are_labels and run.target.source != "labels"
            result: Run = override(run, others if is_other else assignments)
            return result

        return self._each(applied)

    def with_profile(self, name: str) -> "Experiment":
        """The same rows at the size of a profile.

        What the rows vary, and what a row sets apart from `Run()`, stays: that is what the experiment asks about. What
        a profile says of a source of proposals is for experiments that have it among their rows.
        The paper's numbers stay too; whoever compares with them has to look at the profile.
        """
        profile, varied, usual = profile_named(name), self.varied(), flatten(Run())
        sources = {f"sources.{row.run.target.source}" for row in self.rows}

        def is_free(key: str, run: Run) -> bool:
            is_used = not key.startswith("sources.") or key.rpartition(".")[0] in sources
            return is_used and key not in varied and flatten(run)[key] == usual[key]

        def sized(run: Run) -> Any:
            return override(run, [f"{key}={value}" for key, value in profile.of(run).items() if is_free(key, run)])

        return dataclasses.replace(self._each(sized), asked=tuple(varied))

    def varied(self) -> list[str]:
        """Dotted names of the settings in which the rows that run here differ."""
        flat = [flatten(row.run) for row in self.rows if not row.quoted]
        return [name for name in flat[0] if len({repr(each[name]) for each in flat}) > 1] if flat else []

    def _each(self, change: Callable[[Run], Run]) -> "Experiment":
        rows = tuple(
            dataclasses.replace(row, run=change(row.run), pretraining=row.pretraining and change(row.pretraining))
            for row in self.rows
        )
        return dataclasses.replace(self, rows=rows)


def vary(
    run: Run,
    name: str,
    values: Iterable[Any],
    paper: Mapping[Any, Mapping[str, float]] | None = None,
    label: str = "",
) -> tuple[Row, ...]:
    """A row for each value of one setting, called e.g. "alpha=0.8".

    paper: value -> metric -> the paper's number; label: what the row's name says for the setting, if not its last part.
    """
    values, numbers = list(values), paper or {}
    assert set(numbers) <= set(values), f"the paper's numbers are for {list(numbers)}, the rows for {values}"
    leaf = label or name.rsplit(".", 1)[-1]
    return tuple(Row(f"{leaf}={value}", changed(run, **{name: value}), numbers.get(value, {})) for value in values)


def changed(run: Run, **settings: Any) -> Run:
    """`run` with dotted settings changed: changed(Run(), **{"sampling.alpha": 0.8})."""
    result: Run = with_values(run, settings)
    return result


def noc(dataset: str, noc85: float | None, noc90: float | None) -> dict[str, float]:
    """The paper's pair of numbers under their metric names; None where it prints none."""
    numbers = {f"{dataset}/noc85": noc85, f"{dataset}/noc90": noc90}
    return {name: value for name, value in numbers.items() if value is not None}


Pair = tuple[float | None, float | None]  # NoC@85, NoC@90


def four(grabcut: Pair, berkeley: Pair, sbd: Pair, davis: Pair) -> dict[str, float]:
    """The paper's (NoC@85, NoC@90) on its four benchmarks."""
    pairs = {"grabcut": grabcut, "berkeley": berkeley, "sbd": sbd, "davis": davis}
    return {key: value for name, pair in pairs.items() for key, value in noc(name, *pair).items()}


# -- profiles --------------------------------------------------------------------------------------------------------

# The smallest model at one attention window, with nothing to download.
_WITHOUT_WEIGHTS = {
    "features.extractor": "color_texture",
    "sources.tokencut.tau": "0.9",  # these features are all alike at the published 0.2
    "model.variant": "vit_xt",
    "model.init": "random",
    "model.image_size": "224",
    "eval.zoom_size": "224",
    "eval.davis_zoom_size": "224",
}


@dataclass(frozen=True)
class Profile:
    """Sizes of an experiment, as data: settings that rows get, and so part of every fingerprint."""

    settings: Mapping[str, str]  # dotted name -> value
    labelled: Mapping[str, str] = field(default_factory=dict)  # for rows that learn from labels, over the settings

    def of(self, run: Run) -> dict[str, str]:
        """What this profile sets in `run`."""
        return {**self.settings, **(self.labelled if run.target.source == "labels" else {})}


PROFILES = {
    # The paper's sizes, with its benchmarks under --data-root.
    PAPER_PROFILE: Profile({"eval_datasets": '["grabcut", "berkeley", "sbd", "davis"]'}),
    # Half an hour on a GPU or a night on a laptop, without public weights. Few photos have labels: more epochs of them.
    "small": Profile(
        {
            "dataset": "photos",
            "eval_datasets": '["grabcut"]',
            **_WITHOUT_WEIGHTS,
            "train.batch_size": "16",
            "train.learning_rate": "1e-3",
            "train.epochs": "16",
            "train.decay_epochs": "[13]",
            "clicks.iterative_clicks": "1",
        },
        labelled={"dataset": "sbd", "train.epochs": "200", "train.decay_epochs": "[160]"},
    ),
    # Minutes on two cores: the photos that the wheels carry, a few steps.
    "smoke": Profile(
        {
            "dataset": "wheels",
            "eval_datasets": '["synthetic"]',
            **_WITHOUT_WEIGHTS,
            "eval.max_clicks": "3",
            "train.batch_size": "2",
            "train.max_steps": "6",
            "clicks.iterative_clicks": "1",
        }
    ),
}


def profile_named(name: str) -> Profile:
    """Raises ValueError that lists the profiles."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; there are: {', '.join(PROFILES)}")
    return PROFILES[name]


# -- files -----------------------------------------------------------------------------------------------------------


def experiments_folder() -> Path:
    """MIS_EXPERIMENTS, or experiments/ in the working directory, or that of the source tree or installed package."""
    given = os.environ.get("MIS_EXPERIMENTS")
    if given:
        return Path(given)
    installed = Path(sysconfig.get_path("data")) / "share" / "mis-platform" / "experiments"
    places = (Path.cwd() / "experiments", Path(__file__).resolve().parent.parent / "experiments", installed)
    return next((place for place in places if place.is_dir()), places[0])


def list_experiments(folder: Path | None = None) -> dict[str, Path]:
    """Name -> file, in the order of the names. Nothing is imported."""
    folder = folder or experiments_folder()
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")}


def question_of(file: Path) -> str:
    """First line of the docstring of an experiment's file, without running it; what is wrong with a broken file."""
    try:
        return (ast.get_docstring(ast.parse(file.read_text(encoding="utf8"))) or "").partition("\n")[0]
    except (SyntaxError, ValueError, OSError) as error:
        return f"(broken: {error})"


def load_experiment(name: str, folder: Path | None = None) -> Experiment:
    """The `EXPERIMENT` of experiments/NAME.py. Raises ValueError that lists what there is, or says what is wrong."""
    files = list_experiments(folder)
    if name not in files:
        raise ValueError(f"unknown experiment {name!r}{nearest(name, files)}")
    spec = importlib.util.spec_from_file_location(f"mis_experiments.{name}", files[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{files[name]} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, "EXPERIMENT", None)
    if not isinstance(found, Experiment):
        raise ValueError(f"{files[name]} has no EXPERIMENT = Experiment(...)")
    return found
