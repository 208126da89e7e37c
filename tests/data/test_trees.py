"""Trees as Parquet rows: round trips, damaged artifacts, and the examples of docs/reading-trees.md."""

import contextlib
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mis_platform.data.parts import read_part
from mis_platform.data.schemas import CLICKS, QUARANTINE, TREES
from mis_platform.data.trees import TreeReader, decode, rows_of, rows_to_table, tree_from_row, tree_row
from mis_platform.errors import DataError
from mis_platform.simulation.tree import MergeTree
from mis_platform.storage import Storage

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reading-trees.md"


def random_tree(grid: tuple[int, int], seed: int) -> MergeTree:
    """Any two regions may merge, neighbours or not."""
    rng = np.random.default_rng(seed)
    leaves = grid[0] * grid[1]
    roots = list(range(leaves))
    children = np.zeros((leaves - 1, 2), np.int32)
    for k in range(leaves - 1):
        children[k] = [roots.pop(rng.integers(len(roots))) for _ in range(2)]
        roots.append(leaves + k)
    return MergeTree(children, rng.exponential(size=leaves - 1).astype(np.float32), grid)


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_artifact(root: Path, parts: dict[str, bytes], rows: dict[str, int]) -> Storage:
    storage = Storage(str(root))
    entries = []
    for name, data in parts.items():
        storage.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"name": name, "rows": rows[name], "bytes": len(data), "sha256": digest, "digest": digest})
    manifest = {"stage": "trees", "fingerprint": "0" * 16, "digest": "0" * 64, "parts": entries}
    storage.write_bytes("manifest.json", json.dumps(manifest).encode())
    return storage


TREES_OF = {f"{part}/{k}": random_tree((3 + part, 4 + k), 10 * part + k) for part in range(3) for k in range(4)}


@pytest.fixture
def artifact(tmp_path: Path) -> Storage:
    """Three parts with four trees each, and a left-over file that the manifest does not name."""
    tables = {}
    for part in range(3):
        rows = [tree_row(f"{part}/{k}", (24 + part, 32 + k), TREES_OF[f"{part}/{k}"]) for k in range(4)]
        tables[f"part-{part:05d}.parquet"] = rows_to_table(rows)
    storage = write_artifact(
        tmp_path / "trees", {name: parquet(table) for name, table in tables.items()}, dict.fromkeys(tables, 4)
    )
    storage.write_bytes("part-00099.parquet", b"from an interrupted run")
    return storage


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 7), (5, 4), (28, 28)])
def test_rows_round_trip_through_parquet(grid: tuple[int, int]) -> None:
    tree = random_tree(grid, 0)
    table = pq.read_table(io.BytesIO(parquet(rows_to_table([tree_row("a", (8, 9), tree)]))))
    (row,) = rows_of(table)
    assert (row["image_id"], row["image_height"], row["image_width"]) == ("a", 8, 9)
    found = tree_from_row(row)
    assert found.grid == grid
    np.testing.assert_array_equal(found.children, tree.children)
    np.testing.assert_array_equal(found.costs, tree.costs)
    assert (found.children.dtype, found.costs.dtype) == (np.int32, np.float32)


def test_files_keep_the_schemas() -> None:
    for schema in (TREES, QUARANTINE, CLICKS):
        stored = pq.read_schema(io.BytesIO(parquet(schema.empty_table())))
        assert stored.equals(schema)
        assert not any(field.nullable for field in stored)


def test_nulls_cannot_be_written() -> None:
    row = tree_row("a", (8, 8), random_tree((2, 2), 0))
    with pytest.raises(pa.ArrowInvalid, match="null"):
        parquet(rows_to_table([row | {"image_id": None}]))


# -- reader ----------------------------------------------------------------------------------------------------------


def test_reader_follows_the_manifest(artifact: Storage) -> None:
    reader = TreeReader(artifact)
    assert reader.image_ids == tuple(TREES_OF)
    assert len(reader) == 12
    assert "2/3" in reader
    assert "9/9" not in reader
    for image_id in np.random.default_rng(0).permutation(list(TREES_OF)):
        part, k = map(int, image_id.split("/"))
        assert reader.image_size(image_id) == (24 + part, 32 + k)
        np.testing.assert_array_equal(reader.tree(image_id).children, TREES_OF[image_id].children)
    with pytest.raises(KeyError):
        reader.tree("9/9")


def test_every_part_is_read_once_if_they_fit(artifact: Storage, names_read: list[str]) -> None:
    reader = TreeReader(artifact)
    for image_id in list(TREES_OF)[::-1]:
        reader.tree(image_id)
    assert names_read == ["manifest.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    names_read.clear()
    small = TreeReader(artifact, cache_bytes=1)
    for image_id in list(TREES_OF)[::-1]:
        np.testing.assert_array_equal(small.tree(image_id).children, TREES_OF[image_id].children)
    assert names_read[4:] == ["part-00001.parquet", "part-00000.parquet"]  # the last one was still there
    assert len(small._cache) == 1


def test_the_least_recently_used_part_goes_first(artifact: Storage) -> None:
    reader = TreeReader(artifact)
    two_parts = sum(reader._table(number).nbytes for number in (1, 2))
    reader = TreeReader(artifact, cache_bytes=two_parts)
    for image_id, kept in (("1/0", {1, 2}), ("2/0", {1, 2}), ("1/1", {1, 2}), ("0/0", {0, 1}), ("1/2", {0, 1})):
        reader.tree(image_id)
        assert set(reader._cache) == kept


def test_reader_travels_to_other_processes(artifact: Storage) -> None:
    reader = pickle.loads(pickle.dumps(TreeReader(artifact)))  # noqa: S301, our own bytes
    assert reader.image_ids == tuple(TREES_OF)


def test_who_is_told_where_an_image_is_reads_that_part_only(artifact: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    place = TreeReader(artifact).place("1/2")
    names: list[str] = []
    read_bytes = Storage.read_bytes
    monkeypatch.setattr(
        Storage, "read_bytes", lambda self, name, *limit: (names.append(name), read_bytes(self, name))[1]
    )
    reader = TreeReader(artifact)
    reader.know("1/2", place)
    np.testing.assert_array_equal(reader.tree("1/2").children, TREES_OF["1/2"].children)
    assert reader.image_size("1/2") == (25, 34)
    assert names == ["manifest.json", "part-00001.parquet"]


@pytest.mark.parametrize("place", [(0, 2), (1, 1), (1, 4)])
def test_a_wrong_place_is_not_believed(artifact: Storage, place: tuple[int, int]) -> None:
    reader = TreeReader(artifact)
    reader.know("1/2", place)
    with pytest.raises(ValueError, match=rf"part-0000{place[0]}\.parquet: image '1/2' is not in row {place[1]}"):
        reader.tree("1/2")


# -- damaged artifacts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "altered or truncated"),
        (lambda path: path.write_bytes(b""), "altered or truncated"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"\x00", b"\x01", 1)), "altered or truncated"),
    ],
)
def test_a_damaged_part_is_named(artifact: Storage, damage: Callable[[Path], None], message: str) -> None:
    damage(Path(artifact.uri) / "part-00001.parquet")
    with pytest.raises(DataError, match=rf"^part part-00001\.parquet: .*{message}"):
        TreeReader(artifact).tree("0/0")


def broken(**changes: Any) -> dict[str, Any]:
    """A row for a 2x3 grid, valid but for the changes."""
    row = {
        "image_id": "a",
        "image_height": 16,
        "image_width": 24,
        "grid_height": 2,
        "grid_width": 3,
        "children": [0, 1, 2, 5, 3, 4, 6, 7, 8, 9],
        "costs": [0.5, 1.0, 2.0, 1.5, 4.0],
    }
    return row | changes


def test_the_row_that_is_broken_below_is_valid() -> None:
    tree = tree_from_row(broken())
    assert (tree.grid, tree.children.shape) == ((2, 3), (5, 2))


INVALID_TREES = {
    "a child that does not exist": broken(children=[0, 1, 2, 5, 3, 4, 6, 7, 8, 11]),
    "a negative child": broken(children=[0, 1, 2, 5, 3, 4, 6, 7, 8, -1]),
    "a child before its parent": broken(children=[0, 9, 2, 5, 3, 4, 6, 7, 8, 1]),
    "a cycle": broken(children=[0, 6, 2, 5, 3, 4, 1, 7, 8, 9]),
    "a child used twice": broken(children=[0, 1, 2, 5, 3, 4, 6, 7, 8, 8]),
    "a wrong number of leaves": broken(grid_width=4),
    "half a pair": broken(children=[0, 1, 2, 5, 3, 4, 6, 7, 8]),
    "a merge without cost": broken(costs=[0.5, 1.0, 2.0, 1.5]),
    "an infinite cost": broken(costs=[0.5, 1.0, 2.0, 1.5, np.inf]),
    "a cost that is no number": broken(costs=[0.5, np.nan, 2.0, 1.5, 4.0]),
    "a negative area": broken(grid_height=-2, grid_width=-3),
    "an empty image": broken(image_height=0),
}


@pytest.mark.parametrize("row", INVALID_TREES.values(), ids=INVALID_TREES)
def test_an_invalid_tree_is_refused_with_part_and_image(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="image 'a'"):
        tree_from_row(row)
    storage = write_artifact(tmp_path, {"p.parquet": parquet(rows_to_table([row]))}, {"p.parquet": 1})
    with pytest.raises(ValueError, match=r"part p\.parquet: image 'a': "):
        TreeReader(storage).tree("a")


def table_of(*rows: dict[str, Any]) -> pa.Table:
    return rows_to_table(rows)


def dictionary_bomb() -> pa.Table:
    """A row of 20 million equal costs: a few kilobytes of Parquet."""
    return table_of(broken(costs=np.zeros(20_000_000, np.float32)))


@pytest.mark.parametrize(
    ("data", "rows", "message"),
    [
        (lambda: parquet(table_of(broken()).drop_columns(["costs"])), 1, "columns image_id string"),
        (lambda: parquet(table_of(broken()).cast(nullable(TREES))), 1, "columns image_id string"),
        (lambda: parquet(of_version("2")), 1, "trees of version 2"),
        (lambda: parquet(of_version("x")), 1, "trees of version x"),
        (lambda: parquet(table_of(broken())), 2, "1 rows, the manifest says 2"),
        (lambda: b"PAR1 and nothing else PAR1", 1, "Parquet"),
        (lambda: b"no Parquet at all", 1, "Parquet"),
        (lambda: b"", 1, "Parquet"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: Callable[[], bytes], rows: int, message: str) -> None:
    """Their checksums agree with the manifest: a manifest can be wrong, too."""
    storage = write_artifact(tmp_path, {"p.parquet": data()}, {"p.parquet": rows})
    with pytest.raises(DataError, match=rf"^part p\.parquet: [^\n]*{message}[^\n]*$"):
        TreeReader(storage).tree("a")


def of_version(text: str) -> pa.Table:
    return table_of(broken()).replace_schema_metadata({"mis_platform.trees": text})


def nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_nullable(True) for field in schema])


def test_files_without_a_version_are_version_one(tmp_path: Path) -> None:
    data = parquet(table_of(broken()).replace_schema_metadata(None))
    tree = TreeReader(write_artifact(tmp_path, {"p.parquet": data}, {"p.parquet": 1})).tree("a")
    np.testing.assert_array_equal(tree.children.ravel(), broken()["children"])


def test_a_part_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    data = parquet(dictionary_bomb())
    assert len(data) < 100_000
    storage = write_artifact(tmp_path, {"p.parquet": data}, {"p.parquet": 1})
    part = {"name": "p.parquet", "rows": 1, "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(ValueError, match=r"p\.parquet: it unpacks to \d+ bytes"):
        read_part(storage, part, decode, max_bytes=2**26)
    with pytest.raises(ValueError, match=r"p\.parquet: larger than 1000 bytes"):
        read_part(storage, part, decode, max_bytes=1000)


@pytest.mark.parametrize("name", ["../p.parquet", "/etc/passwd", "a/../../p.parquet", "..\\p.parquet"])
def test_parts_lie_inside_their_artifact(tmp_path: Path, name: str) -> None:
    data = parquet(table_of(broken()))
    (tmp_path / "p.parquet").write_bytes(data)
    part = {"name": name, "rows": 1, "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(ValueError, match="is no name for a file"):
        read_part(Storage(str(tmp_path / "trees")), part, decode)


def test_an_image_has_one_tree(tmp_path: Path) -> None:
    data = parquet(table_of(broken()))
    storage = write_artifact(tmp_path, {"p.parquet": data, "q.parquet": data}, {"p.parquet": 1, "q.parquet": 1})
    with pytest.raises(ValueError, match=r"part q\.parquet: image 'a' was there already"):
        TreeReader(storage).tree("a")


def test_an_unfinished_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json"):
        TreeReader(Storage(str(tmp_path)))


# -- documentation ---------------------------------------------------------------------------------------------------


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)


def run_block(code: str, artifact: Storage) -> str:
    """What a code block of the document prints, with the artifact in place of its example path."""
    assert len(code.splitlines()) <= 10
    assert code.count('"artifacts/trees/FINGERPRINT"') == 1
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("artifacts/trees/FINGERPRINT", artifact.uri), {})  # our own document
    return printed.getvalue()


def test_the_document_has_two_examples() -> None:
    assert [re.findall("pyarrow|duckdb", block)[0] for block in code_blocks()] == ["pyarrow", "duckdb"]


def test_the_pyarrow_example_runs(artifact: Storage) -> None:
    tree = TREES_OF["0/0"]
    expected = str(tree.mask(tree.root - 1))
    assert run_block(code_blocks()[0], artifact) == f"0/0 {expected}\n"


def test_the_duckdb_example_runs(artifact: Storage) -> None:
    pytest.importorskip("duckdb", reason="DuckDB is not installed")
    printed = run_block(code_blocks()[1], artifact)
    best = max(TREES_OF, key=lambda image_id: TREES_OF[image_id].costs.sum())
    assert printed.index(best) == min(printed.index(name) for name in TREES_OF if name in printed)
    assert len(re.findall(r"\d/\d", printed)) == 10


def test_the_document_names_all_columns() -> None:
    text = DOCUMENT.read_text(encoding="utf8")
    assert all(f"`{name}`" in text for name in TREES.names)
