"""Weights from the hub are what the hub said they are."""

import contextlib
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


@pytest.mark.parametrize("pinned", [False, True])
def test_a_file_that_caches_share_is_found(blob: Path, tmp_path: Path, pinned: bool) -> None:
    """The client has a link from the SHA-256 to a store of all repositories, whose names are other hashes."""
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    digest = blob.name
    blob.rename(shared)
    blob.symlink_to(shared)
    assert hub.fetch(REPOSITORY, "model.safetensors", digest if pinned else None).read_bytes() == shared.read_bytes()


@pytest.mark.parametrize("pinned", [False, True])
def test_a_cache_without_links_is_read(blob: Path, pinned: bool) -> None:
    link = blob.parents[1] / "snapshots" / ("0" * 40) / "model.safetensors"
    link.unlink()
    blob.rename(link)
    assert hub.fetch(REPOSITORY, "model.safetensors", blob.name if pinned else None) == link


def test_downloads_do_not_take_the_way_that_nobody_watches() -> None:
    assert huggingface_hub.constants.HF_HUB_DISABLE_XET


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
        self.server.asked.append(self.headers["Range"])
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers["Range"] else 0
        content, size = self.server.content[start:], self.server.size - start
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(size))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{self.server.size - 1}/{self.server.size}")
        self.end_headers()
        self.wfile.write(content[: self.server.cuts.pop(0) if self.server.cuts else None])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.content, server.size, server.digest = CONTENT, len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
        server.asked, server.cuts = [], []  # the Range of each question; bytes after which answers break off
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        place = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
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


def test_a_download_that_is_cut_off_goes_on_where_it_was(server: http.server.ThreadingHTTPServer) -> None:
    server.cuts = [3000]
    assert hub.fetch(REPOSITORY, "model.safetensors").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=3000-"]


def test_two_halves_of_different_files_are_no_file(
    server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file on the hub is exchanged while it is fetched."""
    server.cuts = [3000]
    monkeypatch.setattr("time.sleep", lambda _: setattr(server, "content", b"W" * len(CONTENT)))
    with pytest.raises(ConnectionError, match="is damaged: remove it"):
        hub.fetch(REPOSITORY, "model.safetensors")
    with pytest.raises(ConnectionError, match="is damaged: remove it"):
        hub.fetch(REPOSITORY, "model.safetensors")


def test_a_server_that_sends_more_than_it_said_is_left(
    server: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that it says passes; the one that it sends does not, and is not written to its end."""
    monkeypatch.setattr(hub, "MAX_BYTES", 10_000)
    monkeypatch.setattr(Hub, "do_GET", lambda handler: endless(handler))
    with pytest.raises(ConnectionError, match="more than 10000 bytes were sent"):
        hub.fetch(REPOSITORY, "model.safetensors")
    assert not [path for path in tmp_path.rglob("blobs/*") if path.stat().st_size]


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()  # without a length: until the connection is closed
    with contextlib.suppress(OSError):
        for _ in range(100_000):
            handler.wfile.write(b"x" * 4096)


@pytest.mark.parametrize("place", ["http://example.invalid/{repo_id}", "ftp://example.invalid/{repo_id}"])
def test_only_https_leaves_this_machine(place: str, server: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
    with pytest.raises(ConnectionError, match=r"example\.invalid is not https"):
        hub.fetch(REPOSITORY, "model.safetensors")


# -- pinned ----------------------------------------------------------------------------------------------------------


def test_a_pinned_file_is_taken_and_no_other(server: http.server.ThreadingHTTPServer) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ConnectionError, match=f"has the SHA-256 {server.digest}, not {other}, which is wanted") as told:
        hub.fetch(REPOSITORY, "model.safetensors", other)
    assert "\n" not in str(told.value)
    assert not server.asked  # nothing of it was fetched
    assert hub.fetch(REPOSITORY, "model.safetensors", server.digest).read_bytes() == CONTENT
    with pytest.raises(ConnectionError, match=f"not {other}"):  # neither what is in the cache by now
        hub.fetch(REPOSITORY, "model.safetensors", other)


def test_a_pinned_file_is_found_in_an_older_revision(blob: Path) -> None:
    newer = blob.parent / hashlib.sha256(b"newer").hexdigest()
    newer.write_bytes(b"newer")
    revision = blob.parents[1] / "snapshots" / ("1" * 40)
    revision.mkdir()
    (revision / "model.safetensors").symlink_to(newer)
    (blob.parents[1] / "refs" / "main").write_text("1" * 40)
    assert hub.fetch(REPOSITORY, "model.safetensors").read_bytes() == b"newer"
    assert hub.fetch(REPOSITORY, "model.safetensors", blob.name).read_bytes() == blob.read_bytes()
    blob.write_bytes(b"damaged")
    with pytest.raises(ConnectionError, match="is damaged: remove it"):
        hub.fetch(REPOSITORY, "model.safetensors", blob.name)
