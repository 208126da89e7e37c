"""SHA-256 of the files of a data set, and the memory of what earlier calls have read of them.

A file whose name, size, times and inode are what they were has the content that it had: nothing but the kernel sets
the time of a status change (ctime), so neither `touch` nor `rsync --times` hides a change. What is remembered is 48
bytes a file in the user's cache folder, one Parquet file for each data set that takes long enough to read. That file
is never needed: a damaged, foreign or missing one only costs the time to read the photos. See docs/decisions/009.
"""

import hashlib
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mis_platform.storage import Storage

ABSENT = "absent"  # in place of the content of what is no readable file
LARGEST = 2**25  # files of a data set that are remembered; 1.6 GB
FOLDER_BYTES = 2**32  # of all data sets together
SETTLING_NS = 10 * 10**9  # a file that changed since then may change again within one tick of its clock

SCHEMA = pa.schema(
    [
        pa.field("place", pa.uint64(), nullable=False),  # these two: BLAKE2b of a file's name and facts; ascending
        pa.field("check", pa.uint64(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),  # of its content
    ]
)


class _Rows(NamedTuple):
    """What is remembered, by ascending place; arrays of one length."""

    place: np.ndarray  # uint64 [N]
    check: np.ndarray  # uint64 [N]
    sha256: np.ndarray  # V32 [N]


ROW = np.dtype([("place", "u8"), ("check", "u8"), ("sha256", "V32")])
NOTHING = _Rows(np.empty(0, "u8"), np.empty(0, "u8"), np.empty(0, "V32"))


class Memory:
    """The contents of files below `root`. For several threads at once.

    is_used: if not, every file is read, and nothing is remembered.
    """

    def __init__(self, root: Path, is_used: bool = True) -> None:
        self._root = root
        self._folder = cache_folder() if is_used else None
        self._name = f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.parquet"
        self._rows = NOTHING if self._folder is None else _load(self._folder / self._name)
        self._is_used = np.zeros(len(self._rows.place), bool)
        self._new, self._bytes, self._lock = bytearray(), 0, Lock()  # rows that were read now, and from how many bytes

    def contents(self, files: Sequence[str]) -> list[str]:
        """Bytes and SHA-256 of each file, as `SIZE HEXADECIMAL`; `absent` for what is no file that can be read."""
        paths = [os.path.join(self._root, file) for file in files]
        found = [_facts(path) for path in paths]
        keys = [_key(file, facts) if facts else bytes(16) for file, facts in zip(files, found)]
        remembered = self._recall(b"".join(keys))
        return [self._content(*each) for each in zip(files, paths, found, remembered)]

    def _content(self, file: str, path: str, facts: os.stat_result | None, sha256: bytes | None) -> str:
        if facts is None:
            return ABSENT
        return self._read(file, path) if sha256 is None else f"{facts.st_size} {sha256.hex()}"

    def _recall(self, keys: bytes) -> list[bytes | None]:
        """What is remembered of each key of 16 bytes."""
        wanted = np.frombuffer(keys, ROW["place"]).reshape(-1, 2)
        if not len(self._rows.place):
            return [None] * len(wanted)
        at = np.minimum(np.searchsorted(self._rows.place, wanted[:, 0]), len(self._rows.place) - 1)
        fits = (self._rows.place[at] == wanted[:, 0]) & (self._rows.check[at] == wanted[:, 1])
        self._is_used[at[fits]] = True
        return [row.tobytes() if fit else None for row, fit in zip(self._rows.sha256[at], fits)]

    def _read(self, file: str, path: str) -> str:
        now = time.time_ns()
        try:
            with open(path, "rb") as stream:
                before = os.fstat(stream.fileno())
                sha256 = hashlib.file_digest(stream, "sha256").digest()
                after = os.fstat(stream.fileno())
        except OSError:
            return ABSENT
        key = _key(file, before)
        is_settled = max(before.st_mtime_ns, before.st_ctime_ns) < now - SETTLING_NS and key == _key(file, after)
        with self._lock:
            self._bytes += before.st_size
            self._new += key + sha256 if is_settled else b""
        return f"{before.st_size} {sha256.hex()}"

    def save(self, at_least: int) -> None:
        """Remember what was read, if it was more than this number of bytes. What cannot be written is no error."""
        if self._folder is None or not self._new or self._bytes <= at_least:
            return
        new = np.frombuffer(bytes(self._new), ROW)
        is_full = len(self._is_used) + len(new) > LARGEST
        kept = self._is_used if is_full else slice(None)  # files that are gone go when there is no room
        joined = _Rows(*(np.concatenate([old[kept], new[name]]) for name, old in self._rows._asdict().items()))
        order = np.argsort(joined.place)
        self._rows, self._new, self._bytes = _Rows(*(column[order] for column in joined)), bytearray(), 0
        self._is_used = np.concatenate([self._is_used[kept], np.ones(len(new), bool)])[order]
        if len(order) <= LARGEST:
            _store(self._rows, self._folder, self._name)


def cache_folder() -> Path | None:
    """XDG_CACHE_HOME/mis_platform/digests, by default below ~/.cache; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "mis_platform" / "digests"


def _facts(path: str) -> os.stat_result | None:
    """None for what is no file: a pipe would never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # the latter: a zero byte in its name
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _key(file: str, facts: os.stat_result) -> bytes:
    seen = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino} ".encode()
    return hashlib.blake2b(seen + os.fsencode(file), digest_size=16).digest()


def _load(path: Path) -> _Rows:
    """Nothing where there is no such file, or it is damaged, not ours, or could be somebody else's."""
    try:
        if os.stat(path).st_uid != os.geteuid():
            return NOTHING
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA) or file.metadata.num_rows > LARGEST:
                return NOTHING
            table = file.read()
    except (OSError, ValueError, pa.ArrowException):
        return NOTHING
    contents = [np.frombuffer(each.buffers()[1], "V32", len(each), 32 * each.offset) for each in table["sha256"].chunks]
    return _Rows(table["place"].to_numpy(), table["check"].to_numpy(), np.concatenate([NOTHING.sha256, *contents]))


def _store(rows: _Rows, folder: Path, name: str) -> None:
    content = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(rows.sha256), [None, pa.py_buffer(rows.sha256)])
    table = pa.table([pa.array(rows.place), pa.array(rows.check), content], schema=SCHEMA)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sink = pa.BufferOutputStream()
        pq.write_table(
            table, sink, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
        )
        shelf = Storage(str(folder))
        shelf.write_bytes(name, sink.getvalue().to_pybytes())
        _make_room(shelf)
    except OSError:  # a full disk, a home that is read-only: it is read again next time
        return


def _make_room(shelf: Storage) -> None:
    """Remove what was not written for longest, unfinished writes too, until the rest fits into FOLDER_BYTES."""
    held = 0
    for name, facts in sorted(shelf.files().items(), key=lambda each: each[1].age):
        held += facts.bytes
        if held > FOLDER_BYTES:
            shelf.remove(name)
