"""An experiment as Ray Tune trials: one for each training that is missing, which builds its own Ray Train job.

Tune restores nothing: what is done is what has a manifest. A sweep that was stopped anywhere goes on by running it
again, finished rows are not even started, an unfinished training goes on from its newest checkpoint. What many rows
need (trees, a pretraining) is made before the fan-out. Only this process writes to MLflow: one parent run for the
sweep, one child for each row, found again by their fingerprints.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before Ray Tune is imported: no CSV, JSON or TensorBoard copies of what MLflow gets.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables do not respect verbose=0

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback

from mis_platform import drawing, figures, jobs, pipeline, report, tracking
from mis_platform.artifacts import Stage, check_code, check_identity, check_missing, code_of, read_manifest, walk
from mis_platform.comparison import Comparison, Outcome, check_protocols, compare, render
from mis_platform.config import PIN, TRAINED, Resources, Run, fingerprint, flatten, plain, with_values
from mis_platform.data import synthetic
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.labels import labelled_subset
from mis_platform.errors import FingerprintMismatch
from mis_platform.evaluation.noc import iou_table
from mis_platform.experiment import Experiment, Row, load_experiment
from mis_platform.model.weights import licence_of
from mis_platform.saved_models import describe
from mis_platform.stages import cluster, train
from mis_platform.stages.training_loop import Schedule
from mis_platform.storage import Storage, StorageError
from mis_platform.trial import Bell, Task, ensure_watched, run_trial, silent

SAME_SIZE = ("eval_datasets", "features.weights", "model.init_weights")  # settings that leave a profile what it is
TRIES = 2  # of a trial whose process is lost, as with a spot node; its training goes on from the last checkpoint
DRIVER_CPU = 0.01  # of a trial: it only waits; with a whole CPU each, trials leave no room for their own workers
WHEEL_PHOTOS, WHEEL_BENCHMARK = "wheels", "synthetic"  # made below the root from photos that installed packages carry
WHEEL_OBJECTS = 8
Wheels = Callable[[], synthetic.Material]  # makes them where they are missing
RECORD = 2  # raised when rows get other MLflow runs: those of both kinds would lie under one parent
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_ORPHANS = 5.0
SILENCE_MARGIN = 15.0  # seconds: a trial whose own watch works has ended itself by then
PRETRAINING = "pretraining"  # before the reason why a row has nothing to start from
PICTURES = 2  # objects drawn for each row and benchmark
LAST_REPORT = "report.json"
REPORTS = {"report.txt": "text", "report.md": "markdown", "report.html": "html", LAST_REPORT: "json"}  # in this order
CURVES = ("loss", "loss_mask", "loss_smooth", "iou", "gradient_norm", "learning_rate", "images_per_second")

logger = logging.getLogger(__name__)


# -- what is to be done ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """An experiment at the size of a profile, with what its rows read."""

    name: str
    profile: str
    experiment: Experiment
    seeds: int
    root: Storage
    resources: Resources
    tasks: tuple[Task, ...]
    whole: Experiment  # with the rows that are left out this time
    assignments: tuple[str, ...] = ()  # settings on top of the profile's
    refused: Mapping[tuple[str, int], str] = field(default_factory=dict)  # (row, seed) -> why it cannot even start

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the rows, their number of seeds and the data that they read: names the directory of the report."""
        data = sorted({task.measured(self.resources) for task in self.tasks})  # the same words, but other photos
        rows = _plain_rows(self.experiment)
        return fingerprint(
            {"sweep": self.name, "profile": self.profile, "rows": rows, "seeds": self.seeds, "data": data}
        )

    @functools.cached_property
    def parent(self) -> str:
        """The fingerprint of the MLflow run above the rows: one for each data set and settings, whatever part of the
        experiment is run and how often, because a row can lie under one run only.

        Of the data, that which every row of the whole experiment reads is part of it. Rows of classical methods run
        while the training photos are not there yet, and must not move when they are. Needs a row that can start.
        """
        task, rows = self.tasks[0], [row for row in self.whole.rows if not row.quoted]
        shared = {dataset.digest(masks=True) for dataset in self.benchmarks}
        is_shared = task.photos is not None and len({_photos_of(row, self.experiment.measure) for row in rows}) == 1
        data = [[task.photos.digest()] if task.photos is not None and is_shared else [], sorted(shared)]
        rows = _plain_rows(self.whole)
        return fingerprint({"record": RECORD, "sweep": self.name, "profile": self.profile, "rows": rows, "data": data})

    @property
    def benchmarks(self) -> tuple[Dataset, ...]:
        """Those that every row of the whole experiment is scored on. Needs a row that can start."""
        scored = set.intersection(*(set(row.run.eval_datasets) for row in self.whole.rows if not row.quoted))
        task = self.tasks[0]
        specs = zip(task.row.run.eval_datasets, task.benchmarks, strict=True)
        return tuple(dataset for spec, dataset in specs if spec in scored)

    @property
    def size(self) -> str:
        """The profile, with the settings that make it another size: "paper" alone compares with the paper."""
        other = [text for text in self.assignments if text.partition("=")[0].strip() not in SAME_SIZE]
        return " ".join([self.profile, *(["with", ", ".join(other)] if other else [])])

    def work(self) -> str:
        """One line on what is left: rows that cannot start, trainings and their images, rows without their scores.

        A training that several rows share counts once.
        """
        left: dict[str, Task] = {}
        for task in [*self.tasks, *(_as_pretraining(task) for task in self.tasks if task.row.pretraining)]:
            if task.is_trained:
                training = task.training(self.resources)
                if not training.is_done(self.root):
                    left.setdefault(training.fingerprint, task)
        images = sum(_images(task) for task in left.values())
        unscored = {task.row.name for task in self.tasks if not task.is_done(self.root, self.resources)}
        parts = [f"{len(left)} training(s), about {images} images to train on"] if left else []
        parts += [f"{len(unscored)} row(s) to score"] if unscored else []
        text = f"work left: {', '.join(parts) or 'nothing'}"
        refused = len({name for name, _ in self.refused})
        if not refused:
            return text
        rest = f"of the others, {text}" if self.tasks else "no row can start"
        return f"{refused} row(s) refused, for the reasons above; {rest}"

    @property
    def directory(self) -> Storage:
        """Where report and figures go, below the root."""
        return self.root.child("sweeps", f"{self.name}-{self.profile}", self.fingerprint)


def prepare(
    name: str,
    *,
    profile: str,
    root: Storage,
    data_root: Path | None,
    resources: Resources,
    assignments: Sequence[str] = (),
    only: Sequence[str] = (),
    seeds: int = 1,
    writes: bool = True,
) -> Sweep:
    """The sweep that these words name. A row that cannot start (weights or data missing) is refused, with its reason.

    writes: whether photos that a profile makes may be left below the root; a sweep that is to run needs them there.
    Raises ValueError for unknown names and settings, and for rows that would be scored under different protocols.
    """
    whole = load_experiment(name).with_profile(profile).with_settings(assignments)
    experiment = whole.select(only)
    wheels = functools.partial(_wheels, root, writes)
    tasks, refused = [], {}
    measured: dict[tuple[str, int], str] = {}
    for row in experiment.rows:
        for seed in range(row.seeds(seeds, experiment.measure)):
            try:
                task = _task(row, seed, experiment.measure, wheels, data_root, resources.untrusted)
                measured[row.name, seed] = task.measured(resources)  # missing weights and masks show here
                tasks.append(dataclasses.replace(task, is_twin=_is_twin(task, whole, resources, measured)))
            except ValueError as error:
                refused[row.name, seed] = str(error)
            except OSError as error:  # a mask that cannot be read; but without its root no row has a chance
                if isinstance(error, StorageError):
                    raise
                refused[row.name, seed] = reason_of(error)
    _check_protocols(tasks)  # before hours of work that no table may show
    return Sweep(name, profile, experiment, seeds, root, resources, tuple(tasks), whole, tuple(assignments), refused)


def _check_protocols(tasks: Iterable[Task]) -> None:
    planned = []
    for task in tasks:
        if "clicks" in task.measure:
            protocols = {each.name: pipeline.protocol(each, task.run) for each in task.benchmarks}
            planned.append(Outcome(task.row, task.seed, "done", "", {}, {}, protocols))
    check_protocols(planned)


def _plain_rows(experiment: Experiment) -> list[Any]:
    return [[row.name, plain(row.run), row.pretraining and plain(row.pretraining)] for row in experiment.rows]


def _photos_of(row: Row, measure: tuple[str, ...]) -> tuple[str, bool] | None:
    """Which photos a row is trained on, by name and whether with their labels; None for a row without training."""
    is_trained = "clicks" in measure and row.run.method == TRAINED
    return (row.run.dataset, row.run.target.source == "labels") if is_trained else None


def _task(
    row: Row, seed: int, measure: tuple[str, ...], wheels: Wheels, data_root: Path | None, untrusted: bool
) -> Task:  # fmt: skip
    row = dataclasses.replace(row, run=_absolute(row.run), pretraining=row.pretraining and _absolute(row.pretraining))
    is_trained = _photos_of(row, measure) is not None

    def photos_of(run: Run | None) -> Dataset | None:
        if run is None or not is_trained:
            return None
        return pipeline.open_dataset(_photos_spec(run, wheels), data_root, "train", untrusted)

    specs = [_benchmark_spec(spec, wheels, data_root) for spec in row.run.eval_datasets]
    benchmarks = tuple(pipeline.benchmark(spec, data_root, untrusted) for spec in specs)
    return Task(row, seed, photos_of(row.run), benchmarks, measure, photos_of(row.pretraining))


def _is_twin(task: Task, whole: Experiment, resources: Resources, measured: dict[tuple[str, int], str]) -> bool:
    """Whether an earlier row of the whole experiment is the same model under the same protocol on the same objects.

    measured: `Task.measured` by row and seed, that of `task` at least; what is found out is added, since it takes long
    where there are many photos.
    """

    def reads(row: Row) -> tuple[object, ...]:
        is_trained = _photos_of(row, whole.measure) is not None
        start = Row(row.name, row.pretraining) if is_trained and row.pretraining else None
        return _photos_of(row, whole.measure), start and _photos_of(start, whole.measure), row.run.eval_datasets

    for row in whole.rows:
        if row.name == task.row.name:
            break
        if row.quoted or reads(row) != reads(task.row):
            continue
        if (key := (row.name, task.seed)) not in measured:
            measured[key] = ""  # where weights are missing, or masks cannot be read: others than ours
            with contextlib.suppress(ValueError, OSError):
                measured[key] = _as_row(task, row).measured(resources)
        if measured[key] == measured[task.row.name, task.seed]:
            return True
    return False


def _as_row(task: Task, row: Row) -> Task:
    """The task of another row that reads the same photos and benchmarks."""
    pretraining = row.pretraining and _absolute(row.pretraining)
    return dataclasses.replace(task, row=dataclasses.replace(row, run=_absolute(row.run), pretraining=pretraining))


def _absolute(run: Run) -> Run:
    """Weights by absolute paths: a trial has a working directory of its own."""
    paths = {"features.weights": run.features.weights, "model.init_weights": run.model.init_weights}
    files = {name: path for name, path in paths.items() if path is not None and not path.startswith(PIN)}
    given = {name: os.path.abspath(os.path.expanduser(path)) for name, path in files.items()}
    found: Run = with_values(run, given)
    return found


def _photos_spec(run: Run, wheels: Wheels) -> str:
    """The training photos; what a profile calls "wheels" is a folder below the root, with masks if labels are asked."""
    if run.dataset != WHEEL_PHOTOS:
        return run.dataset
    material = wheels()
    return f"folder:{material.labelled if run.target.source == 'labels' else material.photos}"


def _benchmark_spec(spec: str, wheels: Wheels, data_root: Path | None) -> str:
    """The benchmark; "synthetic" is made below the root unless the data root has one."""
    is_there = data_root is not None and (data_root / spec / "images").is_dir()
    return spec if spec != WHEEL_BENCHMARK or is_there else f"synthetic:{wheels().benchmark}"


def _wheels(root: Storage, writes: bool) -> synthetic.Material:
    """Photos and benchmark of the smoke profile; those of a root without them that is only looked at go with us."""
    if root.local is None:
        raise ValueError(f"the smoke profile makes its photos below a local root; {root} is none")
    folder = root.local / "wheels"
    is_ours = writes or folder.is_dir()
    return synthetic.write_material(folder if is_ours else _folder_until_exit(), objects=WHEEL_OBJECTS)


@functools.cache
def _folder_until_exit() -> Path:
    folder = tempfile.mkdtemp(prefix="mis-wheels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _images(task: Task) -> int:
    """Images that a training sees; photos that may be refused count."""
    assert task.photos is not None, "only a row that is trained has images"
    labelled = task.run.target.source == "labels"
    photos = labelled_subset(task.photos, task.run.target) if labelled else task.photos
    return Schedule(len(photos), task.run.train).total_steps * task.run.train.batch_size


# -- running ---------------------------------------------------------------------------------------------------------


def run_sweep(sweep: Sweep) -> Comparison:
    """Finish every row that can be finished, record all of it in MLflow, and compare.

    A row that fails is reported as failed with its reason; the others finish. Raises ValueError when the trials cannot
    be placed on the cluster, KeyboardInterrupt after Ctrl-C. Where not one of the rows that were missing could go on
    because of what is not theirs, that is raised when all is recorded: FingerprintMismatch, StorageError.
    """
    resources, root = sweep.resources, sweep.root
    missing = [task for task in sweep.tasks if not task.is_done(root, resources)]
    failed: dict[str, Failure] = {}
    # A sweep of which no row can start has nothing to record, and does not know yet under which data.
    with _parent(sweep) if sweep.tasks else contextlib.nullcontext() as parent:
        if missing:
            with cluster.cluster(root):
                failed = _finish(sweep, missing)
            # Rows of one trial fail together; one that had finished before is not lost.
            done = {_key(task) for task in missing if task.is_done(root, resources)}
            failed = {key: failure for key, failure in failed.items() if key not in done}
        failed |= (foreign := _foreign(sweep))
        failures = {key: failure.reason for key, failure in failed.items()}
        _write_failures(sweep, failures)
        for task, failure in _recorded(sweep, failures):
            try:
                _record(sweep, task, failure, parent)
            except Exception as error:
                print(
                    f"sweep: {_title(task)} is not in MLflow, the next run tries again: {reason_of(error)}",
                    file=sys.stderr,
                )
        if parent is not None:
            jobs.log_benchmarks(parent, sweep.benchmarks)
        comparison, found = compare_rows(sweep)
        _record_report(sweep, comparison, found, parent)
        if parent is not None:
            _register_best(sweep, comparison, parent)
        _raise_if_lost([*(failed.get(_key(task)) for task in missing), *foreign.values()])
    return comparison


def _foreign(sweep: Sweep) -> dict[str, "Failure"]:
    """ "row/seed" -> that what is finished under its address has other settings: put there by hand, perhaps."""
    found: dict[str, Failure] = {}
    for task in sweep.tasks:
        for stage in _made(sweep, task) if task.is_done(sweep.root, sweep.resources) else ():
            try:
                check_identity(stage, read_manifest(stage.directory(sweep.root)))
            except FingerprintMismatch as error:
                found[_key(task)] = Failure(str(error), error)
    return found


@dataclass(frozen=True)
class Failure:
    """Why a row failed."""

    reason: str  # one line
    lost: Exception | None = (
        None  # where it is not the row that is at fault: the store, or an artifact of other settings
    )

    def of(self, part: str) -> "Failure":
        """The same, of a part of what a row needs."""
        return dataclasses.replace(self, reason=f"{part}: {self.reason}")


def _failure(error: BaseException) -> Failure:
    lost, cause = None, error
    while True:
        lost = cause if isinstance(cause, FingerprintMismatch | StorageError) else lost
        inner = _inner(cause)
        if inner is None:
            return Failure(reason_of(error), lost)
        cause = inner


def _raise_if_lost(failed: Sequence[Failure | None]) -> None:
    """failed: of all rows that were to be finished."""
    causes = [failure.lost for failure in failed if failure is not None and failure.lost is not None]
    if causes and len(causes) == len(failed):
        raise causes[0]


def _finish(sweep: Sweep, tasks: Sequence[Task]) -> dict[str, Failure]:
    """Shared stages here, then a trial for each training. Returns "row/seed" -> why, of those that failed.

    Raises ConnectionError when our Ray is gone.
    """
    train.trials_at_once(sweep.resources)  # refused before anything runs
    failures = _faults(sweep, tasks)
    shared: dict[str, Failure | None] = {}  # fingerprint -> why it failed
    for task in tasks:
        if _key(task) in failures:
            continue
        for stage in _shared(task, sweep.root, sweep.resources):
            if stage.fingerprint not in shared:
                shared[stage.fingerprint] = _attempt(stage, sweep.root, sweep.resources.trial_silence)
            if (failure := shared[stage.fingerprint]) is not None:
                failures[_key(task)] = failure.of(stage.name)
    able = [task for task in tasks if _key(task) not in failures and task.is_trained]
    failures |= _pretrain(sweep, [task for task in able if task.row.pretraining is not None])
    able = [task for task in able if _key(task) not in failures]
    return failures | _fan_out(sweep, _by_training(able, sweep.resources))


def _faults(sweep: Sweep, tasks: Iterable[Task]) -> dict[str, Failure]:
    """ "row/seed" -> why it would fail hours later: settings and weights."""
    faults: dict[str, Failure] = {}
    for task in tasks:
        if task.is_trained:
            try:
                check_missing(task.training(sweep.resources), sweep.root)
            except ValueError as error:
                faults[_key(task)] = Failure(reason_of(error))
    return faults


def _pretrain(sweep: Sweep, tasks: Sequence[Task]) -> dict[str, Failure]:
    """What rows start from is trained before them, once. Returns "row/seed" -> why a row has nothing to start from."""
    groups = _pretrainings(tasks, sweep.resources)
    failed = _fan_out(sweep, [group for group in groups if not group[0].training(sweep.resources).is_done(sweep.root)])
    before = {_key(task): _key(_as_pretraining(task)) for task in tasks}
    return {key: failed[needed].of(PRETRAINING) for key, needed in before.items() if needed in failed}


def _pretrainings(tasks: Iterable[Task], resources: Resources) -> list[list[Task]]:
    """What these rows start from, each training once, as the tasks of all rows that start from it."""
    return _by_training((_as_pretraining(task) for task in tasks if task.row.pretraining is not None), resources)


def _key(task: Task) -> str:
    return f"{task.row.name}/{task.seed}"


def _shared(task: Task, root: Storage, resources: Resources) -> list[Stage]:
    """What is made before the fan-out: trees or proposals, overlaps, and the clicks of methods without training."""
    stages = task.overlaps(resources) if "overlap" in task.measure else []
    if task.is_trained:
        return stages + [stage for stage in walk(task.training(resources)) if stage.name in pipeline.TARGETS]
    return stages + (task.clicks(root, resources) if "clicks" in task.measure else [])


def _attempt(stage: Stage, root: Storage, silence: float) -> Failure | None:
    """Finish a stage, unless it hangs: gives no sign of life for `silence` seconds. Why it failed, or None.

    Raises ConnectionError when it failed because our Ray is gone: then nothing else can be done either.
    """
    try:
        ensure_watched(stage, root, "computation" if stage.name in pipeline.TARGETS else "evaluation", silence)
    except Exception as error:
        _check_cluster()
        return _failure(error)
    return None


def _check_cluster() -> None:
    if cluster.is_lost():
        raise ConnectionError("Ray has ended under this command; the same command goes on from what is finished")


def _as_pretraining(task: Task) -> Task:
    """The training that a row starts from, as a task that nobody scores."""
    assert task.row.pretraining is not None
    row = Row(f"pretraining of {task.row.name}", task.row.pretraining)
    return Task(row, task.seed, task.pretraining_photos, (), ("clicks",), is_pretraining=True)


def _by_training(tasks: Iterable[Task], resources: Resources) -> list[list[Task]]:
    """Rows that share a training (other settings of the evaluation only) go through one trial."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.training(resources).fingerprint, []).append(task)
    return list(groups.values())


def _fan_out(sweep: Sweep, groups: Sequence[Sequence[Task]], tries: int = TRIES) -> dict[str, Failure]:
    """A trial for each group of tasks, up to `tries` while its process is lost. Returns "row/seed" -> why, of those
    that failed.
    """
    if not groups:
        return {}
    trials = min(train.trials_at_once(sweep.resources), len(groups))
    resources = sweep.resources.model_copy(update={"trials": trials})  # each takes its share of the CPUs
    names = ", ".join(group[0].name for group in groups)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the reasons of failed trials are told in one line each
    print(f"sweep: {len(groups)} training(s) to do, {trials} at a time: {names}", file=sys.stderr, flush=True)
    bell = cluster.beside(Bell)
    with _recorder(sweep, groups) as recorder, cluster.scratch("mis-ray-tune-") as storage_path:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, groups=groups, root=sweep.root, resources=resources, bell=bell),
                {"CPU": DRIVER_CPU},
            ),
            param_space={"group": tune.grid_search(list(range(len(groups))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=trials, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"mis-{uuid.uuid4().hex}",  # never one that Ray knows: it would return that run's results
                storage_path=storage_path,
                callbacks=[recorder],
                failure_config=tune.FailureConfig(max_failures=0),  # the training inside has its own
                verbose=0,
            ),
        )
        try:
            fit = cluster.in_background(tuner.fit)
            ended = _wait_for(fit, recorder, lambda: _end_silent(bell, resources.trial_silence, set(recorder.over)))
            results = fit.result()
        except BaseException as cause:  # Ctrl-C or SIGTERM: the trainings write a last checkpoint
            recorder.close()
            _stop_trials(bell, train.seconds_to_stop(cause))
            raise
    failures: dict[str, Failure] = {}
    lost: list[Sequence[Task]] = []
    for result in results:
        if result.error is not None:
            _check_cluster()
            group = result.config["group"]
            if tries > 1 and group not in ended and _is_loss(result.error):
                lost.append(groups[group])
            else:
                failure = Failure(ended[group]) if group in ended else _failure(result.error)
                failures |= {_key(task): failure for task in groups[group]}
    if lost:
        names = ", ".join(group[0].name for group in lost)
        print(f"sweep: the process of {names} is gone, perhaps with its node; once more", file=sys.stderr, flush=True)
        failures |= _fan_out(sweep, lost, tries - 1)
    return failures


def _is_loss(error: BaseException) -> bool:
    """Whether the trial's own process is gone; what the trial raised comes as a RayTaskError, whatever its cause."""
    return isinstance(error, ray.exceptions.RayActorError) and not isinstance(error, ray.exceptions.RayTaskError)


def _wait_for(fit: "Future[Any]", recorder: "_Recorder", end_silent: Callable[[], Mapping[int, str]]) -> dict[int, str]:
    """Until Tune has ended. Meanwhile trials that hang are ended: group -> why. And what a failed one leaves reserved
    is given back: the next one needs the CPUs.

    That it cannot be given back is told once and ends nothing: trials that need less than is left still finish.
    """
    is_told, ended = False, dict[int, str]()
    while wait([fit], timeout=SECONDS_BETWEEN_ORPHANS).not_done:
        ended |= end_silent()
        try:
            if recorder.has_failures:
                cluster.remove_orphans()
        except Exception as error:
            if not is_told:
                reason = reason_of(error)
                logger.warning("what a failed trial reserved cannot be given back, others may wait: %s", reason)
            is_told = True
    return ended


def _end_silent(bell: Any, silence: float, over: set[int]) -> dict[int, str]:
    """Kill the trials whose own watch hangs, too, as in a process that was stopped. Returns group -> why.

    over: groups of the trials that have ended.
    """
    with contextlib.suppress(ray.exceptions.RayError):  # the bell is lost with its cluster: others say so
        asked = bell.silent.remote(silence + SILENCE_MARGIN, over)
        doomed = ray.get(asked, timeout=SECONDS_BETWEEN_ORPHANS)
        for process in doomed.values():
            ray.kill(process)
        return dict.fromkeys(doomed, reason_of(silent("process of the trial", silence)))
    return {}


def _stop_trials(bell: Any, seconds: float) -> None:
    """Let the running trials come to a stop, for `seconds` at most; they cannot where Ray itself was stopped."""
    print("sweep: stopping; the same command goes on from here", file=sys.stderr, flush=True)
    until = time.monotonic() + seconds
    bell.ring.remote()
    with contextlib.suppress(ray.exceptions.RayError):
        asked, is_quiet = bell.is_quiet.remote(), False
        while time.monotonic() < until and not cluster.is_lost() and not is_quiet:
            if ray.wait([asked], timeout=0.2)[0]:
                is_quiet = ray.get(asked)
                asked = bell.is_quiet.remote()
                time.sleep(0.2)


def reason_of(error: BaseException) -> str:
    """One line for people: the innermost cause, without Ray's tracebacks around it."""
    cause: BaseException = error
    while (inner := _inner(cause)) is not None:
        cause = inner
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1] if lines and lines[0].startswith("ray::") else (lines[0] if lines else "")
    return text if isinstance(cause, ValueError) else f"{type(cause).__name__}: {text}".rstrip(": ")


def _inner(error: BaseException) -> BaseException | None:
    inner: BaseException | None = getattr(error, "cause", None) or error.__cause__
    return inner if inner is not error else None


# -- the record ------------------------------------------------------------------------------------------------------


class _Recorder(TrialProgressCallback):  # type: ignore[misc]
    """Live curves of the running trials in MLflow, and a line for people now and then.

    It stands in for Tune's own callback of that kind, which otherwise is added and prints whatever verbose says.
    """

    def __init__(self, sweep: Sweep, groups: Sequence[Sequence[Task]]) -> None:
        super().__init__()
        self._sweep, self._groups = sweep, groups
        self._trackers: dict[int, tracking.Tracker] = {}
        self._printed = 0.0
        self._finished = 0
        self.over: set[int] = set()  # groups whose trial has ended
        self.has_failures = False
        self._is_closed = False
        self._guard = threading.Lock()  # between Tune's thread and the one that people can interrupt

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes itself down when it starts, and what it wrote is never read here

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "step" not in result:
            return
        group, step = int(trial.config["group"]), int(result["step"])
        with self._guard:
            if self._is_closed:
                return
            tracker = self._trackers.get(group) or self._trackers.setdefault(group, self._open(group))
            tracker.log_metrics({f"train/{name}": result[name] for name in CURVES if name in result}, step)
        if time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            name = self._groups[group][0].name
            done = f"sweep: {self._finished}/{len(self._groups)} trainings done"
            print(f"{done}; {name}: step {step}, loss {result['loss']:.4f}", file=sys.stderr, flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._finished += 1
        with self._guard:
            self._close(int(trial.config["group"]), "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._finished += 1
        self.has_failures = True
        with self._guard:
            self._close(int(trial.config["group"]), "FAILED")

    def close(self) -> None:
        """No run is left open, and none is opened any more."""
        with self._guard:
            self._is_closed = True
            for group in list(self._trackers):
                self._close(group, "KILLED")

    def _open(self, group: int) -> tracking.Tracker:
        return _child(self._sweep, self._groups[group][0], wait=False)

    def _close(self, group: int, status: str) -> None:
        self.over.add(group)
        tracker = self._trackers.pop(group, None)
        if tracker is not None:
            tracker.close(status, wait=False)  # the next trial does not wait for a slow store


@contextlib.contextmanager
def _recorder(sweep: Sweep, groups: Sequence[Sequence[Task]]) -> Iterator[_Recorder]:
    recorder = _Recorder(sweep, groups)
    try:
        yield recorder
    finally:
        recorder.close()


def _parent(sweep: Sweep) -> tracking.Tracker:
    """The MLflow run of the whole sweep."""
    return tracking.open_run(
        sweep.root,
        experiment=sweep.name,
        name=f"{sweep.name} {sweep.profile}",
        fingerprint=sweep.parent,
        params={"profile": sweep.profile, "seeds": sweep.seeds, "rows": [row.name for row in sweep.whole.rows]},
        tags={"mis.question": sweep.experiment.question, "mis.source": sweep.experiment.source},
        computes=not all(task.is_done(sweep.root, sweep.resources) for task in sweep.tasks),
    )


def _child(sweep: Sweep, task: Task, wait: bool = True, computes: bool = True) -> tracking.Tracker:
    """The MLflow run of a row: that of its model under its protocol, as `jobs` opens it; or that of a pretraining."""
    start = task.pretraining(sweep.resources)
    settings = jobs.started(task.run, start.fingerprint if start else None)
    about = (sweep.root, sweep.name, _title(task), task.model(sweep.resources), task.run, sweep.resources, sweep.parent)
    identity = task.fingerprint(sweep.resources)
    tracker = jobs.record(*about, wait=wait, settings=settings, identity=identity, computes=computes)
    tracker.set_tags(_tags(sweep, task))
    return tracker


def _title(task: Task) -> str:
    """What its MLflow run is called. Several rows may start from one pretraining, so it has the name of none."""
    if not task.is_pretraining:
        return task.name
    return _row(task) if task.seed == 0 else f"{_row(task)} seed {task.seed}"


def _row(task: Task) -> str:
    return f"pretraining {jobs.title(task.row.run)}" if task.is_pretraining else task.row.name


def _tags(sweep: Sweep, task: Task) -> dict[str, str]:
    """What a person looks for a row by; of a pretraining also which rows of the experiment start from it."""
    tags = {"mis.row": _row(task), "mis.profile": sweep.profile, "mis.seed": str(task.seed)}
    if not task.is_pretraining:
        return tags
    rows = [row.name for row in sweep.whole.rows if row.pretraining and _absolute(row.pretraining) == task.row.run]
    return tags | {"mis.start_of": ", ".join(rows)}


def _is_recorded(sweep: Sweep, what: str, parent: tracking.Tracker | None) -> bool:
    """Whether this is in the store already, below this very parent: a store that was emptied has made another one.

    As long as the store does not answer, what it once got counts.
    """
    try:
        below = sweep.directory.read_bytes(_mark(sweep, what)).decode(errors="replace")
    except FileNotFoundError:
        return False
    return parent is None or parent.run_id in (None, below)


def _set_recorded(sweep: Sweep, what: str, parent: tracking.Tracker | None) -> None:
    """To be called when everything has been said; what waits for the store meanwhile is safe on disk."""
    run_id = parent.run_id if parent is not None else None  # None: the next run says it again, which adds nothing
    sweep.directory.write_bytes(_mark(sweep, what), (run_id or "").encode())


def _mark(sweep: Sweep, what: str) -> str:
    return f"recorded/{fingerprint({'store': tracking.store_of(sweep.root), 'what': what})}"


def _recorded(sweep: Sweep, failures: Mapping[str, str]) -> Iterator[tuple[Task, str | None]]:
    """What has a run of its own: the pretrainings, then the rows; each with why it failed."""
    before = {_key(_as_pretraining(task)): _key(task) for task in sweep.tasks if task.row.pretraining is not None}
    for group in _pretrainings(sweep.tasks, sweep.resources):
        reasons = [failures.get(before[_key(task)], "") for task in group]
        found = (reason.partition(": ") for reason in reasons if reason.startswith(f"{PRETRAINING}: "))
        yield group[0], next((reason for _, _, reason in found), None)
    yield from ((task, failures.get(_key(task))) for task in sweep.tasks)


def _record(sweep: Sweep, task: Task, failure: str | None, parent: tracking.Tracker | None) -> None:
    """Everything about a row or a pretraining in MLflow: why it failed, or curves, scores, pictures and the paper's
    numbers."""
    if failure is not None:
        tracker = _scores_run(sweep, task)
        tracker.set_tags({tracking.ERROR: failure[:500]})
        tracker.close("FAILED")
        return
    identity = task.fingerprint(sweep.resources)
    if not task.is_done(sweep.root, sweep.resources) or _is_recorded(sweep, identity, parent):
        return
    run, resources, root, above = task.run, sweep.resources, sweep.root, (sweep.parent, identity)
    if task.photos is not None:
        start = task.pretraining(resources)
        model = jobs.train(task.photos, run, resources, root, sweep.name, start, _title(task), *above)
        if not task.is_pretraining:
            jobs.evaluate(task.benchmarks, model, run, resources, root, sweep.name, task.name, PICTURES, *above)
    elif "clicks" in task.measure:
        jobs.evaluate_method(task.benchmarks, run, resources, root, sweep.name, task.name, PICTURES, *above)
    with _scores_run(sweep, task) as tracker:
        if "clicks" not in task.measure:  # else the evaluation has said so
            jobs.log_benchmarks(tracker, task.benchmarks)
        tracker.log_metrics({f"paper/{name}": value for name, value in task.row.paper.items()})
        tracker.log_metrics(_overlap_metrics(sweep, task))
    _set_recorded(sweep, identity, parent)


def _scores_run(sweep: Sweep, task: Task) -> tracking.Tracker:
    """The run that the scores of a row go to, which are there already."""
    if "clicks" in task.measure:
        return _child(sweep, task, computes=False)
    return tracking.open_run(
        sweep.root,
        experiment=sweep.name,
        name=task.name,
        fingerprint=task.fingerprint(sweep.resources),
        params=flatten(task.run) | flatten(sweep.resources, "resources."),
        tags=_tags(sweep, task),
        parent=sweep.parent,
        computes=False,
    )


def _overlap_metrics(sweep: Sweep, task: Task) -> dict[str, float]:
    if "overlap" not in task.measure:
        return {}
    return {
        f"{dataset.name}/mean_best_overlap": float(report.read_overlaps(stage.directory(sweep.root)).mean())
        for dataset, stage in zip(task.benchmarks, task.overlaps(sweep.resources), strict=True)
    }


def _record_report(
    sweep: Sweep, comparison: Comparison, found: Sequence[Outcome], parent: tracking.Tracker | None
) -> None:  # fmt: skip
    """The report and its figures, as files in the sweep's directory and as artifacts of the parent run, if any."""
    texts = {name: render(comparison, kind) for name, kind in REPORTS.items()}
    what = fingerprint({"report": texts[LAST_REPORT]})
    is_old = sweep.directory.exists(LAST_REPORT)
    is_old = is_old and sweep.directory.read_bytes(LAST_REPORT).decode() == texts[LAST_REPORT]
    if is_old and (parent is None or _is_recorded(sweep, what, parent)):
        return  # nothing is new: a second run draws nothing again
    try:
        for name, figure in draw(sweep, comparison, found).items():
            sweep.directory.write_bytes(f"figures/{name}", figures.to_png(figure))
            if parent is not None:
                parent.log_figure(figure, f"figures/{name}")
    except Exception as error:  # the numbers do not depend on a photo that cannot be drawn
        print(f"sweep: the report has no more figures: {reason_of(error)}", file=sys.stderr)
    for name, text in texts.items():
        if parent is not None:
            parent.log_text(text, name)
        sweep.directory.write_bytes(name, text.encode())
    if parent is not None:
        _set_recorded(sweep, what, parent)


def _register_best(sweep: Sweep, comparison: Comparison, parent: tracking.Tracker) -> None:
    """The best trained row of an experiment becomes the champion among the versions of a registered model.

    Of one that is whole: among rows of which some are left out, failed, or cannot start yet, nobody knows the best.
    """
    ours = [line for line in comparison.lines if line.state != "quoted"]
    if sweep.experiment.rows != sweep.whole.rows or any(line.state != "done" or line.reason for line in ours):
        return
    done = {task.row.name: task for task in reversed(sweep.tasks)}  # of several seeds the first
    best = best_row(
        comparison, [row.name for row in sweep.whole.rows if row.name in done and done[row.name].is_trained]
    )
    if best is not None:
        _register(sweep, done[best], parent)


def best_row(comparison: Comparison, rows: Sequence[str]) -> str | None:
    """Of `rows`, the one with the least NoC@90 on the first benchmark; of equals NoC@85 decides, then the IoU."""
    known = [cell for cell in comparison.cells if cell.row in rows and cell.mean is not None]
    dataset = next((cell.dataset for cell in known if cell.metric == "noc90"), None)
    means = {(cell.row, cell.metric): cell.mean for cell in known if cell.dataset == dataset}
    scored = [row for row in rows if (row, "noc90") in means]
    return min(
        scored,
        key=lambda row: (means[row, "noc90"], means.get((row, "noc85"), math.inf), -(means.get((row, "iou5")) or 0.0)),
        default=None,
    )


def _register(sweep: Sweep, task: Task, parent: tracking.Tracker) -> None:
    """From a local root only: MLflow uploads a model from files, perhaps after this process has ended."""
    model = task.training(sweep.resources).directory(sweep.root)
    if model.local is None:
        print(f"sweep: the best model is not registered in MLflow, which takes local files: {model}", file=sys.stderr)
        return
    licence = licence_of(describe(model))
    side = task.run.model.image_size
    other = "" if sweep.size == sweep.profile else f"-{sweep.parent}"  # settings that make another size of it
    parent.register_model(model, f"mis-{sweep.name}-{sweep.profile}{other}", (side, side), licence)


def _write_failures(sweep: Sweep, failures: Mapping[str, str]) -> None:
    sweep.directory.write_bytes("failures.json", json.dumps(failures, indent=1).encode())


# -- comparing -------------------------------------------------------------------------------------------------------


def compare_rows(sweep: Sweep) -> tuple[Comparison, list[Outcome]]:
    """The report of what is there, and what it was made from; nothing is run. Says so when parts are of other code."""
    found, known = outcomes(sweep), about(sweep)
    if "," in known.get("commits", ""):
        print(
            f"sweep: not all of this was computed by the same code, but by the commits {known['commits']}; one that "
            "changes results also changes the version of a stage, and is computed anew",
            file=sys.stderr,
        )
    return compare(sweep.experiment, sweep.size, found, known), found


def outcomes(sweep: Sweep) -> list[Outcome]:
    """Every row and seed with what is known of it."""
    failures = _read_failures(sweep)
    found = []
    by_key = {(task.row.name, task.seed): task for task in sweep.tasks}
    for row in sweep.experiment.rows:
        if row.quoted:
            found.append(Outcome(row, 0, "quoted", row.quoted, {}, {}, {}))
            continue
        for seed in range(row.seeds(sweep.seeds, sweep.experiment.measure)):
            task = by_key.get((row.name, seed))
            reason = failures.get(f"{row.name}/{seed}", "")
            if task is None:
                found.append(Outcome(row, seed, "refused", sweep.refused[row.name, seed], {}, {}, {}))
            elif task.is_done(sweep.root, sweep.resources):
                try:
                    found.append(_outcome(sweep, task))
                except FingerprintMismatch as error:  # put there by hand: another row's scores, perhaps
                    found.append(Outcome(row, seed, "failed", str(error), {}, {}, {}))
            else:
                found.append(Outcome(row, seed, "failed" if reason else "missing", reason, {}, {}, {}))
    return found


def _outcome(sweep: Sweep, task: Task) -> Outcome:
    ious, protocols, overlaps = {}, {}, {}
    if "clicks" in task.measure:
        for dataset, stage in zip(task.benchmarks, task.clicks(sweep.root, sweep.resources), strict=True):
            directory = stage.directory(sweep.root)
            check_identity(stage, manifest := read_manifest(directory))
            protocol = manifest["summary"]["protocol"]
            ious[dataset.name] = iou_table(report.read_table(directory), protocol["max_clicks"])
            protocols[dataset.name] = protocol
    if "overlap" in task.measure:
        for dataset, stage in zip(task.benchmarks, task.overlaps(sweep.resources), strict=True):
            check_identity(stage, read_manifest(stage.directory(sweep.root)))
            overlaps[dataset.name] = report.read_overlaps(stage.directory(sweep.root))
    return Outcome(task.row, task.seed, "done", "", ious, overlaps, protocols)


def _read_failures(sweep: Sweep) -> dict[str, str]:
    try:
        found = json.loads(sweep.directory.read_bytes("failures.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def about(sweep: Sweep) -> dict[str, Any]:
    """For the foot of a report: the commits and machines that computed the rows, seconds of computing, profile and
    settings; of what was computed, nothing where nothing was."""
    made = {stage.fingerprint: stage for task in sweep.tasks for stage in _made(sweep, task)}
    found = [read_manifest(stage.directory(sweep.root))["information"] for stage in made.values()]
    computed = {
        "commits": ", ".join(sorted({code for each in found for code in code_of(each)})),
        "machines": "; ".join(sorted({each.get("machine") or "unknown" for each in found})),
        "seconds": round(sum(float(each["seconds"]) for each in found), 1),
    }
    return (computed if found else {}) | {"profile": sweep.size, "seeds": sweep.seeds}


def _made(sweep: Sweep, task: Task) -> list[Stage]:
    """The finished stages of a row, shared ones too."""
    return [stage for stage in _needed(sweep, task) if stage.is_done(sweep.root)]


def _needed(sweep: Sweep, task: Task) -> list[Stage]:
    """All stages of a row, shared ones too; without its clicks as long as it is not trained, which cannot be named."""
    stages: list[Stage] = []
    if "overlap" in task.measure:
        stages += [needed for stage in task.overlaps(sweep.resources) for needed in walk(stage)]
    if task.is_trained:
        stages += walk(training := task.training(sweep.resources))
        if not training.is_done(sweep.root):
            return stages
    if "clicks" in task.measure:
        stages += task.clicks(sweep.root, sweep.resources)
    return stages


def check_same_code(sweep: Sweep) -> None:
    """Refuse a sweep of which other code has made or begun something. Raises FingerprintMismatch that names both."""
    stages = {stage.fingerprint: stage for task in sweep.tasks for stage in _needed(sweep, task)}
    check_code(stages.values(), sweep.root)


def draw(sweep: Sweep, comparison: Comparison, found: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of the experiment: file name -> matplotlib figure, of what is done."""
    done = [task for task in sweep.tasks if task.is_done(sweep.root, sweep.resources)]
    kind = sweep.experiment.figure
    if kind == "curves":
        return drawing.curves(found)
    if kind == "objects":
        trained = [task for task in done if task.is_trained]
        return {name: figure for task in trained[:1] for name, figure in _draw_objects(sweep, task).items()}
    if kind == "proposals":
        runs = {task.row.name: task.run for task in done if task.seed == 0}
        benchmarks = {dataset.name: dataset for task in done for dataset in task.benchmarks}.values()
        sheets = [drawing.proposals(dataset, runs, sweep.resources, sweep.root) for dataset in benchmarks]
        return {name: figure for sheet in sheets for name, figure in sheet.items()}
    return drawing.bars(comparison) | drawing.curves(found)


def _draw_objects(sweep: Sweep, task: Task) -> dict[str, Any]:
    model = task.training(sweep.resources).directory(sweep.root)
    directories = [stage.directory(sweep.root) for stage in task.clicks(sweep.root, sweep.resources)]
    clicks = dict(zip((dataset.name for dataset in task.benchmarks), directories, strict=True))
    return drawing.objects(task.benchmarks, model, clicks, task.run)
