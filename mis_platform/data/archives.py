"""Archives of data sets, unpacked without trust: zip, tar, tar.gz and tar.bz2.

Members are only ever folders and plain files with names inside the archive's own folder; a link, a device, an absolute
name, "..", or a name that is there twice makes the whole archive refused. Sizes are counted while unpacking, not
believed. The folder appears whole, under its name, or not at all.
"""

import bz2
import contextlib
import errno
import functools
import gzip
import hashlib
import os
import re
import shutil
import stat
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from mis_platform.errors import DataError
from mis_platform.storage import TEMPORARY

MAX_BYTES = 2**40  # of all files of an archive
MAX_RATIO = 100  # bytes unpacked for one of the archive, beyond FREE_BYTES; photos hardly shrink, masks by ten or so
FREE_BYTES = 64 * 2**20
MAX_MEMBERS = 2 * 10**6
_READ_BYTES = 2**20
_HEADER_BYTES = 2**24  # that a reader may want at once: more is a header that claims too much

_UNSAFE = re.compile(r"[\x00-\x1f\x7f]|^[a-zA-Z]:")


class Unpacked(NamedTuple):
    """What is there now."""

    folder: Path
    files: int
    bytes: int


class _Member(NamedTuple):
    name: str
    is_folder: bool
    open: Callable[[], BinaryIO]


def unpack(archive: Path, out: Path, *, sha256: str | None = None, max_bytes: int = MAX_BYTES) -> Unpacked:
    """Unpack `archive` into the new or empty folder `out`.

    sha256: of the archive, 64 hexadecimal digits; checked before anything is unpacked. max_bytes: of all files.
    Raises ValueError when `out` is in use or `sha256` is none, DataError when the archive is missing, damaged, another
    file than `sha256` says, no archive (a web page, say), or holds what is refused. Then `out` is as it was.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"--sha256 takes 64 hexadecimal digits, not {sha256!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use; give --out a new folder")
    _check_archive(archive, sha256)
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = out.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        budget = _Budget(min(max_bytes, FREE_BYTES + MAX_RATIO * archive.stat().st_size))
        hidden.mkdir()
        try:
            with _members(archive, budget) as members:
                files = sum(_write(member, hidden, budget) for member in members)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # our side: a full disk, a name too long for it
                raise
            raise DataError(f"{archive} is damaged: {_one_line(error)}") from None
        except Exception as error:  # readers raise anything on damaged archives
            raise DataError(f"{archive} is damaged: {_one_line(error)}") from None
        if not files:
            raise DataError(f"{archive} is empty")
        os.replace(hidden, out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return Unpacked(out, files, budget.spent)


# -- the file --------------------------------------------------------------------------------------------------------


def _check_archive(archive: Path, sha256: str | None) -> None:
    try:
        if not stat.S_ISREG(archive.stat().st_mode):
            raise DataError(f"{archive} is no file")
        with open(archive, "rb") as stream:
            start = stream.read(4096)
            if _is_web_page(start):
                raise DataError(
                    f"{archive} is a web page, not an archive: the server answered with a login, a virus warning or a "
                    "download limit (Google Drive does). Open the link in a browser, or take another mirror"
                )
            stream.seek(0)
            found = hashlib.file_digest(stream, "sha256").hexdigest() if sha256 else None
    except OSError as error:
        raise DataError(f"cannot read {archive}: {error.strerror or error}") from None
    if sha256 and found != sha256.lower():
        raise DataError(f"{archive} is not the file it should be: its SHA-256 is {found}; download it again")


def _is_web_page(start: bytes) -> bool:
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))


@contextlib.contextmanager
def _members(archive: Path, budget: "_Budget") -> Iterator[Iterator[_Member]]:
    with contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(open(archive, "rb"))
        start = stream.read(4)
        stream.seek(0)
        if start.startswith(b"PK"):
            yield _zip_members(stack.enter_context(zipfile.ZipFile(stream)))
            return
        if start.startswith(b"\x1f\x8b"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        elif start.startswith(b"BZh"):
            stream = stack.enter_context(bz2.BZ2File(stream))
        try:
            tar = stack.enter_context(tarfile.open(fileobj=cast(BinaryIO, _Watched(stream, budget)), mode="r:"))
        except tarfile.ReadError as error:
            raise DataError(f"{archive} is no zip, tar, tar.gz or tar.bz2 archive ({_one_line(error)})") from None
        yield _tar_members(tar)


_NO_FILE = "{!a} in the archive is a link or a device; only files and folders are unpacked"


def _zip_members(archive: zipfile.ZipFile) -> Iterator[_Member]:
    for info in archive.infolist():
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(_NO_FILE.format(info.filename))
        yield _Member(info.filename, info.is_dir(), functools.partial(cast(Any, archive.open), info))


def _tar_members(archive: tarfile.TarFile) -> Iterator[_Member]:
    for info in archive:
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise DataError(_NO_FILE.format(info.name))
        yield _Member(info.name, info.isdir(), functools.partial(cast(Any, archive.extractfile), info))


# -- writing ---------------------------------------------------------------------------------------------------------


class _Budget:
    """What may still be unpacked."""

    def __init__(self, limit: int) -> None:
        self.limit, self.spent, self.members = limit, 0, 0

    def spend(self, count: int) -> None:
        self.spent += count
        if self.spent > self.limit:
            raise DataError(
                f"it unpacks to more than {self.limit / 2**20:.0f} MiB, {MAX_RATIO} times its own size or --max-gib; "
                "that is no archive of photos"
            )


class _Watched:
    """The reading side of a stream for `tarfile`, which believes the sizes that headers claim."""

    def __init__(self, stream: BinaryIO, budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    def read(self, count: int) -> bytes:
        if count > _HEADER_BYTES:
            raise DataError(f"a header of {count} bytes in the archive")
        return self._stream.read(count)

    def seek(self, position: int) -> int:
        if position > self._budget.limit + _HEADER_BYTES:
            raise DataError("a member of the archive is larger than all of it may be")
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _write(member: _Member, folder: Path, budget: _Budget) -> int:
    """1 if it was a file."""
    budget.members += 1
    if budget.members > MAX_MEMBERS:
        raise DataError(f"more than {MAX_MEMBERS} members in the archive")
    path = folder / _safe_name(member.name)
    try:
        (path if member.is_folder else path.parent).mkdir(parents=True, exist_ok=True)
        if member.is_folder:
            return 0
        with member.open() as source, open(path, "xb") as target:
            while block := source.read(_READ_BYTES):
                budget.spend(len(block))
                target.write(block)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{member.name!a} is in the archive twice") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError(f"{member.name[:50]!a}... in the archive is too long for a name") from None
        raise
    return 1


def _safe_name(name: str) -> str:
    """The name, if it stays inside. Raises DataError."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or not parts or _UNSAFE.search(name):
        raise DataError(f"{name!a} in the archive would leave its folder, or is no name for a file")
    return "/".join(parts)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
