"""Weights from the hub are what the hub said they are."""

import hashlib
from pathlib import Path

import huggingface_hub.constants
import pytest

from mis_platform.model import hub

REPOSITORY = "timm/tiny"


@pytest.fixture
def blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as the hub's client keeps it: named by its SHA-256, behind a link with its own name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--timm--tiny"
    for name in ("blobs", "refs", f"snapshots/{'0' * 40}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    content = b"weights" * 1000
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (folder / "snapshots" / ("0" * 40) / "model.safetensors").symlink_to(blob)
    return blob


def test_a_whole_file_is_found(blob: Path) -> None:
    assert hub.fetch(REPOSITORY, "model.safetensors").read_bytes() == blob.read_bytes()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"W" + data[1:], lambda data: data + b"x"])
def test_other_bytes_are_refused(blob: Path, change) -> None:
    blob.write_bytes(change(blob.read_bytes()))
    with pytest.raises(ConnectionError, match="is damaged: remove it"):
        hub.fetch(REPOSITORY, "model.safetensors")
