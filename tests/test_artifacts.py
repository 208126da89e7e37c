"""Stages: what is done stays done, what is missing is made once, and other settings are another artifact."""

import contextlib
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_platform import artifacts
from mis_platform.artifacts import (
    MANIFEST,
    FingerprintMismatch,
    Output,
    Part,
    Stage,
    check_missing,
    code_of,
    combine_digests,
    ensure,
    read_manifest,
    sha256,
    walk,
)
from mis_platform.config import SamplingConfig, fingerprint
from mis_platform.errors import DataError
from mis_platform.leases import hold
from mis_platform.storage import Storage, StorageError


def counting_stage(name: str, calls: list[str], config: Any = None, **inputs: Stage) -> Stage:
    """A stage that writes one file with the names of what it read."""

    def run(found: dict[str, Storage], out: Storage) -> Output:
        calls.append(name)
        data = "+".join(sorted(str(storage.read_bytes("content"), "utf8") for storage in found.values())) + name
        out.write_bytes("content", data.encode())
        digest = sha256(data.encode())
        part = Part(name="content", rows=1, bytes=len(data), sha256=digest, digest=digest)
        return Output(parts=(part,), digest=digest, summary={"letters": len(data)})

    return Stage(name=name, version=1, config=config or {}, run=run, inputs=inputs)


def test_what_is_missing_runs_once_inputs_first(tmp_path: Path) -> None:
    root, calls = Storage(str(tmp_path)), []  # type: tuple[Storage, list[str]]
    trees = counting_stage("trees", calls)
    left = counting_stage("left", calls, trees=trees)
    right = counting_stage("right", calls, trees=trees)
    table = counting_stage("table", calls, left=left, right=right)
    out = ensure(table, root)
    assert calls[0] == "trees"
    assert sorted(calls) == ["left", "right", "table", "trees"]
    assert out.read_bytes("content") == b"treesleft+treesrighttable"
    assert ensure(table, root) == out
    assert len(calls) == 4
    assert [stage.name for stage in walk(table)] == ["trees", "left", "right", "table"]


def test_a_root_holds_to_the_weights_that_it_was_begun_with(tmp_path: Path) -> None:
    """Those of the hub, where a file may be exchanged without a word."""

    def stage(weights: bytes) -> Stage:
        digest = sha256(weights)
        made = counting_stage("trees", calls, config={"weights": digest})
        return dataclasses.replace(made, downloads={"timm/x/model.safetensors": digest})

    calls: list[str] = []
    root, one, other = Storage(str(tmp_path / "root")), stage(b"1"), stage(b"2")
    check_missing(one, root)  # that alone is no use of it
    check_missing(other, root)
    begun = ensure(one, root)
    for refused in (check_missing, ensure):
        with pytest.raises(DataError, match=f"has the SHA-256 {sha256(b'2')} here, and {sha256(b'1')} when") as told:
            refused(other, root)
        assert "\n" not in str(told.value)
    assert not other.directory(root).names()
    assert ensure(stage(b"1"), root) == begun
    ensure(other, Storage(str(tmp_path / "another")))  # begins with what there is now
    root.child("downloads").remove("timm--x--model.safetensors.sha256")
    ensure(other, root)
    assert calls == ["trees"] * 3


def test_a_finished_stage_does_not_need_its_inputs(tmp_path: Path) -> None:
    root, calls = Storage(str(tmp_path)), []  # type: tuple[Storage, list[str]]
    trees = counting_stage("trees", calls)
    model = counting_stage("model", calls, trees=trees)
    ensure(model, root)
    root.remove("trees")
    ensure(model, root)
    assert calls == ["trees", "model"]


def test_a_failed_stage_leaves_no_manifest_and_keeps_its_files(tmp_path: Path) -> None:
    def fail(inputs: dict[str, Storage], out: Storage) -> Output:
        out.write_bytes("part", b"1")
        raise RuntimeError("no")

    root = Storage(str(tmp_path))
    stage = Stage(name="trees", version=1, config={}, run=fail)
    with pytest.raises(RuntimeError):
        ensure(stage, root)
    assert not stage.is_done(root)
    assert stage.directory(root).read_bytes("part") == b"1"
    ensure(counting_stage("trees", []), root)  # the same identity: nothing holds the lock any more
    assert stage.is_done(root)


def test_two_processes_do_not_work_on_one_artifact(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    stage = counting_stage("trees", [])
    with hold(stage.directory(root)), pytest.raises(StorageError, match="another mis process"):
        ensure(stage, root)
    assert not stage.is_done(root)


def test_the_manifest_tells_what_was_made_and_how(tmp_path: Path) -> None:
    stage = counting_stage("trees", [], config=SamplingConfig(alpha=0.5))
    manifest = read_manifest(ensure(stage, Storage(str(tmp_path))))
    assert manifest["fingerprint"] == stage.fingerprint == fingerprint(stage.identity())
    assert manifest["config"]["alpha"] == 0.5
    assert manifest["parts"] == [
        {"name": "content", "rows": 1, "bytes": 5, "sha256": sha256(b"trees"), "digest": sha256(b"trees")}
    ]
    assert manifest["summary"] == {"letters": 5}
    assert {"created", "seconds", "packages", "git_commit"} <= manifest["information"].keys()


def test_all_the_code_that_worked_on_an_artifact_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only that which finished it: a training may be resumed by another commit."""
    monkeypatch.setattr(artifacts, "versions", artifacts.versions.__wrapped__)
    good, attempts = counting_stage("trees", []), iter("aabac")

    def run(found: dict[str, Storage], out: Storage) -> Output:
        if commit != "c":
            raise RuntimeError("killed")
        return good.run(found, out)

    stage = dataclasses.replace(good, run=run)
    for commit in attempts:
        monkeypatch.setattr(artifacts, "git_commit", lambda commit=commit: commit)
        with pytest.raises(RuntimeError) if commit != "c" else contextlib.nullcontext():
            ensure(stage, Storage(str(tmp_path)))
    information = read_manifest(stage.directory(Storage(str(tmp_path))))["information"]
    assert information["git_commit"] == "c"
    assert code_of(information) == ["a", "b", "a", "c"]
    alone = counting_stage("trees", [], config={"seed": 1})
    assert code_of(read_manifest(ensure(alone, Storage(str(tmp_path))))["information"]) == ["c"]
    assert code_of({"packages": {"mis-platform": "1.0"}, "git_commit": None}) == ["version 1.0"]


def test_only_settings_version_and_inputs_decide_the_address() -> None:
    def address(config: Any = None, version: int = 1, **inputs: Stage) -> str:
        return Stage(name="s", version=version, config=config or {}, run=lambda i, o: None, inputs=inputs).fingerprint  # type: ignore[arg-type, return-value]

    trees, other = counting_stage("trees", []), counting_stage("trees", [], config={"seed": 1})
    assert address({"a": 1, "b": 2}) == address({"b": 2, "a": 1})
    assert address(trees=trees) == address(trees=counting_stage("trees", []))
    distinct = [
        address(),
        address({"a": 1}),
        address({"a": 1.5}),
        address(version=2),
        address(trees=trees),
        address(trees=other),
        address(photos=trees),
    ]
    assert len(set(distinct)) == len(distinct)


def test_an_artifact_of_other_settings_is_refused_with_the_difference(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    stage = counting_stage("trees", [], config={"alpha": 0.9})
    out = ensure(stage, root)
    manifest = json.loads(out.read_bytes(MANIFEST))
    manifest["config"]["alpha"] = 0.5
    out.write_bytes(MANIFEST, json.dumps(manifest).encode())
    with pytest.raises(FingerprintMismatch, match=r"config\.alpha: 0\.5 -> 0\.9"):
        ensure(stage, root)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"stage": 1}', b"\xff\xfe", b"[" * 200_000])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    stage = counting_stage("trees", [])
    out = stage.directory(Storage(str(tmp_path)))
    out.write_bytes(MANIFEST, content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ensure(stage, Storage(str(tmp_path)))


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing or unfinished"):
        read_manifest(Storage(str(tmp_path)))


@given(st.lists(st.binary(max_size=4), max_size=12), st.integers(0, 12), st.randoms())
def test_digests_do_not_depend_on_order_and_grouping(contents: list[bytes], cut: int, rng: random.Random) -> None:
    digests = [sha256(content) for content in contents]
    whole = combine_digests(digests)
    assert combine_digests(rng.sample(digests, len(digests))) == whole
    assert combine_digests([combine_digests(digests[:cut]), combine_digests(digests[cut:])]) == whole
    assert len(whole) == 64


def test_digests_differ_when_a_row_is_missing_doubled_or_changed() -> None:
    rows = [sha256(bytes([k])) for k in range(5)]
    variants = [rows, rows[:-1], [*rows, rows[0]], [*rows[:-1], sha256(b"other")]]
    assert len({combine_digests(variant) for variant in variants}) == len(variants)
