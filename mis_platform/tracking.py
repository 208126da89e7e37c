"""Runs in MLflow: the only file that knows it.

One experiment record a fingerprint: opening a run again, after a crash or for another benchmark, continues the same
MLflow run, and every (metric, step) is there once. Only the driver process writes. The store is SQLite in the root,
or whatever MLFLOW_TRACKING_URI names; a server that is down costs nothing but a warning: what it misses is kept on
disk and sent when it answers again.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

# Before the import, which reads them: no usage reports, no chatter, and no minutes of silent retries inside a training.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds

import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema, TensorSpec

from mis_platform.artifacts import git_commit
from mis_platform.redaction import scrub
from mis_platform.storage import TEMPORARY, Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logging.getLogger("alembic").setLevel(logging.WARNING)

FINGERPRINT, MODEL, ERROR = "mis.fingerprint", "mis.model", "mis.error"
PARENT = "mlflow.parentRunId"  # the UI shows runs with this tag below their parent
ATTEMPT, OPENED = "mis.attempt", "mis.opened"  # how often the run was opened, and when last (milliseconds)
DIGEST = "mis.sha256"  # of a registered model's weights
MODEL_FILES = ("model.safetensors", "config.json")
SECONDS_BETWEEN_FLUSHES = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds before a store that did not answer is asked again
METRICS_IN_BATCH, PARAMS_IN_BATCH = 1000, 100  # limits of MLflow
LONGEST_DIGEST = 36  # characters, limit of MLflow
# What a store says that may answer next time; everything else it says is final.
PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED"}
LOCK, EVENTS = ".lock", "events.jsonl"

Event = dict[str, Any]  # one thing to tell MLflow, as JSON values: see `_Sender`

logger = logging.getLogger(__name__)


# -- where the runs are ----------------------------------------------------------------------------------------------


def tracking_uri(root: Storage) -> str:
    """MLFLOW_TRACKING_URI, or SQLite in the root. Raises ValueError for an object store without a tracking server."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    if root.local is None:
        raise ValueError(
            f"MLflow cannot keep its SQLite file on {root}; set MLFLOW_TRACKING_URI to your MLflow server, "
            "or to sqlite:////absolute/path/mlflow.db"
        )
    return f"sqlite:///{root.local / 'mlflow.db'}"


def connect(root: Storage) -> MlflowClient:
    """A client of the root's store; a missing SQLite store is made first, whole or not at all.

    Raises ValueError when the store cannot be opened. A server is not contacted yet.
    """
    uri = tracking_uri(root)
    database = _sqlite_file(uri)
    try:
        if database is not None:
            _create_database(database)
        return MlflowClient(uri)
    except MlflowException as error:
        raise ValueError(f"cannot open the MLflow store {scrub(uri)}: {_first_line(error)}") from None


def ui_command(root: Storage, port: int = 5000) -> list[str]:
    """The command that serves the MLflow UI of this root on the loopback address."""
    uri = tracking_uri(root)
    if uri.startswith(("http://", "https://")):
        raise ValueError(f"the runs are on an MLflow server: open {scrub(uri)} in a browser")
    connect(root)  # the database must not be made by two processes at once
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def find_model(root: Storage, text: str) -> Storage:
    """The checkpoint directory of an MLflow run, by run id or by the first digits of its fingerprint.

    Raises ValueError when no run, or more than one, matches.
    """
    client = connect(root)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run for run in _search(client, experiments, f"tags.`{MODEL}` LIKE '%'") if _is_called(run, text)]
    found = {run.data.tags[MODEL] for run in runs}
    if len(found) == 1:
        return Storage(found.pop())
    what = "no run with a model" if not found else f"{len(found)} models"
    raise ValueError(f"{what} in {scrub(tracking_uri(root))} for {text!r}; give a run id or a longer fingerprint")


def _is_called(run: Run, text: str) -> bool:
    return run.info.run_id == text or run.data.tags.get(FINGERPRINT, "").startswith(text)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _lock_file(database: Path) -> Path:
    return database.with_name(".mlflow.lock")


def _create_database(file: Path) -> None:
    """Make the tables in a temporary file and rename it: MLflow's own migration survives neither company nor a kill."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_lock_file(file)):
        if file.exists():
            return
        temporary = file.with_name(f"{TEMPORARY}{file.name}")
        temporary.unlink(missing_ok=True)
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        os.replace(temporary, file)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for our turn; the kernel ends it if we are killed."""
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# -- a run -----------------------------------------------------------------------------------------------------------


def open_run(
    root: Storage,
    *,
    experiment: str,
    name: str,
    fingerprint: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> "Tracker":
    """The MLflow run of a fingerprint, made if it is not there yet.

    parent: fingerprint of the run of the same experiment under which it is shown: a sweep, for one of its rows.
    params: dotted name -> value, e.g. from `config.flatten`. A run that is opened again keeps the parameters it has,
    since MLflow forbids changing them; one that differs now (only Resources may) becomes the tag `latest.<name>`.
    Raises ValueError when the store refuses (unknown kind, no access); when it does not answer, the run starts without.
    """
    client = connect(root)
    shelf = (root.local or Path.home() / ".cache" / "mis_platform") / "mlflow-spool"
    database = _sqlite_file(tracking_uri(root))
    _send_orphans(client, shelf, database)
    about = {FINGERPRINT: fingerprint, "mlflow.source.name": "mis", **(tags or {})}
    if (commit := git_commit()) is not None:
        about["mlflow.source.git.commit"] = commit
    opening = {
        "experiment": experiment,
        "name": name,
        "fingerprint": fingerprint,
        "params": {key: scrub(_spell(value)) for key, value in params.items()},
        "tags": {key: scrub(str(value)) for key, value in about.items()},
        "opened": int(time.time() * 1000),
        "parent": parent,
    }
    tracker = Tracker(_Sender(client, database), _Spool(shelf), opening)
    tracker.start()
    return tracker


class Tracker:
    """One run being written; made by `open_run`, used as a context manager.

    Nothing here raises or waits long because a store does not answer. May be called from several threads of the driver
    process; it refuses to travel to another process.
    """

    def __init__(self, sender: "_Sender", spool: "_Spool", opening: Event) -> None:
        self._sender, self._spool = sender, spool
        self._opening: Event = {"open": opening}
        self._unsent: deque[Event] = deque([self._opening])
        self._unsaved: list[Event] = [self._opening]  # those of `_unsent` that are in memory only
        self._metrics: list[list[Any]] = []  # name, value, step, milliseconds
        self._flushed = time.monotonic()
        self._pause, self._ask_again = FIRST_PAUSE, 0.0
        self._guard = threading.RLock()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as the store has not answered."""
        return self._sender.run_id

    def start(self) -> None:
        """Open the run in the store. Raises ValueError when the store refuses."""
        try:
            self._sender.send(self._opening, self._spool.files)
            self._unsent.clear()
            self._unsaved.clear()
        except (MlflowException, OSError) as error:
            if not _may_pass(error):
                self._spool.remove()
                raise ValueError(f"MLflow refuses the run: {_first_line(error)}") from None
            self._wait(error)
            self.flush()

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Scalars at a training step. A (name, step) that is in the store already keeps its first value."""
        now = int(time.time() * 1000)
        with self._guard:
            self._metrics += [[name, float(value), int(step), now] for name, value in values.items()]
            if time.monotonic() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
                self.flush()

    def log_curve(self, name: str, values: Iterable[float], first_step: int = 1) -> None:
        """A whole curve, e.g. the mean IoU after click 1, 2, ...: the step is the number of clicks."""
        for step, value in enumerate(values, first_step):
            self.log_metrics({name: float(value)}, step)

    def log_figure(self, figure: "Figure", path: str) -> None:
        """A drawing as an artifact; path: its name there, e.g. "figures/merge_levels.png"."""
        with self._guard:
            figure.savefig(self._spool.new_file(path))
            self._add({"artifact": path})

    def log_image(self, image: np.ndarray, path: str) -> None:
        """uint8 [H, W, 3] RGB as a PNG artifact."""
        from matplotlib.image import imsave

        with self._guard:
            imsave(self._spool.new_file(path), image)
            self._add({"artifact": path})

    def log_text(self, text: str, path: str) -> None:
        """A text artifact, e.g. "tables/noc.md"."""
        with self._guard:
            self._spool.new_file(path).write_text(scrub(text), encoding="utf8")
            self._add({"artifact": path})

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """What was read: the digest of its content, where it lies, and what for ("training", "evaluation")."""
        self._add({"dataset": [name, digest[:LONGEST_DIGEST], scrub(source), context]})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._add({"tags": {name: scrub(str(value)) for name, value in tags.items()}})

    def set_model(self, directory: Storage) -> None:
        """Where the run's checkpoint lies, for `find_model`."""
        self.set_tags({MODEL: directory.uri})

    def register_model(self, directory: Storage, name: str, size: tuple[int, int], licence: str) -> None:
        """Put a saved model into the model registry, once for each content.

        directory: local, with model.safetensors and config.json. name: of the registered model, which gets a version.
        size: (height, width) in pixels of its input, for the signature. licence: what a user has to know.
        """
        assert directory.local is not None, "only a local model can be uploaded"
        self._add({"model": [name, str(directory.local), list(size), licence]})

    def flush(self) -> None:
        """Send all that waits; what the store does not take is kept on disk."""
        with self._guard:
            self._flushed = time.monotonic()
            if self._metrics:
                self._queue({"metrics": self._metrics})
                self._metrics = []
            if self._flushed >= self._ask_again:
                self._send()
            if not self._unsent:
                self._unsaved.clear()
                self._spool.clear()
            elif self._unsaved:
                self._spool.save(self._opening, self._unsaved)
                self._unsaved = []

    def close(self, status: str = "FINISHED") -> None:
        """status: FINISHED, FAILED or KILLED."""
        with self._guard:
            self._ask_again = 0.0  # the last chance of this process
            self.flush()
            self._add({"status": status})
            if self._unsent:
                logger.warning("MLflow has not got everything; the rest follows with the next run on this root")
                self._spool.release()
            else:
                self._spool.remove()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self.set_tags({ERROR: f"{type(error).__name__}: {_first_line(error)}"[:500]})
        self.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def __reduce__(self) -> Any:
        raise TypeError("a Tracker stays in the driver process: let the workers report their numbers instead")

    def _add(self, event: Event) -> None:
        with self._guard:
            self._queue(event)
            self.flush()

    def _queue(self, event: Event) -> None:
        self._unsent.append(event)
        self._unsaved.append(event)

    def _send(self) -> None:
        while self._unsent:
            event = self._unsent[0]
            try:
                self._sender.send(event, self._spool.files)
                self._pause = FIRST_PAUSE
            except (MlflowException, OSError) as error:
                if _may_pass(error) or "open" in event:
                    return self._wait(error)
                logger.warning("MLflow refuses %s, it is left out: %s", next(iter(event)), _first_line(error))
            self._unsent.popleft()
        return None

    def _wait(self, error: Exception) -> None:
        if self._pause == FIRST_PAUSE:
            logger.warning("MLflow does not answer, its records are kept in %s: %s", self._spool, _first_line(error))
        self._ask_again = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


# -- sending ---------------------------------------------------------------------------------------------------------


class _Sender:
    """Writes events of one run to the store. Sending an event twice changes nothing."""

    def __init__(self, client: MlflowClient, database: Path | None) -> None:
        self._client, self._database = client, database
        self._known: dict[str, set[int]] = {}  # metric -> steps that are in the store
        self._run_id: str | None = None

    @property
    def run_id(self) -> str | None:
        return self._run_id

    def send(self, event: Event, files: Path) -> None:
        """Raises MlflowException or OSError when the store does not take it. files: where artifacts wait."""
        ((kind, value),) = event.items()
        if kind == "open":
            with self._opening():
                self._open(value)
            return
        assert self._run_id is not None, "the first event of a run opens it"
        if kind == "metrics":
            self._log_metrics(self._run_id, value)
        elif kind == "tags":
            self._client.log_batch(self._run_id, tags=[RunTag(key, text) for key, text in value.items()])
        elif kind == "dataset":
            self._log_dataset(self._run_id, *value)
        elif kind == "artifact":
            self._log_artifact(self._run_id, files, value)
        elif kind == "model":
            self._register(self._run_id, *value)
        else:
            assert kind == "status", kind
            self._client.set_terminated(self._run_id, value)

    def _opening(self) -> contextlib.AbstractContextManager[None]:
        """Searching and creating must not be interleaved with another process; a server leaves us no way to lock."""
        return contextlib.nullcontext() if self._database is None else _locked(_lock_file(self._database))

    def _open(self, opening: Event) -> None:
        experiment = self._experiment(opening["experiment"])
        run = self._find(experiment, opening["fingerprint"])
        if run is not None:
            self._client.update_run(run.info.run_id, status="RUNNING")
            if ERROR in run.data.tags:  # of an attempt before this one
                self._client.delete_tag(run.info.run_id, ERROR)
        else:
            run = self._client.create_run(experiment, run_name=opening["name"], tags=opening["tags"])
        parent = self._find(experiment, opening["parent"]) if opening.get("parent") else None
        above = {PARENT: parent.info.run_id} if parent is not None else {}
        self._describe(run, {**opening, "tags": opening["tags"] | above})
        self._run_id = run.info.run_id

    def _find(self, experiment: str, fingerprint: str) -> Run | None:
        """The oldest run of a fingerprint."""
        found = _search(self._client, [experiment], f"tags.`{FINGERPRINT}` = '{fingerprint}'")
        return found[-1] if found else None

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            folder = None if self._database is None else f"{self._database.parent / 'mlflow-artifacts'}"
            try:
                return self._client.create_experiment(name, artifact_location=folder)
            except MlflowException:  # somebody was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _describe(self, run: Run, opening: Event) -> None:
        before = run.data.params
        new = {key: value for key, value in opening["params"].items() if key not in before}
        changed = {key: value for key, value in opening["params"].items() if before.get(key, value) != value}
        tags = {**opening["tags"], **{f"latest.{key}": value for key, value in changed.items()}}
        tags[OPENED] = str(opening["opened"])
        tags[ATTEMPT] = str(int(run.data.tags.get(ATTEMPT, 0)) + (run.data.tags.get(OPENED) != tags[OPENED]))
        for batch in _batches(list(new.items()), PARAMS_IN_BATCH):
            self._client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in batch])
        for batch in _batches(list(tags.items()), PARAMS_IN_BATCH):
            self._client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in batch])

    def _log_metrics(self, run_id: str, points: Sequence[Sequence[Any]]) -> None:
        """Points [name, value, step, milliseconds]; each (name, step) once, also after a crash or a lost answer."""
        fresh = []
        for name, value, step, milliseconds in points:
            if name not in self._known:
                self._known[name] = {point.step for point in self._client.get_metric_history(run_id, name)}
            if step not in self._known[name]:
                self._known[name].add(step)
                fresh.append(Metric(name, value, milliseconds, step))
        try:
            for batch in _batches(fresh, METRICS_IN_BATCH):
                self._client.log_batch(run_id, metrics=batch)
        except BaseException:
            self._known.clear()  # it may have arrived nevertheless: ask again
            raise

    def _log_dataset(self, run_id: str, name: str, digest: str, source: str, context: str) -> None:
        dataset = Dataset(name, digest, source_type="local", source=json.dumps({"uri": source}))
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def _log_artifact(self, run_id: str, files: Path, path: str) -> None:
        file = files / path
        if file.exists():  # else it was sent before
            folder = os.path.dirname(path)
            self._client.log_artifact(run_id, str(file), folder or None)
            file.unlink()

    def _register(self, run_id: str, name: str, directory: str, size: list[int], licence: str) -> None:
        weights = Path(directory) / MODEL_FILES[0]
        if not weights.is_file():  # final: no later attempt would find it
            raise MlflowException.invalid_parameter_value(f"there is no model to register in {directory}")
        with open(weights, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with contextlib.suppress(MlflowException):  # it is there already
            self._client.create_registered_model(name)
        if any(each.tags.get(DIGEST) == digest for each in self._client.search_model_versions(f"name = '{name}'")):
            return
        with tempfile.TemporaryDirectory() as folder:
            for file in MODEL_FILES:
                shutil.copy(Path(directory) / file, folder)
            about = Model(artifact_path="model", run_id=run_id, signature=_signature(*size))
            about.add_flavor("mis_platform", weights=MODEL_FILES[0], config=MODEL_FILES[1])
            about.save(str(Path(folder) / "MLmodel"))
            self._client.log_artifacts(run_id, folder, "model")
        source = f"{self._client.get_run(run_id).info.artifact_uri}/model"
        tags = {DIGEST: digest, "licence": licence}
        self._client.create_model_version(name, source, run_id, tags=tags)


def _signature(height: int, width: int) -> ModelSignature:
    """What goes into SimpleClick and comes out, batch first."""
    kind = np.dtype(np.float32)
    inputs: list[ColSpec | TensorSpec] = [
        TensorSpec(kind, (-1, 3, height, width), "image"),
        TensorSpec(kind, (-1, 1, height, width), "previous_mask"),
        TensorSpec(kind, (-1, -1, 3), "points"),
    ]
    return ModelSignature(Schema(inputs), Schema([TensorSpec(kind, (-1, 1, height, width), "logits")]))


class _Spool:
    """A directory for what the store has not taken: events.jsonl, the run's opening first, and files/ of artifacts.

    It is locked as long as its process lives; an unlocked one is an orphan, which the next `open_run` sends.
    """

    def __init__(self, shelf: Path) -> None:
        self.directory = shelf / uuid.uuid4().hex
        self.files = self.directory / "files"
        self._lock: int | None = None  # file descriptor

    def __str__(self) -> str:
        return str(self.directory)

    def new_file(self, path: str) -> Path:
        """Where an artifact is written before it is sent."""
        self._claim()
        file = self.files / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def save(self, opening: Event, events: Sequence[Event]) -> None:
        self._claim()
        file = self.directory / EVENTS
        lines = [] if file.exists() or events[0] is opening else [opening]
        with open(file, "a", encoding="utf8") as stream:
            stream.writelines(json.dumps(event) + "\n" for event in [*lines, *events])
            stream.flush()
            os.fsync(stream.fileno())

    def clear(self) -> None:
        """Everything has been sent."""
        (self.directory / EVENTS).unlink(missing_ok=True)

    def release(self) -> None:
        """Leave it to the next process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.release()

    def _claim(self) -> None:
        if self._lock is None:
            hidden = self.directory.with_name(TEMPORARY + self.directory.name)  # nobody may see it unlocked
            hidden.mkdir(parents=True)
            self._lock = os.open(hidden / LOCK, os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(self.directory)


def _send_orphans(client: MlflowClient, shelf: Path, database: Path | None) -> None:
    """Send what processes that are gone could not; a run whose end they did not record was killed."""
    for directory in sorted(shelf.glob("[!.]*")):
        with contextlib.suppress(OSError), open(directory / LOCK, "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
            events = _read_events(directory / EVENTS)
            if events and "status" not in events[-1]:
                events.append({"status": "KILLED"})
            sender = _Sender(client, database)
            try:
                for event in events:
                    sender.send(event, directory / "files")
            except MlflowException as error:
                if _may_pass(error):
                    return
                logger.warning("MLflow refuses what is left in %s: %s", directory, _first_line(error))
                continue
            shutil.rmtree(directory, ignore_errors=True)


def _read_events(file: Path) -> list[Event]:
    """Whole lines only: the last one may have been cut off by a kill."""
    lines = file.read_text(encoding="utf8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def _search(client: MlflowClient, experiments: list[str], query: str) -> list[Run]:
    """All active runs that match, the newest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _may_pass(error: Exception) -> bool:
    return isinstance(error, OSError) or getattr(error, "error_code", None) in PASSING


# -- text ------------------------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return scrub((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def _spell(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
