"""Files from the Hugging Face hub, by way of its cache. Fails within seconds on a machine without network."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

PROBE_SECONDS = 5.0
MAX_BYTES = 4 * 2**30  # ViT-H is 2.5 GB
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(repository: str, name: str) -> Path:
    """The local path of file `name` of `repository`: from the hub's cache if it is there, else downloaded.

    It must have the SHA-256 and the size that the hub names, and at most MAX_BYTES. Which revision that is is not
    pinned: the digest of weights is part of every fingerprint, so other weights make other artifacts.
    Raises ConnectionError, in one line, when it can be had from neither, or is damaged.
    """
    if found := cached(repository, name):
        return found
    # The hub's client tries for half a minute to reach a hub that does not answer; one short question comes first.
    wanted = probe(repository, name)
    with _explained(repository):
        path = Path(huggingface_hub.hf_hub_download(repository, name))
    return _checked(path, wanted)


def cached(repository: str, name: str) -> Path | None:
    """Where the file lies in the hub's cache, if it does."""
    try:
        return _whole(Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True)))
    except FileNotFoundError:
        return None


def probe(repository: str, name: str) -> str:
    """The SHA-256 that the hub names for a file.

    Raises ConnectionError, within seconds and in one line, when the hub cannot be reached, has no such file, names no
    SHA-256 for it (it does for all weights), or more bytes than MAX_BYTES.
    """
    with _explained(repository):
        url = huggingface_hub.hf_hub_url(repository, name)
        about = huggingface_hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS)
        if not about.etag or not _SHA256.fullmatch(about.etag):
            raise OSError(f"it names no SHA-256 for {name}")
        if about.size is None or about.size > MAX_BYTES:
            raise OSError(f"{name} has {about.size} bytes; at most {MAX_BYTES} are fetched")
        return about.etag


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
    """`path`, if its content is what its name in the cache says: there, large files are named by their SHA-256."""
    name = path.resolve().name
    return _checked(path, name) if _SHA256.fullmatch(name) else path


def _checked(path: Path, wanted: str) -> Path:
    with open(path, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
            raise ConnectionError(f"{path.resolve()} is damaged: remove it, and it is fetched again")
    return path
