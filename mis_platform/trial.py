"""One row of a sweep with one seed, and the Ray Tune trial that works it off in a process of its own.

That process imports this module, and so neither MLflow nor matplotlib: starting it is most of what a short trial takes.
"""

import functools
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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

SECONDS_BETWEEN_LOOKS = 1.0  # at the bell, and at the work
ENDING_SECONDS = 3.0  # for work that is to stop: an evaluation looks up every two, a computation at the next photo
ALIVE, METRICS, DOING, FAILED, DONE, STOPPED = "alive", "metrics", "doing", "failed", "done", "stopped"

Say = Callable[[str, Any], None]  # a kind of sign, and what goes with it
Look = Callable[[Mapping[str, float] | None], bool]


@dataclass(frozen=True)
class Task:
    """One row with one seed."""

    row: Row
    seed: int
    photos: Dataset | None  # None: nothing is trained
    benchmarks: tuple[Dataset, ...]
    measure: tuple[str, ...]
    pretraining_photos: Dataset | None = None  # of the row's pretraining, where it has one
    is_pretraining: bool = False  # what rows start from, which nobody scores
    is_twin: bool = False  # an earlier row of the experiment is the same model, scored in the same way

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
        """The fingerprint of the model, the protocol and the objects it is scored on, whatever the row is called.

        The objects by their content: a benchmark that was exchanged has other scores under the same name, and MLflow
        can only add to those that a run has.
        """
        if self.is_pretraining:
            return fingerprint({"pretraining": self.model(resources)})
        if "clicks" not in self.measure:
            return fingerprint([stage.fingerprint for stage in self.overlaps(resources)])
        objects = sorted([each.name, each.digest(masks=True)] for each in self.benchmarks)
        return fingerprint({"model": self.model(resources), "eval": plain(self.run.eval), "objects": objects})

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


# -- work that may hang ----------------------------------------------------------------------------------------------


def ensure_watched(stage: Stage, root: Storage, doing: str, silence: float) -> None:
    """As `ensure`, but a stage without a sign of life is ended: its thread, and with it what it holds on the cluster.

    doing: what the stage is, for people; silence: seconds. Raises as `ensure`, TimeoutError for a stage that hangs.
    """
    _watch(functools.partial(_ensure_heard, stage, root), doing, silence, lambda metrics: False, ENDING_SECONDS)


def silent(what: str, seconds: float) -> TimeoutError:
    """The end of what hangs. seconds: the setting."""
    return TimeoutError(f"the {what} gave no sign of life for {seconds:g} seconds (resources.trial_silence)")


def _ensure_heard(stage: Stage, root: Storage, say: Say) -> None:
    def hear(has_got_on: bool) -> None:
        stopping.check()  # also while nothing gets on: work that was given up holds CPUs
        if has_got_on:
            say(ALIVE, None)

    with heard_by(hear):
        ensure(stage, root)


def _watch(work: Callable[[Say], None], doing: str, silence: float, look: Look, patience: float = 0.0) -> None:
    """Do the work in a thread, so that this one can give it up after `silence` seconds without a sign of life.

    work: says ALIVE when it has got on, METRICS with those of a step, DOING with what it begins. look: called with
    metrics, and about once a second without; whether the work shall stop. However this ends, the work is told to.
    patience: seconds for it to end then; none where the process ends with it.
    Raises what the work raises, except Preempted.
    """
    signs: queue.Queue[tuple[str, Any]] = queue.Queue()
    stop = threading.Event()
    thread = threading.Thread(target=_work, args=(work, signs, stop), name="watched", daemon=True)
    thread.start()
    try:
        _hear(signs, doing, silence, look, stop)
    finally:
        stop.set()
        thread.join(patience)


def _hear(
    signs: "queue.Queue[tuple[str, Any]]", doing: str, silence: float, look: Look, stop: threading.Event
) -> None:  # fmt: skip
    heard = time.monotonic()
    while True:
        try:
            kind, value = signs.get(timeout=min(silence, SECONDS_BETWEEN_LOOKS))
            heard = time.monotonic()
        except queue.Empty:
            if time.monotonic() - heard >= silence:
                raise silent(doing, silence) from None
            kind, value = ALIVE, None
        if look(value if kind == METRICS else None):
            stop.set()
        if kind == DOING:
            doing = value
        elif kind == FAILED:
            raise value
        elif kind in (DONE, STOPPED):
            return


def _work(work: Callable[[Say], None], signs: "queue.Queue[tuple[str, Any]]", stop: threading.Event) -> None:
    try:
        with stopping.stopped_by(stop.is_set):
            work(lambda kind, value: signs.put((kind, value)))
        signs.put((DONE, None))
    except Preempted:
        signs.put((STOPPED, None))
    except BaseException as error:
        signs.put((FAILED, error))


# -- a trial ---------------------------------------------------------------------------------------------------------


class Bell:
    """An actor beside the driver of a sweep: by it the driver tells the trials to stop, and they say when they have.

    They ask it about once a second, so that it also knows of a process that hangs as a whole, with its own watch.
    """

    def __init__(self) -> None:
        self._is_rung = False
        self._working: dict[int, Any] = {}  # group -> what its process is ended by
        self._heard: dict[int, float] = {}  # group -> when it asked last, in seconds of this process's clock
        self._suspected: set[int] = set()

    def ring(self) -> None:
        """Tell all trials to stop."""
        self._is_rung = True

    def is_rung(self, group: int) -> bool:
        """Whether trials shall stop; a trial that asks is alive."""
        self._heard[group] = time.monotonic()
        return self._is_rung

    def enter(self, group: int, process: Any) -> bool:
        """A trial begins, unless the bell has been rung; whether it may. process: the handle of its actor."""
        if not self._is_rung:
            self._working[group], self._heard[group] = process, time.monotonic()
        return not self._is_rung

    def leave(self, group: int) -> None:
        """A trial has ended."""
        self._working.pop(group, None)

    def is_quiet(self) -> bool:
        """Whether no trial is at work."""
        return not self._working

    def silent(self, seconds: float, over: Collection[int]) -> dict[int, Any]:
        """The trials that have not asked for so long, with their processes, at every look until they are over.

        Two looks in a row must find them silent: after one that comes late, as when everything was stopped for a
        while, they get the time to ask. over: groups of trials that are known to have ended, however that was.
        """
        for group in over:
            self.leave(group)
        now = time.monotonic()
        found = {group for group in self._working if now - self._heard[group] >= seconds}
        doomed, self._suspected = found & self._suspected, found
        return {group: self._working[group] for group in sorted(doomed)}  # again, if this answer does not arrive


def run_trial(
    config: Mapping[str, Any], groups: Sequence[Sequence[Task]], root: Storage, resources: Resources, bell: Any
) -> None:
    """Train once and score every row of the group; stop, with a checkpoint, when the Bell (its handle) is rung.

    A trial without a sign of life for resources.trial_silence seconds ends as a failed row, instead of holding the
    sweep up for ever. Signs are training steps and clicks.
    """
    group = config["group"]

    def look(metrics: Mapping[str, float] | None) -> bool:
        if metrics is not None:
            tune.report(metrics)
        return bool(ray.get(bell.is_rung.remote(group)))

    if ray.get(bell.enter.remote(group, ray.get_runtime_context().current_actor)):
        try:
            work = functools.partial(_train_and_score, groups[group], root, resources)
            _watch(work, "training", resources.trial_silence, look)
        finally:
            ray.get(bell.leave.remote(group))


def _train_and_score(tasks: Sequence[Task], root: Storage, resources: Resources, say: Say) -> None:
    def report_step(step: int, metrics: dict[str, float]) -> None:
        say(METRICS, {"step": step, **metrics})

    _ensure_heard(tasks[0].training(resources, report_step), root, say)  # every step is a sign, not only logged ones
    say(DOING, "evaluation")
    for task in tasks:
        for stage in task.clicks(root, resources):
            _ensure_heard(stage, root, say)
