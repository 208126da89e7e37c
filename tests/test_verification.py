"""Verification finds every damage, believes nothing, and repairs only what is broken."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mis_platform import cli, pipeline, verification
from mis_platform.artifacts import MANIFEST, Output, Part, Stage, combine_digests, ensure, read_manifest, sha256
from mis_platform.config import Resources, Run, override
from mis_platform.data import parts as data_parts
from mis_platform.data.proposals import Proposals, proposal_row
from mis_platform.data.schemas import TREES
from mis_platform.data.trees import TreeReader, rows_to_table, tree_row
from mis_platform.errors import DataError
from mis_platform.simulation.ward import merge
from mis_platform.stages.precompute import write_part
from mis_platform.stages.products import TREES_PRODUCT, SourceProposals
from mis_platform.storage import Storage
from mis_platform.verification import Verdict, repair, verify


def tree_rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    trees = [merge(rng.normal(size=(4, 5, 6)).astype(np.float32)) for _ in range(count)]
    return [tree_row(f"photo {k}", (64, 80), tree) for k, tree in enumerate(trees)]


def stage_of(name: str, write: Callable[[Storage], list[Part]]) -> Stage:
    def run(inputs: dict[str, Storage], out: Storage) -> Output:
        parts = write(out)
        return Output(parts=tuple(parts), digest=combine_digests([part.digest for part in parts]))

    return Stage(name=name, version=1, config={"data": {}, "features": {}}, run=run)


def trees_in(root: Storage, rows: list[list[dict[str, Any]]]) -> Storage:
    """A finished trees artifact with a part for each list of rows."""
    return ensure(stage_of("trees", lambda out: [write_part(each, out) for each in rows]), root)


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


@pytest.fixture
def whole(root: Storage) -> Path:
    rows = tree_rows(8)
    local = trees_in(root, [rows[k : k + 2] for k in range(0, 8, 2)]).local
    assert local is not None
    return local


def names_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("trees-*.parquet"))


def found(verdict: Verdict) -> list[tuple[str, str]]:
    return [(problem.part, problem.what) for problem in verdict.problems]


def test_a_whole_root_has_no_problems(root: Storage, whole: Path) -> None:
    verdict = verify(root)
    assert (verdict.artifacts, verdict.parts, verdict.problems, verdict.notes) == (1, 4, [], [])
    assert verdict.bytes == sum((whole / name).stat().st_size for name in names_of(whole))


def test_missing_truncated_altered_and_swapped_parts_are_all_found(root: Storage, tmp_path: Path) -> None:
    rows = tree_rows(10)
    whole = trees_in(root, [rows[k : k + 2] for k in range(0, 10, 2)]).local
    assert whole is not None
    missing, truncated, altered, left, right = names_of(whole)
    (whole / missing).unlink()
    content = (whole / truncated).read_bytes()
    (whole / truncated).write_bytes(content[:-7])
    content = bytearray((whole / altered).read_bytes())
    content[len(content) // 2] ^= 1
    (whole / altered).write_bytes(content)
    os.rename(whole / left, whole / "x")
    os.rename(whole / right, whole / left)
    os.rename(whole / "x", whole / right)
    size = len((whole / truncated).read_bytes())
    assert dict(found(verify(root))) == {
        missing: "missing",
        truncated: f"{size} bytes instead of {size + 7}",
        altered: "its content was altered: another SHA-256",
        left: f"holds what belongs in {right}",
        right: f"holds what belongs in {left}",
    }


def test_any_flipped_byte_is_found(root: Storage, whole: Path) -> None:
    path, rng = whole / names_of(whole)[0], np.random.default_rng(0)
    content = path.read_bytes()
    for position in rng.integers(0, len(content), 40):
        torn = bytearray(content)
        torn[position] ^= 1 << rng.integers(8)
        path.write_bytes(torn)
        assert found(verify(root)) == [(path.name, "its content was altered: another SHA-256")]


def edited(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**row, **changes}


def with_child(row: dict[str, Any], place: int, node: int) -> dict[str, Any]:
    children = row["children"].copy()
    children[place] = node
    return edited(row, children=children)


def with_cost(row: dict[str, Any], cost: float) -> dict[str, Any]:
    costs = row["costs"].copy()
    costs[3] = cost
    return edited(row, costs=costs)


BAD_TREES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "parent out of range": (lambda row: with_child(row, 37, 39), "not nodes in 0..37"),
    "negative node": (lambda row: with_child(row, 0, -1), "not nodes in"),
    "child before parent": (lambda row: with_child(row, 0, 25), "merge 0 joins"),
    "cycle": (lambda row: with_child(row, 10, 25), "merge 5 joins"),
    "two parents": (lambda row: with_child(row, 36, int(row["children"][0])), "child of more than one merge"),
    "wrong leaf count": (lambda row: edited(row, grid_height=5), "a 5x5 grid needs"),
    "negative cost": (lambda row: with_cost(row, -1.0), "finite and not negative"),
    "NaN cost": (lambda row: with_cost(row, float("nan")), "finite and not negative"),
    "empty grid": (lambda row: edited(row, grid_height=0), "at least one"),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_trees_that_are_none_are_found_though_every_checksum_is_right(root: Storage, name: str) -> None:
    damage, message = BAD_TREES[name]
    rows = tree_rows(3)
    directory = trees_in(root, [[rows[0], damage(rows[1])], rows[2:]])
    ((_, what),) = found(verify(root))
    assert what.startswith("image 'photo 1': ")
    assert message in what
    with pytest.raises(ValueError, match=message):
        TreeReader(directory).tree("photo 1")  # and a training would not use it either


def test_an_image_in_two_parts_is_found(root: Storage) -> None:
    rows = tree_rows(3)
    trees_in(root, [rows[:2], rows[1:]])
    ((_, what),) = found(verify(root))
    assert what.startswith("image 'photo 1' is in trees-")


def raw_part(content: bytes, rows: int = 1, name: str = "trees-0000.parquet") -> Callable[[Storage], list[Part]]:
    def write(out: Storage) -> list[Part]:
        out.write_bytes(name, content)
        return [Part(name=name, rows=rows, bytes=len(content), sha256=sha256(content), digest=sha256(b""))]

    return write


def packed(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue().to_pybytes()


def test_a_version_of_the_future_is_refused(root: Storage) -> None:
    table = rows_to_table(tree_rows(1)).replace_schema_metadata({b"mis_platform.trees": b"2"})
    ensure(stage_of("trees", raw_part(packed(table))), root)
    assert found(verify(root)) == [
        ("trees-0000.parquet", "trees of version 2; this version of mis_platform reads version 1")
    ]


def test_a_part_that_unpacks_to_far_more_is_not_unpacked(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 MB of one value pack into 20 kB; the limit of a part is lowered so that the test may be small."""
    monkeypatch.setattr(verification, "MAX_PART_BYTES", 2**26)
    monkeypatch.setattr(data_parts.decode_parquet, "__defaults__", (2**26,))
    monkeypatch.setattr(verification.trees.decode, "__defaults__", (2**26,))
    values = pa.array(np.zeros(100_000_000, np.int32))
    children = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    one = {name: pa.array([1], TREES.field(name).type) for name in TREES.names[1:5]}
    columns = {"image_id": pa.array(["bomb"]), **one, "children": children, "costs": pa.array([[0.0]], TREES[6].type)}
    table = pa.table([column.cast(TREES.field(name).type) for name, column in columns.items()], schema=TREES)
    content = packed(table)
    assert len(content) < 2**16
    ensure(stage_of("trees", raw_part(content)), root)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("it was unpacked"))
    ((_, what),) = found(verify(root))
    assert what.startswith("it unpacks to 4000000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(digest="0" * 64), "do not add up"),
        (lambda it: it["config"].update(x=1), "settings were altered"),
        (lambda it: it.update(fingerprint="0" * 16), "it belongs to trees/0000"),
        (lambda it: it["parts"].append(it["parts"][0]), "a part is listed twice"),
        (lambda it: it["parts"][0].update(name="../x"), "no name for a file"),
        (lambda it: it["parts"][0].update(rows="2"), "is damaged"),
        (lambda it: it["parts"][0].update(sha256="x"), "are none"),
        (lambda it: it.update(parts={}), "is damaged"),
        (lambda it: it.pop("config"), "lacks 'config'"),
    ],
)
def test_a_manifest_that_was_altered_is_found(root: Storage, whole: Path, change: Any, message: str) -> None:
    manifest = json.loads((whole / MANIFEST).read_bytes())
    change(manifest)
    (whole / MANIFEST).write_text(json.dumps(manifest))
    ((part, what),) = found(verify(root))
    assert part == MANIFEST
    assert message in what


def test_rows_and_digests_of_a_part_are_counted_again(root: Storage, whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_bytes())
    first, second = manifest["parts"][:2]
    first["rows"] = 3
    first["digest"], second["digest"] = second["digest"], first["digest"]
    (whole / MANIFEST).write_text(json.dumps(manifest))
    assert [what for _, what in found(verify(root))] == [
        "2 rows, the manifest says 3",
        "its rows do not have the digest that the manifest says",
        "its rows do not have the digest that the manifest says",
    ]


def test_masks_that_do_not_fit_their_photo_are_found(root: Storage) -> None:
    product = SourceProposals("tokencut", Run().sources)
    masks = np.zeros((1, 4, 5), bool)
    masks[0, 1:3, 1:3] = True
    row = proposal_row("a", Proposals(masks, np.ones(1, np.float32)))
    wrong = edited(proposal_row("b", Proposals(masks, np.ones(1, np.float32))), areas=np.array([7], np.int32))
    ensure(stage_of("proposals", lambda out: [write_part([row, wrong], out, product)]), root)
    ((_, what),) = found(verify(root))
    assert what == "image 'b': mask 0 covers 4 pixels, its area says 7"


def test_unfinished_artifacts_and_old_files_without_an_owner_are_notes(root: Storage, whole: Path) -> None:
    (whole.parent / "0123456789abcdef").mkdir()
    old = time.time() - 30 * 3600
    for name, moment in (("stray.parquet", old), (".tmp-torn", old), ("young.parquet", time.time())):
        (whole / name).write_text("")
        os.utime(whole / name, (moment, moment))
    verdict = verify(root)
    assert verdict.problems == []
    notes = [(note.part, note.what) for note in verdict.notes]
    assert (".tmp-torn", "left over: no manifest names it, 30 hours old") in notes
    assert ("stray.parquet", "left over: no manifest names it, 30 hours old") in notes
    assert ("", "unfinished; the command that began it goes on from here") in notes
    assert len(notes) == 3


def test_readers_follow_the_manifest_not_the_directory(
    root: Storage, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stray part is not read, and parts that a listing hides are."""
    write_part([edited(tree_rows(1)[0], image_id="stray")], Storage(str(whole)))
    monkeypatch.setattr(Storage, "_list", lambda self: [])
    reader = TreeReader(Storage(str(whole)))
    assert len(reader) == 8
    assert "stray" not in reader
    monkeypatch.setattr(verification, "_artifacts", lambda root: [f"trees/{whole.name}"])
    assert verify(root).problems == []
    stage = dataclasses.replace(
        stage_of("checkpoint", lambda out: []), inputs={"trees": stage_of("trees", lambda o: [])}
    )
    ensure(stage, root)  # its input's sizes are asked for one by one


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_stage_does_not_begin_on_damaged_inputs(root: Storage, whole: Path, damage: str) -> None:
    path, ran = whole / names_of(whole)[1], []
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    training = Stage(
        name="checkpoint",
        version=1,
        config={},
        run=lambda inputs, out: ran.append(1),  # type: ignore[arg-type, func-returns-value]
        inputs={"trees": stage_of("trees", lambda out: [])},
    )
    with pytest.raises(DataError, match=rf"1 of 4 parts of .* damaged or missing: {path.name}; `mis verify`"):
        ensure(training, root)
    assert ran == []


def test_an_altered_model_is_not_scored_under_another_name(root: Storage, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 1)
    photos = pipeline.training_photos(override(Run(), [f"dataset=folder:{tmp_path / 'photos'}"]), None)
    model = ensure(stage_of("checkpoint", raw_part(b"weights", name="model.safetensors")), root)
    model.write_bytes("config.json", b'{"variant": "vit_xt", "image_size": 224}')
    stage = pipeline.clicks_stage(photos, Run(), Resources(), model)
    assert stage.config["model"] == sha256(b"weights")
    model.write_bytes("model.safetensors", b"Weights")
    with pytest.raises(DataError, match=r"model.safetensors was altered since its training; `mis verify`"):
        pipeline.clicks_stage(photos, Run(), Resources(), model)


# -- repair, on photos -----------------------------------------------------------------------------------------------


def write_photos(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for k in range(count):
        blobs = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(blobs).resize((56, 40), Image.Resampling.BICUBIC).save(folder / f"{k}.png")


@pytest.mark.ray
def test_repair_makes_only_the_damaged_parts_again(
    ray_cluster: None,
    root: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_photos(tmp_path / "photos", 12)
    run = override(Run(), ["features.extractor=color_texture", f"dataset=folder:{tmp_path / 'photos'}"])
    resources = Resources(chunk_images=3)
    stage = pipeline.trees_stage(pipeline.training_photos(run, None), run, resources)
    directory = ensure(stage, root).local
    assert directory is not None
    before = read_manifest(Storage(str(directory)))
    first, second, third, fourth = names_of(directory)
    kept = {name: (directory / name).stat().st_ino for name in (third, fourth)}
    (directory / first).unlink()
    (directory / second).write_bytes(b"torn")

    arguments = ["mis", "verify", "--root", root.uri]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    said = capsys.readouterr()
    assert f"trees/{directory.name}  {first}  missing" in said.out
    assert f"mis verify --repair trees/{directory.name} --dataset" in said.err

    write_photos(tmp_path / "others", 3)  # not the photos that it was made from
    monkeypatch.setattr("sys.argv", [*arguments, "--repair", "--dataset", f"folder:{tmp_path / 'others'}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert "was not made from these photos" in capsys.readouterr().err
    assert (directory / MANIFEST).exists()

    repaired = repair(root, f"trees/{directory.name}", [first, second], run, resources, None)
    assert repaired["digest"] == before["digest"]
    assert {name: (directory / name).stat().st_ino for name in kept} == kept
    assert verify(root).problems == []


def test_what_cannot_be_made_again_in_parts_is_told_with_the_command(root: Storage) -> None:
    directory = ensure(stage_of("clicks/grabcut", raw_part(b"torn", name="clicks-0.parquet")), root)
    artifact = f"clicks/grabcut/{directory.uri.rsplit('/', 1)[1]}"
    assert [problem.artifact for problem in verify(root).problems] == [artifact]
    with pytest.raises(DataError, match=r"remove .*manifest.json and run .*`mis eval --dataset grabcut"):
        repair(root, artifact, ["clicks-0.parquet"], Run(), Resources(), None)


def test_a_name_that_fits_no_artifact_is_answered_with_those_there_are(root: Storage, whole: Path) -> None:
    with pytest.raises(DataError, match=f"'trees/x'; there are: trees/{whole.name}"):
        verify(root, ["trees/x"])
    assert verify(root, [f"trees/{whole.name[:4]}"]).parts == 4
    assert TREES_PRODUCT.name == "trees"
