"""One row of a sweep with one seed, and the Ray Tune trial that works it off in a process of its own.

That process imports this module, and so neither MLflow nor matplotlib: starting it is most of what a short trial takes.
"""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from mis_platform import pipeline, stopping
from mis_platform.artifacts import Stage, ensure
from mis_platform.config import TRAINED, Resources, Run, fingerprint, override, plain
from mis_platform.data.benchmarks import Dataset
from mis_platform.errors import Preempted
from mis_platform.experiment import Row
from mis_platform.progress import heard_by
from mis_platform.storage import Storage

SECONDS_BETWEEN_LOOKS = 1.0  # at the bell


@dataclass(frozen=True)
class Task:
    """One row with one seed."""

    row: Row
    seed: int
    photos: Dataset | None  # None: nothing is trained
    benchmarks: tuple[Dataset, ...]
    measure: tuple[str, ...]
    pretraining_photos: Dataset | None = None  # of the row's pretraining, where it has one
    is_twin: bool = False  # an earlier row of the experiment is the same model under the same protocol

    @property
    def run(self) -> Run:
        """The row's settings under this seed."""
        return seeded(self.row.run, self.seed)

    @property
    def name(self) -> str:
        """Of the row, with the seed if that is not 0."""
        return self.row.name if self.seed == 0 else f"{self.row.name} seed {self.seed}"

    def pretraining(self, resources: Resources) -> Stage | None:
        """The training that the row's own starts from, or None."""
        run = self.row.pretraining
        if run is None:
            return None
        photos = self.pretraining_photos
        assert photos is not None, "only a row that is trained has a pretraining"
        return pipeline.checkpoint_stage(photos, seeded(run, self.seed), resources, lambda step, metrics: None)

    def training(self, resources: Resources, on_metrics: pipeline.OnMetrics = lambda step, metrics: None) -> Stage:
        """The stage of the row's own training. on_metrics: as in `pipeline.checkpoint_stage`."""
        assert self.photos is not None, f"{self.row.name} is not trained"
        return pipeline.checkpoint_stage(self.photos, self.run, resources, on_metrics, self.pretraining(resources))

    @property
    def is_trained(self) -> bool:
        """Whether clicks are answered by a model that this row trains; else by a method that needs no training."""
        return "clicks" in self.measure and self.run.method == TRAINED

    def clicks(self, root: Storage, resources: Resources) -> list[Stage]:
        """The evaluations, once the model is trained."""
        if not self.is_trained:
            return [pipeline.method_clicks_stage(each, self.run, resources) for each in self.benchmarks]
        model = self.training(resources).directory(root)
        return [pipeline.clicks_stage(each, self.run, resources, model) for each in self.benchmarks]

    def overlaps(self, resources: Resources) -> list[Stage]:
        """The stages that score the proposals, one for each benchmark."""
        return [pipeline.overlap_stage(each, self.run, resources) for each in self.benchmarks]

    def is_done(self, root: Storage, resources: Resources) -> bool:
        """Whether every stage that the row is measured by is finished."""
        stages = self.overlaps(resources) if "overlap" in self.measure else []
        if self.is_trained and not self.training(resources).is_done(root):
            return False
        if "clicks" in self.measure:
            stages = stages + self.clicks(root, resources)
        return all(stage.is_done(root) for stage in stages)

    def fingerprint(self, resources: Resources) -> str:
        """That of the MLflow run: `measured`, and of a twin its name too, because every row has a run of its own."""
        measured = self.measured(resources)
        return fingerprint({"measured": measured, "row": self.row.name}) if self.is_twin else measured

    def measured(self, resources: Resources) -> str:
        """The fingerprint of the model and the protocol it is scored under, whatever the row is called."""
        if "clicks" not in self.measure:
            return fingerprint([stage.fingerprint for stage in self.overlaps(resources)])
        return fingerprint({"model": self.model(resources), "eval": plain(self.run.eval)})

    def model(self, resources: Resources) -> str:
        """The fingerprint of what answers the clicks: of a training, or of a method."""
        return self.training(resources).fingerprint if self.is_trained else pipeline.method_fingerprint(self.run)


def seeded(run: Run, seed: int) -> Run:
    """`run` with its training seed moved on by `seed`, and which images have labels if that is drawn; 0 leaves it."""
    if not seed:
        return run
    moved = [f"train.seed={run.train.seed + seed}"]
    if run.target.subset == "random":
        moved.append(f"target.subset_seed={run.target.subset_seed + seed}")
    changed: Run = override(run, moved)
    return changed


class Bell:
    """An actor beside the driver of a sweep: by it the driver tells the trials to stop, and they say when they have."""

    def __init__(self) -> None:
        self._is_rung = False
        self._working: set[int] = set()

    def ring(self) -> None:
        """Tell all trials to stop."""
        self._is_rung = True

    def is_rung(self) -> bool:
        """Whether trials shall stop."""
        return self._is_rung

    def enter(self, group: int) -> bool:
        """A trial begins, unless the bell has been rung; whether it may."""
        if not self._is_rung:
            self._working.add(group)
        return not self._is_rung

    def leave(self, group: int) -> None:
        """A trial has ended."""
        self._working.discard(group)

    def is_quiet(self) -> bool:
        """Whether no trial is at work."""
        return not self._working


def run_trial(
    config: Mapping[str, Any], groups: Sequence[Sequence[Task]], root: Storage, resources: Resources, bell: Any
) -> None:
    """Train once and score every row of the group; stop, with a checkpoint, when the Bell (its handle) is rung."""
    group = config["group"]
    if ray.get(bell.enter.remote(group)):
        try:
            _run_group(groups[group], root, resources, bell)
        finally:
            ray.get(bell.leave.remote(group))


def _run_group(tasks: Sequence[Task], root: Storage, resources: Resources, bell: Any) -> None:
    """The work is done in a thread, so that a trial without a sign of life for resources.trial_silence seconds ends as
    a failed row instead of holding the sweep up for ever. Signs are training steps and clicks.
    """
    signs: queue.Queue[tuple[str, Any]] = queue.Queue()
    stop = threading.Event()
    threading.Thread(target=_work, args=(tasks, root, resources, signs, stop), daemon=True).start()
    doing, heard = "training", time.monotonic()
    while True:
        try:
            kind, value = signs.get(timeout=min(resources.trial_silence, SECONDS_BETWEEN_LOOKS))
            heard = time.monotonic()
        except queue.Empty:
            if time.monotonic() - heard >= resources.trial_silence:
                silence = f"{resources.trial_silence:g} seconds (resources.trial_silence)"
                raise TimeoutError(f"the {doing} gave no sign of life for {silence}") from None
            kind, value = "alive", None
        if ray.get(bell.is_rung.remote()):
            stop.set()
        if kind == "metrics":
            tune.report(value)
        elif kind == "trained":
            doing = "evaluation"
        elif kind == "failed":
            raise value
        elif kind in ("done", "stopped"):
            return


def _work(
    tasks: Sequence[Task],
    root: Storage,
    resources: Resources,
    signs: "queue.Queue[tuple[str, Any]]",
    stop: threading.Event,
) -> None:
    def report_step(step: int, metrics: dict[str, float]) -> None:
        signs.put(("metrics", {"step": step, **metrics}))

    def give_sign() -> None:
        stopping.check()
        signs.put(("alive", None))

    try:
        with stopping.stopped_by(stop.is_set):
            ensure(tasks[0].training(resources, report_step), root)
            signs.put(("trained", None))
            for task in tasks:
                for stage in task.clicks(root, resources):
                    with heard_by(give_sign):
                        ensure(stage, root)
        signs.put(("done", None))
    except Preempted:
        signs.put(("stopped", None))
    except BaseException as error:
        signs.put(("failed", error))
