"""Runs in MLflow: the only file that knows it.

One experiment record a fingerprint: opening a run again, after a crash or for another benchmark, continues the same
MLflow run, and every (metric, step) is there once. Only the driver process writes. The store is SQLite in the root,
or whatever MLFLOW_TRACKING_URI names. A thread talks to it, so that a server that is slow or down holds up nothing:
what it misses is kept on disk and sent when it answers again, to that very store and to no other. A run that is open
has a locked folder on that shelf; a folder that is not locked was left by a process that died, and the next one to open
a run in the same store ends the dead one's.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
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
from urllib.parse import urlsplit

# Before the import, which reads them: no usage reports, no chatter, and no silent retries: after a lost answer MLflow
# itself would log the same points again.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds
# Runners of jobs that nobody sends: eight more processes, and a folder in /dev/shm that stays behind.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema, TensorSpec

from mis_platform.artifacts import git_commit
from mis_platform.errors import DataError
from mis_platform.redaction import scrub
from mis_platform.storage import TEMPORARY, Storage, StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logging.getLogger("alembic").setLevel(logging.WARNING)

FINGERPRINT, MODEL, ERROR = "mis.fingerprint", "mis.model", "mis.error"
COMMIT = "mlflow.source.git.commit"  # of the code that began the run
CODE_CHANGED = "mis.code_changed"  # the commits that have computed a run, where they are several
LATEST = "latest."  # what differs since: of a parameter, or of the commit that opened the run again
PARENT = "mlflow.parentRunId"  # the UI shows runs with this tag below their parent
ATTEMPT, OPENED = "mis.attempt", "mis.opened"  # how often the run was opened, and when last (milliseconds)
CHAMPION = "champion"  # alias of the best version of a registered model
DIGEST = "mis.sha256"  # of a registered model's weights
MODEL_FILES = ("model.safetensors", "config.json")
SECONDS_BETWEEN_FLUSHES = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a store that did not answer is asked again; doubled each time
OPENING_SECONDS = 10.0  # that a run waits for a store that is slow to open it
FAILURES, FAILING_SECONDS = 5, 15.0  # in a row: a store that fails so often, or so long, is away
GRACE, SECONDS_BETWEEN_GRACES = 1.0, 10.0  # seconds that a store that is away is waited for, and how often
METRICS_IN_BATCH, PARAMS_IN_BATCH = 1000, 100  # limits of MLflow
LONGEST_DIGEST = 36  # characters, limit of MLflow
# What a store says that may answer next time; everything else it says is final.
PASSING = {
    *("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"),
    *("REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"),
}
DATABASE = "mlflow.db"  # in the root
PROBED = "mis"  # the experiment of `mis train`
LOCK, EVENTS = ".lock", "events.jsonl"
THINNED = "mis.thinned"  # what a store has not got of the curves, because it was away for too long
# Of a run that waits: its pictures and texts may take a quarter, and so may its points, once they have taken two fifths
# and are thinned; while the new file is written, the old one is there too.
SPOOL_BYTES = 100_000_000

Point = list[Any]  # name, value, step, milliseconds
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
    return f"sqlite:///{root.local / DATABASE}"


def connect(root: Storage) -> MlflowClient:
    """A client of the root's store; a missing SQLite store is made first, whole or not at all.

    Raises ValueError when the store cannot be opened, StorageError when its file cannot be made, e.g. on a full disk. A
    server is not contacted yet.
    """
    uri = tracking_uri(root)
    database = _sqlite_file(uri)
    try:
        if database is not None:
            _create_database(database)
        return MlflowClient(uri)
    except MlflowException as error:
        raise ValueError(f"cannot open the MLflow store {scrub(uri)}: {_first_line(error)}") from None
    except Exception as error:  # of SQLAlchemy or the disk
        if database is None:
            raise
        raise StorageError(f"cannot make the MLflow store {database}: {_first_line(error)}") from None


def probe(root: Storage) -> None:
    """Write a tag to our experiment, as a run would. Raises ValueError when the store does not take it."""
    client = connect(root)
    try:
        found = client.get_experiment_by_name(PROBED)
        experiment = found.experiment_id if found else client.create_experiment(PROBED)
        client.set_experiment_tag(experiment, "mis.doctor", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    except MlflowException as error:
        raise ValueError(f"{scrub(tracking_uri(root))} cannot be written: {_first_line(error)}") from None


def ui_command(root: Storage, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """The command that serves the MLflow UI of this root on the loopback address, and its environment.

    The store's address, which may hold a password, is in the environment: all users of a machine see command lines.

    Raises DataError when there is no store: one that a mistyped root made would be an empty page. Raises ValueError
    when the port is taken: MLflow says so among other lines and then hangs.
    """
    uri = tracking_uri(root)
    if uri.startswith(("http://", "https://")):
        raise ValueError(f"the runs are on an MLflow server: open {scrub(uri)} in a browser")
    database = _sqlite_file(uri)
    if database is not None and not database.exists():
        raise DataError(f"there are no runs yet: {database} does not exist; is it the right --root?")
    connect(root)  # a store that cannot be opened is told in one line
    _check_port(port)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return command, {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"--port {port}: {(error.strerror or str(error)).lower()}; choose another one") from None


def waiting(root: Storage) -> dict[str, int]:
    """What the root keeps for other MLflow stores than the present one: address without secrets -> number of runs.

    Nobody sends that until a command on this root has that store again.
    """
    shelf, prefix = _shelf(root), _prefix(root, tracking_uri(root))
    stores: dict[str, int] = {}
    for directory in sorted(shelf.glob("[!.]*")):
        if directory.name.startswith(prefix) or (lock := _lock_of_dead(directory)) is None:
            continue
        os.close(lock)
        events = _read_events(directory / EVENTS)
        store = str(events[0]["open"].get("store", "unknown")) if events else "unknown"
        stores[store] = stores.get(store, 0) + 1
    return stores


def store_of(root: Storage) -> str:
    """What tells the stores that a root had apart: without secrets, and the same wherever the root is moved."""
    return _prefix(root, tracking_uri(root)).rstrip("-")


def _shelf(root: Storage) -> Path:
    """The folder with a folder for each run that is open, or waits."""
    return (root.local or Path.home() / ".cache" / "mis_platform") / "mlflow-spool"


def _prefix(root: Storage, uri: str) -> str:
    """Of the folders on the shelf that are for this store.

    Without user, password and options: another login is the same store, and a hash of a password is a clue to it. The
    root's own store is that wherever the root is moved.
    """
    file, own = _sqlite_file(uri), root.local and os.path.abspath(root.local / DATABASE)
    if file is None:
        parts = urlsplit(uri)
        place = (parts.hostname or "") + (f":{parts.port}" if parts.port else "")
        address = f"{parts.scheme}://{place}{parts.path.rstrip('/')}"
    elif (address := os.path.abspath(file)) == own:
        return "own-"
    return f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-"


def _tell_waiting(root: Storage) -> None:
    """Once a process and store."""
    shelf = _shelf(root)
    if (place := (shelf, _prefix(root, tracking_uri(root)))) in _told:
        return
    _told.add(place)
    with contextlib.suppress(OSError):
        for store, runs in waiting(root).items():
            logger.warning("%s keeps %d run(s) for another MLflow store until it is used again: %s", shelf, runs, store)


_told: set[tuple[Path, str]] = set()


def find_model(root: Storage, text: str) -> Storage:
    """The checkpoint directory of an MLflow run, by run id or by the first digits of its fingerprint.

    Raises ValueError when no run, or more than one, matches, and when there is no store, or it does not answer.
    """
    uri = tracking_uri(root)
    database = _sqlite_file(uri)
    if database is not None and not database.exists():  # looking for a model makes no files
        raise ValueError(f"there is no MLflow store {database}")
    client = connect(root)
    try:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = [run for run in _search(client, experiments, f"tags.`{MODEL}` LIKE '%'") if _is_called(run, text)]
    except MlflowException as error:
        raise ValueError(f"the MLflow store {scrub(uri)} cannot be asked: {_first_line(error)}") from None
    found = {run.data.tags[MODEL] for run in runs}
    if len(found) == 1:
        return Storage(found.pop())
    what = "no run with a model" if not found else f"{len(found)} models"
    raise ValueError(f"{what} in {scrub(uri)} for {text!r}; give a run id or a longer fingerprint")


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
        for torn in file.parent.glob(f"{TEMPORARY}*{file.name}*"):
            torn.unlink()
        # A new name each time: MLflow keeps its connection to a file that it could not finish.
        temporary = file.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{file.name}")
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
    wait: bool = True,
    computes: bool = True,
) -> "Tracker":
    """The MLflow run of a fingerprint, made if it is not there yet.

    parent: fingerprint of the run of the same experiment under which it is shown: a sweep, for one of its rows.
    params: dotted name -> value, e.g. from `config.flatten`. A run that is opened again keeps the parameters it has,
    since MLflow forbids changing them; one that differs now (only Resources may) becomes the tag `latest.<name>`. So
    does the commit: an evaluation years later must not pass for the code that trained.
    wait: for the store to open it; False where waiting for a slow one would hold something up.
    computes: whether anything is computed while it is open. Where nothing is, a run that had ended keeps its end, so
    that its duration remains that of the work, and is not counted up to a report weeks later.
    Raises ValueError when the store refuses (unknown kind, no access); when it does not answer, the run starts without.
    """
    outbox, shelf = _outbox(root), _shelf(root)
    uri = tracking_uri(root)
    prefix = _prefix(root, uri)
    about = {FINGERPRINT: fingerprint, "mlflow.source.name": "mis", **(tags or {})}
    if (commit := git_commit()) is not None:
        about[COMMIT] = commit
    opening = {
        "store": scrub(uri),  # for people: who it is for
        "experiment": experiment,
        "name": name,
        "fingerprint": fingerprint,
        "params": {key: scrub(_spell(value)) for key, value in params.items()},
        "tags": {key: scrub(str(value)) for key, value in about.items()},
        "opened": int(time.time() * 1000),
        "parent": parent,
        "computes": computes,
    }
    _tell_waiting(root)
    for orphan in _orphans(shelf, prefix, outbox):
        orphan.post()
    tracker = Tracker(outbox, _Spool(shelf, prefix), opening)
    tracker.start(wait)
    return tracker


class Tracker:
    """One run being written; made by `open_run`, used as a context manager.

    Nothing here raises or waits long because a store does not answer. May be called from several threads of the driver
    process; it refuses to travel to another process.
    """

    def __init__(self, outbox: "_Outbox", spool: "_Spool", opening: Event) -> None:
        self.run, self._name = str(opening["fingerprint"]), str(opening["name"])
        self._outbox, self._spool = outbox, spool
        self._sender = outbox.sender()
        self._opening: Event = {"open": opening}
        self._unsent: deque[_Letter] = deque()
        self._unsaved: list[Event] = []  # those of `_unsent` that are in memory only
        self._metrics: list[Point] = []
        self._thinning = _Thinning()
        self._flushed = time.monotonic()
        self._is_closed = self._is_refused = self._is_full = False
        self._guard = threading.RLock()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as the store has not answered."""
        return self._sender.run_id

    def start(self, wait: bool = True) -> None:
        """Open the run in the store. Raises ValueError when the store refuses, as far as it is waited for."""
        self._spool.save([self._opening])
        with self._guard:
            letter = self._post(self._opening)
            self._unsaved.clear()
        if wait:
            self._outbox.wait_for(letter, OPENING_SECONDS, failures=1)
            if letter.refusal is not None:
                self._spool.remove()
                raise ValueError(f"MLflow refuses the run: {_first_line(letter.refusal)}")

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Scalars at a training step. A (name, step) that is in the store already keeps its first value."""
        now = int(time.time() * 1000)
        with self._guard:
            points = [[name, float(value), int(step), now] for name, value in values.items()]
            self._metrics += filter(self._thinning.keeps, points)
            if time.monotonic() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
                self._post_metrics()

    def log_curve(self, name: str, values: Iterable[float]) -> None:
        """A whole curve, e.g. the mean IoU after click 1, 2, ...: the step is the number of clicks."""
        for step, value in enumerate(values, 1):
            self.log_metrics({name: float(value)}, step)

    def log_figure(self, figure: "Figure", path: str) -> None:
        """A drawing as an artifact; path: its name there, e.g. "figures/merge_levels.png"."""
        with self._guard:
            figure.savefig(self._spool.new_file(path))
            self._add_file(path)

    def log_text(self, text: str, path: str) -> None:
        """A text artifact, e.g. "tables/noc.md"."""
        with self._guard:
            self._spool.new_file(path).write_text(scrub(text), encoding="utf8")
            self._add_file(path)

    def _add_file(self, path: str) -> None:
        if self._spool.file_bytes() <= SPOOL_BYTES // 4:
            self._add({"artifact": path})
        else:
            self._spool.new_file(path).unlink()
            logger.warning("MLflow does not get %s of %s: too much waits for it already", path, self._name)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """What was read: the digest of its content, where it lies, and what for ("training", "evaluation")."""
        self._add({"dataset": [name, digest[:LONGEST_DIGEST], scrub(source), context]})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Name -> text; a tag that is set again has the new text. Secrets are blotted out."""
        self._add({"tags": {name: scrub(str(value)) for name, value in tags.items()}})

    def set_model(self, directory: Storage) -> None:
        """Where the run's checkpoint lies, for `find_model`."""
        self.set_tags({MODEL: directory.uri})

    def register_model(self, directory: Storage, name: str, size: tuple[int, int], licence: str) -> None:
        """Put a saved model into the model registry, once for each content; the alias "champion" moves to it.

        directory: local, with model.safetensors and config.json. name: of the registered model, which gets a version.
        size: (height, width) in pixels of its input, for the signature. licence: what a user has to know.
        """
        assert directory.local is not None, "only a local model can be uploaded"
        self._add({"model": [name, str(directory.local), list(size), licence]})

    def flush(self) -> None:
        """Send all that waits; what the store does not take is kept on disk."""
        with self._guard:
            self._post_metrics()
            last = self._unsent[-1] if self._unsent else None
        if last is not None:
            self._outbox.wait_for(last, failures=1)
            self.save()

    def close(self, status: str = "FINISHED", wait: bool = True) -> None:
        """status: FINISHED, FAILED or KILLED. wait: until the store has everything, or is away; what it has not got
        then is sent by the next process. False leaves it to the thread as long as this process lives."""
        with self._guard:
            self._metrics += self._thinning.ends()
            self._post_metrics()
            self._is_closed = True
            last = self._post({"status": status, "at": int(time.time() * 1000)})
        try:
            if wait:
                self._outbox.wait_for(last)
        finally:
            self.save()
        if wait and not last.is_done:
            self._outbox.give_up()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self.set_tags({ERROR: f"{type(error).__name__}: {_first_line(error)}"[:500]})
        self.close("FAILED" if isinstance(error, Exception) else "KILLED")

    def __reduce__(self) -> Any:
        raise TypeError("a Tracker stays in the driver process: let the workers report their numbers instead")

    def _add(self, event: Event) -> None:
        with self._guard:
            self._post_metrics()  # first, so that the store gets everything in the order it was said
            self._post(event)

    def _post_metrics(self) -> None:
        """Hand over the points since the last time; what has been waiting since then is kept on disk too."""
        self._flushed = time.monotonic()
        self.save()
        if self._metrics:
            self._post({"metrics": self._metrics})
            self._metrics = []

    def _post(self, event: Event) -> "_Letter":
        letter = _Letter(self, event)
        self._unsent.append(letter)
        self._unsaved.append(event)
        self._outbox.post(letter)
        return letter

    # What the thread of the outbox calls.

    def deliver(self, event: Event) -> None:
        """Raises MlflowException or OSError."""
        if self._sender.run_id is not None or event is self._opening:
            self._sender.send(event, self._spool.files)

    def save(self) -> None:
        """Keep on disk what the store has not got."""
        with self._guard:
            if self._unsaved:
                self._spool.save(self._unsaved)
                self._unsaved = []
            if self._spool.bytes > SPOOL_BYTES * 2 // 5 and not self._is_refused:
                self._make_room()

    def _make_room(self) -> None:
        """Drop what was sent meanwhile; if that is not enough, every second of the points that wait, and say so."""
        before = self._thinning.every
        while len("".join(map(_line, self._waiting()))) > SPOOL_BYTES // 4:
            new = {"metrics": self._metrics}
            if not self._thinning.halve([*(each.event for each in self._unsent if "metrics" in each.event), new]):
                break  # all that is left are single numbers
            self._metrics = new["metrics"]
        if self._thinning.every > before:
            text = f"one in {self._thinning.every} points of what was measured while the store was away"
            logger.warning("MLflow is away for too long: of %s it gets only %s", self._name, text)
            self._post({"tags": {THINNED: text}})
        self._spool.replace(self._waiting())
        self._unsaved = []

    def _waiting(self) -> list[Event]:
        events = (letter.event for letter in self._unsent if letter.event is not self._opening)
        return [self._opening, *(event for event in events if event.get("metrics") != [])]

    def delivered(self, letter: "_Letter") -> None:
        """The first unsent letter has been taken, or was refused for good."""
        with self._guard:
            assert self._unsent[0] is letter, "letters are delivered in order"
            self._unsent.popleft()
            if self._sender.run_id is None:  # the store refuses the run: kept for the next process, which asks again
                self._is_refused = True
                if self._spool.bytes > SPOOL_BYTES // 4:
                    self._leave_out_metrics()
                self.save()
                if "status" in letter.event:
                    self._spool.release()
                return
            if self._unsaved and self._unsaved[0] is letter.event:
                self._unsaved.pop(0)
            if not self._unsent:
                self._thinning.stop()
                self._spool.remove() if self._is_closed else self._spool.clear(self._opening)

    def _leave_out_metrics(self) -> None:
        """Of a run that the store refuses, when enough of it is kept."""
        rest = [event for event in self._unsaved if "metrics" not in event]
        if len(rest) < len(self._unsaved) and not self._is_full:
            self._is_full = True
            logger.warning("MLflow refuses %s, and enough of it is kept: further points are left out", self._name)
        self._unsaved = rest

    def give_up(self) -> bool:
        """Leave what is unsent to the next process, if the run has ended; whether it has."""
        with self._guard:
            if self._is_closed:
                self.save()
                self._spool.release()
            return self._is_closed


class _Thinning:
    """Which points of a run are kept while it waits for its store: of each curve every `every`-th, and its end."""

    def __init__(self) -> None:
        self.every = 1
        self._places: dict[str, int] = {}  # of the next point in its curve, from the first that waits on
        self._ends: dict[str, Point] = {}  # the newest point of a curve, unless it was kept

    def keeps(self, point: Point) -> bool:
        """Whether this next point of its curve is kept."""
        if self.every == 1:
            return True
        name = point[0]
        place = self._places[name] = self._places.get(name, -1) + 1
        is_kept = place % self.every == 0
        if is_kept:
            self._ends.pop(name, None)
        else:
            self._ends[name] = point
        return is_kept

    def halve(self, curves: Sequence[Event]) -> bool:
        """Keep every second of the points in these events, in their order; whether there was one to drop."""
        seen: dict[str, int] = {}
        newest: dict[str, Point] = {}
        for event in curves:
            points, event["metrics"] = event["metrics"], []  # a new list: the old one may be on its way
            for point in points:
                name = point[0]
                newest[name], seen[name] = point, seen.get(name, -1) + 1
                if seen[name] % 2 == 0:
                    event["metrics"].append(point)
        if not any(seen.values()):
            return False
        for name, place in seen.items():
            if place % 2:
                self._ends.setdefault(name, newest[name])  # one that is there is newer
            self._places[name] = place * self.every + self._places.get(name, 0) % self.every
        self.every *= 2
        return True

    def ends(self) -> list[Point]:
        """The newest points that were not kept, which belong to the curves all the same."""
        ends, self._ends = list(self._ends.values()), {}
        return ends

    def stop(self) -> None:
        """The store has everything that waited."""
        self.every, self._places = 1, {}


# -- sending ---------------------------------------------------------------------------------------------------------


class _Letter:
    """One event of one run, on its way to the store."""

    def __init__(self, tracker: "Tracker | _Orphan", event: Event) -> None:
        self.tracker, self.event = tracker, event
        self.is_done = False
        self.refusal: Exception | None = None  # what the store said if it will not take it, ever


class _Outbox:
    """What all runs of this process have to tell one store, sent by one thread, in order.

    One queue, because a run may be opened again while what it said before still waits. The thread ends when there is
    nothing to send.
    """

    def __init__(self, client: MlflowClient, database: Path | None) -> None:
        self._client, self._database = client, database
        self._letters: deque[_Letter] = deque()
        self._thread: threading.Thread | None = None
        self._attempts = self._failures = 0  # the latter since the last success
        self._failing_since = self._ask_again = 0.0
        self._asked = self._graced = -math.inf  # when the last attempt ended; when it was last waited for while away
        self._is_told = False
        self._changed = threading.Condition()

    def sender(self) -> "_Sender":
        return _Sender(self._client, self._database)

    def post(self, letter: _Letter) -> None:
        with self._changed:
            self._letters.append(letter)
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait_for(self, letter: _Letter, seconds: float | None = None, failures: int | None = None) -> None:
        """Until it has been sent or the store is away: unless it was asked just now, it is asked once more, at once.

        A store that is away already is waited for a second in ten: a sweep must not wait with each of its many rows.
        seconds: at most that long; failures: give up after so many in a row instead of what counts as away.
        """
        with self._changed:
            was_away = self._is_away(FAILURES)
            just_asked = time.monotonic() - self._asked < SECONDS_BETWEEN_FLUSHES
            asked = self._attempts
            if not (just_asked and was_away):
                self._ask_again = 0.0
                self._changed.notify_all()
            if was_away and not self._is_back():
                return

            def is_over() -> bool:
                is_away = (just_asked or self._attempts > asked) and self._is_away(failures or FAILURES)
                return letter.is_done or is_away or self._thread is None

            self._changed.wait_for(is_over, seconds)

    def _is_back(self) -> bool:
        now = time.monotonic()
        if now - self._graced < SECONDS_BETWEEN_GRACES:
            return False
        self._graced = now
        return self._changed.wait_for(lambda: self._failures == 0 or self._thread is None, GRACE)

    def give_up(self) -> None:
        """Leave what ended runs still have to say to the next process."""
        if not self._is_told:
            self._is_told = True
            logger.warning("MLflow has not got everything; the rest follows with the next run on this root")
        gone = {tracker for tracker in self._waiting() if tracker.give_up()}
        with self._changed:
            self._letters = deque(letter for letter in self._letters if letter.tracker not in gone)
            self._changed.notify_all()

    def _waiting(self) -> "set[Tracker | _Orphan]":
        with self._changed:
            return {letter.tracker for letter in self._letters}

    def _is_away(self, failures: int) -> bool:
        is_failing_long = self._failures > 0 and time.monotonic() - self._failing_since > FAILING_SECONDS
        return self._failures >= failures or is_failing_long

    def _send_all(self) -> None:
        try:
            self._send_each()
        finally:
            with self._changed:  # whoever waits must not wait for a thread that a mistake of ours has ended
                if self._thread is threading.current_thread():
                    self._thread = None
                self._changed.notify_all()

    def _send_each(self) -> None:
        while (letter := self._next()) is not None:
            error: Exception | None = None
            began = time.monotonic()
            try:
                letter.tracker.deliver(letter.event)
            except (MlflowException, OSError) as raised:
                error = raised
            except Exception as raised:  # of MLflow itself; whatever it is, the thread goes on
                letter.refusal = raised
            if error is not None and not _may_pass(error):
                letter.refusal, error = error, None
            self._settle(letter, error, began)

    def _next(self) -> _Letter | None:
        """The first letter, when it is time; None when there is none, and then no thread either."""
        with self._changed:
            while self._letters and (pause := self._ask_again - time.monotonic()) > 0:
                self._changed.wait(pause)
            if not self._letters:
                self._thread = None  # under the lock, so that whoever posts next starts another
                return None
            return self._letters[0]

    def _settle(self, letter: _Letter, error: Exception | None, began: float) -> None:
        """Go on to the next letter, or wait because of `error`, for which the store was asked at `began`."""
        # No tracker is called while `_changed` is held: a tracker that posts holds its own lock first.
        if error is not None:
            with contextlib.suppress(OSError):  # a full disk is told where the run is written, in its own thread
                for tracker in self._waiting():
                    tracker.save()
        else:
            if letter.refusal is not None and "open" not in letter.event:
                kind = next(iter(letter.event))
                logger.warning("MLflow refuses %s, it is left out: %s", kind, _first_line(letter.refusal))
            if self._take(letter):
                with contextlib.suppress(OSError):  # what stays on disk is sent again, which changes nothing
                    letter.tracker.delivered(letter)
        with self._changed:
            self._attempts += 1
            self._asked = time.monotonic()
            if error is not None:
                self._wait(error, began)
            else:
                self._failures = 0
                letter.is_done = True
            self._changed.notify_all()

    def _take(self, letter: _Letter) -> bool:
        """Remove the first letter; False if it was given up meanwhile."""
        with self._changed:
            is_there = bool(self._letters) and self._letters[0] is letter
            if is_there:
                self._letters.popleft()
            return is_there

    def _wait(self, error: Exception, began: float) -> None:
        if self._failures:  # again: perhaps it is this run that the store cannot digest, so others first
            run = self._letters[0].tracker.run if self._letters else ""
            self._letters = deque(sorted(self._letters, key=lambda each: each.tracker.run == run))
        now = time.monotonic()
        if not self._failures:
            self._failing_since = began  # not `now`: one that never answers has failed as long as it was waited for
        self._failures += 1
        if self._failures == FAILURES:
            logger.warning("MLflow does not answer, its records are kept on disk: %s", _first_line(error))
        self._ask_again = now + min(FIRST_PAUSE * 2 ** min(self._failures - 1, 16), LONGEST_PAUSE)


_outboxes: dict[str, _Outbox] = {}  # by the address of the store


def _outbox(root: Storage) -> _Outbox:
    """That of the root's store. Raises ValueError as `connect` does."""
    uri = tracking_uri(root)
    client = connect(root)
    return _outboxes.setdefault(uri, _Outbox(client, _sqlite_file(uri)))


class _Sender:
    """Writes events of one run to the store. Sending an event twice changes nothing."""

    def __init__(self, client: MlflowClient, database: Path | None) -> None:
        self._client, self._database = client, database
        self._known: dict[str, set[int]] = {}  # metric -> steps that are in the store
        self._is_new = False  # made by this sender: there is nothing in the store that could be sent twice
        self._end: int | None = None  # milliseconds: that the run keeps
        self._run_id: str | None = None

    @property
    def run_id(self) -> str | None:
        return self._run_id

    def send(self, event: Event, files: Path) -> None:
        """Raises MlflowException or OSError when the store does not take it. files: where artifacts wait."""
        kind, value = next(iter(event.items()))
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
            self._client.set_terminated(self._run_id, value, self._end or event.get("at"))

    def _opening(self) -> contextlib.AbstractContextManager[None]:
        """Searching and creating must not be interleaved with another process; a server leaves us no way to lock."""
        return contextlib.nullcontext() if self._database is None else _locked(_lock_file(self._database))

    def _open(self, opening: Event) -> None:
        experiment = self._experiment(opening["experiment"])
        run = self._find(experiment, opening["fingerprint"])
        if run is not None:
            if not opening.get("computes", True):
                self._end = run.info.end_time
            self._client.update_run(run.info.run_id, status="RUNNING")  # its end stays, also if we are killed now
            if ERROR in run.data.tags:  # of an attempt before this one
                self._client.delete_tag(run.info.run_id, ERROR)
        else:
            name, tags, began = opening["name"], opening["tags"], opening["opened"]  # perhaps long ago
            run = self._client.create_run(experiment, began, tags, name)
            self._is_new = True
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
        tags = {**opening["tags"], **{LATEST + key: value for key, value in changed.items()}}
        first = run.data.tags.get(COMMIT, tags.get(COMMIT))
        worked = run.data.tags.get(CODE_CHANGED, str(first)).split(", ")
        if opening.get("computes", True) and worked[-1] != tags.get(COMMIT, worked[-1]):
            tags[CODE_CHANGED] = ", ".join([*worked, tags[COMMIT]])
        if COMMIT in tags and (tags[COMMIT] != first or LATEST + COMMIT in run.data.tags):
            tags |= {COMMIT: first, LATEST + COMMIT: tags[COMMIT]}
        tags[OPENED] = str(opening["opened"])
        tags[ATTEMPT] = str(int(run.data.tags.get(ATTEMPT, 0)) + (run.data.tags.get(OPENED) != tags[OPENED]))
        for batch in _batches(list(new.items()), PARAMS_IN_BATCH):
            self._client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in batch])
        for batch in _batches(list(tags.items()), PARAMS_IN_BATCH):
            self._client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in batch])

    def _log_metrics(self, run_id: str, points: Sequence[Sequence[Any]]) -> None:
        """Points [name, value, step, milliseconds]; each (name, step) once, also after a crash or a lost answer."""
        for name in {point[0] for point in points} - self._known.keys():
            history = [] if self._is_new else self._client.get_metric_history(run_id, name)
            self._known[name] = {point.step for point in history}
        fresh: dict[tuple[str, int], Metric] = {}
        for name, value, step, milliseconds in points:
            if step not in self._known[name]:
                fresh.setdefault((name, step), Metric(name, value, milliseconds, step))
        try:
            for batch in _batches(list(fresh.values()), METRICS_IN_BATCH):
                self._client.log_batch(run_id, metrics=batch)
        except BaseException:
            self._known.clear()  # it may have arrived nevertheless: ask again
            self._is_new = False
            raise
        for name, step in fresh:
            self._known[name].add(step)

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
        known = self._client.search_model_versions(f"name = '{name}'")
        version = next((each.version for each in known if each.tags.get(DIGEST) == digest), None)
        if version is None:
            version = self._upload(run_id, name, directory, size, {DIGEST: digest, "licence": licence})
        self._client.set_registered_model_alias(name, CHAMPION, version)

    def _upload(self, run_id: str, name: str, directory: str, size: list[int], tags: dict[str, str]) -> str:
        """A new version of a registered model. Returns its number."""
        with tempfile.TemporaryDirectory() as folder:
            for file in MODEL_FILES:
                shutil.copy(Path(directory) / file, folder)
            about = Model(artifact_path="model", run_id=run_id, signature=_signature(*size))
            about.add_flavor("mis_platform", weights=MODEL_FILES[0], config=MODEL_FILES[1])
            about.save(str(Path(folder) / "MLmodel"))
            self._client.log_artifacts(run_id, folder, "model")
        source = f"{self._client.get_run(run_id).info.artifact_uri}/model"
        return str(self._client.create_model_version(name, source, run_id, tags=tags).version)


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

    def __init__(self, shelf: Path, prefix: str) -> None:
        name = f"{prefix}{time.time_ns()}-{uuid.uuid4().hex}"  # sorted: in the order they were opened
        self.directory = shelf / name
        self.files = self.directory / "files"
        self._events = self._bytes = 0  # in the file
        self._lock: int | None = None  # file descriptor

    def new_file(self, path: str) -> Path:
        """Where an artifact is written before it is sent."""
        file = self.files / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def save(self, events: Sequence[Event]) -> None:
        """Add events; the first is the run's opening."""
        self._claim()
        lines = "".join(map(_line, events)).encode()
        with open(self.directory / EVENTS, "ab") as stream:
            stream.truncate(self._bytes)  # what a full disk left of an attempt before would tear the next line
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())
        self._events += len(events)
        self._bytes += len(lines)

    def clear(self, opening: Event) -> None:
        """Everything has been sent; that the run is open stays."""
        if self._events > 1:
            self.replace([opening])

    def replace(self, events: Sequence[Event]) -> None:
        """Keep these instead of those that were added."""
        file, temporary = self.directory / EVENTS, self.directory / f"{TEMPORARY}{EVENTS}"
        temporary.write_bytes(lines := "".join(map(_line, events)).encode())
        os.replace(temporary, file)
        self._events, self._bytes = len(events), len(lines)

    @property
    def bytes(self) -> int:
        """Of the events."""
        return self._bytes

    def file_bytes(self) -> int:
        """Of the artifacts that wait."""
        total = 0
        for file in self.files.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # sent meanwhile
                total += file.stat().st_size if file.is_file() else 0
        return total

    def release(self) -> None:
        """Leave it to the next process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.release()

    def _claim(self) -> None:
        if self._lock is None:
            hidden = self.directory.with_name(TEMPORARY + self.directory.name)  # nobody may see it unlocked
            hidden.mkdir(parents=True)
            self._lock = os.open(hidden / LOCK, os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(self.directory)


class _Orphan:
    """What a process that is gone could not send; a run whose end it did not record was killed."""

    def __init__(self, directory: Path, lock: int, outbox: _Outbox) -> None:
        self._directory, self._lock, self._outbox = directory, lock, outbox
        self._sender = outbox.sender()
        events = _read_events(directory / EVENTS)
        self.run = str(events[0]["open"]["fingerprint"]) if events else ""
        if events and not any("status" in event for event in events):
            events.append({"status": "KILLED"})
        self._letters = deque(_Letter(self, event) for event in events)

    def post(self) -> None:
        for letter in list(self._letters):
            self._outbox.post(letter)
        if not self._letters:
            self._remove()

    def deliver(self, event: Event) -> None:
        if self._sender.run_id is not None or "open" in event:
            self._sender.send(event, self._directory / "files")

    def save(self) -> None:
        """It is on disk."""

    def delivered(self, letter: _Letter) -> None:
        if "open" in letter.event and letter.refusal is not None:
            logger.warning("MLflow refuses what is left in %s: %s", self._directory, _first_line(letter.refusal))
        self._letters.popleft()
        if self._letters:
            return
        if self._sender.run_id is not None:
            self._remove()
        else:
            self.give_up()

    def give_up(self) -> bool:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        return True

    def _remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        self.give_up()


def _orphans(shelf: Path, prefix: str, outbox: _Outbox) -> Iterator[_Orphan]:
    """The folders on the shelf for one store whose process is gone, locked now by this one."""
    for directory in sorted(shelf.glob(f"{prefix}*")):
        if (lock := _lock_of_dead(directory)) is not None:
            with contextlib.suppress(OSError):
                yield _Orphan(directory, lock, outbox)


def _lock_of_dead(directory: Path) -> int | None:
    """The lock of a run's folder, ours now; None if its process lives or the folder is gone."""
    with contextlib.suppress(OSError):
        lock = os.open(directory / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
            return lock
        except OSError:
            os.close(lock)
    return None


def _line(event: Event) -> str:
    return json.dumps(event) + "\n"


def _read_events(file: Path) -> list[Event]:
    """Whole lines only: the last one may have been cut off by a kill. Others that cannot be read are told and left out,
    and all of them where the first does not say which run it is.
    """
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or (number == 1 and not isinstance(event.get("open"), dict)):
                raise ValueError("this is no event")
        except ValueError as error:
            logger.warning("MLflow does not get line %d of %s, which is damaged: %s", number, file, error)
            if number == 1:
                return []
        else:
            events.append(event)
    return events


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
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False  # a file of ours; asking again would hold up everything behind it
    return isinstance(error, OSError) or getattr(error, "error_code", None) in PASSING


# -- text ------------------------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return scrub((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def _spell(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
