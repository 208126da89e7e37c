"""Photos to merge trees (paper section 3.1): decoding, patch features, Ward merging, Parquet parts.

The proposals of other methods are made the same way: what is kept of a photo is a `Product`.

Notable choices:

* **A photo is described as if it were alone.** Photos of one network size may share a forward pass
  (features.batch_size), and which ones do is chance; a tree does not depend on it (docs/decisions/005). Chunks bring
  photos of one size together, by their headers; in a chunk they are looked for as far as WINDOW_BYTES of pixels reach.
* **Workers write, the driver counts.** A worker writes its part under a name that follows from the ids inside
  (temporary file, then rename) and returns one small record: the same part always has the same name.
* **Copies are computed once.** Files with the same bytes, wherever in the data set they are, are given to one worker
  together; it compares them itself, so that a file which changed meanwhile is computed alone.
* **The directory is the state.** After any interruption the whole parts are found by reading them; only photos in none
  of them are computed. The digest is a sum over rows, so it does not depend on how photos were cut into parts.
* **What grows with the photos are names.** They go to Ray Data in waves, chunks become larger the more photos there
  are, and large trees are written before a chunk is finished: no process's memory grows with the data set but for the
  driver's list of its files.
* **Without a GPU, or a network for it, each worker does all steps of its chunk**: what is cheap to compute is not
  worth sending. With GPUs, their workers only describe, several on each GPU, so that it computes for one while others
  move pixels and features; CPU tasks decode and resize before and merge after them.
"""

import functools
import gc
import heapq
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar, cast

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.annotations import RayDeprecationWarning

from mis_platform.artifacts import Output, Part, combine_digests, sha256
from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.data import sandbox
from mis_platform.data.benchmarks import Dataset, Sample
from mis_platform.data.images import ImageRefused, Picture, Reason, file_limit, read_file
from mis_platform.data.parts import decode_parquet
from mis_platform.data.schemas import QUARANTINE
from mis_platform.data.trees import rows_of
from mis_platform.errors import DataError
from mis_platform.model.features import (
    WITHOUT_WEIGHTS,
    Extractor,
    build_extractor,
    network_size,
    patch_size,
    photos_at_once,
    prepare,
)
from mis_platform.progress import Progress, say
from mis_platform.stages import cluster
from mis_platform.stages.products import TREES_PRODUCT, Product
from mis_platform.storage import READERS, Storage, StorageError

VERSION = 3  # 3 and 2: a few merge costs differ in their last bits, and with 3 some merges among equal costs

QUARANTINE_FILE = "quarantine.parquet"
DIGEST_KEY = b"mis_platform.digest"  # in the metadata of a part: what its rows must add up to
MORE_KEY = b"mis_platform.first_frames"  # there too, if any: ids of photos that have more frames or pages, as JSON

LEDGER_FILE = ".parts.parquet"  # parts that were read and found whole
LEDGER_BYTES = 2**28  # of parts, that took long enough to read
LARGEST_LEDGER = 2**34  # bytes, unpacked: 10^8 ids
LEDGER = pa.schema(
    {
        **{"name": pa.string(), "rows": pa.int64(), "bytes": pa.int64(), "sha256": pa.string(), "digest": pa.string()},
        **{"image_ids": pa.list_(pa.string()), "has_more": pa.list_(pa.string())},
    }
)

RECORDED = ("parts", "image_ids", "refused", "refused_copies", "has_more")  # lists in the record of a chunk

INTERNAL = "INTERNAL"  # reason of a photo whose computation failed without a known cause
OUT_OF_MEMORY = "OUT_OF_MEMORY"  # stops the run
NOT_THE_PHOTO = (INTERNAL, Reason.UNREADABLE.value)  # reasons that may lie in the code, the machine or the network
FAILURES_IN_A_ROW = 32  # of these reasons, without a single tree between them: it is not the photos
RETRIES = 1  # of a chunk whose worker died
LOST_CHUNKS = 16  # that may be given up after that; their photos are tried once more, one by one
SINGLE_TRIES = 2  # of those, where nodes may go: a photo that was on one is not to blame
STALL_SECONDS = 300.0  # without a finished chunk
MESSAGE_LETTERS = 500
MAX_TASKS = 4096  # chunks in a wave, one a task: Ray Data plans every task in advance
DEATHS = (
    *(ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError),
    ray.exceptions.RayActorError,
)
HEADERS_PER_TASK = 512  # photos; 0.4 ms each on a disk
CHUNKS_PER_WORKER = 4  # in a wave, at least; its end, when some workers have nothing left to do, must not count
MANY_PARTS = 16_384  # where chunks start to grow with the data set: a manifest lists every part
MAX_FILES = 1024  # with one content that are computed together; each is read, and its row is written
MAX_CHUNK = 128  # photos that they grow to: a training reads a whole part to get at one tree
PART_BYTES = 32 * 2**20  # of rows in memory; a chunk with more becomes several parts
EXTRACTORS_PER_GPU = 4  # processes that share it: moving a photo's features takes longer than computing them
WINDOW_BYTES = 32 * 2**20  # of pixels that wait for others of their size; one photo more than that may be held

Step = TypeVar("Step")
Outcome = TypeVar("Outcome")
Row = dict[str, Any]
Name = tuple[str, bytes]  # image id, path


class Photo(NamedTuple):
    """A file to compute, and the files that get its row too."""

    image_id: str
    path: bytes
    copies: tuple[Name, ...] = ()  # files with the same content
    has_more: bool = False  # frames or pages; the first one counts
    is_copy: bool = False  # of one that was computed

    def files(self) -> Iterator["Photo"]:
        """This one and its copies, each alone."""
        yield self._replace(copies=())
        yield from (Photo(*name, has_more=self.has_more, is_copy=True) for name in self.copies)

    def without(self, image_ids: Set[str]) -> "Photo | None":
        """What is left of it when these are done."""
        left = [each for each in self.files() if each.image_id not in image_ids]
        return Photo(*left[0][:2], tuple((each.image_id, each.path) for each in left[1:])) if left else None


class Refused(NamedTuple):
    """A photo without a tree: a row of the schema QUARANTINE."""

    image_id: str
    path: str
    stage: str  # "list", "decode", "features" or "merge"; "worker" where that is not known
    reason: str  # name of a Reason, or INTERNAL
    message: str


class Result(NamedTuple):
    """What came of one file."""

    photo: Photo  # alone
    made: Row | Refused


class Decoded(NamedTuple):
    """A photo and its pixels."""

    photo: Photo
    pixels: np.ndarray | Refused  # uint8 [H, W, 3]
    resized_from: tuple[int, int] | None = None  # (height, width) of the photo, if `pixels` are what the network takes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the photo in pixels, 0 where there are none."""
        if isinstance(self.pixels, Refused):
            return 0, 0
        return self.resized_from or (self.pixels.shape[0], self.pixels.shape[1])

    def prepared(self, extractor: Extractor) -> np.ndarray:
        """What the network takes, see `Extractor.prepare`."""
        pixels = cast(np.ndarray, self.pixels)
        return extractor.prepare(pixels) if self.resized_from is None else pixels


class Found(NamedTuple):
    """A whole part that an earlier attempt left."""

    part: Part
    image_ids: tuple[str, ...]
    has_more: tuple[str, ...] = ()  # those of photos with more frames or pages


def precompute(
    dataset: Dataset,
    features: FeaturesConfig,
    data: DataConfig,
    resources: Resources,
    out: Storage,
    product: Product = TREES_PRODUCT,
) -> Output:
    """The merge trees of all photos of `dataset`: parts `trees-*.parquet` and `quarantine.parquet` in `out`.

    product: what is made instead of trees; its name is the prefix of the parts.

    A photo that cannot be used, or whose computation fails, becomes a row of the quarantine and changes no other row.
    The digest covers the trees alone. Call it while holding the lease of `out`.

    Raises DataError when no photo is left or one needs more memory than there is, StorageError when `out` cannot be
    written or photos stop being readable, RuntimeError when 32 photos in a row fail in the computation or workers hang,
    ValueError when weights are missing. What was finished stays in `out`, and the next call goes on from there.
    """
    began = time.monotonic()
    if dataset.untrusted:
        resources = resources.model_copy(update={"untrusted": True})
    build_extractor(features)  # missing or wrong weights are noticed here, before any process starts
    out.remove_unfinished()
    # Of millions of photos every index counts: the samples themselves are used, not the data set's lists by id.
    found = finished_parts(out, (sample.image_id for sample in dataset.samples), product)
    finished = {image_id for each in found for image_id in each.image_ids}
    missing = sorted(sample for sample in dataset.samples if sample.image_id not in finished)
    parts, refused = [each.part for each in found], list_refused(dataset)
    has_more = [image_id for each in found for image_id in each.has_more]
    done = len(finished)
    del found, finished
    if missing:
        if dataset.copies:
            copies = sum(map(len, dataset.copies)) - len(dataset.copies)
            say(product.name, f"{copies} of {len(dataset)} photos are copies of others, which are computed once")
        photos = bring_together(missing, dataset)
        resources = resources.model_copy(update={"chunk_images": images_in_a_chunk(len(dataset), resources)})
        with cluster.cluster(out, dataset):
            progress = Progress(product.name, len(dataset), "images", start=done)
            tally = compute_all(photos, features, data, resources, out, progress, product)
        parts, refused, has_more = parts + tally.parts, refused + tally.refused, has_more + tally.has_more
    write_quarantine(refused, out)
    _check_outcome(dataset, parts, refused, out)
    if has_more:
        say(product.name, first_frames(dataset, has_more))
    seconds = time.monotonic() - began
    return Output(
        parts=tuple(parts),
        digest=combine_digests([part.digest for part in parts]),
        summary={
            "images": sum(part.rows for part in parts),
            "quarantined": len(refused),
            "seconds": round(seconds, 1),
            "images_per_second": round(len(missing) / seconds, 2),
            "bytes": sum(part.bytes for part in parts),
            **({"first_frames": len(has_more)} if has_more else {}),
        },
    )


def images_in_a_chunk(images: int, resources: Resources) -> int:
    """Photos that are computed together. images: of the whole data set, so that a resumed run has the same chunks."""
    return max(resources.chunk_images, min(MAX_CHUNK, -(-images // MANY_PARTS)))


def bring_together(samples: Sequence[Sample], dataset: Dataset) -> Iterator[Photo]:
    """A photo for each of the samples, which are of the data set, but one alone for those with the same content.

    It stands where the first of them does. What the files were when the data set was read decides.
    """
    group_of = {image_id: number for number, group in enumerate(dataset.copies) for image_id in group}
    groups: dict[int, list[Name]] = {}

    def name(sample: Sample) -> Name:
        return sample.image_id, os.fsencode(dataset.root / sample.image)

    for sample in samples if group_of else ():
        if sample.image_id in group_of:
            groups.setdefault(group_of[sample.image_id], []).append(name(sample))
    for sample in samples:
        if sample.image_id not in group_of:
            yield Photo(*name(sample))
        else:  # all of a group at the first of them
            names = groups.pop(group_of[sample.image_id], [])
            for start in range(0, len(names), MAX_FILES):
                first, *others = names[start : start + MAX_FILES]
                yield Photo(*first, tuple(others))


def first_frames(dataset: Dataset, image_ids: Sequence[str]) -> str:
    """A line about photos of which more is there than what is used."""
    some = heapq.nsmallest(3, image_ids)
    files = {sample.image_id: sample.image for sample in dataset.samples if sample.image_id in some}
    named = ", ".join(printable(files[image_id]) for image_id in some)
    one = "photo has" if len(image_ids) == 1 else "photos have"
    rest = ", ..." if len(image_ids) > 3 else ""
    return f"{len(image_ids)} {one} several frames or pages, of which the first one counts ({named}{rest})"


def _check_outcome(dataset: Dataset, parts: Sequence[Part], refused: Sequence[Refused], out: Storage) -> None:
    if not parts:
        examples = "; ".join(f"{each.image_id}: {each.reason}: {each.message}" for each in refused[:3])
        if refused and all(each.reason == INTERNAL for each in refused):
            raise RuntimeError(f"the computation failed for every photo: {examples}")
        raise DataError(
            f"none of the {len(refused)} photos of {dataset.name} in {dataset.root} could be used ({examples})"
            if refused
            else f"there are no photos in {dataset.name}: searched {dataset.root}"
        )
    sizes = out.sizes(part.name for part in parts)  # one listing, and a question about each file that it lacks
    lost = [part.name for part in parts if sizes[part.name] is None]
    if lost:
        raise StorageError(f"{lost[0]} was written by another machine and is not in {out}: use a shared --root")


# -- one photo -------------------------------------------------------------------------------------------------------


def attempt(photo: Photo, stage: str, step: Callable[[], Step]) -> Step | Refused:
    """What `step` returns, or why this photo is left out."""
    try:
        return step()
    except ImageRefused as refusal:
        reason, message = refusal.reason.value, refusal.message
    except Exception as error:
        reason, message = OUT_OF_MEMORY if _is_out_of_memory(error) else INTERNAL, f"{type(error).__name__}: {error}"
    path = printable(os.fsdecode(photo.path))
    return Refused(photo.image_id, path, stage, reason, printable(message)[:MESSAGE_LETTERS])


def results_of(
    photo: Photo, features: np.ndarray | Refused, product: Product, make: Callable[[str, np.ndarray], Row]
) -> Iterator[Result]:
    """What comes of a photo, and the same for each of its copies.

    features: float32 [gh, gw, C], or a refusal, which is handed on; make: the row of an image id and features.
    """

    def made_for(each: Photo) -> Row | Refused:
        if isinstance(features, Refused):
            return features
        return attempt(each, product.step, lambda: make(each.image_id, features))

    made = made_for(photo)
    for each in photo.files():
        if not each.is_copy:
            yield Result(each, made)
        elif isinstance(made, Refused):
            path = printable(os.fsdecode(each.path))
            yield Result(each, made._replace(image_id=each.image_id, path=path))
        elif product.is_drawn:
            yield Result(each, made_for(each))
        else:
            yield Result(each, {**made, "image_id": each.image_id})


def printable(text: str) -> str:
    """One line of valid Unicode."""
    return " ".join(text.encode("utf8", "backslashreplace").decode().split())


def _is_out_of_memory(error: Exception) -> bool:
    """NumPy's and torch's ways to say so; torch itself is only imported by extractors that need it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


# -- photos in company -----------------------------------------------------------------------------------------------

Finish = Callable[[Decoded, np.ndarray | Refused], Outcome]  # of features float32 [gh, gw, C]


def describe_all(decoded: Iterable[Decoded], extractor: Extractor, finish: Finish[Outcome]) -> Iterator[Outcome]:
    """What `finish` makes of each photo and its features, in order.

    Photos of one network size are described together, as many as the extractor takes. One that fails takes no other
    with it. Without batches, a photo is finished before the next one is asked for.
    """
    # A chain of maps, unlike a loop, keeps no window while the next one is decoded.
    finish_each = functools.partial(_finish_window, extractor=extractor, finish=finish)
    return chain.from_iterable(map(finish_each, _windows(decoded, extractor.batch_size)))


def _windows(decoded: Iterable[Decoded], batch_size: int) -> Iterator[list[Decoded]]:
    limit = WINDOW_BYTES if batch_size > 1 else 0
    window: list[Decoded] = []
    held = 0  # bytes
    for each in decoded:
        window.append(each)
        held += 0 if isinstance(each.pixels, Refused) else each.pixels.nbytes
        if held >= limit:
            yield window
            window, held = [], 0
            del each  # its memory is needed for the next one
    if window:
        yield window


def _finish_window(window: Sequence[Decoded], extractor: Extractor, finish: Finish[Outcome]) -> list[Outcome]:
    results: dict[int, Outcome] = {}
    for places in _groups(window, extractor):
        for place, features in zip(places, _describe_group([window[place] for place in places], extractor)):
            results[place] = finish(window[place], features)
    return [results[place] for place in range(len(window))]


def _groups(window: Sequence[Decoded], extractor: Extractor) -> Iterator[list[int]]:
    """The places in `window` of photos for one forward pass each. Those without pixels are groups of their own."""
    by_grid: dict[tuple[int, int], list[int]] = {}
    for place, each in enumerate(window):
        if isinstance(each.pixels, Refused):
            yield [place]
        else:
            by_grid.setdefault(extractor.grid(*each.size), []).append(place)
    for (rows, columns), places in by_grid.items():
        count = extractor.photos_at_once(rows * columns)
        for start in range(0, len(places), count):
            yield places[start : start + count]


def _describe_group(group: Sequence[Decoded], extractor: Extractor) -> Iterable[np.ndarray | Refused]:
    """Features float32 [gh, gw, C] of photos of one network size."""
    if len(group) > 1:
        together = attempt(group[0].photo, "features", functools.partial(describe, group, extractor))
        if not isinstance(together, Refused):
            return together
    return (_describe_one(each, extractor) for each in group)


def _describe_one(decoded: Decoded, extractor: Extractor) -> np.ndarray | Refused:
    if isinstance(decoded.pixels, Refused):
        return decoded.pixels
    return attempt(decoded.photo, "features", lambda: describe([decoded], extractor)[0])


def describe(group: Sequence[Decoded], extractor: Extractor) -> np.ndarray:
    """Patch features float32 [B, gh, gw, C] of photos of one network size."""
    prepared = np.stack([each.prepared(extractor) for each in group])
    return extractor(prepared).reshape(len(group), *extractor.grid(*group[0].size), -1)


# -- parts -----------------------------------------------------------------------------------------------------------


def write_part(
    rows: Iterable[Row], out: Storage, product: Product = TREES_PRODUCT, has_more: Collection[str] = ()
) -> Part:
    """Write rows as one Parquet file, by image id, under a name that follows from the ids.

    has_more: ids of photos with more frames or pages; the file says so.
    """
    rows = sorted(rows, key=lambda row: row["image_id"])
    image_ids = [row["image_id"] for row in rows]
    digest = combine_digests([product.digest(row) for row in rows])
    table = product.table(rows)
    more = [image_id for image_id in image_ids if image_id in has_more]
    about = {DIGEST_KEY: digest.encode(), **({MORE_KEY: json.dumps(more).encode()} if more else {})}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **about})
    content = _to_parquet(table, product.encoding)
    name = f"{product.name}-{sha256(json.dumps(image_ids).encode())[:16]}.parquet"
    out.write_bytes(name, content)
    return Part(name=name, rows=len(rows), bytes=len(content), sha256=sha256(content), digest=digest)


def _to_parquet(table: pa.Table, encoding: Mapping[str, str] | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, column_encoding=dict(encoding or {}) or None)
    return sink.getvalue().to_pybytes()


def finished_parts(out: Storage, image_ids: Iterable[str], product: Product = TREES_PRODUCT) -> list[Found]:
    """The parts of an earlier attempt, read and checked.

    Damaged ones, and ones with photos that are not asked for or are in another part, are deleted. Where that takes long
    it is done once: of parts that an earlier call has read, only the size is looked at.
    """
    sizes = {name: facts.bytes for name, facts in out.files().items() if name.startswith(f"{product.name}-")}
    known = {name: each for name, each in _read_ledger(out).items() if sizes.get(name) == each.part.bytes}
    new = [name for name in sizes if name not in known]
    with ThreadPoolExecutor(READERS) as pool:
        read = dict(zip(new, pool.map(lambda name: _read_part(name, out.read_bytes(name), product), new), strict=True))
    unseen, found = set(image_ids), []
    for name in sorted(sizes):
        part = known.get(name) or read[name]
        if part is not None and len(set(part.image_ids) & unseen) == len(part.image_ids):
            unseen.difference_update(part.image_ids)
            found.append(part)
        else:
            out.remove(name)
    if sum(sizes[name] for name in new) > LEDGER_BYTES:
        _write_ledger(out, found)
    return found


def _write_ledger(out: Storage, found: Sequence[Found]) -> None:
    rows = [{**vars(each.part), "image_ids": each.image_ids, "has_more": each.has_more} for each in found]
    out.write_bytes(LEDGER_FILE, _to_parquet(pa.Table.from_pylist(rows, schema=LEDGER)))


def _read_ledger(out: Storage) -> dict[str, Found]:
    """By name; empty if there is none, or it is damaged."""
    try:
        table = decode_parquet(out.read_bytes(LEDGER_FILE), LEDGER, LARGEST_LEDGER)
    except (FileNotFoundError, ValueError, pa.ArrowException):
        return {}
    return {row["name"]: _known(**row) for row in table.to_pylist()}


def _known(image_ids: Sequence[str], has_more: Sequence[str], **part: Any) -> Found:
    return Found(Part(**part), tuple(image_ids), tuple(has_more))


def _read_part(name: str, content: bytes, product: Product) -> Found | None:
    """The part if its rows add up to the digest it carries, else None."""
    try:
        table = pq.read_table(pa.BufferReader(content))
        digest = (table.schema.metadata or {})[DIGEST_KEY].decode()
        if not table.schema.equals(product.schema):
            return None
        if digest != combine_digests([product.digest(row) for row in rows_of(table)]):
            return None
        image_ids = tuple(table["image_id"].to_pylist())
        has_more = tuple(map(str, json.loads((table.schema.metadata or {}).get(MORE_KEY, b"[]"))))
    except (ValueError, KeyError, OSError, pa.ArrowException):  # in memory, an OSError is a damaged file
        return None
    part = Part(name=name, rows=len(image_ids), bytes=len(content), sha256=sha256(content), digest=digest)
    return Found(part, image_ids, tuple(image_id for image_id in has_more if image_id in image_ids))


def list_refused(dataset: Dataset) -> list[Refused]:
    """Pictures in the data set's folder that are no usable files, such as links that leave it."""
    return [
        Refused(path := printable(str(each.path)), path, "list", each.reason.value, printable(each.message))
        for each in dataset.refused
    ]


def write_quarantine(refused: Iterable[Refused], out: Storage) -> None:
    """One file, by image id, also where nothing was refused."""
    rows = [each._asdict() for each in sorted(refused)]
    out.write_bytes(QUARANTINE_FILE, _to_parquet(pa.Table.from_pylist(rows, schema=QUARANTINE)))


# -- records ---------------------------------------------------------------------------------------------------------
# What a worker returns of a chunk, as JSON in one column: its parts, its refused photos and the copies of those, photos
# with more frames, and why it could not write.
# Errors travel as values, because Ray Data wraps exceptions in its own.


def finish_chunk(results: Iterable[Result], out: Storage, product: Product) -> pa.Table:
    """Write the parts of a chunk, one unless its rows are large; the record that tells the driver."""
    record: Row = dict.fromkeys(("storage_error",)) | {name: [] for name in RECORDED}
    rows: list[Row] = []
    has_more: set[str] = set()
    held = 0

    def write() -> None:
        record["parts"].append(vars(write_part(rows, out, product, has_more)))
        record["image_ids"] += [row["image_id"] for row in rows]
        record["has_more"] += [row["image_id"] for row in rows if row["image_id"] in has_more]
        rows.clear()

    try:
        for photo, made in results:
            if isinstance(made, Refused):
                record["refused_copies" if photo.is_copy else "refused"].append(made)
                continue
            has_more |= {photo.image_id} if photo.has_more else set()
            rows.append(made)
            held += product.table([made]).nbytes
            if held >= PART_BYTES:
                write()
                held = 0
        if rows:
            write()
    except StorageError as error:
        record["storage_error"] = str(error)
    return pa.table({"record": [json.dumps(record)]})


class Tally:
    """What the records add up to."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.parts: list[Part] = []
        self.refused: list[Refused] = []
        self.has_more: list[str] = []  # image ids
        self.image_ids: set[str] = set()  # of parts and of refused photos, of this wave
        self.barren: list[Refused] = []  # photos that failed since the last part

    def add(self, record: Row) -> None:
        """Raises what stops a run, see `precompute`."""
        if record["storage_error"] is not None:
            raise StorageError(record["storage_error"])
        new, copies = ([Refused(*each) for each in record[name]] for name in ("refused", "refused_copies"))
        if record["parts"]:
            self.parts += [Part(**part) for part in record["parts"]]
            self.barren = []
        self.refused += new + copies
        self.has_more += record["has_more"]
        self.barren += new  # a photo that fails is one photo, however many copies it has
        self.image_ids.update(record["image_ids"], (each.image_id for each in new + copies))
        check_cause(new, self.barren)
        done = self.progress.done + len(record["image_ids"]) + len(new) + len(copies)
        self.progress.update(done, f"{len(self.refused)} quarantined")


def check_cause(new: Sequence[Refused], barren: Sequence[Refused]) -> None:
    """Raises when the cause of failures is not the photos.

    new: photos that failed just now; barren: all that failed since the last photo that did not.
    """
    for each in new:
        if each.reason == OUT_OF_MEMORY:
            raise DataError(
                f"not enough memory for {each.path} in {each.stage}; lower data.max_megapixels, features.batch_size or "
                "resources.extractors (processes)"
            )
        if each.reason == Reason.GONE:
            raise DataError(
                f"{each.path} is not there any more, or not on every node of the cluster; photos must stay as they are "
                "until all are done"
            )
    suspicious = [each for each in barren if each.reason in NOT_THE_PHOTO]
    if len(suspicious) >= FAILURES_IN_A_ROW:
        last = suspicious[-1]
        kind = StorageError if last.reason == Reason.UNREADABLE.value else RuntimeError
        raise kind(
            f"{len(suspicious)} photos in a row failed, so the cause is not the photos; "
            f"the last one, {last.path}, in {last.stage}: {last.message}"
        )


# -- Ray Data --------------------------------------------------------------------------------------------------------


def compute_all(
    photos: Iterable[Photo],
    features: FeaturesConfig,
    data: DataConfig,
    resources: Resources,
    out: Storage,
    progress: Progress,
    product: Product = TREES_PRODUCT,
) -> Tally:
    """Parts, refused photos, and what else is counted.

    Photos of chunks whose workers died are tried again, one by one, so that a photo that ends every process which
    touches it takes no other with it.
    """
    tally, waiting = Tally(progress), iter(photos)
    workers = _workers(resources, _gpus(features, resources))
    wave_images = resources.chunk_images * max(MAX_TASKS, CHUNKS_PER_WORKER * workers)
    died = "its worker process failed or died whenever it came to this photo"

    def try_all(left: list[Photo], chunk_images: int) -> list[Photo]:
        """Those that are still missing."""
        chunked = resources.model_copy(update={"chunk_images": chunk_images})
        while left:
            is_through = add_up(compute(left, features, data, chunked, out, product), tally)
            still = [rest for photo in left if (rest := photo.without(tally.image_ids)) is not None]
            gc.collect()  # Ray Data's error handling leaves cycles that keep the first workers, and their CPUs
            is_stuck = still == left and len(left) <= LOST_CHUNKS * resources.chunk_images  # more may wait for nodes
            left = still
            if is_through or (is_stuck and chunk_images > 1):
                break
            if is_stuck:
                raise RuntimeError(
                    f"workers hang, or the cluster has no room for one: none of {len(left)} photos, of which "
                    f"{printable(os.fsdecode(left[0].path))} is the first, was finished in {STALL_SECONDS:.0f} s"
                )
        return left

    try:
        while wave := list(islice(waiting, wave_images)):
            tally.image_ids.clear()
            lost = try_all(wave, resources.chunk_images)
            for _ in range(SINGLE_TRIES if len(cluster.nodes()) > 1 else 1):
                lost = try_all(lost, 1)
            for each in chain.from_iterable(photo.files() for photo in lost):
                path = printable(os.fsdecode(each.path))
                tally.refused.append(Refused(each.image_id, path, "worker", INTERNAL, died))
    finally:
        progress.close()
    return tally


def add_up(records: Iterable[Row], tally: Tally) -> bool:
    """Whether that went to the end.

    If not, the chunks of some workers are stuck: they hang, or wait for ever because their node is gone and no other
    has room for them. Or many chunks were lost with their workers, as on nodes that come and go; Ray's error is raised
    if not more than that were finished meanwhile.
    """
    before = len(tally.parts)
    try:
        for record in records:
            tally.add(record)
    except ExecutionTimeoutError:
        return False
    except DEATHS:
        if len(tally.parts) - before <= LOST_CHUNKS:
            raise
        return False
    return True


def compute(
    photos: Sequence[Photo],
    features: FeaturesConfig,
    data: DataConfig,
    resources: Resources,
    out: Storage,
    product: Product = TREES_PRODUCT,
) -> Iterator[Row]:
    """The records of the chunks, in the order in which they are finished.

    A chunk is left out when its worker dies and dies again, or has not come back yet; Ray's error is raised when there
    are too many of those.
    """
    cluster.quiet_data()
    cluster.quiet_actors()
    logging.getLogger("ray.data._internal.execution").setLevel(logging.CRITICAL)  # chunks that are left out, at length
    gpus = _gpus(features, resources)
    cut = cut_into_chunks(photos, features, data, resources)
    chunks = chunk_dataset(cut)
    chunks.context.max_errored_blocks = LOST_CHUNKS
    chunks.context.execution_no_progress_timeout_s = STALL_SECONDS
    workers = min(_workers(resources, gpus), len(cut))
    # A chunk that waits at a worker is lost with it. Single photos are handed out one at a time for that reason.
    pool = ray.data.ActorPoolStrategy(
        size=workers, max_tasks_in_flight_per_actor=2 if resources.chunk_images > 1 else 1
    )
    if gpus:
        share = cluster.gpu_share(workers, gpus)
        untrusted = resources.untrusted
        records = in_steps(chunks, features, data, out, resources.chunk_images, pool, "cuda", share, product, untrusted)
    else:
        records = in_whole_chunks(chunks, features, data, out, pool, product, resources.untrusted)
    yield from read_records(records)


def _gpus(features: FeaturesConfig, resources: Resources) -> int:
    """GPUs that photos are described on; an extractor without a network has no use for them, only for all CPUs."""
    usable = cluster.usable_gpus(resources)
    return 0 if features.extractor == WITHOUT_WEIGHTS else usable


def _workers(resources: Resources, gpus: int) -> int:
    """Processes that describe photos."""
    return resources.extractors or EXTRACTORS_PER_GPU * gpus or cluster.cpus()


def read_records(records: ray.data.Dataset) -> Iterator[Row]:
    """Of chunks, as they are finished."""
    for batch in records.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from map(json.loads, cast(pa.Table, batch)["record"].to_pylist())


def cut_into_chunks(
    photos: Sequence[Photo], features: FeaturesConfig, data: DataConfig, resources: Resources
) -> list[Sequence[Photo]]:
    """Chunks of at most `resources.chunk_images` photos, or of as many as share a forward pass if that is more.

    Where photos share passes, a chunk has photos of one size, in whole passes; only what is left of each size is mixed.
    """
    size = resources.chunk_images
    are_alone = features.batch_size == 1 or features.extractor == WITHOUT_WEIGHTS
    if are_alone or size == 1 or resources.untrusted:  # a header would be as slow to read as a photo
        return _slices(photos, size)
    groups: dict[tuple[int, int], list[Photo]] = {}
    for photo, grid in zip(photos, _grids(photos, data, patch_size(features)), strict=True):
        groups.setdefault(grid, []).append(photo)
    chunks: list[Sequence[Photo]] = []
    left: list[Photo] = []
    for (rows, columns), group in groups.items():
        count = photos_at_once(features.batch_size, max(1, rows * columns))
        whole = len(group) // count * count
        chunks += _slices(group[:whole], max(count, size // count * count))
        left += group[whole:]
    return chunks + _slices(left, size)


def _slices(photos: Sequence[Photo], size: int) -> list[Sequence[Photo]]:
    return [photos[start : start + size] for start in range(0, len(photos), size)]


def _grids(photos: Sequence[Photo], data: DataConfig, patch: int) -> list[tuple[int, int]]:
    """(rows, columns) of patches by the header of each photo; (0, 0) for one that has none, or ends its process."""
    parts = _slices(photos, HEADERS_PER_TASK)
    tasks = [_read_grids.remote(part, data, patch) for part in parts]
    found: list[tuple[int, int]] = []
    for task, part in zip(tasks, parts, strict=True):
        try:
            grids: list[tuple[int, int]] = ray.get(task)
        except DEATHS:  # which of them it is will be found out
            grids = [(0, 0)] * len(part)
        found += grids
    return found


@ray.remote(max_retries=0)
def _read_grids(photos: Sequence[Photo], data: DataConfig, patch: int) -> list[tuple[int, int]]:
    def grid(photo: Photo) -> tuple[int, int]:
        path = os.fsdecode(photo.path)
        try:
            decoder = sandbox.decoder(untrusted=False)
            size = decoder.probe_size(path, max_megapixels=data.max_megapixels, min_side=data.min_side)
            height, width = network_size(*size, patch)
        except ImageRefused:
            return 0, 0
        return height // patch, width // patch

    return [grid(Photo(*photo)) for photo in photos]


def chunk_dataset(chunks: Sequence[Sequence[Photo]]) -> ray.data.Dataset:
    """One row a chunk, see `chunk_row`."""
    return ray.data.from_items([chunk_row(photos) for photos in chunks], override_num_blocks=len(chunks))


def chunk_row(photos: Sequence[Photo]) -> Row:
    """All files: `image_ids` list<string>, `paths` list<binary>; `files` list<int>: how many each photo has."""
    files = [list(photo.files()) for photo in photos]
    image_ids, paths = zip(*((each.image_id, each.path) for each in chain.from_iterable(files)))
    return {"image_ids": list(image_ids), "paths": list(paths), "files": list(map(len, files))}


def photos_of(chunk: pa.Table) -> Iterator[Photo]:
    """The photos of a row or several of `chunk_dataset`."""
    for row in chunk.to_pylist():
        names = zip(row["image_ids"], row["paths"])
        for count in row["files"]:
            first, *copies = islice(names, count)
            yield Photo(*first, tuple(copies))


def compared(photos: Iterable[Photo], data: DataConfig) -> Iterator[Photo]:
    """The photos with those of their copies that are equal to them, byte for byte; the others follow, each alone."""
    for photo in photos:
        if not photo.copies:
            yield photo
            continue
        content = _content(photo.path, data)
        is_same = [content is not None and _content(path, data) == content for _, path in photo.copies]
        yield photo._replace(copies=tuple(name for name, same in zip(photo.copies, is_same) if same))
        yield from (Photo(*name) for name, same in zip(photo.copies, is_same) if not same)


def _content(path: bytes, data: DataConfig) -> bytes | None:
    try:
        return read_file(os.fsdecode(path), file_limit(data.max_megapixels))
    except ImageRefused:  # why will be said when it is decoded
        return None


def decode(photo: Photo, data: DataConfig, untrusted: bool = False) -> Picture:
    """Raises ImageRefused."""
    decoder = sandbox.decoder(untrusted)
    path = os.fsdecode(photo.path)
    return decoder.read_picture(path, max_megapixels=data.max_megapixels, min_side=data.min_side)


def decoded(photo: Photo, data: DataConfig, untrusted: bool = False) -> Decoded:
    """A photo with its pixels, or with why it was refused."""
    picture = attempt(photo, "decode", functools.partial(decode, photo, data, untrusted))
    if isinstance(picture, Refused):
        return Decoded(photo, picture)
    return Decoded(photo._replace(has_more=picture.has_more), picture.pixels)


def in_whole_chunks(
    chunks: ray.data.Dataset,
    features: FeaturesConfig,
    data: DataConfig,
    out: Storage,
    pool: ray.data.ActorPoolStrategy,
    product: Product,
    untrusted: bool = False,
) -> ray.data.Dataset:
    """Every worker takes chunks from files to part."""
    return map_in_actors(chunks, ChunkWorker, (features, data, out, product, untrusted), pool, num_gpus=None)


def map_in_actors(
    rows: ray.data.Dataset,
    worker: type[Any],
    arguments: tuple[Any, ...],
    pool: ray.data.ActorPoolStrategy,
    num_gpus: float | None,
    rows_at_once: int = 1,
) -> ray.data.Dataset:
    """worker: a class whose instances turn a table of at most `rows_at_once` into a table or several; arguments: of its
    constructor.
    """
    with warnings.catch_warnings():
        # Announced to go in Ray 2.64, but there is no other way to bound the retries, which are endless by default.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return rows.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=rows_at_once,
            batch_format="pyarrow",
            compute=pool,
            num_gpus=num_gpus,
            ray_remote_args_fn=lambda: {"max_task_retries": RETRIES},
        )


class ChunkWorker:
    """An actor that decodes, describes, merges and writes."""

    def __init__(
        self,
        features: FeaturesConfig,
        data: DataConfig,
        out: Storage,
        product: Product = TREES_PRODUCT,
        untrusted: bool = False,
    ) -> None:
        cv2.setNumThreads(1)  # one process a CPU: its threads would only wait for each other
        product.warm_up()
        self.product = product
        self.extractor = build_extractor(features)
        self.data = data
        self.out = out
        self.untrusted = untrusted

    def __call__(self, chunk: pa.Table) -> pa.Table:
        return finish_chunk(self.rows(photos_of(chunk)), self.out, self.product)

    def rows(self, photos: Iterable[Photo]) -> Iterator[Result]:
        """One result for each photo and each of its copies, in their order, decoded while they are asked for."""
        each = map(self.decoded, compared(photos, self.data))
        return chain.from_iterable(describe_all(each, self.extractor, self.results))

    def decoded(self, photo: Photo) -> Decoded:
        """A photo with its pixels, or with why it was refused."""
        return decoded(photo, self.data, self.untrusted)

    def results(self, decoded: Decoded, features: np.ndarray | Refused) -> list[Result]:
        """The product's rows of a photo and its copies; features float32 [gh, gw, C], or a refusal, handed on."""

        def make(image_id: str, features: np.ndarray) -> Row:
            return self.product.make(image_id, decoded.size, features, cast(np.ndarray, decoded.pixels))

        return list(results_of(decoded.photo, features, self.product, make))


# With GPUs a photo travels from task to actor to task to task: one row, its arrays as bytes.
TRAVELLING = pa.schema(
    {
        "image_id": pa.string(),
        "path": pa.binary(),
        "copies": pa.list_(pa.struct({"image_id": pa.string(), "path": pa.binary()})),
        "has_more": pa.bool_(),
        "is_copy": pa.bool_(),
        "height": pa.int32(),  # pixels
        "width": pa.int32(),
        "shape": pa.list_(pa.int32()),
        # uint8 pixels of the network's size, then float32 features [gh, gw, C], then what was made: an Arrow stream
        "values": pa.large_binary(),
        "refused": pa.list_(pa.string()),  # the fields of a Refused, else null
    }
)


def in_steps(
    chunks: ray.data.Dataset,
    features: FeaturesConfig,
    data: DataConfig,
    out: Storage,
    chunk_images: int,
    pool: ray.data.ActorPoolStrategy,
    device: str,
    num_gpus: float | None,
    product: Product = TREES_PRODUCT,
    untrusted: bool = False,
) -> ray.data.Dataset:
    """Tasks decode, actors that keep the network on their GPU describe, tasks merge, tasks write."""
    decode_task = functools.partial(decode_chunk, features=features, data=data, untrusted=untrusted)
    merge_task = functools.partial(merge_photo, data=data, product=product, untrusted=untrusted)
    write_task = functools.partial(write_chunk, out=out, product=product)
    decoded = chunks.map_batches(decode_task, batch_size=1, batch_format="pyarrow", num_cpus=1)
    rows_at_once = 1 if features.batch_size == 1 else chunk_images
    described = map_in_actors(decoded, FeatureWorker, (features, device), pool, num_gpus, rows_at_once)
    merged = described.map_batches(merge_task, batch_size=1, batch_format="pyarrow", num_cpus=1)
    # Half a CPU, so that Ray does not fuse it with merging: such a task would be given the features of a whole chunk.
    return merged.map_batches(write_task, batch_size=chunk_images, batch_format="pyarrow", num_cpus=0.5)


def decode_chunk(
    chunk: pa.Table, features: FeaturesConfig, data: DataConfig, untrusted: bool = False
) -> Iterator[pa.Table]:
    """A row of TRAVELLING for each photo: pixels of the network's size, or why it was refused."""
    for each in compared(photos_of(chunk), data):
        photo, pixels, _ = found = decoded(each, data, untrusted)
        if not isinstance(pixels, Refused):
            pixels = attempt(photo, "features", functools.partial(prepare, pixels, patch_size(features)))
        yield pack(photo, found.size, pixels)


class FeatureWorker:
    """An actor that describes photos: for each row in, one row out."""

    def __init__(self, features: FeaturesConfig, device: str) -> None:
        self.extractor = build_extractor(features, device)

    def __call__(self, travelling: pa.Table) -> Iterator[pa.Table]:
        decoded = (arrived(travelling.slice(k, 1)) for k in range(len(travelling)))
        yield from describe_all(decoded, self.extractor, lambda each, features: pack(each.photo, each.size, features))


def arrived(travelling: pa.Table) -> Decoded:
    """The photo of one row of TRAVELLING, as the network takes it."""
    photo, size, pixels = unpack(travelling, np.uint8)
    return Decoded(photo, pixels, size)


def merge_photo(
    travelling: pa.Table, data: DataConfig, product: Product, untrusted: bool = False
) -> Iterator[pa.Table]:
    """A row for the photo and one for each of its copies.

    Pixels are decoded again where a product needs them: they are what is large.
    """
    _warm_up(product)
    photo, size, features = unpack(travelling, np.float32)

    @functools.cache
    def pixels() -> np.ndarray | None:
        return decode(photo, data, untrusted).pixels if product.needs_pixels else None

    def make(image_id: str, features: np.ndarray) -> Row:
        return product.make(image_id, size, features, pixels())

    for each, made in results_of(photo, features, product, make):
        yield pack(each, size, made if isinstance(made, Refused) else to_stream(product.table([made])))


def write_chunk(travelling: pa.Table, out: Storage, product: Product) -> pa.Table:
    """Rows of TRAVELLING with what was made of them -> the record of their parts."""

    def results() -> Iterator[Result]:
        for k in range(len(travelling)):
            photo, _, made = unpack(travelling.slice(k, 1), np.uint8)
            if isinstance(made, Refused):
                yield Result(photo, made)
            else:
                yield Result(photo, pa.ipc.open_stream(made).read_all().to_pylist()[0])

    return finish_chunk(results(), out, product)


def to_stream(table: pa.Table) -> np.ndarray:
    """uint8 [bytes]."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)


@functools.cache
def _warm_up(product: Product) -> None:
    product.warm_up()


def pack(photo: Photo, size: tuple[int, ...], content: np.ndarray | Refused) -> pa.Table:
    """One row of TRAVELLING. size: (height, width) of the photo in pixels."""
    copies = [{"image_id": image_id, "path": path} for image_id, path in photo.copies]
    row: Row = {**photo._asdict(), "copies": copies, "height": size[0], "width": size[1]}
    if isinstance(content, Refused):
        return pa.Table.from_pylist([row | {"refused": list(content)}], schema=TRAVELLING)
    table = pa.Table.from_pylist([row | {"shape": content.shape}], schema=TRAVELLING)
    # Not copied: for features, each copy takes as long as a GPU takes to compute them.
    buffers = [None, pa.py_buffer(np.array([0, content.nbytes])), pa.py_buffer(np.ascontiguousarray(content))]
    values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)
    return table.set_column(TRAVELLING.get_field_index("values"), TRAVELLING.field("values"), values)


def unpack(travelling: pa.Table, dtype: type[np.generic]) -> tuple[Photo, tuple[int, int], np.ndarray | Refused]:
    """(photo, its size in pixels, what travels with it) of a table of one row. The array is read-only."""
    row = travelling.drop_columns("values").to_pylist()[0]
    content = (
        Refused(*row["refused"])
        if row["refused"] is not None
        else np.frombuffer(travelling["values"][0].as_buffer(), dtype).reshape(row["shape"])
    )
    copies = tuple((each["image_id"], each["path"]) for each in row["copies"])
    photo = Photo(row["image_id"], row["path"], copies, row["has_more"], row["is_copy"])
    return photo, (row["height"], row["width"]), content
