"""The click protocol and the overlap of merge trees with the objects of a benchmark, spread over the cluster.

Notable choices:

* **On a CPU every object is asked alone, by one thread.** How many rows a matrix product has, and how many threads
  share it, changes the last bits of its result; here neither the number of workers nor `eval_batch` can. On a GPU
  objects go through the network together, `eval_batch` at a time, and another `eval_batch` may move a pixel.
* **Workers score, the driver writes.** A chunk of photos is a small table, so only the driver needs the storage.
* **The directory is the state.** A part says which photos it is about, also those without a row; a restart scores only
  photos that no whole part is about. The digest is a sum over rows, without the times.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from mis_platform.artifacts import Output, Part, combine_digests, sha256
from mis_platform.baselines.methods import METHODS_VERSION, build_method
from mis_platform.config import ClassicalConfig, EvalConfig, Resources, SamplingConfig, plain
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.images import ImageRefused
from mis_platform.data.proposals import ProposalReader, best_overlap_of_masks
from mis_platform.data.schemas import CLICKS, OVERLAPS
from mis_platform.data.trees import TreeReader
from mis_platform.errors import DataError
from mis_platform.evaluation.click_model import ClickModel
from mis_platform.evaluation.predictor import load_network
from mis_platform.evaluation.protocol import (
    Excluded,
    Sample,
    click_model_fingerprint,
    evaluate,
    evaluate_click_model,
    protocol_fingerprint,
    robot_settings,
    told,
)
from mis_platform.evaluation.session import Network
from mis_platform.model.weights import CONFIG_FILE, WEIGHTS_FILE
from mis_platform.progress import Progress
from mis_platform.simulation.proposals import best_overlap
from mis_platform.stages import cluster
from mis_platform.storage import Storage

VERSION = 2  # 2: among equally deep errors the first is clicked, not one by chance
OVERLAP_VERSION = 4  # of `evaluate_proposals`; 4: numbers and sizes of proposals are those of photos, not of objects

GOOD_OVERLAPS = (0.5, 0.7, 0.85)  # IoU

CHUNK_IMAGES = 8  # photos in a part, at least
WORKERS_PER_GPU = 4  # processes that share it: the simulated user takes longer than the network
ROUNDS = 4  # forwards' worth of objects in a chunk, so that a GPU is not left half full for long
POLL_SECONDS = 1.0
SILENT_SECONDS = 30.0  # without an answer of a worker: one that has nothing to do takes over its chunk
RETRIES = 2  # of a chunk whose worker died
TIMES = ("ms",)  # columns that are measured, not computed
IMAGES_KEY, EXCLUDED_KEY, DIGEST_KEY = b"mis_platform.images", b"mis_platform.excluded", b"mis_platform.digest"

Row = dict[str, Any]


def evaluate_model(
    dataset: Dataset, model_dir: Storage, config: EvalConfig, zoom_size: int, resources: Resources, out: Storage
) -> Output:
    """Every click of the simulated user on every object: parts `clicks-*.parquet` with the schema CLICKS in `out`.

    model_dir: any directory with model.safetensors and config.json; zoom_size: side of the network's input in pixels.
    Rows are in the order of the data set; objects without a pixel are only listed in the summary. Call it while holding
    the lease of `out`. Raises DataError for a photo or mask that cannot be used and when there is nothing to score,
    ValueError for a model that cannot be loaded.
    """
    with cluster.cluster(out, dataset):
        gpus = cluster.usable_gpus(resources)
        batch = resources.eval_batch if gpus else 1
        job = Clicking(_absolute(dataset), model_dir, config, zoom_size, batch, "cuda" if gpus else "cpu")
        share = math.ceil(len(dataset) / _workers(resources, gpus))  # a small benchmark is for all workers, too
        found = _score(job, max(CHUNK_IMAGES, min(ROUNDS * batch, share)), resources, gpus, out)
    return _clicks_output(dataset, found, protocol_of_model(config, zoom_size))


def evaluate_method(
    dataset: Dataset, method: str, classical: ClassicalConfig, config: EvalConfig, resources: Resources, out: Storage
) -> Output:
    """As `evaluate_model`, for what needs no training.

    method: a classical one by name, or module:class of a ClickModel, whose constructor takes no arguments. Raises
    ValueError if there is no such module or class.
    """
    build_click_model(method, classical)  # a typing error is noticed here
    job = Answering(_absolute(dataset), method, classical, config)
    with cluster.cluster(out, dataset):
        found = _score(job, CHUNK_IMAGES, resources, 0, out)
    return _clicks_output(dataset, found, protocol_of_method(method, config))


def protocol_of_model(config: EvalConfig, zoom_size: int) -> Row:
    """What a trained model is scored under, as its artifact and report say it. zoom_size: of the network's input."""
    return {"fingerprint": protocol_fingerprint(config, zoom_size), "zoom_size": zoom_size, **_settings(config)}


def protocol_of_method(method: str, config: EvalConfig) -> Row:
    """As `protocol_of_model`, for what needs no training and is asked at image size."""
    return {"fingerprint": click_model_fingerprint(config), "family": method, **robot_settings(config)}


def _clicks_output(dataset: Dataset, found: "Sequence[Found]", protocol: Row) -> Output:
    clicks = sum(each.part.rows for each in found)
    excluded = [each for part in found for each in part.excluded]
    if not clicks:
        raise DataError(f"{dataset.name} in {dataset.root} has no object to score")
    return _output(found, {"images": len(dataset), "clicks": clicks, "excluded": excluded, "protocol": protocol})


def evaluate_proposals(
    dataset: Dataset, proposals: Storage, are_trees: bool, resources: Resources, out: Storage
) -> Output:
    """The best IoU that any proposal reaches on each object: parts `overlap-*.parquet` (OVERLAPS) in `out`.

    proposals: a finished artifact of merge trees, all nodes of which count, or of masks. The summary has the mean best
    overlap, the median, the share of objects above 0.5, 0.7 and 0.85, over the photos the mean number of proposals and
    the median of their median sizes, and the share of photos in which none was found; photos without any (quarantined)
    and objects without a pixel are listed there and count nowhere. Raises DataError as above.
    """
    job = Overlapping(_absolute(dataset), proposals, are_trees)
    with cluster.cluster(out, dataset):
        found = _score(job, CHUNK_IMAGES, resources, 0, out)
    overlaps = _column(out, found, "best_iou")
    if not overlaps.size:
        raise DataError(f"{dataset.name} in {dataset.root} has no object with a proposal to score")
    _, first = np.unique(_column(out, found, "image_id"), return_index=True)  # a photo's objects say the same of it
    sizes, counts = (_column(out, found, name)[first] for name in ("proposal_area", "proposals"))
    summary: Row = {
        "images": len(dataset),
        "objects": len(overlaps),
        "mean_best_overlap": round(float(overlaps.mean(dtype=np.float64)), 4),
        "median_best_overlap": round(float(np.median(overlaps)), 4),
        "proposals": round(float(counts.mean(dtype=np.float64)), 2),
        "share_of_photos_without": round(float((counts == 0).mean()), 4),
        "median_proposal_area": round(float(np.nanmedian(sizes)), 4) if np.isfinite(sizes).any() else 0.0,
    }
    summary |= {f"share_above_{iou:g}": round(float((overlaps > iou).mean()), 4) for iou in GOOD_OVERLAPS}
    summary["excluded"] = [each for part in found for each in part.excluded]
    return _output(found, summary)


def _settings(config: EvalConfig) -> Row:
    """The protocol's settings without the two sizes of which one was used."""
    return {name: value for name, value in plain(config).items() if name not in ("zoom_size", "davis_zoom_size")}


def _absolute(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, root=dataset.root.resolve())  # workers have their own working directories


# -- what a worker does ----------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What is known about a chunk of photos."""

    rows: list[Row]
    excluded: list[str]  # "photo, object N: why", for people


Tell = Callable[[int, int], None]  # told how many photos are finished, and how many rows there are


@dataclasses.dataclass(frozen=True)
class Clicking:
    """The click protocol."""

    prefix, schema, noun = "clicks", CLICKS, "clicks"
    dataset: Dataset
    model_dir: Storage
    config: EvalConfig
    zoom_size: int
    batch: int  # objects per forward
    device: str

    def score(self, image_ids: Sequence[str], tell: Tell) -> Scored:
        """The clicks on these photos, from a model that is loaded once a process.

        Raises DataError for a photo or mask that cannot be used, ValueError for weights that cannot be loaded or a GPU
        that is too small.
        """
        network = _network(self.model_dir, self.zoom_size, self.device)
        excluded: list[Excluded] = []
        rows: list[Row] = []
        places = {image_id: place for place, image_id in enumerate(image_ids)}
        clicks = evaluate(
            network,
            (_sample(self.dataset, image_id) for image_id in image_ids),
            self.config,
            zoom_size=self.zoom_size,
            batch=self.batch,
            device=self.device,
            on_excluded=excluded.append,
        )
        try:
            for row in clicks:
                rows.append(row)
                tell(places[row["image_id"]], len(rows))
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the GPU has too little memory for resources.eval_batch={self.batch} objects at once in each of its "
                f"processes; lower it, or resources.eval_workers (default: {WORKERS_PER_GPU} for each GPU)"
            ) from None
        return Scored(rows, _reasons(excluded))


@dataclasses.dataclass(frozen=True)
class Answering:
    """The click protocol for a method that needs no training."""

    prefix, schema, noun = "clicks", CLICKS, "clicks"
    dataset: Dataset
    method: str
    classical: ClassicalConfig
    config: EvalConfig

    def score(self, image_ids: Sequence[str], tell: Tell) -> Scored:
        """The clicks on these photos.

        Raises DataError for a photo, mask or answer that cannot be used, ValueError for a method that does not exist.
        """
        model = build_click_model(self.method, self.classical)
        excluded: list[Excluded] = []
        rows: list[Row] = []
        for done, image_id in enumerate(image_ids):
            sample = _sample(self.dataset, image_id)
            for row in evaluate_click_model(model, [sample], self.config, on_excluded=excluded.append):
                rows.append(row)
                tell(done, len(rows))
        return Scored(rows, _reasons(excluded))


def method_identity(method: str, classical: ClassicalConfig) -> Row:
    """What decides the answers of a method: its settings, or the source of the module it comes from."""
    if ":" not in method:
        return {"name": method, "version": METHODS_VERSION, "settings": plain(classical)}
    try:
        source = inspect.getsource(importlib.import_module(_own_class(method).__module__))
    except (OSError, TypeError) as error:
        raise ValueError(f"method={method}: {error}; it is addressed by the source of its module") from None
    return {"name": method, "source": hashlib.sha256(source.encode()).hexdigest()}


def build_click_model(method: str, classical: ClassicalConfig) -> ClickModel:
    """A new ClickModel. Raises ValueError if `method` names none, or one whose constructor fails."""
    if ":" not in method:
        return build_method(method, classical)
    model = _own_class(method)
    try:
        built: ClickModel = model()
    except Exception as error:  # anything, as it is not our code
        raise ValueError(f"method={method}: its constructor, called without arguments: {told(error)}") from error
    return built


def _own_class(method: str) -> type[Any]:
    """The class that somebody names by module:class."""
    module, _, name = method.partition(":")
    try:
        model: type[Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # anything, as it is not our code
        reason = error if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"method={method}: {reason}; the module must be importable, e.g. with PYTHONPATH") from error
    for needed in ("set_image", "predict"):
        if not callable(getattr(model, needed, None)):
            raise ValueError(f"method={method}: a ClickModel needs {needed}(), see docs/click-models.md")
    return model


@dataclasses.dataclass(frozen=True)
class Overlapping:
    """The best proposal for each object."""

    prefix, schema, noun = "overlap", OVERLAPS, "objects"
    dataset: Dataset
    proposals: Storage
    are_trees: bool

    def score(self, image_ids: Sequence[str], tell: Tell) -> Scored:
        """The best overlaps of the objects in these photos. Raises DataError for masks of another size."""
        scored = Scored([], [])
        for done, image_id in enumerate(image_ids, 1):
            self.score_image(image_id, scored)
            tell(done, len(scored.rows))
        return scored

    def score_image(self, image_id: str, scored: Scored) -> None:
        """Add the rows of one photo, or why it has none, to `scored`."""
        reader = _reader(self.proposals, self.are_trees)
        if image_id not in reader:
            scored.excluded.append(f"{image_id}: its photo was refused, it has no proposals")
            return
        candidates, size = _candidates(reader, image_id), reader.image_size(image_id)
        for object_id, mask in self.dataset.read_objects(image_id):
            if mask.shape != size:
                raise DataError(f"{image_id}, object {object_id}: mask of {mask.shape} pixels, proposals of {size}")
            if not (mask == 1).any():
                scored.excluded.append(f"{image_id}, object {object_id}: no pixel of the object")
                continue
            iou, number = candidates.best_overlap(mask)
            name = {"dataset": self.dataset.name, "image_id": image_id, "object_id": object_id}
            about = {"proposals": candidates.number, "proposal_area": candidates.median_area}
            area = float((mask == 1).mean())
            scored.rows.append({**name, "best_iou": float(iou), "node": int(number), "area": area, **about})


class Candidates(NamedTuple):
    """The proposals of one photo."""

    best_overlap: Callable[[np.ndarray], tuple[float, int]]  # object int8 [H, W] -> best IoU, number of the proposal
    number: int  # that a training may draw
    median_area: float  # of those, share of the photo; NaN if there are none


def _candidates(reader: TreeReader | ProposalReader, image_id: str) -> Candidates:
    if isinstance(reader, TreeReader):
        tree = reader.tree(image_id)
        shares = tree.sizes / tree.num_leaves
        shares = shares[shares > SamplingConfig().min_area]
        return Candidates(functools.partial(best_overlap, tree), len(shares), float(np.median(shares)))
    masks = reader.masks(image_id)
    area = float(np.median(masks.mean(axis=(1, 2)))) if len(masks) else float("nan")
    return Candidates(functools.partial(best_overlap_of_masks, masks), len(masks), area)


def _sample(dataset: Dataset, image_id: str) -> Sample:
    return Sample(dataset.name, image_id, _read(dataset, image_id), dataset.read_objects(image_id))


def _reasons(excluded: Iterable[Excluded]) -> list[str]:
    return [f"{each.image_id}, object {each.object_id}: {each.reason}" for each in excluded]


def _read(dataset: Dataset, image_id: str) -> np.ndarray:
    """uint8 [H, W, 3]. Raises DataError: a score without one of the photos would be another benchmark's."""
    try:
        return dataset.read_image(image_id)
    except ImageRefused as error:
        raise DataError(f"{dataset.name}: photo {image_id} cannot be used: {error}") from None


@functools.lru_cache(maxsize=1)
def _network(model_dir: Storage, zoom_size: int, device: str) -> Network:
    with model_dir.on_disk((CONFIG_FILE, WEIGHTS_FILE)) as directory:
        return load_network(directory, zoom_size, device)


@functools.lru_cache(maxsize=1)
def _reader(proposals: Storage, are_trees: bool) -> TreeReader | ProposalReader:
    return TreeReader(proposals) if are_trees else ProposalReader(proposals)


# -- spreading over the cluster --------------------------------------------------------------------------------------


Job = Clicking | Answering | Overlapping


class Worker:
    """A Ray actor that scores chunks. Nothing is loaded before the first one: there, errors arrive as they are."""

    begun = 0, 0

    def score(self, job: Job, image_ids: Sequence[str]) -> Scored:
        """Do the chunk, with one CPU thread. Raises as the job."""
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.begun = 0, 0
        return job.score(image_ids, self.tell)

    def tell(self, images: int, rows: int) -> None:
        """Keep what `progress` says."""
        self.begun = images, rows

    @ray.method(max_task_retries=0)  # Ray otherwise reports, in red, that it asks workers again that we have ended
    def progress(self) -> tuple[int, int]:
        """Photos and rows finished of the chunk that `score` is at; called from another thread."""
        return self.begun


class Found(NamedTuple):
    """A part that is whole."""

    part: Part
    image_ids: tuple[str, ...]
    excluded: tuple[str, ...]


def _score(job: Job, chunk_images: int, resources: Resources, gpus: int, out: Storage) -> list[Found]:
    """All parts, those of earlier attempts and new ones, in the order of the data set."""
    ids = job.dataset.image_ids
    found = finished_parts(out, job.prefix, job.schema, ids)
    done = {image_id for each in found for image_id in each.image_ids}
    missing = [image_id for image_id in ids if image_id not in done]
    chunks = [missing[start : start + chunk_images] for start in range(0, len(missing), chunk_images)]
    if chunks:
        progress = Progress(f"{job.noun} of {job.dataset.name}", len(ids), "images", start=len(done))
        try:
            workers = _start_workers(len(chunks), resources, gpus)
            for chunk, scored in _spread(workers, job, chunks, progress):
                found.append(write_part(job, chunk, scored, out))
        finally:
            progress.close()
    return sorted(found, key=lambda each: each.part.name)


def _workers(resources: Resources, gpus: int) -> int:
    """Processes of one evaluation: within a sweep, its share of the GPUs or CPUs."""
    on_gpus = max(1, WORKERS_PER_GPU * gpus // (resources.trials or 1)) if gpus else 0
    return resources.eval_workers or on_gpus or cluster.cpus_of_trial(resources.trials)


def _start_workers(chunks: int, resources: Resources, gpus: int) -> list[Any]:
    count = _workers(resources, gpus)
    options: Row = {"num_cpus": min(1.0, cluster.CPU_SHARE * cluster.cpus_of_trial(resources.trials) / count)}
    if gpus:
        # In a sweep a share that fits into what this row's training held: the trainings of other rows go on.
        options["num_gpus"] = cluster.gpu_share(count * (resources.trials or 1), gpus)
    options["scheduling_strategy"] = "DEFAULT"  # in a sweep: not within what is reserved for the trial's own process
    kind = ray.remote(Worker).options(max_concurrency=2, max_restarts=-1, max_task_retries=RETRIES, **options)
    return [kind.remote() for _ in range(min(count, chunks))]


def _spread(
    workers: Sequence[Any], job: Job, chunks: Sequence[Sequence[str]], progress: Progress
) -> Iterator[tuple[Sequence[str], Scored]]:
    """Each chunk with what a worker found, as they are finished."""
    crew = _Crew(workers, job, chunks)
    images, rows = progress.start, 0
    try:
        while crew.left:
            for chunk, scored in crew.finished():
                images, rows = images + len(chunks[chunk]), rows + len(scored.rows)
                yield chunks[chunk], scored
            begun = crew.hand_out()
            # A worker may not have begun its next chunk yet.
            seen = min(images + sum(each[0] for each in begun), progress.total - bool(crew.left))
            progress.update(seen, f"{rows + sum(each[1] for each in begun)} {job.noun}")
    finally:
        for worker in workers:
            ray.kill(worker)


class _Crew:
    """Workers, and the chunks that are left for them.

    A worker whose node is lost may wait for another one for ever; its chunk is done twice, by whoever is idle. A chunk
    whose worker is gone is given to another one, once; then the error is raised.
    """

    def __init__(self, workers: Sequence[Any], job: Job, chunks: Sequence[Sequence[str]]) -> None:
        self._chunks, self._job = chunks, ray.put(job)
        self.left = set(range(len(chunks)))
        self._waiting = deque(range(len(chunks)))
        self._abandoned: set[int] = set()
        # A chunk goes to a worker that is alive: others on the cluster may hold the CPUs that a second one waits for,
        # and two evaluations that share it would wait for each other for ever.
        self._starting = {worker.progress.remote(): worker for worker in workers}
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int]] = {}
        self._heard: dict[Any, float] = {}  # when a worker answered last

    def finished(self) -> Iterator[tuple[int, Scored]]:
        """Chunks, by number, that were finished by now, or within POLL_SECONDS."""
        ready, _ = ray.wait([*self._running, *self._starting], timeout=POLL_SECONDS)
        for reference in ready:
            if reference in self._starting:
                self._welcome(self._starting.pop(reference), _answers(reference))
                continue
            worker, chunk = self._running.pop(reference)
            if chunk not in self.left:  # somebody else was faster than a worker that was silent, or is dead
                continue
            scored = self._collect(reference, worker, chunk)
            if scored is not None:
                yield chunk, scored

    def hand_out(self) -> list[tuple[int, int]]:
        """Give chunks to idle workers; what the others say that they have begun: images and rows of each."""
        while self._idle and self._waiting:
            self._give(self._waiting.popleft())
        begun = _begun(worker for worker, _ in self._running.values())
        self._heard |= dict.fromkeys(begun, time.monotonic())
        for worker, chunk in list(self._running.values()) if self._idle else ():
            if chunk in self.left and time.monotonic() - self._heard[worker] > SILENT_SECONDS and self._idle:
                self._give(chunk)
                self._heard[worker] = time.monotonic()
        return list(begun.values())

    def _welcome(self, worker: Any, is_alive: bool) -> None:
        if is_alive:
            self._idle.append(worker)
        else:
            self._starting[worker.progress.remote()] = worker

    def _collect(self, reference: Any, worker: Any, chunk: int) -> Scored | None:
        """What the worker found, nothing if it is gone."""
        try:
            scored = _result(reference)
        except ray.exceptions.RayActorError:
            if chunk in self._abandoned:
                raise
            self._abandoned.add(chunk)
            self._waiting.append(chunk)
            self._welcome(worker, is_alive=False)
            return None
        self.left.remove(chunk)
        self._idle.append(worker)
        return scored

    def _give(self, chunk: int) -> None:
        worker = self._idle.pop()
        self._heard[worker] = time.monotonic()
        self._running[worker.score.remote(self._job, self._chunks[chunk])] = worker, chunk


def _answers(reference: Any) -> bool:
    """Whether a worker has. Raises ActorDiedError for one that never will, which would be asked again and again."""
    try:
        ray.get(reference)
    except ray.exceptions.ActorUnavailableError:
        return False
    return True


def _result(reference: Any) -> Scored:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise error.cause from None  # the message for people, without Ray's traceback around it
        raise


def _begun(workers: Iterable[Any]) -> dict[Any, tuple[int, int]]:
    """Photos and rows finished in the chunks that are under way, of the workers that answer at once."""
    answers = {worker.progress.remote(): worker for worker in workers}
    ready, _ = ray.wait([*answers], num_returns=len(answers), timeout=POLL_SECONDS) if answers else ([], [])
    begun = {}
    for answer in ready:
        with contextlib.suppress(ray.exceptions.RayError):  # a worker that died is reported by its chunk
            begun[answers[answer]] = ray.get(answer)
    return begun


# -- parts -----------------------------------------------------------------------------------------------------------


def row_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 of the content of one row, whatever file it is in; how long it took does not count."""
    return hashlib.sha256(json.dumps([row[name] for name in row if name not in TIMES]).encode()).hexdigest()


def _digest(table: pa.Table) -> str:
    return combine_digests([row_digest(row) for row in table.to_pylist()])


def write_part(job: Job, image_ids: Sequence[str], scored: Scored, out: Storage) -> Found:
    """Write one chunk under a name that follows from its photos and sorts by their place in the data set."""
    table = pa.Table.from_pylist(scored.rows, schema=job.schema)
    digest = _digest(table)
    about = {
        IMAGES_KEY: json.dumps(list(image_ids)).encode(),
        EXCLUDED_KEY: json.dumps(scored.excluded).encode(),
        DIGEST_KEY: digest.encode(),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(about), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    place = job.dataset.image_ids.index(image_ids[0])
    name = f"{job.prefix}-{place:06d}-{sha256(about[IMAGES_KEY])[:16]}.parquet"
    out.write_bytes(name, content)
    part = Part(name=name, rows=len(table), bytes=len(content), sha256=sha256(content), digest=digest)
    return Found(part, tuple(image_ids), tuple(scored.excluded))


def finished_parts(out: Storage, prefix: str, schema: pa.Schema, image_ids: Iterable[str]) -> list[Found]:
    """The whole parts that an earlier attempt left; damaged ones, and those about other photos, are deleted."""
    out.remove_unfinished()
    unseen, found = set(image_ids), []
    for name in out.names():
        if not name.startswith(f"{prefix}-"):
            continue
        part = _read_part(name, out.read_bytes(name), schema)
        if part is not None and unseen.issuperset(part.image_ids):
            unseen.difference_update(part.image_ids)
            found.append(part)
        else:
            out.remove(name)
    return found


def _read_part(name: str, content: bytes, schema: pa.Schema) -> Found | None:
    """The part if its rows add up to the digest it carries, else None."""
    try:
        table = pq.read_table(pa.BufferReader(content))
        about = table.schema.metadata or {}
        digest = about[DIGEST_KEY].decode()
        if not table.schema.equals(schema) or digest != _digest(table):
            return None
        image_ids, excluded = json.loads(about[IMAGES_KEY]), json.loads(about[EXCLUDED_KEY])
    except (ValueError, KeyError, OSError, pa.ArrowException):  # in memory, an OSError is a damaged file
        return None
    part = Part(name=name, rows=len(table), bytes=len(content), sha256=sha256(content), digest=digest)
    return Found(part, tuple(image_ids), tuple(excluded))


def _column(out: Storage, found: Sequence[Found], name: str) -> np.ndarray:
    """One column of all parts."""
    tables = [pq.read_table(pa.BufferReader(out.read_bytes(each.part.name)), columns=[name]) for each in found]
    return np.concatenate([table[name].to_numpy() for table in tables])


def _output(found: Sequence[Found], summary: Row) -> Output:
    parts = tuple(each.part for each in found)
    return Output(parts=parts, digest=combine_digests([part.digest for part in parts]), summary=summary)
