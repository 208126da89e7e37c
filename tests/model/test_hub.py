"""Weights from the hub are what the hub said they are."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
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


CONTENT = b"weights" * 1000


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one file needs; what it says of the file and what it sends are the server's."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{self.server.digest}"')
        self.send_header("Content-Length", str(self.server.size))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.content, server.size, server.digest = CONTENT, len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        place = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
        yield server
        server.shutdown()


def test_a_file_is_fetched_once(server: http.server.ThreadingHTTPServer) -> None:
    assert hub.fetch(REPOSITORY, "model.safetensors").read_bytes() == CONTENT
    server.content = b"other"
    assert hub.fetch(REPOSITORY, "model.safetensors").read_bytes() == CONTENT


def test_a_server_with_wrong_bytes_is_found_out(server: http.server.ThreadingHTTPServer) -> None:
    server.content = CONTENT[:-1] + b"X"
    for _ in range(2):  # and what it left in the cache is not used later
        with pytest.raises(ConnectionError, match="is damaged: remove it"):
            hub.fetch(REPOSITORY, "model.safetensors")


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"digest": "0123abcd"}, "it names no SHA-256 for model.safetensors"),
        ({"size": 2**40}, "model.safetensors has 1099511627776 bytes; at most 4294967296 are fetched"),
    ],
)
def test_what_is_too_large_or_without_a_digest_is_not_fetched(
    server: http.server.ThreadingHTTPServer, about: dict[str, object], told: str, tmp_path: Path
) -> None:
    vars(server).update(about)
    with pytest.raises(ConnectionError, match=told):
        hub.fetch(REPOSITORY, "model.safetensors")
    assert not list(tmp_path.rglob("*.incomplete"))
    assert not list(tmp_path.rglob("blobs/*"))
