"""Precompute: one digest however the work is cut, interrupted or broken by bad photos."""

import dataclasses
import json
import os
import random
import shutil
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
from hostile_files import hostile_photos, write_all
from PIL import Image
from precompute_material import (
    FEATURES,
    expected_rows,
    files_of,
    listed,
    quarantine_in,
    row_of,
    rows_in,
    run,
    write_photos,
)

from mis_platform.artifacts import Output, Part, Stage, combine_digests, ensure, read_manifest
from mis_platform.config import DataConfig, FeaturesConfig, Resources, SourcesConfig
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.images import read_image
from mis_platform.data.schemas import QUARANTINE, TREES
from mis_platform.data.trees import TreeReader
from mis_platform.errors import DataError
from mis_platform.model.features import Extractor, build_extractor
from mis_platform.progress import Progress
from mis_platform.simulation.ward import merge
from mis_platform.stages import precompute
from mis_platform.stages.products import TREES_PRODUCT, SourceProposals, Trees
from mis_platform.storage import TEMPORARY, Storage, StorageError
from mis_platform.verification import verify


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_photos(tmp_path_factory.mktemp("photos"), 24)


def write_all_parts(dataset: Dataset, out: Path, size: int) -> None:
    rows = sorted(expected_rows(dataset), key=lambda row: row["image_id"])
    for start in range(0, len(rows), size):
        precompute.write_part(rows[start : start + size], Storage(str(out)))


# -- parts, without Ray ----------------------------------------------------------------------------------------------


def test_parts_are_plain_parquet(photos: Dataset, tmp_path: Path) -> None:
    rows = expected_rows(photos)[:5]
    part = precompute.write_part(rows[::-1], Storage(str(tmp_path)))
    table = pq.read_table(tmp_path / part.name)
    assert table.schema.remove_metadata() == TREES.remove_metadata()
    assert table["image_id"].to_pylist() == sorted(row["image_id"] for row in rows)
    assert table["children"][0].values.to_pylist() == rows[0]["children"].tolist()
    assert table["costs"][4].values.to_pylist() == rows[4]["costs"].tolist()
    assert (part.rows, part.bytes) == (5, (tmp_path / part.name).stat().st_size)


def test_other_engines_read_the_encodings(photos: Dataset, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = expected_rows(photos)[:3]
    part = precompute.write_part(rows, Storage(str(tmp_path)))
    query = f"select image_id, children, costs from read_parquet('{tmp_path / part.name}')"
    for row, (image_id, children, costs) in zip(rows, duckdb.sql(query).fetchall()):
        assert image_id == row["image_id"]
        assert children == row["children"].tolist()
        assert costs == row["costs"].tolist()


@pytest.mark.parametrize("sizes", [[1] * 12, [12], [5, 7], [3, 4, 5]])
def test_the_digest_does_not_depend_on_the_parts(photos: Dataset, tmp_path: Path, sizes: list[int]) -> None:
    rows = expected_rows(photos)[:12]
    whole = precompute.write_part(rows, Storage(str(tmp_path / "whole")))
    random.Random(0).shuffle(rows)
    parts = [precompute.write_part([rows.pop() for _ in range(size)], Storage(str(tmp_path / "cut"))) for size in sizes]
    assert combine_digests([part.digest for part in parts]) == whole.digest


def test_the_digest_notices_every_column(photos: Dataset) -> None:
    row = row_of(photos, photos.image_ids[0])
    altered = [{**row, name: row[name] + ("x" if name == "image_id" else 1)} for name in TREES.names]
    assert len({TREES_PRODUCT.digest(each) for each in [row, *altered]}) == 1 + len(TREES.names)


def test_whole_parts_are_found_again(photos: Dataset, tmp_path: Path) -> None:
    storage, rows = Storage(str(tmp_path)), expected_rows(photos)
    written = [precompute.write_part(rows[start : start + 6], storage) for start in range(0, 24, 6)]
    found = precompute.finished_parts(storage, photos.image_ids)
    assert sorted(each.part.name for each in found) == sorted(part.name for part in written)
    assert {each.part for each in found} == set(written)
    assert sorted(image_id for each in found for image_id in each.image_ids) == sorted(photos.image_ids)


def test_large_parts_are_read_once_over_all_attempts(
    photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "LEDGER_BYTES", 0)
    read: list[str] = []
    read_part = precompute._read_part
    monkeypatch.setattr(precompute, "_read_part", lambda name, *rest: (read.append(name), read_part(name, *rest))[1])
    storage, rows = Storage(str(tmp_path)), expected_rows(photos)
    early = [precompute.write_part(rows[start : start + 6], storage) for start in (0, 6)]
    first = precompute.finished_parts(storage, photos.image_ids)
    late = precompute.write_part(rows[12:18], storage)
    again = precompute.finished_parts(storage, photos.image_ids)
    assert {each.part for each in again} == {*early, late}
    assert set(first) < set(again)
    assert sorted(read) == sorted(part.name for part in [*early, late])
    (tmp_path / early[0].name).unlink()
    (tmp_path / early[1].name).write_bytes(b"torn")
    assert [each.part for each in precompute.finished_parts(storage, photos.image_ids)] == [late]
    storage.write_bytes(precompute.LEDGER_FILE, b"torn")
    assert [each.part for each in precompute.finished_parts(storage, photos.image_ids)] == [late]


def flip_byte(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


def without_footer(content: bytes) -> bytes:
    return content[:-8]


def of_other_columns(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image_id": ["photo_000"]}), sink)
    return sink.getvalue().to_pybytes()


def without_digest(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pq.read_table(pa.BufferReader(content)).replace_schema_metadata(TREES.metadata), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "damage", [flip_byte, without_footer, of_other_columns, without_digest, lambda content: b"", lambda content: b"x"]
)
def test_damaged_parts_are_dropped(photos: Dataset, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    storage, rows = Storage(str(tmp_path)), expected_rows(photos)
    good = precompute.write_part(rows[:6], storage)
    bad = precompute.write_part(rows[6:12], storage)
    (tmp_path / bad.name).write_bytes(damage((tmp_path / bad.name).read_bytes()))
    assert [each.part for each in precompute.finished_parts(storage, photos.image_ids)] == [good]
    assert storage.names() == [good.name]


def test_any_flipped_bit_is_noticed_or_harmless(photos: Dataset, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    part = precompute.write_part(expected_rows(photos)[:2], storage)
    content = storage.read_bytes(part.name)
    rng = random.Random(0)
    for _ in range(300):
        position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        torn = content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
        (tmp_path / part.name).write_bytes(torn)
        for each in precompute.finished_parts(storage, photos.image_ids):
            assert each.part.digest == part.digest
            assert each.image_ids == photos.image_ids[:2]


def test_photos_of_another_data_set_or_in_two_parts_are_dropped(photos: Dataset, tmp_path: Path) -> None:
    storage, rows = Storage(str(tmp_path)), expected_rows(photos)
    for chosen in (rows[:4], rows[2:6], [{**rows[7], "image_id": "stranger"}]):
        precompute.write_part(chosen, storage)
    found = precompute.finished_parts(storage, photos.image_ids)
    assert len(found) == 1
    assert storage.names() == [found[0].part.name]


# -- when to stop, without Ray ---------------------------------------------------------------------------------------


def refusal(reason: str, stage: str = "decode") -> precompute.Refused:
    return precompute.Refused("id", "/photos/id.jpg", stage, reason, "some message")


def tally_of(chunks: Iterable[list[precompute.Refused | None]]) -> precompute.Tally:
    """A tally of chunks in which None is a photo with a tree."""
    tally = precompute.Tally(Progress("trees", 10_000, "images"))
    for k, chunk in enumerate(chunks):
        ids = [f"{k}/{place}" for place in range(len(chunk))]
        good = [image_id for image_id, each in zip(ids, chunk) if each is None]
        parts = [vars(Part(name=f"trees-{k}", rows=len(good), bytes=1, sha256="", digest="0"))] if good else []
        bad = [each._replace(image_id=image_id) for image_id, each in zip(ids, chunk) if each is not None]
        record = {"parts": parts, "image_ids": good, "refused": bad, "refused_copies": [], "has_more": []}
        record["storage_error"] = None
        tally.add(json.loads(json.dumps(record)))
    return tally


def test_bad_photos_never_stop_a_run() -> None:
    tally = tally_of([[refusal("TRUNCATED")] * 16] * 100)
    assert len(tally.refused) == 1600


def test_scattered_failures_do_not_stop_a_run() -> None:
    tally = tally_of([[refusal("INTERNAL", "features")] * 15 + [None]] * 100)
    assert (len(tally.refused), len(tally.parts)) == (1500, 100)


def test_failures_in_a_row_stop_a_run() -> None:
    with pytest.raises(RuntimeError, match=r"32 photos in a row failed.*id\.jpg, in features: some message"):
        tally_of([[None] * 16, *([[refusal("INTERNAL", "features")] * 16] * 2)])
    with pytest.raises(StorageError, match="32 photos in a row failed"):
        tally_of([[refusal("UNREADABLE")] * 16] * 2)
    tally_of([[refusal("INTERNAL")] * 31])


def test_a_photo_that_fails_fails_once_however_many_copies_it_has() -> None:
    tally = precompute.Tally(Progress("trees", 200, "images"))
    copies = [list(refusal("INTERNAL", "features")._replace(image_id=str(k))) for k in range(100)]
    record: dict[str, Any] = {**{name: [] for name in precompute.RECORDED}, "storage_error": None}
    tally.add({**record, "refused": copies[:1], "refused_copies": copies[1:]})
    assert (len(tally.refused), len(tally.image_ids), tally.progress.done) == (100, 100, 100)
    with pytest.raises(RuntimeError, match="100 photos in a row failed"):
        tally.add({**record, "refused": copies[1:]})


def test_a_photo_that_is_not_there_stops_a_run() -> None:
    with pytest.raises(DataError, match=r"/photos/id\.jpg is not there any more, or not on every node"):
        tally_of([[None, refusal("GONE")]])


def test_too_little_memory_stops_a_run() -> None:
    with pytest.raises(DataError, match=r"not enough memory for /photos/id\.jpg in merge; lower data\.max_megapixels"):
        tally_of([[None, refusal("OUT_OF_MEMORY", "merge")]])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("shapes differ"), "INTERNAL"),
        (MemoryError(), "OUT_OF_MEMORY"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "OUT_OF_MEMORY"),
    ],
)
def test_reasons_of_failures(error: Exception, reason: str) -> None:
    def fail() -> None:
        raise error

    refused = precompute.attempt(precompute.Photo("id", b"/photos/\xff\n.jpg"), "merge", fail)
    assert isinstance(refused, precompute.Refused)
    assert (refused.image_id, refused.stage, refused.reason) == ("id", "merge", reason)
    assert refused.message.startswith(type(error).__name__)
    pa.array(list(refused))  # valid Unicode, whatever the file is called


def test_torch_and_numpy_say_that_memory_is_short_in_a_known_way() -> None:
    for step in (lambda: torch.empty(1 << 55), lambda: np.empty(1 << 55)):
        refused = precompute.attempt(precompute.Photo("id", b"x"), "features", step)
        assert isinstance(refused, precompute.Refused)
        assert refused.reason == "OUT_OF_MEMORY", refused.message


def test_a_folder_without_photos_is_refused(tmp_path: Path, photos: Dataset) -> None:
    empty = photos.subset(0.1, 0).__class__(photos.name, "train", tmp_path, (), photos.read, is_labelled=False)
    with pytest.raises(DataError, match="there are no photos in folder"):
        run(empty, tmp_path / "out")


def test_missing_weights_are_noticed_before_any_worker_starts(photos: Dataset, tmp_path: Path) -> None:
    config = FeaturesConfig(weights=str(tmp_path / "no.pth"))
    with pytest.raises(ValueError, match="color_texture"):
        precompute.precompute(photos, config, DataConfig(), Resources(), Storage(str(tmp_path / "out")))


def test_workers_leave_untrusted_photos_to_a_child(
    photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that do all steps, and those that decode and merge around a GPU."""
    photo = precompute.Photo("photo_000", os.fsencode(photos.image_path("photo_000")))
    chunk = pa.Table.from_pylist([precompute.chunk_row([photo])])
    expected, out = row_of(photos, photo.image_id), Storage(str(tmp_path))
    tokencut = SourceProposals("tokencut", SourcesConfig())  # needs pixels again when it is made
    assert tokencut.needs_pixels

    def decoder_called(*_: object, **__: object) -> None:
        raise AssertionError("the worker called a decoder")

    monkeypatch.setattr(Image, "open", decoder_called)
    ((_, made),) = precompute.ChunkWorker(FEATURES, DataConfig(), out, untrusted=True).rows([photo])
    assert isinstance(made, dict)
    np.testing.assert_array_equal(made["children"], expected["children"])
    (decoded,) = precompute.decode_chunk(chunk, FEATURES, DataConfig(), untrusted=True)
    (described,) = precompute.FeatureWorker(FEATURES, "cpu")(decoded)
    for product in (TREES_PRODUCT, tokencut):
        (merged,) = precompute.merge_photo(described, DataConfig(), product, untrusted=True)
        (record,) = precompute.write_chunk(merged, out, product)["record"].to_pylist()
        assert json.loads(record)["image_ids"] == [photo.image_id], record
    ((_, trusted),) = precompute.ChunkWorker(FEATURES, DataConfig(), out).rows([photo])
    assert isinstance(trusted, precompute.Refused), "else this test would tell nothing"


# -- copies, without Ray ---------------------------------------------------------------------------------------------


def with_copies(photos: Dataset, folder: Path, count: int) -> Dataset:
    """The first five photos, and `count` copies of photo_003 whose names lie before and behind all of them."""
    folder.mkdir()
    for image_id in photos.image_ids[:5]:
        shutil.copyfile(photos.image_path(image_id), folder / f"{image_id}.jpg")
    for k in range(count):
        shutil.copyfile(photos.image_path("photo_003"), folder / f"{'az'[k % 2]}_{k:03d}.jpg")
    return open_dataset(f"folder:{folder}")


def test_copies_are_brought_together(photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = with_copies(photos, tmp_path / "photos", 8)

    def together(without: str = "-") -> list[list[str]]:
        samples = [sample for sample in dataset.samples if not sample.image_id.startswith(without)]
        photos = list(precompute.bring_together(samples, dataset))
        for each in photos:
            for file in each.files():
                assert os.fsdecode(file.path) == str(dataset.image_path(file.image_id))
        return [[file.image_id for file in each.files()] for each in photos]

    behind = ["photo_003", "z_001", "z_003", "z_005", "z_007"]
    others = [["photo_000"], ["photo_001"], ["photo_002"]]
    assert together() == [["a_000", "a_002", "a_004", "a_006", *behind], *others, ["photo_004"]]
    assert together(without="a") == [*others, behind, ["photo_004"]]
    monkeypatch.setattr(precompute, "MAX_FILES", 4)
    assert together(without="a") == [*others, behind[:4], behind[4:], ["photo_004"]]
    assert list(precompute.bring_together(photos.samples, photos)) == listed(photos)


def test_what_is_left_of_a_photo_and_its_copies() -> None:
    photo = precompute.Photo("a", b"/a", (("b", b"/b"), ("c", b"/c")))
    assert photo.without({"x"}) == photo
    assert photo.without({"a"}) == precompute.Photo("b", b"/b", (("c", b"/c"),))
    assert photo.without({"a", "b", "c"}) is None


def rows_of_copies(worker: precompute.ChunkWorker, photo: precompute.Photo) -> dict[str, Any]:
    return {result.photo.image_id: result.made for result in worker.rows([photo])}


def test_files_that_are_no_copies_any_more_are_computed_alone(photos: Dataset, tmp_path: Path) -> None:
    dataset = with_copies(photos, tmp_path / "photos", 8)
    (photo, *_) = precompute.bring_together(dataset.samples, dataset)
    shutil.copyfile(dataset.image_path("photo_001"), dataset.image_path("a_002"))
    dataset.image_path("z_003").write_bytes(b"no image")
    decoded: list[str] = []

    class Noting(precompute.ChunkWorker):
        def decoded(self, photo: precompute.Photo) -> precompute.Decoded:
            decoded.append(photo.image_id)
            return super().decoded(photo)

    worker = Noting(FEATURES, DataConfig(), Storage(str(tmp_path / "out")))
    found = rows_of_copies(worker, photo)
    assert decoded == ["a_000", "a_002", "z_003"]
    assert found.pop("z_003")[2:4] == ("decode", "NOT_AN_IMAGE")
    assert len(found) == 8
    for image_id, row in found.items():
        assert TREES_PRODUCT.digest(row) == TREES_PRODUCT.digest(row_of(dataset, image_id)), image_id
    dataset.image_path("a_000").unlink()
    found = rows_of_copies(worker, photo)
    assert found.pop("a_000").reason == "GONE"
    assert sum(isinstance(each, dict) for each in found.values()) == 7


@pytest.mark.parametrize(("source", "computed"), [("tokencut", 1), ("dsm", 4), ("freemask", 1)])
def test_copies_have_the_proposals_that_they_have_alone(
    photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, computed: int
) -> None:
    """What draws by the image's id draws for each of them, from features that are computed once."""
    product = SourceProposals(source, SourcesConfig())
    dataset = with_copies(photos, tmp_path / "photos", 3)
    (photo, *_) = precompute.bring_together(dataset.samples, dataset)
    worker = precompute.ChunkWorker(FEATURES, DataConfig(), Storage(str(tmp_path / "out")), product)
    alone = {each.image_id: rows_of_copies(worker, each)[each.image_id] for each in listed(dataset)}
    calls: list[int] = []
    made: list[int] = []
    describe, make = worker.extractor.describe, SourceProposals.make
    counted = dataclasses.replace(worker.extractor, describe=lambda batch: (calls.append(1), describe(batch))[1])
    worker.extractor = counted
    monkeypatch.setattr(SourceProposals, "make", lambda *arguments: (made.append(1), make(*arguments))[1])
    found = rows_of_copies(worker, photo)
    assert sorted(found) == ["a_000", "a_002", "photo_003", "z_001"]
    assert {image_id: product.digest(row) for image_id, row in found.items()} == {
        image_id: product.digest(alone[image_id]) for image_id in found
    }
    assert (len(calls), len(made)) == (1, computed)


# -- frames and pages, without Ray -----------------------------------------------------------------------------------


def test_parts_say_of_which_photos_there_is_more(
    photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when they are found again, and from the ledger; rows and digests are the same."""
    monkeypatch.setattr(precompute, "LEDGER_BYTES", 0)
    results = [precompute.Result(photo, row) for photo, row in zip(listed(photos), expected_rows(photos))]
    moving = [result._replace(photo=result.photo._replace(has_more=k in (1, 3))) for k, result in enumerate(results)]
    plain, marked = Storage(str(tmp_path / "plain")), Storage(str(tmp_path / "marked"))
    records = [
        json.loads(precompute.finish_chunk(each, out, TREES_PRODUCT)["record"][0].as_py())
        for each, out in ((results, plain), (moving, marked))
    ]
    assert [record["has_more"] for record in records] == [[], ["photo_001", "photo_003"]]
    assert records[0]["parts"][0]["digest"] == records[1]["parts"][0]["digest"]
    assert rows_in(tmp_path / "plain") == rows_in(tmp_path / "marked")
    metadata = pq.read_schema(tmp_path / "plain" / records[0]["parts"][0]["name"]).metadata
    assert precompute.MORE_KEY not in metadata, "a part without any is the file that it always was"
    for _ in range(2):
        (found,) = precompute.finished_parts(marked, photos.image_ids)
        assert found.has_more == ("photo_001", "photo_003")


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (1, "1 photo has several frames or pages, of which the first one counts (photo_000.jpg)"),
        (
            4,
            "4 photos have several frames or pages, of which the first one counts "
            "(photo_000.jpg, photo_001.jpg, photo_002.jpg, ...)",
        ),
    ],
)
def test_the_line_about_frames_names_files(photos: Dataset, count: int, told: str) -> None:
    assert precompute.first_frames(photos, photos.image_ids[:count]) == told


# -- photos in company, without Ray ----------------------------------------------------------------------------------


def by_mean(batch_size: int, calls: list[list[int]], unlucky: int = -1, error: Exception | None = None) -> Extractor:
    """Its feature of a patch is the mean of the photo; `calls` gets those of each batch. It fails on `unlucky`."""

    def describe(batch: np.ndarray) -> np.ndarray:
        means = batch.mean(axis=(1, 2, 3)).astype(np.float32)
        calls.append(means.astype(int).tolist())
        if unlucky in calls[-1]:
            raise error or RuntimeError("no luck")
        return np.repeat(means, batch.shape[1] * batch.shape[2] // 64).reshape(len(batch), -1, 1)

    return Extractor("by_mean", 8, 1, describe, batch_size)


def plain_photo(grey: int, height: int = 16, width: int = 24) -> precompute.Decoded:
    photo = precompute.Photo(f"photo_{grey}", b"/photos")
    return precompute.Decoded(photo, np.full((height, width, 3), grey, np.uint8))


def outcome(decoded: precompute.Decoded, features: np.ndarray | precompute.Refused) -> Any:
    """(image id, feature, grid), or the refusal."""
    if isinstance(features, precompute.Refused):
        return features
    return decoded.photo.image_id, int(features[0, 0, 0]), features.shape[:2]


def test_photos_of_one_network_size_share_batches_and_keep_their_order() -> None:
    calls: list[list[int]] = []
    photo = precompute.Photo("broken", b"/photos")
    broken = precompute.Decoded(photo, refusal("TRUNCATED")._replace(image_id="broken"))
    photos = [plain_photo(k, *((16, 24), (15, 17), (24, 24))[k % 3]) for k in range(8)]  # two become 16x24
    found = list(precompute.describe_all([*photos[:3], broken, *photos[3:]], by_mean(2, calls), outcome))
    expected = [(f"photo_{k}", k, (3, 3) if k % 3 == 2 else (2, 3)) for k in range(8)]
    assert found == [*expected[:3], broken.pixels, *expected[3:]]
    assert calls == [[0, 0], [0, 1], [3, 4], [6, 7], [2, 2], [2, 5]]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("error", "reason"), [(None, "INTERNAL"), (MemoryError(), "OUT_OF_MEMORY")])
def test_a_photo_that_fails_takes_no_other_with_it(batch_size: int, error: Exception | None, reason: str) -> None:
    photos = [plain_photo(k) for k in range(9)]
    found = list(precompute.describe_all(photos, by_mean(batch_size, [], 6, error), outcome))
    refused = found.pop(6)
    assert found == [(f"photo_{k}", k, (2, 3)) for k in range(9) if k != 6]
    assert (refused.image_id, refused.stage, refused.reason) == ("photo_6", "features", reason)


@pytest.mark.parametrize(("batch_size", "held_at_most"), [(1, 1), (4, 6)])
def test_few_photos_are_held_at_once(batch_size: int, held_at_most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever another one is decoded: none without batches, else as many as the window has bytes for."""
    monkeypatch.setattr(precompute, "WINDOW_BYTES", 5 * 16 * 24 * 3 + 1)
    alive: list[weakref.ref[np.ndarray]] = []
    most: list[int] = []

    def decoded() -> Iterator[precompute.Decoded]:
        for k in range(30):
            each = plain_photo(k)
            alive.append(weakref.ref(each.pixels))  # type: ignore[arg-type]
            most.append(sum(pixels() is not None for pixels in alive))
            yield each
            del each

    results = precompute.describe_all(decoded(), by_mean(batch_size, calls := []), outcome)
    assert next(results)[0] == "photo_0"
    assert len(most) == held_at_most, "it reads ahead"
    assert [each[0] for each in results] == [f"photo_{k}" for k in range(1, 30)]
    assert max(most) == held_at_most
    assert {len(batch) for batch in calls} == {batch_size}


# -- with Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(photos: Dataset, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Output]:
    out = tmp_path_factory.mktemp("undisturbed")
    return out, run(photos, out, chunk_images=5)


@pytest.mark.ray
def test_every_row_is_what_the_functions_give(photos: Dataset, undisturbed: tuple[Path, Output]) -> None:
    out, output = undisturbed
    rows = rows_in(out)
    assert sorted(rows) == sorted(photos.image_ids)
    for expected in expected_rows(photos):
        found = rows[expected["image_id"]]
        assert {name: np.asarray(value).tolist() for name, value in expected.items()} == found
    rotated = Image.open(photos.image_path("photo_001"))
    assert (rows["photo_001"]["image_height"], rows["photo_001"]["image_width"]) == rotated.size
    assert output.digest == combine_digests([TREES_PRODUCT.digest(row) for row in expected_rows(photos)])
    assert output.summary["images"] == 24
    assert output.summary["quarantined"] == 0
    assert output.summary["bytes"] == sum(path.stat().st_size for path in out.glob("trees-*.parquet"))
    assert pq.read_table(out / "quarantine.parquet").schema == QUARANTINE


@pytest.mark.ray
@pytest.mark.parametrize(("chunk_images", "extractors"), [(1, 2), (7, 1), (100, 3)])
def test_the_digest_does_not_depend_on_resources(
    photos: Dataset, undisturbed: tuple[Path, Output], tmp_path: Path, chunk_images: int, extractors: int
) -> None:
    output = run(photos, tmp_path, chunk_images=chunk_images, extractors=extractors)
    assert output.digest == undisturbed[1].digest
    assert len(output.parts) == -(-24 // chunk_images)
    assert rows_in(tmp_path) == rows_in(undisturbed[0])


@pytest.mark.ray
def test_step_by_step_gives_the_same_trees(photos: Dataset, undisturbed: tuple[Path, Output], tmp_path: Path) -> None:
    """The way that is taken with GPUs, on the CPU, with a broken photo among them."""
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    bad = precompute.Photo("bad", os.fsencode(tmp_path / "bad.jpg"))
    chunks = precompute.chunk_dataset(precompute._slices([*listed(photos), bad], 6))
    pool = ray.data.ActorPoolStrategy(size=1)
    steps = precompute.in_steps(chunks, FEATURES, DataConfig(), Storage(str(tmp_path)), 6, pool, "cpu", None)
    tally = precompute.Tally(Progress("trees", 25, "images"))
    for record in precompute.read_records(steps):
        tally.add(record)
    assert combine_digests([part.digest for part in tally.parts]) == undisturbed[1].digest
    assert rows_in(tmp_path) == rows_in(undisturbed[0])
    assert [(each.image_id, each.stage, each.reason) for each in tally.refused] == [("bad", "decode", "NOT_AN_IMAGE")]


def counted_in(notes: Path) -> tuple[type[Any], type[Any], Trees]:
    """Workers of both ways, and a product, that leave a line in `notes` for all that they compute."""

    def note(what: str) -> None:
        with open(notes, "a") as file:
            file.write(f"{what}\n")

    def counting(extractor: Extractor) -> Extractor:
        describe = extractor.describe
        return dataclasses.replace(extractor, describe=lambda batch: (note("describe"), describe(batch))[1])

    class Whole(precompute.ChunkWorker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.extractor = counting(self.extractor)

    class Features(precompute.FeatureWorker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.extractor = counting(self.extractor)

    class Counted(Trees):
        def make(self, *arguments: Any) -> dict[str, Any]:
            note("merge")
            return super().make(*arguments)

    return Whole, Features, Counted()


def moving_picture(path: Path) -> None:
    frames = [Image.fromarray(np.full((48, 64, 3), level, np.uint8)) for level in (40, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.ray
def test_copies_are_computed_once(
    photos: Dataset,
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A hundred of one photo, forty of a broken one: six computations, rows and digest as if each were alone.

    Then again, with parts of the first attempt: what is whole is kept, and the rest is computed once more.
    """
    good = with_copies(photos, tmp_path / "photos", 99)
    moving_picture(tmp_path / "photos" / "moving.gif")
    for k in range(40):
        (tmp_path / "photos" / f"broken_{k:02d}.jpg").write_bytes(photos.image_path("photo_004").read_bytes()[:500])
    dataset = open_dataset(f"folder:{tmp_path / 'photos'}")
    worker, _, product = counted_in(tmp_path / "notes")
    monkeypatch.setattr(precompute, "ChunkWorker", worker)
    out, resources = Storage(str(tmp_path / "out")), Resources(chunk_images=2, extractors=2)

    def computed() -> tuple[Output, list[str]]:
        (tmp_path / "notes").write_text("")
        output = precompute.precompute(dataset, FEATURES, DataConfig(), resources, out, product)
        return output, sorted((tmp_path / "notes").read_text().split())

    output, notes = computed()
    assert notes == ["describe"] * 6 + ["merge"] * 6
    rows = [*expected_rows(good), row_of(dataset, "moving")]
    assert len(rows) == 105
    assert output.digest == combine_digests([TREES_PRODUCT.digest(row) for row in rows])
    assert sorted(rows_in(tmp_path / "out")) == sorted(row["image_id"] for row in rows)
    refused = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [row["image_id"] for row in refused] == [f"broken_{k:02d}" for k in range(40)]
    assert [row["path"] for row in refused] == [str(dataset.image_path(row["image_id"])) for row in refused]
    assert {(row["stage"], row["reason"]) for row in refused} == {("decode", "TRUNCATED")}
    assert (output.summary["images"], output.summary["quarantined"], output.summary["first_frames"]) == (105, 40, 1)
    told = capsys.readouterr().err
    assert "trees: 138 of 145 photos are copies of others, which are computed once\n" in told
    assert "trees: 1 photo has several frames or pages, of which the first one counts (moving.gif)\n" in told

    largest = max(output.parts, key=lambda part: part.rows)
    kept = files_of(tmp_path / "out")
    out.remove(largest.name)
    precompute.write_part([row for row in rows if row["image_id"] in ("a_000", "z_001")], out)
    again, notes = computed()
    assert notes == ["describe", "merge"], "of the part that is gone, and of nothing else"
    assert again.digest == output.digest
    del kept[largest.name]
    assert kept.items() <= files_of(tmp_path / "out").items()
    assert again.summary["first_frames"] == 1


@pytest.mark.ray
def test_step_by_step_copies_are_computed_once(
    photos: Dataset, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that is taken with GPUs, on the CPU."""
    good = with_copies(photos, tmp_path / "photos", 30)
    moving_picture(tmp_path / "photos" / "moving.gif")
    for k in range(3):
        (tmp_path / "photos" / f"broken_{k}.jpg").write_bytes(b"no image")
    dataset = open_dataset(f"folder:{tmp_path / 'photos'}")
    _, worker, product = counted_in(tmp_path / "notes")
    monkeypatch.setattr(precompute, "FeatureWorker", worker)
    together = list(precompute.bring_together(dataset.samples, dataset))
    chunks, pool = precompute.chunk_dataset(precompute._slices(together, 3)), ray.data.ActorPoolStrategy(size=1)
    out = Storage(str(tmp_path / "out"))
    steps = precompute.in_steps(chunks, FEATURES, DataConfig(), out, 3, pool, "cpu", None, product)
    tally = precompute.Tally(Progress("trees", 39, "images"))
    for record in precompute.read_records(steps):
        tally.add(record)
    assert sorted((tmp_path / "notes").read_text().split()) == ["describe"] * 6 + ["merge"] * 6
    rows = [*expected_rows(good), row_of(dataset, "moving")]
    digest = combine_digests([TREES_PRODUCT.digest(row) for row in rows])
    assert combine_digests([part.digest for part in tally.parts]) == digest
    assert sorted(rows_in(tmp_path / "out")) == sorted(row["image_id"] for row in rows)
    assert [Path(each.path).stem for each in sorted(tally.refused)] == ["broken_0", "broken_1", "broken_2"]
    assert len(tally.barren) <= 1, "one photo that fails, not three"
    assert tally.has_more == ["moving"]


def spoil(folder: Path) -> dict[str, tuple[str, str]]:
    """Writes bad photos beside the good ones; what the quarantine should say of them."""
    good = (folder / "photo_000.jpg").read_bytes()
    (folder / "a_torn.jpg").write_bytes(good[: len(good) // 2])
    (folder / "b_empty.jpg").write_bytes(b"")
    (folder / "c_text.jpg").write_text("hello")
    Image.new("RGB", (4, 90)).save(folder / "d_small.png")
    Image.new("1", (9000, 9000)).save(folder / "e_large.png")
    (folder / "f_pipe.jpg").symlink_to("/dev/zero")
    return {
        "a_torn": ("decode", "TRUNCATED"),
        "b_empty": ("decode", "EMPTY_FILE"),
        "c_text": ("decode", "NOT_AN_IMAGE"),
        "d_small": ("decode", "TOO_SMALL"),
        "e_large": ("decode", "TOO_LARGE"),
    }


@pytest.mark.ray
def test_bad_photos_change_no_other_row(undisturbed: tuple[Path, Output], tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 24)
    expected = spoil(tmp_path / "photos")
    os.mkfifo(tmp_path / "photos" / "photo_900.jpg")
    odd = os.fsencode(tmp_path / "photos") + b"/photo_\xff.jpg"
    Path(os.fsdecode(odd)).write_bytes(b"not Unicode, no image")
    dataset = open_dataset(f"folder:{tmp_path / 'photos'}")
    output = run(dataset, tmp_path / "out", chunk_images=5)
    assert output.digest == undisturbed[1].digest
    assert rows_in(tmp_path / "out") == rows_in(undisturbed[0])
    found = quarantine_in(tmp_path / "out")
    assert {image_id: found[image_id] for image_id in expected} == expected
    assert found["photo_%FF"] == ("decode", "NOT_AN_IMAGE")
    listed = {key: value for key, value in found.items() if key.startswith("/")}
    assert {stage for stage, _ in listed.values()} == {"list"}
    assert len(listed) == 2, "the pipe and the link to a device"
    assert output.summary["quarantined"] == len(found) == len(expected) + 3


@pytest.mark.ray
def test_untrusted_photos_give_the_same_trees(undisturbed: tuple[Path, Output], tmp_path: Path) -> None:
    """Every kind of hostile photo among the good ones, decoded in children."""
    write_photos(tmp_path / "photos", 24)
    hostile = hostile_photos()
    write_all(tmp_path / "photos", hostile)
    dataset = open_dataset(f"folder:{tmp_path / 'photos'}", untrusted=True)
    output = run(dataset, tmp_path / "out", chunk_images=8, extractors=2)
    assert output.digest == undisturbed[1].digest
    assert rows_in(tmp_path / "out") == rows_in(undisturbed[0])
    twice = ("half.jpg", "half.png")  # equal stems keep their suffix
    ids = {name: name if name in twice else Path(name).stem for name in hostile}
    expected = {ids[name]: ("decode", reason.value) for name, (_, reason) in hostile.items()}
    assert quarantine_in(tmp_path / "out") == expected


@pytest.mark.ray
def test_only_bad_photos_is_an_error_that_says_so(ray_cluster: None, tmp_path: Path) -> None:
    for k in range(40):
        (tmp_path / f"{k}.jpg").write_text("hello")
    with pytest.raises(DataError, match=r"none of the 40 photos of folder.*NOT_AN_IMAGE"):
        run(open_dataset(f"folder:{tmp_path}"), tmp_path / "out")
    assert len(quarantine_in(tmp_path / "out")) == 40


@pytest.mark.ray
def test_a_computation_that_always_fails_stops_the_run(
    photos: Dataset, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(precompute.ChunkWorker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.extractor = dataclasses.replace(self.extractor, describe=None)

    monkeypatch.setattr(precompute, "ChunkWorker", Broken)
    with pytest.raises(RuntimeError, match=r"failed for every photo: photo_000: INTERNAL: .*NoneType"):
        run(photos, tmp_path)
    assert files_of(tmp_path) == {}


@pytest.mark.ray
def test_a_photo_that_kills_its_worker_is_set_aside(
    photos: Dataset, undisturbed: tuple[Path, Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With twenty copies of it: more than may be lost of other photos."""

    class Crashing(precompute.ChunkWorker):
        def decoded(self, photo: precompute.Photo) -> precompute.Decoded:
            if photo.image_id == "photo_007":
                os.kill(os.getpid(), signal.SIGKILL)  # as a decoder's segmentation fault does
            return super().decoded(photo)

    monkeypatch.setattr(precompute, "ChunkWorker", Crashing)
    monkeypatch.setattr(precompute, "RETRIES", 0)
    shutil.copytree(photos.root, tmp_path / "photos")
    for k in range(20):
        shutil.copyfile(photos.image_path("photo_007"), tmp_path / "photos" / f"photo_copy_{k}.jpg")
    output = run(open_dataset(f"folder:{tmp_path / 'photos'}"), tmp_path, chunk_images=4, extractors=1)
    lost = ["photo_007", *(f"photo_copy_{k}" for k in range(20))]
    assert quarantine_in(tmp_path) == dict.fromkeys(lost, ("worker", "INTERNAL"))
    expected = rows_in(undisturbed[0])
    del expected["photo_007"]
    assert rows_in(tmp_path) == expected
    assert output.summary["images"] == 23


@pytest.mark.ray
def test_a_storage_that_cannot_be_written_stops_the_run(photos: Dataset, ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("a file where the directory should be")
    storage, progress = Storage(str(tmp_path / "full")), Progress("trees", 24, "images")
    with pytest.raises(StorageError, match=r"cannot write trees-.*\.parquet in .*full"):
        precompute.compute_all(listed(photos), FEATURES, DataConfig(), Resources(), storage, progress)


@pytest.mark.ray
def test_a_photo_that_goes_away_is_not_lost_silently(photos: Dataset, ray_cluster: None, tmp_path: Path) -> None:
    shutil.copytree(photos.root, tmp_path / "photos")
    moved = dataclasses.replace(photos, root=tmp_path / "photos")
    moved.image_path("photo_007").unlink()
    with pytest.raises(DataError, match=r"photo_007\.\w+ is not there any more, or not on every node"):
        precompute.precompute(moved, FEATURES, DataConfig(), Resources(), Storage(str(tmp_path / "out")))
    assert not (tmp_path / "out" / precompute.QUARANTINE_FILE).exists()


@pytest.mark.ray
def test_a_rerun_computes_only_what_is_missing(
    photos: Dataset, undisturbed: tuple[Path, Output], tmp_path: Path
) -> None:
    """Damaged, deleted and torn files among whole parts, and other chunks than the first time."""
    write_all_parts(photos, tmp_path, 4)
    names = sorted(files_of(tmp_path))
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-20])
    (tmp_path / f"{TEMPORARY}0123").write_bytes(b"torn")
    kept = {name: file for name, file in files_of(tmp_path).items() if name in names[2:]}
    output = run(photos, tmp_path, chunk_images=7)
    assert output.digest == undisturbed[1].digest
    assert kept.items() <= files_of(tmp_path).items()
    assert len(output.parts) == 4 + 2
    assert rows_in(tmp_path) == rows_in(undisturbed[0])
    assert not (tmp_path / f"{TEMPORARY}0123").exists()


def test_what_is_finished_starts_nothing(photos: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when all parts are there but no manifest, nor when there is one: without Ray this would fail."""
    config = {"dataset": photos.digest()}
    stage = Stage(name="trees", version=precompute.VERSION, config=config, run=lambda _, out: run(photos, out))
    root = Storage(str(tmp_path))
    directory = Path(stage.directory(root).uri)
    write_all_parts(photos, directory, 5)
    before = files_of(directory)
    monkeypatch.setattr(precompute.cluster, "cluster", None)
    out = ensure(stage, root)
    assert read_manifest(out)["summary"]["images"] == 24
    monkeypatch.setattr(precompute, "precompute", None)
    assert ensure(stage, root) == out
    assert files_of(directory) == before
    assert verify(root).problems == []
    assert sorted(TreeReader(out).image_ids) == sorted(photos.image_ids)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As workers have; the number of threads, too, decides last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.ray
def test_a_network_goes_the_same_way(ray_cluster: None, one_thread: None, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch8_224", num_classes=0)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    config = FeaturesConfig(extractor="dino_vits8", weights=str(tmp_path / "weights.pth"))
    dataset = write_photos(tmp_path / "photos", 4)
    out = Storage(str(tmp_path / "out"))
    output = precompute.precompute(dataset, config, DataConfig(), Resources(chunk_images=3), out)
    assert output.summary["images"] == 4
    extractor = build_extractor(config)
    for image_id, row in rows_in(tmp_path / "out").items():
        image = read_image(dataset.image_path(image_id))
        tree = merge(extractor(extractor.prepare(image)[None])[0], extractor.grid(*image.shape[:2]))
        assert row["children"] == tree.children.ravel().tolist()


@pytest.mark.ray
def test_batches_change_nothing_however_they_are_formed(
    ray_cluster: None, one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos of several sizes and a broken one: in chunks, resumed in other chunks, and step by step as with GPUs."""
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), tmp_path / "weights.pth")
    batched = FeaturesConfig(extractor="dino_vits16", weights=str(tmp_path / "weights.pth"), batch_size=4)
    dataset = write_photos(tmp_path / "photos", 10)
    (tmp_path / "photos" / "photo_003_broken.jpg").write_bytes(b"no image")
    expected, extractor = {}, build_extractor(batched)
    for image_id in dataset.image_ids:
        image = read_image(dataset.image_path(image_id))
        alone = precompute.Decoded(precompute.Photo("", b""), image)
        tree = merge(precompute.describe([alone], extractor)[0])
        expected[image_id] = (tree.children.ravel().tolist(), tree.costs.tolist())
    dataset = open_dataset(f"folder:{tmp_path / 'photos'}")
    out = Storage(str(tmp_path / "out"))

    def precomputed(chunk_images: int) -> Output:
        resources = Resources(chunk_images=chunk_images, extractors=1)
        return precompute.precompute(dataset, batched, DataConfig(), resources, out)

    first = precomputed(8)
    found = rows_in(tmp_path / "out")
    assert {image_id: (row["children"], row["costs"]) for image_id, row in found.items()} == expected
    assert quarantine_in(tmp_path / "out") == {"photo_003_broken": ("decode", "NOT_AN_IMAGE")}
    large, small = sorted(first.parts, key=lambda part: -part.rows)
    kept = files_of(tmp_path / "out")[small.name]
    out.remove(large.name)
    assert precomputed(3).digest == first.digest
    assert files_of(tmp_path / "out")[small.name] == kept
    assert rows_in(tmp_path / "out") == found
    assert quarantine_in(tmp_path / "out") == {"photo_003_broken": ("decode", "NOT_AN_IMAGE")}

    class Counting(precompute.FeatureWorker):
        def __call__(self, travelling: pa.Table) -> Iterator[pa.Table]:
            (tmp_path / f"{len(travelling)}_at_once").touch()
            yield from super().__call__(travelling)

    monkeypatch.setattr(precompute, "FeatureWorker", Counting)
    chunks, pool = precompute.chunk_dataset([listed(dataset)]), ray.data.ActorPoolStrategy(size=1)
    steps = precompute.in_steps(chunks, batched, DataConfig(), Storage(str(tmp_path / "s")), 5, pool, "cpu", None)
    tally = precompute.Tally(Progress("trees", 11, "images"))
    for record in precompute.read_records(steps):
        tally.add(record)
    assert combine_digests([part.digest for part in tally.parts]) == first.digest
    assert [each.image_id for each in tally.refused] == ["photo_003_broken"]
    assert sorted(path.name for path in tmp_path.glob("*_at_once")) == ["1_at_once", "5_at_once"]


@pytest.mark.ray
def test_chunks_bring_photos_of_one_size_together(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole passes; what is left of each size, and what has no header, is mixed."""
    rng, sizes = np.random.default_rng(0), [(40, 48)] * 7 + [(39, 47)] * 2 + [(48, 40)] * 5 + [(64, 64)] * 2
    photos = []
    for k in rng.permutation(len(sizes) + 1):
        path = tmp_path / f"{k:02d}.png"
        if k < len(sizes):
            Image.fromarray(rng.integers(0, 256, (*sizes[k], 3), dtype=np.uint8)).save(path)
        else:
            path.write_bytes(b"no image")
        photos.append(precompute.Photo(path.stem, os.fsencode(path)))
    monkeypatch.setattr(precompute, "HEADERS_PER_TASK", 5)
    batched = FeaturesConfig(extractor="dino_vits8", batch_size=4)

    def cut(features: FeaturesConfig, **resources: Any) -> list[list[str]]:
        chunks = precompute.cut_into_chunks(photos, features, DataConfig(), Resources(**resources))
        assert sorted(photo for chunk in chunks for photo in chunk) == sorted(photos)
        return [[photo.image_id for photo in chunk] for chunk in chunks]

    grids = {f"{k:02d}": (-(-height // 8), -(-width // 8)) for k, (height, width) in enumerate(sizes)}
    *whole, left = cut(batched, chunk_images=10)
    assert sorted(map(len, whole)) == [4, 8]  # of the nine photos of 5x6 patches and the five of 6x5
    for chunk in whole:
        assert len({grids[image_id] for image_id in chunk}) == 1
    assert len(left) == 5
    ids = [photo.image_id for photo in photos]
    for features, resources in (
        (FeaturesConfig(extractor="dino_vits8"), {}),
        (FeaturesConfig(extractor="color_texture", batch_size=4), {}),
        (batched, {"untrusted": True}),
    ):
        assert cut(features, chunk_images=10, **resources) == [ids[:10], ids[10:]]
    assert cut(batched, chunk_images=1) == [[image_id] for image_id in ids]


@pytest.mark.ray
def test_proposals_of_another_method_go_the_same_way(photos: Dataset, ray_cluster: None, tmp_path: Path) -> None:
    """The masks are those of one process, a lost part is made again, and whole parts are kept."""
    product, out = SourceProposals("dsm", SourcesConfig()), Storage(str(tmp_path / "out"))

    def precomputed() -> Output:
        return precompute.precompute(photos, FEATURES, DataConfig(), Resources(chunk_images=7), out, product)

    first = precomputed()
    extractor = build_extractor(FEATURES)
    names = [part.name for part in first.parts if part.name.startswith("proposals-")]
    rows = {
        str(row["image_id"]): row
        for name in names
        for row in pq.read_table(pa.BufferReader(out.read_bytes(name))).to_pylist()
    }
    assert sorted(rows) == sorted(photos.image_ids)
    for image_id in photos.image_ids[:5]:
        image = read_image(photos.image_path(image_id))
        grid = extractor.grid(*image.shape[:2])
        features = extractor(extractor.prepare(image)[None])[0].reshape(*grid, -1)
        made = product.make(image_id, image.shape[:2], features, image)
        assert product.digest(made) == product.digest(rows[image_id])
    assert sum(len(row["scores"]) for row in rows.values()) > len(rows)  # several masks a photo
    kept = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in names[1:]}
    out.remove(names[0])
    assert precomputed().digest == first.digest
    assert {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in names[1:]} == kept


def test_products_of_other_settings_are_other_products() -> None:
    assert SourceProposals("dsm", SourcesConfig()) == SourceProposals("dsm", SourcesConfig())
    assert hash(SourceProposals("dsm", SourcesConfig())) == hash(SourceProposals("dsm", SourcesConfig()))
    assert SourceProposals("dsm", SourcesConfig()) != SourceProposals("tokencut", SourcesConfig())
