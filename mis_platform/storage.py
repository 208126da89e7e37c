"""Where artifacts live: a local path, NFS, or a URI such as `s3://bucket/prefix`.

A `Storage` is one directory there. It is only its URI, so it travels to any worker. What is written under a name
appears whole or not at all: a temporary file and a rename locally, a single object on object stores.

A store that answers slowly, with 503 or not at all is asked again, ten times with growing pauses (a minute or two in
all); then it is a StorageError. The AWS SDK inside pyarrow does that.
"""

import contextlib
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pyarrow.fs as pafs

from mis_platform.redaction import scrub

TEMPORARY = ".tmp-"
ATTEMPTS = 10  # of one request; with 30 % of requests failing, one in 170 000 fails for good
QUICK_ATTEMPTS = 4  # of the first request to a root: a wrong address is told in seconds
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 30.0  # before a request counts as failed
READERS = min(16, 4 * (os.cpu_count() or 1))  # files that are read at once: a network disk answers many
S3_OPTIONS = {"region", "scheme", "endpoint_override", "allow_bucket_creation"}  # of an s3:// URI


class StorageError(OSError):
    """The root cannot be read or written any more."""


class Fence(Protocol):
    """Whether who carries it may still write; see `leases`."""

    def check(self, name: str) -> None:
        """Raises StorageError when another attempt has taken over. name: what is about to be written."""


class FileFacts(NamedTuple):
    """What a listing says about a file."""

    bytes: int
    age: float  # seconds since it was last written, by the store's clock against ours


@dataclass(frozen=True, repr=False)
class Storage:
    """One directory. uri: a local path or any URI of `pyarrow.fs`; credentials come from the environment.

    fence: asked before every write and removal; it travels along. Two storages with one URI are equal.
    Raises ValueError for an address with a password in it, and for one whose slashes are missing.
    """

    uri: str
    fence: Fence | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        uri = self.uri
        if mistyped := re.match(r"(s3|gs|gcs|hdfs|abfss?|file):(?!//)", uri):
            raise ValueError(f"{uri!r} is no address: it begins with {mistyped[1]}://, a folder of that name with ./")
        if uri.startswith("file://"):
            uri = unquote(urlsplit(uri).path)
        if "://" not in uri:
            uri = os.path.abspath(os.path.expanduser(uri))
        elif "@" in urlsplit(uri).netloc and uri.startswith("s3://"):
            raise ValueError("a root with a password in it ends up in logs; set AWS_ACCESS_KEY_ID and the like instead")
        object.__setattr__(self, "uri", uri)

    def __getstate__(self) -> tuple[str, Fence | None]:
        return self.uri, self.fence  # the file system is opened again where it arrives

    def __setstate__(self, state: tuple[str, Fence | None]) -> None:
        for name, value in zip(("uri", "fence"), state, strict=True):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return scrub(self.uri)  # an address may hold a password

    def __repr__(self) -> str:
        return f"Storage({str(self)!r})"

    @cached_property
    def _target(self) -> tuple[pafs.FileSystem, str]:
        return self._open(ATTEMPTS)

    def _open(self, attempts: int) -> tuple[pafs.FileSystem, str]:
        if self.local is not None:
            return pafs.LocalFileSystem(), str(self.local)
        try:
            if self.uri.startswith("s3://"):
                return _open_s3(self.uri, attempts)
            filesystem, base = pafs.FileSystem.from_uri(self.uri)
            return filesystem, base.rstrip("/")
        except (ValueError, NotImplementedError) as error:
            raise ValueError(
                f"--root {self}: {scrub(str(error))}; use a local path, s3://bucket/prefix or gs://..."
            ) from None
        except OSError as error:  # of the AWS SDK, which asks where a bucket is
            raise StorageError(f"cannot reach {self}: {reason_of(error)}") from error

    @property
    def local(self) -> Path | None:
        """The directory on this machine's disk, or None for an object store."""
        return Path(self.uri) if "://" not in self.uri else None

    def child(self, *names: str) -> "Storage":
        """A directory below. Raises ValueError for a name that would leave this one."""
        for name in names:
            check_name(name)
        if self.local is not None:
            return Storage("/".join([self.uri.rstrip("/"), *names]), self.fence)
        path, mark, query = self.uri.partition("?")
        return Storage("/".join([path.rstrip("/"), *map(quote, names)]) + mark + query, self.fence)

    def fenced(self, fence: Fence) -> "Storage":
        """The same directory for somebody who may write only while `fence` allows it."""
        return Storage(self.uri, fence)

    def read_bytes(self, name: str, max_bytes: int | None = None) -> bytes:
        """Raises FileNotFoundError when there is no such file, ValueError when it is larger than max_bytes."""
        filesystem, path = self._path(name)
        with self._told(f"cannot read {name} in"), filesystem.open_input_file(path) as stream:
            if max_bytes is not None and stream.size() > max_bytes:
                raise ValueError(f"larger than {max_bytes} bytes")
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the whole file or nothing; an existing one is replaced.

        Raises StorageError, e.g. on a full disk, or when the fence says that another attempt has taken over.
        """
        filesystem, path = self._path(name)
        if self.fence is not None:
            self.fence.check(name)
        with self._told(f"cannot write {name} in"):
            if self.local is not None:
                _write_local(self.local / name, data)
                return
            with filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)

    def exists(self, name: str) -> bool:
        """Whether there is a file or directory of that name. Raises StorageError when the store does not answer."""
        filesystem, path = self._path(name)
        with self._told(f"cannot look for {name} in"):
            return filesystem.get_file_info(path).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """Files and directories directly in here, sorted; unfinished writes are left out. Empty if nothing is there."""
        return sorted(info.base_name for info in self._list() if not info.base_name.startswith(TEMPORARY))

    def files(self) -> dict[str, FileFacts]:
        """Name -> facts of the files directly in here, unfinished writes among them."""
        now = time.time()
        return {
            info.base_name: FileFacts(info.size or 0, now - (info.mtime_ns or 0) / 1e9)
            for info in self._list()
            if info.type == pafs.FileType.File
        }

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each file, None where there is none: from one listing, and where it knows nothing by asking.

        The listing of an object store may be late; an object that is asked for by name is not.
        """
        listed = self.files()
        return {name: listed[name].bytes if name in listed else self._size(name) for name in names}

    def _size(self, name: str) -> int | None:
        filesystem, path = self._path(name)
        with self._told(f"cannot look for {name} in"):
            info = filesystem.get_file_info(path)
        return info.size if info.type == pafs.FileType.File else None

    def remove(self, name: str) -> None:
        """Delete a file or a directory with all that is in it; nothing happens if it is not there."""
        filesystem, path = self._path(name)
        if self.fence is not None:
            self.fence.check(name)
        with self._told(f"cannot remove {name} in"):
            kind = filesystem.get_file_info(path).type
            if kind == pafs.FileType.Directory:
                filesystem.delete_dir(path)
            elif kind == pafs.FileType.File:
                filesystem.delete_file(path)

    def remove_unfinished(self) -> None:
        """Delete what interrupted writes left directly in here. Only while holding the lease: nobody else writes."""
        for info in self._list():
            if info.base_name.startswith(TEMPORARY):
                self.remove(info.base_name)

    @contextlib.contextmanager
    def on_disk(self, names: Iterable[str]) -> Iterator[Path]:
        """A local directory with these files: this one, or a copy that is gone afterwards."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory() as copy:
            for name in names:
                (Path(copy) / name).write_bytes(self.read_bytes(name))
            yield Path(copy)

    def check_writable(self) -> None:
        """Write and remove a small file. Raises ValueError that says what is wrong with the root."""
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        here = Storage(self.uri)
        try:
            object.__setattr__(here, "_target", here._open(QUICK_ATTEMPTS))
            here.write_bytes(probe, b"")
            here.remove(probe)
        except OSError as error:
            reason = reason_of(error.__cause__ if isinstance(error.__cause__, OSError) else error)
            raise ValueError(f"cannot write to {self}: {reason}; choose another --root") from None

    def _path(self, name: str) -> tuple[pafs.FileSystem, str]:
        check_name(name)
        filesystem, base = self._target
        return filesystem, f"{base}/{name}"

    def _list(self) -> list[pafs.FileInfo]:
        filesystem, base = self._target
        with self._told("cannot list"):
            found: list[pafs.FileInfo] = filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        return found

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors of the store in one line; a missing file stays a FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, StorageError) as error:
            # Writing "into" a file that is no directory is the caller's FileNotFoundError on some systems.
            if what.startswith("cannot read") or isinstance(error, StorageError):
                raise
            raise StorageError(f"{what} {self}: {reason_of(error)}") from error
        except OSError as error:
            raise StorageError(f"{what} {self}: {reason_of(error)}") from error


def check_name(name: str) -> None:
    """Raises ValueError for a name that is empty or would lead out of its directory; "a/b" is a file in a child."""
    steps = name.split("/")
    if not name or "\0" in name or "\\" in name or any(step in ("", ".", "..") for step in steps):
        raise ValueError(f"{name!r} is no name for a file below a directory")


def _open_s3(uri: str, attempts: int) -> tuple[pafs.FileSystem, str]:
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if unknown := options.keys() - S3_OPTIONS:
        raise ValueError(f"unknown option {min(unknown)!r}; there are {', '.join(sorted(S3_OPTIONS))}")
    if not parts.netloc or parts.fragment:
        raise ValueError("it must look like s3://bucket/prefix, with # as %23")
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = options.get("endpoint_override")
    if region is None and endpoint is None and not os.environ.get("AWS_ENDPOINT_URL"):
        region = pafs.resolve_s3_region(parts.netloc)
    filesystem = pafs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        scheme=options.get("scheme"),
        allow_bucket_creation=options.get("allow_bucket_creation") == "true",
        allow_delayed_open=True,  # a small object is one PUT instead of an upload in three requests
        connect_timeout=CONNECT_SECONDS,
        request_timeout=ANSWER_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )
    return filesystem, f"{parts.netloc}/{unquote(parts.path).strip('/')}".rstrip("/")


def reason_of(error: OSError) -> str:
    """One line."""
    return error.strerror or str(error).splitlines()[0]


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
