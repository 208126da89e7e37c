"""Storage on S3 (a local server) through a proxy that fails as object stores do, and the whole chain on it."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from s3_server import CREDENTIALS, Faults, faulty, s3_server, uri
from training_material import tiny_run

from mis_platform import storage as storage_module
from mis_platform.artifacts import MANIFEST, Output, Stage, combine_digests, ensure, read_manifest
from mis_platform.data import synthetic
from mis_platform.data.trees import TreeReader, tree_row
from mis_platform.evaluation.predictor import Predictor
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import save_model
from mis_platform.simulation.ward import merge
from mis_platform.stages import training_loop
from mis_platform.stages.precompute import finished_parts, write_part
from mis_platform.stages.training_loop import Learner, Schedule, complete_steps, load_checkpoint_model, save_checkpoint
from mis_platform.storage import TEMPORARY, Storage, StorageError
from mis_platform.tracking import tracking_uri
from mis_platform.verification import verify


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as address:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield address


@pytest.mark.parametrize("name", ["a.bin", "Größe 1.txt", "a%2eb", "x#y?z.json", "-rf", "🌳", "a+b&c=d", "%2e%2e"])
def test_bytes_come_back_under_any_name(server: str, name: str) -> None:
    for storage in (Storage(uri(server, "names")), Storage(uri(server, "names")).child(f"in {name}")):
        storage.write_bytes(name, b"\0\1payload")
        assert storage.read_bytes(name) == b"\0\1payload"
        assert name in storage.names()
        assert storage.sizes([name, "none"]) == {name: 9, "none": None}
    Storage(uri(server, "names")).remove(name)
    assert not Storage(uri(server, "names")).exists(name)


def test_missing_things_and_unfinished_writes(server: str) -> None:
    storage = Storage(uri(server, "nothing"))
    assert storage.names() == []
    assert not storage.exists("a")
    storage.remove("a")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a")
    storage.write_bytes(f"{TEMPORARY}x", b"torn")
    storage.write_bytes("a", b"1" * 100)
    assert storage.names() == ["a"]
    storage.remove_unfinished()
    assert set(storage.files()) == {"a"}
    with pytest.raises(ValueError, match="larger than 99 bytes"):
        storage.read_bytes("a", max_bytes=99)
    storage.check_writable()
    with storage.on_disk(["a"]) as folder:
        assert (folder / "a").read_bytes() == b"1" * 100


@pytest.mark.parametrize("fault", ["unavailable", "dropped", "forgotten"])
def test_a_store_that_fails_often_is_asked_again(server: str, fault: str) -> None:
    faults = Faults(**{fault: 0.3}, seed=1)
    with faulty(server, faults) as address:
        storage = Storage(uri(address, fault))
        for k in range(5):
            storage.write_bytes(f"{k}", bytes([k]) * 1000)
        for k in range(5):
            assert storage.read_bytes(f"{k}") == bytes([k]) * 1000
        storage.remove("4")
        assert storage.names() == ["0", "1", "2", "3"]
    assert faults.seen[fault] > 0


def test_a_large_object_arrives_whole_or_not_at_all(server: str) -> None:
    """Over 10 MB pyarrow sends parts; it is one object when the last request is done."""
    faults = Faults(unavailable=0.2, seed=3)
    content = os.urandom(24_000_000)
    with faulty(server, faults) as address:
        Storage(uri(address, "large")).write_bytes("a", content)
    assert Storage(uri(server, "large")).read_bytes("a") == content
    with faulty(server, Faults()) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_module, "ATTEMPTS", 1)
        storage = Storage(uri(address, "large"))
        storage._target  # noqa: B018 - opened while the store is well
    with pytest.raises(StorageError, match="cannot write b in"):
        storage.write_bytes("b", content)
    assert Storage(uri(server, "large")).names() == ["a"]


def test_a_slow_store_is_waited_for_and_a_silent_one_is_not(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(server, Faults(slow=1.0, delay=1.5)) as address:
        Storage(uri(address, "slow")).write_bytes("a", b"1")
    assert Storage(uri(server, "slow")).read_bytes("a") == b"1"
    monkeypatch.setattr(storage_module, "ATTEMPTS", 1)
    monkeypatch.setattr(storage_module, "ANSWER_SECONDS", 1.0)
    began = time.monotonic()
    with faulty(server, Faults(slow=1.0, delay=20.0)) as address, pytest.raises(StorageError, match="cannot write a"):
        Storage(uri(address, "slow")).write_bytes("a", b"1")
    assert time.monotonic() - began < 15


def test_a_store_that_stays_down_is_told_in_one_line(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 3)
    faults = Faults(is_down=True)
    with faulty(server, faults) as address:
        storage = Storage(uri(address, "down"))
        with pytest.raises(StorageError, match=r"cannot write a in s3://bucket/down.*SLOW_DOWN") as error:
            storage.write_bytes("a", b"1")
        assert "\n" not in str(error.value)
        assert faults.seen["requests"] == 3
        for use in (lambda: storage.read_bytes("a"), storage.names, lambda: storage.exists("a")):
            with pytest.raises(StorageError):
                use()


def test_a_root_that_cannot_be_written_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "QUICK_ATTEMPTS", 2)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(ValueError, match="choose another --root"):
        Storage(uri("127.0.0.1:1")).check_writable()
    assert time.monotonic() - began < 20


def test_a_listing_that_is_late_hides_nothing_that_is_asked_for_by_name(server: str) -> None:
    Storage(uri(server, "late")).write_bytes("old", b"1")
    with faulty(server, Faults(listing_lag=30.0)) as address:
        storage = Storage(uri(address, "late"))
        storage.write_bytes("a", b"12")
        assert storage.names() == ["old"]  # the listing lies
        assert storage.exists("a")
        assert storage.read_bytes("a") == b"12"
        assert storage.sizes(["a", "b"]) == {"a": 2, "b": None}


def test_mlflow_on_an_object_store_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"cannot keep its SQLite file on s3://bucket.*set MLFLOW_TRACKING_URI"):
        tracking_uri(Storage("s3://bucket/x?region=us-east-1"))


def test_a_model_on_an_object_store_answers_clicks(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its address, and by its fingerprint where the root is one."""
    model = SimpleClick("vit_xt", 224).eval()
    save_model(tmp_path, model, {})
    root = Storage(uri(server, "clicked"))
    directory = root.child("checkpoint", "0123456789abcdef")
    for path in tmp_path.iterdir():
        directory.write_bytes(path.name, path.read_bytes())
    directory.write_bytes(MANIFEST, b"{}")
    monkeypatch.setenv("MIS_ROOT", root.uri)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    answers = []
    for name in (tmp_path, directory.uri, "0123"):
        predictor = Predictor.from_pretrained(name)
        predictor.set_image(image)
        answers.append(predictor.click(y=12, x=30).probability)
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])


def test_artifacts_and_checkpoints_on_a_bad_store_are_what_they_are_on_a_disk(server: str, tmp_path: Path) -> None:
    """Without Ray: parts, manifests, resuming, the tree reader, verification, training checkpoints."""
    rng = np.random.default_rng(0)
    trees = [merge(rng.normal(size=(4, 5, 6)).astype(np.float32)) for _ in range(4)]
    rows = [tree_row(f"photo {k}", (64, 80), tree) for k, tree in enumerate(trees)]

    def run(inputs: dict[str, Storage], out: Storage) -> Output:
        parts = [write_part(rows[k : k + 2], out) for k in (0, 2)]
        assert {each.part for each in finished_parts(out, [row["image_id"] for row in rows])} == set(parts)
        return Output(parts=tuple(parts), digest=combine_digests([part.digest for part in parts]))

    stage = Stage(name="trees", version=1, config={}, run=run)
    settings = tiny_run()
    model = training_loop.initial_model(settings)
    optimizer = training_loop.optimizer_of(model, settings.train)
    learner = Learner(settings, Schedule(4, settings.train), model, model, optimizer, torch.device("cpu"), 1)
    faults = Faults(unavailable=0.1, dropped=0.05, forgotten=0.05, seed=5)
    with faulty(server, faults) as address:
        root = Storage(uri(address, "artifacts"))
        directory = ensure(stage, root)
        local = ensure(stage, Storage(str(tmp_path)))
        assert read_manifest(directory)["parts"] == read_manifest(local)["parts"]
        assert TreeReader(directory).tree("photo 3").children.tolist() == trees[3].children.tolist()
        assert verify(root).problems == []
        out = root.child("checkpoint", "0123456789abcdef")
        for step in (1, 2, 3):
            save_checkpoint(out, step, learner, [{"step": step}])
        assert complete_steps(out) == [2, 3]
        saved = load_checkpoint_model(out, 3).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert sum(faults.seen[name] for name in ("unavailable", "dropped", "forgotten")) > 3


# -- the whole chain -------------------------------------------------------------------------------------------------

CHAIN = """
    import json, sys
    from mis_platform import cli
    from mis_platform.stages.cluster import cluster

    codes = []

    def mis(*words):
        sys.argv = ["mis", *words]
        try:
            cli.main()
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code or 0)

    root, photos, benchmark, *tiny = sys.argv[1:]
    at = ["--root", root]
    with cluster():
        mis("precompute", "--dataset", photos, *at, *tiny)
        mis("train", "--dataset", photos, *at, *tiny)
        mis("eval", "--dataset", benchmark, *at, *tiny)
        mis("eval", "--dataset", benchmark, "--model", "latest", *at, *tiny)
    mis("verify", *at)
    print("CODES", json.dumps(codes))
    """
TINY = [
    *("--set", "features.extractor=color_texture", "--set", "resources.chunk_images=2"),
    *("--set", "model.variant=vit_xt", "--set", "model.init=random", "--set", "model.image_size=224"),
    *("--set", "eval.zoom_size=224", "--set", "eval.max_clicks=2", "--set", "resources.checkpoint_every=1"),
    *("--set", "train.batch_size=2", "--set", "train.max_steps=2", "--set", "resources.log_every=1"),
]


def run_chain(folder: Path, root: str) -> list[int]:
    photos, benchmark = f"folder:{folder / 'photos'}", f"synthetic:{folder / 'benchmark'}"
    command = [sys.executable, "-c", textwrap.dedent(CHAIN), root, photos, benchmark, *TINY]
    environment = {**os.environ, **CREDENTIALS, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420)
    last = [line for line in done.stdout.splitlines() if line.startswith("CODES")]
    assert last, done.stdout[-3000:] + done.stderr[-3000:]
    codes = json.loads(last[0].removeprefix("CODES"))
    assert codes == [0] * 5, done.stdout[-3000:] + done.stderr[-3000:]
    return codes


def digests(root: Storage) -> dict[str, str]:
    found = {}
    for kind in ("trees", "checkpoint", "clicks/synthetic"):
        shelf = root.child(*kind.split("/"))
        for name in shelf.names():
            found[f"{kind}/{name}"] = read_manifest(shelf.child(name))["digest"]
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_chain_on_a_bad_object_store_makes_what_it_makes_on_a_disk(server: str, tmp_path: Path) -> None:
    synthetic.write_photos(tmp_path / "photos", 6)
    synthetic.write_benchmark(tmp_path / "benchmark", 2)
    run_chain(tmp_path, str(tmp_path / "root"))
    faults = Faults(unavailable=0.15, dropped=0.05, forgotten=0.05, slow=0.05, delay=1.0, listing_lag=2.0)
    with faulty(server, faults) as address:
        run_chain(tmp_path, uri(address, "chain"))
    there = digests(Storage(uri(server, "chain")))
    assert len(there) == 3
    assert there == digests(Storage(str(tmp_path / "root")))
    assert min(faults.seen[name] for name in ("unavailable", "dropped", "forgotten", "slow")) > 0
