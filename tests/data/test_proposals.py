"""Masks as Parquet rows: run lengths, round trips, damaged artifacts, overlap with objects."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mis_platform.data.proposals import (
    ProposalReader,
    Proposals,
    best_overlap_of_masks,
    decode_mask,
    encode_mask,
    proposal_row,
    row_digest,
    rows_to_table,
)
from mis_platform.data.schemas import PROPOSALS
from mis_platform.simulation.proposals import best_overlap, mask_at_image_size
from mis_platform.simulation.ward import merge
from mis_platform.stages.products import SourceProposals
from mis_platform.storage import Storage

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


def random_proposals(count: int, height: int, width: int, seed: int) -> Proposals:
    rng = np.random.default_rng(seed)
    return Proposals(rng.random((count, height, width)) > 0.7, rng.random(count, np.float32))


# -- run lengths -----------------------------------------------------------------------------------------------------


def naive_runs(mask: np.ndarray) -> list[int]:
    """Column by column, one pixel at a time; zeros begin."""
    runs, value = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != value:
                runs.append(0)
                value = not value
            runs[-1] += 1
    return runs


@given(MASKS)
def test_runs_are_those_of_a_naive_version(mask: np.ndarray) -> None:
    runs = encode_mask(mask)
    assert runs.dtype == np.int32
    assert runs.tolist() == naive_runs(mask)
    found = decode_mask(runs, *mask.shape)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, mask)


def test_runs_of_a_known_mask() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert encode_mask(mask).tolist() == [2, 1, 1, 2]
    assert encode_mask(~mask).tolist() == [0, 2, 1, 1, 2]
    assert encode_mask(np.zeros((2, 3), bool)).tolist() == [6]
    assert encode_mask(np.ones((2, 3), bool)).tolist() == [0, 6]


@pytest.mark.parametrize(
    ("runs", "message"), [([5], "5 pixels together"), ([7], "7 pixels"), ([7, -1], "a run of -1"), ([], "0 pixels")]
)
def test_runs_that_make_no_mask(runs: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_mask(np.array(runs, np.int32), 2, 3)


# -- rows ------------------------------------------------------------------------------------------------------------


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def stored(table: pa.Table) -> pa.Table:
    """As precompute writes it."""
    encoding = SourceProposals.encoding
    return pq.read_table(io.BytesIO(parquet(table, use_dictionary=False, column_encoding=dict(encoding))))


def test_rows_round_trip_through_parquet() -> None:
    proposals = random_proposals(3, 7, 9, 0)
    table = stored(rows_to_table([proposal_row("a", proposals), proposal_row("b", random_proposals(0, 4, 5, 0))]))
    assert table.schema.equals(PROPOSALS)
    row, empty = table.to_pylist()
    assert (row["image_id"], row["image_height"], row["image_width"]) == ("a", 7, 9)
    assert row["masks"] == [naive_runs(mask) for mask in proposals.masks]
    assert row["areas"] == [int(mask.sum()) for mask in proposals.masks]
    np.testing.assert_array_equal(np.float32(row["scores"]), proposals.scores)
    assert (empty["image_height"], empty["masks"], empty["areas"], empty["scores"]) == (4, [], [], [])


def test_digest_does_not_depend_on_how_a_row_is_held() -> None:
    row = proposal_row("a", random_proposals(3, 7, 9, 0))
    (read,) = stored(rows_to_table([row])).to_pylist()
    assert row_digest(read) == row_digest(row)
    assert len(row_digest(row)) == 64


def test_digest_tells_rows_apart() -> None:
    row = proposal_row("a", random_proposals(2, 4, 4, 0))
    runs = [each.tolist() for each in row["masks"]]
    joined = [runs[0] + runs[1][:1], runs[1][1:]]  # the same numbers, cut elsewhere
    others = [
        row | {"image_id": "b"},
        row | {"image_height": 2, "image_width": 8},
        row | {"scores": row["scores"] + np.float32(1e-6)},
        row | {"areas": row["areas"] + 1},
        row | {"masks": runs[::-1]},
        row | {"masks": joined},
    ]
    assert len({row_digest(each) for each in [row, *others]}) == 7


# -- overlap ---------------------------------------------------------------------------------------------------------


def naive_overlap(masks: np.ndarray, target: np.ndarray) -> tuple[float, int]:
    best, number = 0.0, 0
    for k, mask in enumerate(masks):
        inside = union = 0
        for pixel, value in zip(mask.ravel(), target.ravel(), strict=True):
            if value != -1:
                inside += bool(pixel) and value == 1
                union += bool(pixel) or value == 1
        iou = inside / union if union else 0.0
        if iou > best:
            best, number = iou, k
    return best, number


@settings(max_examples=50)
@given(st.data())
def test_best_overlap_against_loops(data: st.DataObject) -> None:
    height, width, count = (data.draw(st.integers(1, 6)) for _ in range(3))
    masks = data.draw(arrays(bool, (count, height, width)))
    target = data.draw(arrays(np.int8, (height, width), elements=st.integers(-1, 1)))
    iou, number = best_overlap_of_masks(masks, target)
    assert (iou, number) == pytest.approx(naive_overlap(masks, target))


def test_no_masks_and_objects_without_pixels() -> None:
    assert best_overlap_of_masks(np.zeros((0, 4, 5), bool), np.ones((4, 5), np.int8)) == (0.0, -1)
    for value in (0, -1):
        assert best_overlap_of_masks(np.ones((2, 4, 5), bool), np.full((4, 5), value, np.int8)) == (0.0, 0)


def test_overlap_is_that_of_trees() -> None:
    """The nodes of a tree drawn as masks: the same IoU and the same node."""
    rng = np.random.default_rng(0)
    tree = merge(rng.random((4, 5, 3), np.float32))
    below = [np.eye(20, dtype=bool)[k] for k in range(20)]
    for first, second in tree.children:
        below.append(below[first] | below[second])
    masks = np.stack([mask_at_image_size(each.reshape(4, 5), 33, 38) for each in below])
    for seed in range(5):
        target = np.random.default_rng(seed).integers(-1, 2, (33, 38)).astype(np.int8)
        target[:, 20:] = np.where(target[:, 20:] == 1, 0, target[:, 20:])
        iou, node = best_overlap_of_masks(masks, target)
        expected, expected_node = best_overlap(tree, target)
        assert iou == pytest.approx(expected)
        assert node == expected_node


# -- reader ----------------------------------------------------------------------------------------------------------

ALL = {f"{part}/{k}": random_proposals(k, 5 + part, 6 + k, 10 * part + k) for part in range(3) for k in range(4)}


def write_artifact(root: Path, parts: dict[str, bytes], rows: dict[str, int]) -> Storage:
    storage = Storage(str(root))
    entries = []
    for name, data in parts.items():
        storage.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"name": name, "rows": rows[name], "bytes": len(data), "sha256": digest, "digest": digest})
    manifest = {"stage": "proposals", "fingerprint": "0" * 16, "digest": "0" * 64, "parts": entries}
    storage.write_bytes("manifest.json", json.dumps(manifest).encode())
    return storage


@pytest.fixture
def artifact(tmp_path: Path) -> Storage:
    """Three parts of four photos with 0, 1, 2 and 3 masks."""
    tables = {
        f"proposals-{part}.parquet": rows_to_table(proposal_row(f"{part}/{k}", ALL[f"{part}/{k}"]) for k in range(4))
        for part in range(3)
    }
    return write_artifact(tmp_path, {name: parquet(table) for name, table in tables.items()}, dict.fromkeys(tables, 4))


def one_row(root: Path, row: dict[str, Any]) -> ProposalReader:
    return ProposalReader(write_artifact(root, {"p.parquet": parquet(rows_to_table([row]))}, {"p.parquet": 1}))


@pytest.mark.parametrize("cache_bytes", [1, 2**20])
def test_reader_finds_every_photo(artifact: Storage, cache_bytes: int) -> None:
    reader = ProposalReader(artifact, cache_bytes)
    assert reader.image_ids == tuple(ALL)
    assert len(reader) == 12
    assert "2/3" in reader
    assert "9/9" not in reader
    for image_id in np.random.default_rng(0).permutation(list(ALL)):
        expected = ALL[image_id]
        assert reader.image_size(image_id) == expected.masks.shape[1:]
        assert reader.count(image_id) == len(expected.masks)
        np.testing.assert_array_equal(reader.masks(image_id), expected.masks)
        np.testing.assert_array_equal(reader.scores(image_id), expected.scores)
        for k, mask in enumerate(expected.masks):
            np.testing.assert_array_equal(reader.mask(image_id, k), mask)
            assert reader.mask(image_id, k).dtype == bool
    assert reader.masks("0/0").shape == (0, 5, 6)
    with pytest.raises(KeyError):
        reader.masks("9/9")


def test_parts_are_read_once_if_they_fit(artifact: Storage, names_read: list[str]) -> None:
    reader = ProposalReader(artifact)
    for image_id in list(ALL)[::-1]:
        reader.masks(image_id)
    assert names_read == ["manifest.json", *(f"proposals-{part}.parquet" for part in range(3))]
    small = ProposalReader(artifact, cache_bytes=1)
    assert small.count("0/1") == 1
    assert len(small._cache) == 1


def test_reader_travels_to_other_processes(artifact: Storage) -> None:
    reader = pickle.loads(pickle.dumps(ProposalReader(artifact, 5)))  # noqa: S301, our own bytes
    assert reader.image_ids == tuple(ALL)
    assert reader.cache_bytes == 5


# -- damaged artifacts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_altered_parts_are_noticed(artifact: Storage, damage: Any) -> None:
    artifact.write_bytes("proposals-1.parquet", damage(artifact.read_bytes("proposals-1.parquet")))
    with pytest.raises(ValueError, match=r"part proposals-1.parquet: the file was altered"):
        len(ProposalReader(artifact))


def test_missing_parts_and_manifests_are_noticed(artifact: Storage, tmp_path: Path) -> None:
    artifact.remove("proposals-2.parquet")
    with pytest.raises(ValueError, match=r"part proposals-2.parquet: it is missing"):
        len(ProposalReader(artifact))
    with pytest.raises(ValueError):
        ProposalReader(Storage(str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("name", "data", "rows", "message"),
    [
        ("a.parquet", b"no parquet", 1, "part a.parquet"),
        ("a.parquet", parquet(pa.table({"image_id": ["a"]})), 1, "columns image_id string where"),
        ("a.parquet", parquet(PROPOSALS.empty_table()), 1, "0 rows, the manifest says 1"),
    ],
)
def test_parts_that_hold_something_else(tmp_path: Path, name: str, data: bytes, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        len(ProposalReader(write_artifact(tmp_path, {name: data}, {name: rows})))


def test_parts_outside_the_artifact_are_not_read(tmp_path: Path) -> None:
    data = parquet(rows_to_table([proposal_row("a", ALL["0/1"])]))
    storage = write_artifact(tmp_path / "in", {"p.parquet": data}, {"p.parquet": 1})
    (tmp_path / "p.parquet").write_bytes(data)
    manifest = json.loads(storage.read_bytes("manifest.json"))
    manifest["parts"][0]["name"] = "../p.parquet"
    storage.write_bytes("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ValueError, match="is no name for a file"):
        len(ProposalReader(storage))


def test_a_photo_in_two_parts_is_refused(tmp_path: Path) -> None:
    data = parquet(rows_to_table([proposal_row("a", ALL["0/1"])]))
    storage = write_artifact(tmp_path, {"p.parquet": data, "q.parquet": data}, {"p.parquet": 1, "q.parquet": 1})
    with pytest.raises(ValueError, match=r"part q.parquet: image 'a' was there already"):
        len(ProposalReader(storage))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": [[3, 3], [0, 5]]}, "mask 1: runs of 5 pixels together, a mask of 2x3 has 6"),
        ({"masks": [[3, 3], [8, -2]]}, "mask 1: a run of -2"),
        ({"masks": [[3, 3], []]}, "mask 1: runs of 0"),
        ({"areas": [3, 4]}, "mask 1: it covers 6 pixels, its area says 4"),
        ({"areas": [3]}, "2 masks, 1 areas, 2 scores"),
        ({"scores": [1.0]}, "2 masks, 2 areas, 1 scores"),
        ({"image_width": 4}, "a mask of 2x4 has 8"),
    ],
)
def test_rows_that_hold_no_masks(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"image_id": "a", "image_height": 2, "image_width": 3, "scores": [1.0, 0.5], "areas": [3, 6]}
    row["masks"] = [[3, 3], [0, 6]]
    assert one_row(tmp_path / "good", row).masks("a").sum() == 9
    reader = one_row(tmp_path / "bad", row | change)
    with pytest.raises(ValueError, match=f"part p.parquet: image 'a': .*{message}"):
        reader.masks("a")
    with pytest.raises(ValueError, match=message):
        reader.mask("a", 1)
