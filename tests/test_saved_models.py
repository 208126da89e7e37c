"""Which directory a name stands for, on real artifacts and a real MLflow store."""

import json
from pathlib import Path

import pytest

from mis_platform import tracking
from mis_platform.artifacts import MANIFEST, Output, Stage, ensure
from mis_platform.errors import DataError
from mis_platform.model.weights import WEIGHTS_FILE
from mis_platform.saved_models import find_model
from mis_platform.storage import Storage


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def training(root: Storage, seed: int, created: str = "2026-01-01T00:00:00Z") -> Storage:
    """A finished training that says when it was made."""

    def run(inputs: dict[str, Storage], out: Storage) -> Output:
        out.write_bytes(WEIGHTS_FILE, b"weights")
        return Output(parts=(), digest="0" * 64)

    directory = ensure(Stage(name="checkpoint", version=1, config={"seed": seed}, run=run), root)
    manifest = json.loads(directory.read_bytes(MANIFEST))
    manifest["information"]["created"] = created
    directory.write_bytes(MANIFEST, json.dumps(manifest).encode())
    return directory


def name_of(directory: Storage) -> str:
    return directory.uri.rpartition("/")[2]


def run_of(root: Storage, fingerprint: str, model: Storage) -> str:
    """The id of a run in the MLflow of `root` whose model lies in `model`."""
    about = {"experiment": "mis", "name": "a run", "fingerprint": fingerprint, "params": {"train.seed": 0}}
    with tracking.open_run(root, **about) as tracker:
        tracker.set_model(model)
    assert tracker.run_id is not None
    return tracker.run_id


def test_a_directory_a_training_and_the_newest(root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, older = training(root, 1, created="2026-01-02T00:00:00Z"), training(root, 2)
    unfinished = root.child("checkpoint", "f" * 16)
    unfinished.write_bytes(WEIGHTS_FILE, b"weights")
    assert find_model(root, "latest") == newest
    for directory in (newest, older):
        assert find_model(root, name_of(directory)) == find_model(root, name_of(directory)[:6]) == directory
        assert find_model(Storage(str(tmp_path / "elsewhere")), directory.uri) == directory
    assert find_model(root, unfinished.uri) == unfinished  # a path is a path
    monkeypatch.chdir(tmp_path / "root" / "checkpoint")
    assert find_model(root, name_of(older)) == older
    Storage(name_of(older)[:4]).write_bytes(WEIGHTS_FILE, b"other weights")
    assert find_model(root, name_of(older)[:4]) == Storage(name_of(older)[:4])  # a directory comes first


@pytest.mark.parametrize("text", ["", "fff", "ffffffff", "no such folder", "latest/"])
def test_what_is_not_there_is_answered_with_what_is(root: Storage, text: str) -> None:
    names = sorted(name_of(training(root, seed)) for seed in (1, 2))
    root.child("checkpoint", "f" * 16).write_bytes(WEIGHTS_FILE, b"weights")
    with pytest.raises(DataError, match=rf"no single model is called '{text}': .* are: {', '.join(names)}$"):
        find_model(root, text)
    assert root.names() == ["checkpoint"]  # looking makes no store


def test_nothing_was_trained_yet(root: Storage, tmp_path: Path) -> None:
    for text in ("latest", "abcd"):
        with pytest.raises(DataError, match=r"the trainings in .*/root/checkpoint are: none, `mis train` makes one"):
            find_model(root, text)
    assert not (tmp_path / "root").exists()


def test_a_run_in_mlflow_comes_after_the_trainings(root: Storage, tmp_path: Path, empty_store: Path) -> None:
    root.write_bytes("mlflow.db", empty_store.read_bytes())
    here, away = training(root, 1), training(Storage(str(tmp_path / "away")), 2)
    first = run_of(root, "0123456789abcdef", away)
    run_of(root, name_of(here), away)
    assert find_model(root, first) == find_model(root, "01234") == away
    assert find_model(root, name_of(here)) == here
    run_of(root, "0123ffffffffffff", here)
    with pytest.raises(DataError, match=r"2 models in sqlite:.* for '0123'.*the trainings in"):
        find_model(root, "0123")
    with pytest.raises(DataError, match="no run with a model in sqlite:"):
        find_model(root, "beef")
    away.remove(WEIGHTS_FILE)
    with pytest.raises(DataError, match=rf"the run {first} in MLflow has its model in {away.uri}, where there is none"):
        find_model(root, first)


def test_a_server_that_is_down_hides_no_training(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = training(root, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    assert find_model(root, name_of(directory)) == directory
    with pytest.raises(DataError, match=rf"http://127.0.0.1:9 cannot be asked: .* are: {name_of(directory)}$"):
        find_model(root, "abcdef")
