"""Files from the Hugging Face hub, by way of its cache. Fails within seconds on a machine without network."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.utils import tqdm

from mis_platform.config import PIN

PROBE_SECONDS = 5.0
MAX_BYTES = 4 * 2**30  # ViT-H is 2.5 GB
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Files that come through Xet come from an address that nobody looked at, without a bound while they come.
huggingface_hub.constants.HF_HUB_DISABLE_XET = True
_SHA256 = re.compile(r"[0-9a-f]{64}")


def pin_of(source: str | None) -> str | None:
    """The SHA-256 in a setting "sha256:HEX", which asks for the hub's file with that content; None for a path."""
    return source.removeprefix(PIN) if source is not None and source.startswith(PIN) else None


def fetch(repository: str, name: str, sha256: str | None = None) -> Path:
    """The local path of file `name` of `repository`: from the hub's cache if it is there, else downloaded over https.

    sha256: of the content that is wanted; nothing else is taken, from any revision. Without it the file must have the
    SHA-256 and the size that the hub names, and at most MAX_BYTES.
    Raises ConnectionError, in one line, when it can be had from neither, is damaged, or is another than is wanted.
    """
    if found := cached(repository, name, sha256):
        return found
    # The hub's client tries for half a minute to reach a hub that does not answer; one short question comes first.
    offered = probe(repository, name)
    if sha256 not in (None, offered):
        raise ConnectionError(f"the hub's {repository}/{name} has the SHA-256 {offered}, not {sha256}, which is wanted")
    with _explained(repository):
        path = Path(huggingface_hub.hf_hub_download(repository, name, tqdm_class=_BoundedProgress))
    return _checked(path, offered)


def cached(repository: str, name: str, sha256: str | None = None) -> Path | None:
    """Where the file lies in the hub's cache, if it does; sha256: as of `fetch`."""
    if sha256 is not None:
        return next((_whole(path) for path in _revisions(repository, name) if _digest(path) == sha256), None)
    try:
        return _whole(Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True)))
    except FileNotFoundError:
        return None


def probe(repository: str, name: str) -> str:
    """The SHA-256 that the hub names for a file.

    Raises ConnectionError, within seconds and in one line, when the hub cannot be reached, has no such file, names no
    SHA-256 for it (it does for all weights), more bytes than MAX_BYTES, or an address that is not https.
    """
    with _explained(repository):
        url = huggingface_hub.hf_hub_url(repository, name)
        _check_address(url)
        about = huggingface_hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS)
        _check_address(about.location)
        if not about.etag or not _SHA256.fullmatch(about.etag):
            raise OSError(f"it names no SHA-256 for {name}")
        if about.size is None or about.size > MAX_BYTES:
            raise OSError(f"{name} has {about.size} bytes; at most {MAX_BYTES} are fetched")
        return about.etag


class _BoundedProgress(tqdm):  # type: ignore[misc]
    """The client compares sizes after the last byte, and what a server never stops sending has none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.received = 0.0  # `n` stays where it is while no bar is shown

    def update(self, n: float | None = 1) -> Any:
        self.received += n or 0
        if self.received > MAX_BYTES:
            raise OSError(f"more than {MAX_BYTES} bytes were sent")
        return super().update(n)


def _check_address(url: str) -> None:
    place = urlsplit(url)
    if place.scheme != "https" and place.hostname not in LOOPBACK:
        raise OSError(f"{place.scheme}://{place.hostname} is not https")


def _revisions(repository: str, name: str) -> Iterator[Path]:
    """The file in each revision that the cache has of it."""
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE, "models--" + repository.replace("/", "--"), "snapshots")
    return (path for path in sorted(folder.glob(f"*/{name}")) if path.is_file())


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    try:
        yield
    except ConnectionError:  # of `_whole`
        raise
    except Exception as error:  # offline, refused, timed out: the client and its HTTP library have many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"{repository} cannot be fetched from the Hugging Face hub: {reason}") from None


def _whole(path: Path) -> Path:
    """`path`, if its content is what its name in the cache says: there, large files are named by their SHA-256.

    The name is that of the first link: where caches share files (Xet) it is one to another name.
    """
    name = _link(path)
    return _checked(path, name) if _SHA256.fullmatch(name) else path


def _link(path: Path) -> str:
    return Path(os.readlink(path)).name if path.is_symlink() else ""


def _digest(path: Path) -> str:
    """What the cache says that the file's SHA-256 is; where it says nothing, as in copies without links, what it is."""
    return name if _SHA256.fullmatch(name := _link(path)) else _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked(path: Path, wanted: str) -> Path:
    if _sha256(path) != wanted:
        raise ConnectionError(f"{path.resolve()} is damaged: remove it, and it is fetched again")
    return path
