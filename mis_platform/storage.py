"""Where artifacts live: a local path, NFS, or a URI such as `s3://bucket/prefix`.

A `Storage` is one directory there. It is only its URI, so it travels to any worker. What is written under a name
appears whole or not at all: a temporary file and a rename locally, a single object on object stores.
"""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.fs as pafs

from mis_platform.redaction import scrub

TEMPORARY = ".tmp-"


class StorageError(OSError):
    """The root cannot be read or written any more."""


@dataclass(frozen=True, repr=False)
class Storage:
    """One directory. uri: a local path or any URI of `pyarrow.fs`; credentials come from the environment."""

    uri: str

    def __post_init__(self) -> None:
        if "://" not in self.uri:
            object.__setattr__(self, "uri", os.path.abspath(os.path.expanduser(self.uri)))

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}  # the file system is opened again where it arrives

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "uri", state["uri"])

    def __str__(self) -> str:
        return scrub(self.uri)  # an address may hold a password

    def __repr__(self) -> str:
        return f"Storage({str(self)!r})"

    @cached_property
    def _target(self) -> tuple[pafs.FileSystem, str]:
        if self.local is not None:
            return pafs.LocalFileSystem(), str(self.local)
        try:
            filesystem, base = pafs.FileSystem.from_uri(self.uri)
            return filesystem, base.rstrip("/")
        except (ValueError, NotImplementedError) as error:
            raise ValueError(
                f"--root {self}: {scrub(str(error))}; use a local path, s3://bucket/prefix or gs://..."
            ) from None

    @property
    def local(self) -> Path | None:
        """The directory on this machine's disk, or None for an object store."""
        if "://" not in self.uri:
            return Path(self.uri)
        return Path(self.uri.removeprefix("file://")) if self.uri.startswith("file://") else None

    def child(self, *names: str) -> "Storage":
        path, mark, query = self.uri.partition("?") if self.local is None else (self.uri, "", "")
        return Storage("/".join([path.rstrip("/"), *names]) + mark + query)

    def read_bytes(self, name: str) -> bytes:
        """Raises FileNotFoundError when there is no such file."""
        filesystem, base = self._target
        with filesystem.open_input_stream(f"{base}/{name}", compression=None) as stream:
            return stream.readall()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the whole file or nothing; an existing one is replaced. Raises StorageError, e.g. on a full disk."""
        try:
            if self.local is not None:
                _write_local(self.local / name, data)
                return
            filesystem, base = self._target
            with filesystem.open_output_stream(f"{base}/{name}", compression=None) as stream:
                stream.write(data)
        except OSError as error:
            raise StorageError(f"cannot write {name} in {self}: {_reason(error)}") from error

    def exists(self, name: str) -> bool:
        filesystem, base = self._target
        return filesystem.get_file_info(f"{base}/{name}").type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """Files and directories directly in here, sorted; unfinished writes are left out. Empty if nothing is there."""
        filesystem, base = self._target
        found = filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        return sorted(info.base_name for info in found if not info.base_name.startswith(TEMPORARY))

    def remove(self, name: str) -> None:
        """Delete a file or a directory with all that is in it; nothing happens if it is not there."""
        filesystem, base = self._target
        path = f"{base}/{name}"
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)

    def remove_unfinished(self) -> None:
        """Delete what interrupted writes left directly in here. Only while holding the lock: nobody else is writing."""
        filesystem, base = self._target
        for info in filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True)):
            if info.base_name.startswith(TEMPORARY):
                self.remove(info.base_name)

    def check_writable(self) -> None:
        """Write and remove a small file. Raises ValueError that says what is wrong with the root."""
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"")
            self.remove(probe)
        except OSError as error:
            reason = _reason(error.__cause__ if isinstance(error.__cause__, OSError) else error)
            raise ValueError(f"cannot write to {self}: {reason}; choose another --root") from None

    @contextlib.contextmanager
    def lock(self, name: str = ".lock") -> Iterator[None]:
        """Hold this directory against other processes of this machine; released by the kernel if we are killed.

        Raises StorageError when somebody else holds it. Object stores have no locks: there, writing the same parts
        twice is harmless because the same name always holds the same content.
        """
        if self.local is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                self.local.mkdir(parents=True, exist_ok=True)
                handle = stack.enter_context(open(self.local / name, "w"))
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(f"another mis process is working on {self}; wait for it or stop it") from None
            except OSError as error:
                raise StorageError(f"cannot lock {self}: {_reason(error)}") from error
            yield


def _reason(error: OSError) -> str:
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
