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
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from mis_platform.artifacts import Output, Part, combine_digests, sha256
from mis_platform.config import EvalConfig, Resources, plain
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.images import ImageRefused, read_image
from mis_platform.data.schemas import CLICKS, OVERLAPS
from mis_platform.data.trees import TreeReader
from mis_platform.errors import DataError
from mis_platform.evaluation.protocol import Excluded, Sample, evaluate, protocol_fingerprint
from mis_platform.model.simpleclick import SimpleClick, resize_position_embedding
from mis_platform.model.weights import CONFIG_FILE, WEIGHTS_FILE, load_model
from mis_platform.progress import Progress
from mis_platform.simulation.proposals import best_overlap
from mis_platform.stages import cluster
from mis_platform.storage import Storage

VERSION = 1

GOOD_OVERLAPS = (0.5, 0.7, 0.85)  # IoU

CHUNK_IMAGES = 8  # photos in a part, at least
ROUNDS = 4  # forwards' worth of objects in a chunk, so that a GPU is not left half full for long
POLL_SECONDS = 1.0
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
    the lock of `out`. Raises DataError for a photo or mask that cannot be used and when there is nothing to score,
    ValueError for a model that cannot be loaded.
    """
    with cluster.cluster():
        gpus = _gpus(resources)
        batch = resources.eval_batch if gpus else 1
        job = Clicking(_absolute(dataset), model_dir, config, zoom_size, batch, "cuda" if gpus else "cpu")
        found = _score(job, max(CHUNK_IMAGES, ROUNDS * batch), resources, gpus, out)
    clicks = sum(each.part.rows for each in found)
    excluded = [each for part in found for each in part.excluded]
    if not clicks:
        raise DataError(f"{dataset.name} in {dataset.root} has no object to score")
    protocol = {"fingerprint": protocol_fingerprint(config, zoom_size), "zoom_size": zoom_size, **_settings(config)}
    summary = {"images": len(dataset), "clicks": clicks, "excluded": excluded, "protocol": protocol}
    return _output(found, summary)


def evaluate_proposals(dataset: Dataset, trees: Storage, resources: Resources, out: Storage) -> Output:
    """The best IoU that any node of the merge trees reaches on each object: parts `overlap-*.parquet` (OVERLAPS).

    The summary has the mean best overlap, the median and the share of objects above 0.5, 0.7 and 0.85; photos without a
    tree (quarantined) and objects without a pixel are listed there and count nowhere. Raises DataError as above.
    """
    with cluster.cluster():
        found = _score(Overlapping(_absolute(dataset), trees), CHUNK_IMAGES, resources, 0, out)
    overlaps = np.concatenate([_column(out, each.part, "best_iou") for each in found])
    if not overlaps.size:
        raise DataError(f"{dataset.name} in {dataset.root} has no object with a tree to score")
    summary: Row = {
        "images": len(dataset),
        "objects": len(overlaps),
        "mean_best_overlap": round(float(overlaps.mean(dtype=np.float64)), 4),
        "median_best_overlap": round(float(np.median(overlaps)), 4),
    }
    summary |= {f"share_above_{iou:g}": round(float((overlaps > iou).mean()), 4) for iou in GOOD_OVERLAPS}
    summary["excluded"] = [each for part in found for each in part.excluded]
    return _output(found, summary)


def _settings(config: EvalConfig) -> Row:
    """The protocol's settings without the two sizes of which one was used."""
    return {name: value for name, value in plain(config).items() if name not in ("zoom_size", "davis_zoom_size")}


def _absolute(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, root=dataset.root.resolve())  # workers have their own working directories


def _gpus(resources: Resources) -> int:
    gpus = cluster.gpus() if resources.use_gpu is not False else 0
    if resources.use_gpu and not gpus:
        raise ValueError("resources.use_gpu=true, but the cluster has no GPU")
    return gpus


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
        network = _network(self.model_dir, self.zoom_size, self.device)
        excluded: list[Excluded] = []
        rows: list[Row] = []
        places = {image_id: place for place, image_id in enumerate(image_ids)}
        clicks = evaluate(
            network,
            (self.sample(image_id) for image_id in image_ids),
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
                f"the GPU has too little memory for resources.eval_batch={self.batch} objects at once; lower it"
            ) from None
        return Scored(rows, [f"{each.image_id}, object {each.object_id}: {each.reason}" for each in excluded])

    def sample(self, image_id: str) -> Sample:
        return Sample(self.dataset.name, image_id, _read(self.dataset, image_id), self.dataset.read_objects(image_id))


@dataclasses.dataclass(frozen=True)
class Overlapping:
    """The best node of the tree for each object."""

    prefix, schema, noun = "overlap", OVERLAPS, "objects"
    dataset: Dataset
    trees: Storage

    def score(self, image_ids: Sequence[str], tell: Tell) -> Scored:
        scored = Scored([], [])
        for done, image_id in enumerate(image_ids, 1):
            self.score_image(image_id, scored)
            tell(done, len(scored.rows))
        return scored

    def score_image(self, image_id: str, scored: Scored) -> None:
        reader = _trees(self.trees)
        if image_id not in reader:
            scored.excluded.append(f"{image_id}: its photo was refused, it has no tree")
            return
        tree, size = reader.tree(image_id), reader.image_size(image_id)
        for object_id, mask in self.dataset.read_objects(image_id):
            if mask.shape != size:
                raise DataError(f"{image_id}, object {object_id}: mask of {mask.shape} pixels, tree of {size}")
            if not (mask == 1).any():
                scored.excluded.append(f"{image_id}, object {object_id}: no pixel of the object")
                continue
            iou, node = best_overlap(tree, mask)
            name = {"dataset": self.dataset.name, "image_id": image_id, "object_id": object_id}
            scored.rows.append({**name, "best_iou": float(iou), "node": int(node), "area": float((mask == 1).mean())})


def _read(dataset: Dataset, image_id: str) -> np.ndarray:
    """uint8 [H, W, 3]. Raises DataError: a score without one of the photos would be another benchmark's."""
    try:
        return read_image(dataset.image_path(image_id))
    except ImageRefused as error:
        raise DataError(f"{dataset.name}: photo {image_id} cannot be used: {error}") from None


@functools.lru_cache(maxsize=1)
def _network(model_dir: Storage, zoom_size: int, device: str) -> SimpleClick:
    with _on_disk(model_dir) as directory:
        model = load_model(directory)
    resize_position_embedding(model, zoom_size)
    return model.to(device).eval()


@contextlib.contextmanager
def _on_disk(model_dir: Storage) -> Iterator[Path]:
    """The model's directory, or a copy of it while it is being loaded."""
    if model_dir.local is not None:
        yield model_dir.local
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (Path(copy) / name).write_bytes(model_dir.read_bytes(name))
        yield Path(copy)


@functools.lru_cache(maxsize=1)
def _trees(storage: Storage) -> TreeReader:
    return TreeReader(storage)


# -- spreading over the cluster --------------------------------------------------------------------------------------


class Worker:
    """A Ray actor that scores chunks. Nothing is loaded before the first one: there, errors arrive as they are."""

    begun = 0, 0

    def score(self, job: Clicking | Overlapping, image_ids: Sequence[str]) -> Scored:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        torch.backends.cudnn.allow_tf32 = False  # the same float32 everywhere
        self.begun = 0, 0
        return job.score(image_ids, self.tell)

    def tell(self, images: int, rows: int) -> None:
        self.begun = images, rows

    def progress(self) -> tuple[int, int]:
        """Photos and rows finished of the chunk that `score` is at; called from another thread."""
        return self.begun


class Found(NamedTuple):
    """A part that is whole."""

    part: Part
    image_ids: tuple[str, ...]
    excluded: tuple[str, ...]


def _score(
    job: Clicking | Overlapping, chunk_images: int, resources: Resources, gpus: int, out: Storage
) -> list[Found]:
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


def _start_workers(chunks: int, resources: Resources, gpus: int) -> list[Any]:
    count = resources.eval_workers or gpus or cluster.cpus()
    options: Row = {"num_cpus": min(1.0, cluster.CPU_SHARE * cluster.cpus() / count)}
    if gpus:
        options["num_gpus"] = min(1.0, gpus / count)
    options["scheduling_strategy"] = "DEFAULT"  # in a sweep: not within what is reserved for the trial's own process
    kind = ray.remote(Worker).options(max_concurrency=2, max_restarts=-1, max_task_retries=RETRIES, **options)
    return [kind.remote() for _ in range(min(count, chunks))]


def _spread(
    workers: Sequence[Any], job: Clicking | Overlapping, chunks: Sequence[Sequence[str]], progress: Progress
) -> Iterator[tuple[Sequence[str], Scored]]:
    """Each chunk with what a worker found, as they are finished."""
    waiting, shared = deque(chunks), ray.put(job)
    running: dict[Any, tuple[Any, Sequence[str]]] = {}
    # A chunk goes to a worker that is alive: others on the cluster may hold the CPUs that a second one waits for, and
    # two evaluations that share it would wait for each other for ever.
    starting = {worker.progress.remote(): worker for worker in workers}
    images, rows = progress.start, 0

    def go_on(worker: Any) -> None:
        if waiting:
            chunk = waiting.popleft()
            running[worker.score.remote(shared, chunk)] = worker, chunk

    try:
        while running or waiting:
            ready, _ = ray.wait([*running, *starting], timeout=POLL_SECONDS)
            for reference in ready:
                if reference in starting:
                    go_on(starting.pop(reference))
                    continue
                worker, chunk = running.pop(reference)
                scored = _result(reference)
                images, rows = images + len(chunk), rows + len(scored.rows)
                go_on(worker)
                yield chunk, scored
            begun = _begun(worker for worker, _ in running.values())
            # A worker may not have begun its next chunk yet.
            seen = min(images + begun[0], progress.total - bool(running or waiting))
            progress.update(seen, f"{rows + begun[1]} {job.noun}")
    finally:
        for worker in workers:
            ray.kill(worker)


def _result(reference: Any) -> Scored:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise error.cause from None  # the message for people, without Ray's traceback around it
        raise


def _begun(workers: Iterable[Any]) -> tuple[int, int]:
    """Photos and rows finished in the chunks that are under way; those that answer at once count."""
    answers = [worker.progress.remote() for worker in workers]
    ready, _ = ray.wait(answers, num_returns=len(answers), timeout=POLL_SECONDS) if answers else ([], [])
    images = rows = 0
    for answer in ready:
        with contextlib.suppress(ray.exceptions.RayError):  # a worker that died is reported by its chunk
            begun = ray.get(answer)
            images, rows = images + begun[0], rows + begun[1]
    return images, rows


# -- parts -----------------------------------------------------------------------------------------------------------


def row_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 of the content of one row, whatever file it is in; how long it took does not count."""
    return hashlib.sha256(json.dumps([row[name] for name in row if name not in TIMES]).encode()).hexdigest()


def _digest(table: pa.Table) -> str:
    return combine_digests([row_digest(row) for row in table.to_pylist()])


def write_part(job: Clicking | Overlapping, image_ids: Sequence[str], scored: Scored, out: Storage) -> Found:
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


def _column(out: Storage, part: Part, name: str) -> np.ndarray:
    return pq.read_table(pa.BufferReader(out.read_bytes(part.name)), columns=[name])[name].to_numpy()


def _output(found: Sequence[Found], summary: Row) -> Output:
    parts = tuple(each.part for each in found)
    return Output(parts=parts, digest=combine_digests([part.digest for part in parts]), summary=summary)
