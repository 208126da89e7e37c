"""Is everything here that a run needs? Each finding says what was looked at and, where it is wrong, how to mend it.

Nothing is started and nothing large is fetched: without RAY_ADDRESS the arithmetic is that of this machine. What is
written, a megabyte to the root and a tag to MLflow, is what a run would write.
"""

import base64
import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import resource
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mis_platform import access, tracking
from mis_platform.config import TRAINED, Resources, Run, fingerprint, plain
from mis_platform.data.benchmarks import Split, list_datasets, open_dataset
from mis_platform.errors import DataError
from mis_platform.experiment import Experiment, load_experiment
from mis_platform.model import hub
from mis_platform.model.features import BACKBONES, WITHOUT_WEIGHTS, weights_file
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import MAE_REPOSITORIES, WEIGHTS_FILE, fetch_mae
from mis_platform.redaction import scrub
from mis_platform.stages import cluster, train
from mis_platform.stages.training_loop import CHECKPOINTS_KEPT
from mis_platform.storage import TEMPORARY, Storage
from mis_platform.sweep import WHEEL_BENCHMARK, WHEEL_PHOTOS

OK, WARN, FAIL = "ok", "warn", "FAIL"
USAGE, DATA, LOST = 2, 3, 6  # what a failure would end a run with
PACKAGE = "mis-platform"
# Older ones have known holes: Pillow's decoders, MLflow's default password, Ray's open ports, torch.load.
FLOORS = {"ray": "2.60", "pillow": "12.3", "mlflow": "3.16.1", "torch": "2.6"}
GIB, MIB = 2**30, 2**20
PROBE_BYTES = MIB
TRAINING_BYTES, CHECKPOINT_BYTES = 16, 12  # of a parameter: itself, gradient, Adam's two moments; no gradient on disk
LITTLE_SPACE, HARDLY_SPACE = 20 * GIB, 1 * GIB
GPU_FILE = Path("/dev/nvidia0")  # there where the machine has one
OPEN_FILES = 65536  # Ray's advice
SHARED_MEMORY_SHARE = 0.3  # of the memory: Ray's object store
SECONDS = 5.0  # that a server has to answer
DEFAULT_PASSWORDS = ("password1234", "password")  # of MLflow's user admin, before 3.16.1


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. fix: what to do about it; kind: the exit code of a failure."""

    state: str
    what: str
    fix: str = ""
    kind: int = USAGE

    @property
    def exit_code(self) -> int:
        """0 unless this is a failure."""
        return self.kind if self.state == FAIL else 0

    def __str__(self) -> str:
        text = f"{self.state:<4}  {self.what}" + (f"\n      -> {self.fix}" if self.fix else "")
        return scrub(text)


Findings = Iterator[Finding]


def examine(
    root: Storage,
    data_root: Path | None,
    resources: Resources,
    name: str | None = None,
    profile: str = "paper",
    assignments: Sequence[str] = (),
) -> Findings:
    """Findings one by one, as they are made. name: the experiment that is to run, at `profile` with `assignments`."""
    experiment = name and load_experiment(name).with_profile(profile).with_settings(assignments)
    runs = [row.run for row in experiment.rows if not row.quoted] if isinstance(experiment, Experiment) else []
    yield from _guarded("versions", _versions)
    yield from _guarded("token", _token)
    with contextlib.ExitStack() as joined:
        if os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
            yield from _guarded("cluster", lambda: _join(joined))
        yield from _guarded("GPUs", lambda: _gpus(resources))
        yield from _guarded("cluster", lambda: _capacity(resources))
        yield from _guarded("memory", lambda: _memory(runs, resources, root))
        yield from _guarded("shared memory", _shared_memory)
        yield from _guarded("open files", _open_files)
        yield from _guarded("storage", lambda: _storage(root))
        yield from _guarded("nodes", lambda: _sharing(root, data_root))
        yield from _guarded("data", lambda: _datasets(runs, data_root, root))
        yield from _guarded("weights", lambda: _weights(runs))
        yield from _guarded("MLflow", lambda: _mlflow(root))


def _guarded(what: str, check: Callable[[], Findings]) -> Findings:
    """A check that cannot be made is a finding, and the others are still made."""
    try:
        yield from check()
    except DataError as error:
        yield Finding(FAIL, f"{what}: {_line(error)}", kind=DATA)
    except ValueError as error:
        yield Finding(FAIL, f"{what}: {_line(error)}")
    except Exception as error:
        yield Finding(FAIL, f"{what}: {type(error).__name__}: {_line(error)}", kind=LOST)


# -- what is installed -----------------------------------------------------------------------------------------------


def _versions() -> Findings:
    python, wanted = platform.python_version(), _metadata()
    if python < "3.11" and Version(python) < Version("3.11"):
        yield Finding(FAIL, f"Python {python}", "use Python 3.11 or newer")
    found, wrong = [], []
    requirements = [Requirement(text) for text in wanted]
    requirements = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    requirements += [Requirement(f"{name}>={floor}") for name, floor in FLOORS.items()]
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if requirement.name in FLOORS:
            found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        fix = "pip install -c constraints.txt -e . (or the image that cluster/ builds)"
        yield Finding(FAIL, f"versions: {', '.join(dict.fromkeys(wrong))}", fix)
    else:
        yield Finding(OK, f"Python {python}, {', '.join(dict.fromkeys(found))}")
    if other := _off_pins(requirements):
        yield Finding(WARN, f"not the versions that the tests ran with: {', '.join(other)}", "see constraints.txt")


def _metadata() -> list[str]:
    """Requirements of the installed package; none where only its source was sent."""
    try:
        return importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _off_pins(requirements: Iterable[Requirement]) -> list[str]:
    """Direct dependencies that differ from constraints.txt of a source tree."""
    file = Path(__file__).resolve().parent.parent / "constraints.txt"
    if not file.is_file():
        return []
    lines = (line.partition("==") for line in file.read_text(encoding="utf8").splitlines())
    pins = {name.strip().lower(): pin.strip() for name, separator, pin in lines if separator}
    names = dict.fromkeys(requirement.name.lower() for requirement in requirements)
    found = {name: importlib.metadata.version(name) for name in names if name in pins}
    return [f"{name} {version} (pin {pins[name]})" for name, version in found.items() if version != pins[name]]


def _token() -> Findings:
    token, mode = access.find_token(), os.environ.get("RAY_AUTH_MODE", "")
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        access.check_ray_address(address)
    if mode.lower() == "disabled":
        yield Finding(
            WARN, "token: RAY_AUTH_MODE=disabled", "unset it: without a token, who reaches the port runs code"
        )
    elif token is None:
        fix = f"a cluster elsewhere needs one in {access.PLACES}; `ray get-auth-token --generate` makes one"
        yield Finding(OK if not address else WARN, "token: none yet; a Ray of this machine makes its own", fix)
    else:
        yield Finding(OK, f"token: in {token.place}")
        path = Path(token.place)
        if path.is_file() and path.stat().st_mode & 0o077:
            yield Finding(WARN, f"token: others may read {path}", f"chmod 600 {path}")


# -- machines --------------------------------------------------------------------------------------------------------


def _join(stack: contextlib.ExitStack) -> Findings:
    address, started = os.environ["RAY_ADDRESS"], time.monotonic()
    try:
        stack.enter_context(cluster.cluster())
    except (ConnectionError, RuntimeError) as error:
        fix = "is it running, and reachable from here? From outside a cluster use `mis submit -- doctor`"
        yield Finding(FAIL, f"cluster: {address} cannot be joined: {_line(error)}", fix, LOST)
        return
    nodes = len(cluster.nodes())
    yield Finding(OK, f"cluster: joined {address} in {time.monotonic() - started:.1f} s, {nodes} node(s)")


def _gpus(resources: Resources) -> Findings:
    here, whole = torch.cuda.device_count(), cluster.gpus()
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if here == 0 and GPU_FILE.exists() and not is_hidden:
        yield Finding(FAIL, "GPUs: there is one, and PyTorch cannot use it", "install a driver that fits this PyTorch")
    for index in range(here):
        device = torch.cuda.get_device_properties(index)
        yield Finding(OK, f"GPU {index}: {device.name}, {device.total_memory / GIB:.0f} GiB")
    if whole == 0 and resources.use_gpu is not True:
        yield Finding(WARN, "GPUs: none; training runs on CPUs", "fine for --profile smoke and small; paper needs one")


def _capacity(resources: Resources) -> Findings:
    """The arithmetic of a training and of a sweep on these CPUs and GPUs."""
    where = f"{len(cluster.nodes())} node(s)" if ray.is_initialized() else "this machine"
    trials, workers = train.trials_at_once(resources), resources.num_workers
    scaling, loaders, threads = train.plan(resources.model_copy(update={"trials": trials}))
    has = {"CPU": cluster.cpus(), "GPU": cluster.gpus()}
    needs = [
        f"{trials} training(s) x {workers} worker(s) x {amount:g} {kind} = {trials * workers * amount:g} of {has[kind]}"
        for kind, amount in dict(scaling.resources_per_worker or {}).items()  # type: ignore[arg-type]
    ]
    each = f"{loaders} example task(s) and {threads} torch thread(s) for each worker"
    yield Finding(OK, f"{where}: {'; '.join(needs)}; {each}")


def _memory(runs: Sequence[Run], resources: Resources, root: Storage) -> Findings:
    """What trainings hold at least, and what they write, against memory and disk; images come on top."""
    trained = [run for run in runs if run.method == TRAINED]
    if not trained:
        return
    with torch.device("meta"):
        models = {run.model.variant: SimpleClick(run.model.variant) for run in trained}
    sizes = {name: sum(each.numel() for each in model.parameters()) for name, model in models.items()}
    variant = max(sizes, key=lambda name: sizes[name])
    trials, workers = train.trials_at_once(resources), resources.num_workers
    each = TRAINING_BYTES * sizes[variant] / GIB
    held = f"{trials} training(s) x {workers} worker(s) x {each:.1f} GiB for {variant}, its gradients and Adam"
    use_gpu, here = train.uses_gpu(resources), torch.cuda.device_count()
    if not use_gpu:
        yield _enough(f"memory: {held}", trials * workers * each, _memory_of_nodes(), "fewer resources.num_workers")
    elif here:
        has = min(torch.cuda.get_device_properties(index).total_memory for index in range(here)) / GIB
        on_each = math.ceil(trials * workers / cluster.gpus())
        yield _enough(f"GPU memory: {held}, {on_each} on each GPU", on_each * each, has, "fewer resources.trials")
    if root.local is not None:
        trainings = len({fingerprint(_without_evaluation(run)) for run in trained})
        disk = trainings * (CHECKPOINTS_KEPT + 1) * CHECKPOINT_BYTES * sizes[variant] / GIB
        free = shutil.disk_usage(_existing(root.local)).free / GIB
        yield _enough(f"disk: checkpoints of {trainings} training(s), {disk:.1f} GiB", disk, free, "another --root")


def _without_evaluation(run: Run) -> dict[str, Any]:
    return {name: value for name, value in plain(run).items() if not name.startswith("eval")}


def _enough(what: str, wanted: float, has: float, fix: str) -> Finding:
    """wanted, has: GiB."""
    what = f"{what}; {wanted:.1f} of {has:.1f} GiB"
    return Finding(OK, what) if wanted <= has else Finding(FAIL, what, fix)


def _memory_of_nodes() -> float:
    """GiB: what Ray counts, or what this machine has."""
    if ray.is_initialized():
        return float(ray.cluster_resources().get("memory", 0.0)) / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _shared_memory() -> Findings:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = SHARED_MEMORY_SHARE * memory
    text = (
        f"/dev/shm: {size / GIB:.1f} GiB, Ray's object store wants {wanted / GIB:.1f} of {memory / GIB:.1f} GiB memory"
    )
    fix = f"docker run --shm-size={wanted / GIB:.0f}g; Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    yield Finding(OK, text) if size >= wanted else Finding(WARN, f"{text}: it will use a disk instead", fix)


def _open_files() -> Findings:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        yield Finding(OK, f"open files: {soft}")
    else:
        yield Finding(WARN, f"open files: {soft}; large clusters need {OPEN_FILES}", f"ulimit -n {OPEN_FILES}")


# -- storage ---------------------------------------------------------------------------------------------------------


def _storage(root: Storage) -> Findings:
    """Write, read, replace by rename and remove a megabyte in the root, and see what is free."""
    was_there = root.local is None or root.local.is_dir()
    root.check_writable()
    probe, data = f"{TEMPORARY}doctor-{uuid.uuid4().hex}", os.urandom(PROBE_BYTES)
    seconds: dict[str, float] = {}

    def timed(what: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = action()
        seconds[what] = time.perf_counter() - started
        return result

    try:
        timed("write", lambda: root.write_bytes(probe, data))
        timed("replace", lambda: root.write_bytes(probe, data[::-1]))
        returned = timed("read", lambda: root.read_bytes(probe))
    finally:
        timed("remove", lambda: root.remove(probe))
    if returned != data[::-1]:
        yield Finding(FAIL, f"storage: {root} returns other bytes than were written", "choose another --root", LOST)
    times = ", ".join(f"{what} {1000 * value:.0f} ms" for what, value in seconds.items())
    yield Finding(OK, f"storage: {root}: 1 MiB {times}")
    if root.local is not None:
        free = shutil.disk_usage(root.local).free
        state = FAIL if free < HARDLY_SPACE else WARN if free < LITTLE_SPACE else OK
        fix = "" if state == OK else "make room, or choose another --root"
        yield Finding(state, f"storage: {free / GIB:.1f} GiB free", fix, LOST)
        if not was_there:
            with contextlib.suppress(OSError):  # somebody began to use it
                root.local.rmdir()


def _sharing(root: Storage, data_root: Path | None) -> Findings:
    """Whether every node of a cluster sees what is a path here; measured on each."""
    count = len(cluster.nodes())
    if count < 2:
        return
    if root.local is not None:
        try:
            cluster.check_shared(root)
        except ValueError as error:
            yield Finding(FAIL, f"root: {_line(error)}")
        else:
            yield Finding(OK, f"root: {root} is seen by all {count} nodes")
    if data_root is not None:
        path = data_root.expanduser().absolute()
        if blind := cluster.nodes_without(path):
            fix = "copy it to every node, or mount it there under the same path"
            yield Finding(FAIL, f"data root: {path} is not there on {', '.join(blind)}", fix, DATA)
        else:
            yield Finding(OK, f"data root: {path} is seen by all {count} nodes")


# -- what a run reads ------------------------------------------------------------------------------------------------


def _datasets(runs: Sequence[Run], data_root: Path | None, root: Storage) -> Findings:
    if not runs:
        there = [each for each in list_datasets(data_root) if each.root is not None] if data_root else []
        text = ", ".join(f"{each.name} {each.split} ({each.images})" for each in there)
        fix = "--data-root or MIS_DATA names the folder that holds them; `mis data list` says what is looked for"
        yield Finding(OK, f"data: {text}") if there else Finding(WARN, "data: no datasets found", fix)
        return
    trained = {run.dataset for run in runs if run.method == TRAINED}
    wanted: list[tuple[str, Split]] = [(spec, "train") for spec in sorted(trained)]
    wanted += [(spec, "val") for spec in sorted({spec for run in runs for spec in run.eval_datasets})]
    for spec, split in wanted:
        if spec in {WHEEL_PHOTOS, WHEEL_BENCHMARK}:
            if root.local is None:
                yield Finding(FAIL, f"data: {spec} is made below a local root; {root} is none", "use --profile small")
            else:
                yield Finding(OK, f"data: {spec} is made from photos that the packages carry")
            continue
        try:
            dataset = open_dataset(spec, data_root, split)
            yield Finding(OK, f"data: {spec} {split}: {len(dataset)} images in {dataset.root}")
        except ValueError as error:
            fix = "`mis data list` says what is looked for; a smaller profile needs less data (--profile smoke: none)"
            yield Finding(FAIL, f"data: {_line(error)}", fix, DATA)


def _weights(runs: Sequence[Run]) -> Findings:
    """The weights that the runs start from: a file, in the hub's cache, to be fetched, or not to be had."""
    asked = runs or [Run()]
    features = {
        (run.features.extractor, run.features.weights): run.features
        for run in asked
        if run.features.extractor != WITHOUT_WEIGHTS and run.target.source != "labels"
    }
    starts = {(run.model.variant, run.model.init_weights) for run in asked if run.model.init == "mae"}
    for config in features.values():
        repository, fetch = BACKBONES[config.extractor].repository, functools.partial(weights_file, config)
        yield _weight(f"weights of {config.extractor}", config.weights, repository, fetch, bool(runs))
    for variant, given in sorted(starts, key=str):
        fetch = functools.partial(fetch_mae, variant, hub.pin_of(given))
        yield _weight(f"weights of MAE {variant}", given, MAE_REPOSITORIES[variant], fetch, bool(runs))
    if not features and not starts:
        yield Finding(OK, "weights: none are needed")


def _weight(what: str, given: str | None, repository: str, fetch: Callable[[], Path], is_needed: bool) -> Finding:
    """fetch: raises ValueError that says how to get them; asked only where it has nothing to download."""
    pin = hub.pin_of(given)
    if given is not None and pin is None:
        is_there = Path(given).expanduser().exists()  # a folder, for extractors that are compared
        text = f"{what}: {given}" if is_there else f"{what}: there is no file {given}"
        return Finding(OK if is_there else FAIL, text, "" if is_there else "give a path that exists", DATA)
    if hub.cached(repository, WEIGHTS_FILE, pin):
        return Finding(OK, f"{what}: in the hub's cache")
    try:
        offered = hub.probe(repository, WEIGHTS_FILE)
    except ConnectionError:
        offered = None
    if offered is not None and pin in (None, offered):
        return Finding(OK, f"{what}: will be fetched from {repository}")
    try:
        fetch()
    except ValueError as error:
        fix = "`--profile smoke` and `small` need no weights"
        return Finding(FAIL if is_needed else WARN, _line(error), fix, USAGE)
    return Finding(OK, f"{what}: in the hub's cache")


# -- MLflow ----------------------------------------------------------------------------------------------------------


def _mlflow(root: Storage) -> Findings:
    uri = tracking.tracking_uri(root)
    for store, runs in tracking.waiting(root).items():
        yield Finding(WARN, f"MLflow: {runs} run(s) wait in the root for {store}", "set MLFLOW_TRACKING_URI to it once")
    if not uri.startswith(("http://", "https://")):
        database = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not database.exists():
            try:
                tempfile.TemporaryFile(
                    dir=_existing(database.parent)
                ).close()  # root may write wherever modes forbid it
                yield Finding(OK, f"MLflow: {uri} will be made")
            except OSError as error:
                yield Finding(FAIL, f"MLflow: {uri} cannot be made: {_line(error)}", "choose another --root", LOST)
            return
        tracking.probe(root)
        yield Finding(OK, f"MLflow: {uri}, written")
        return
    url = urlsplit(uri)
    server = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path.rstrip('/')}"  # without a login
    api = f"{server}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        status = _status(api)
    except OSError as error:
        fix = "start the server (cluster/compose.yaml has one), or unset MLFLOW_TRACKING_URI to use a file in the root"
        yield Finding(FAIL, f"MLflow: nobody answers at {server}: {_line(error)}", fix, LOST)
        return
    if status in {401, 403}:
        for password in DEFAULT_PASSWORDS:
            if _status(api, f"admin:{password}") == 200:
                fix = "change it now: whoever reaches the server owns it, and may run code on it"
                yield Finding(FAIL, f"MLflow: {uri} ACCEPTS THE DEFAULT PASSWORD of its user admin", fix)
                break
    elif not access.is_loopback(url.hostname or ""):
        yield Finding(WARN, f"MLflow: {uri} asks nobody for a password", "start it with --app-name basic-auth")
    tracking.probe(root)
    yield Finding(OK, f"MLflow: {uri}, written")


def _status(url: str, login: str | None = None) -> int:
    """HTTP status of a GET. Raises OSError when nobody answers."""
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__
