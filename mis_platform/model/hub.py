"""Files from the Hugging Face hub, by way of its cache. Fails within seconds on a machine without network."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub

PROBE_SECONDS = 5.0


def fetch(repository: str, name: str) -> Path:
    """The local path of file `name` of `repository`: from the hub's cache if it is there, else downloaded.

    A large file must have the SHA-256 that the hub named when it was fetched. Which revision that was is not pinned:
    the digest of weights is part of every fingerprint, so other weights make other artifacts.
    Raises ConnectionError, in one line, when it can be had from neither, or is damaged.
    """
    if found := cached(repository, name):
        return found
    # The hub's client tries for half a minute to reach a hub that does not answer; one short question comes first.
    probe(repository, name)
    with _explained(repository):
        return _whole(Path(huggingface_hub.hf_hub_download(repository, name)))


def cached(repository: str, name: str) -> Path | None:
    """Where the file lies in the hub's cache, if it does."""
    try:
        return _whole(Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True)))
    except FileNotFoundError:
        return None


def probe(repository: str, name: str) -> None:
    """Raises ConnectionError, within seconds and in one line, when the hub cannot be reached or has no such file."""
    with _explained(repository):
        answer = huggingface_hub.get_session().head(huggingface_hub.hf_hub_url(repository, name), timeout=PROBE_SECONDS)
        if answer.status_code >= 400:
            raise OSError(f"status {answer.status_code}")


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
    file = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", file.name):
        with open(file, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.name:
                raise ConnectionError(f"{file} is damaged: remove it, and it is fetched again")
    return path
