"""Parquet parts of an artifact, checked against the manifest's entry before anything in them is believed."""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mis_platform.artifacts import REPAIR, read_manifest
from mis_platform.errors import DataError
from mis_platform.storage import READERS, Storage

Part = Mapping[str, Any]  # an entry of the manifest's "parts": name, rows, sha256, ...

MAX_PART_BYTES = 2**30  # of a part, packed or unpacked
CACHE_BYTES = 512 * 2**20  # holds the unpacked trees of all of SBD (8498 images of 24 kB)

Decode = Callable[[bytes, int], pa.Table]  # (content, max_bytes) -> table; raises ValueError for what is none


def read_part(storage: Storage, part: Part, decode: Decode, max_bytes: int = MAX_PART_BYTES) -> pa.Table:
    """One part of an artifact.

    Raises DataError naming the part when it is missing, altered, truncated, too large, has another schema or another
    number of rows.
    """
    name = part["name"]
    try:
        data = storage.read_bytes(name, max_bytes)
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise ValueError("the file was altered or truncated: its SHA-256 is not the manifest's")
        table = decode(data, max_bytes)
        if table.num_rows != part["rows"]:
            raise ValueError(f"{table.num_rows} rows, the manifest says {part['rows']}")
        return table
    except FileNotFoundError:
        raise DataError(f"part {name}: it is missing from {storage}; {REPAIR}") from None
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"part {name}: {str(error).splitlines()[0]}; {REPAIR}") from None


def decode_parquet(data: bytes, schema: pa.Schema, max_bytes: int = MAX_PART_BYTES) -> pa.Table:
    """One Parquet file with these columns, metadata aside.

    What it says it unpacks to is looked at first: repeated values pack almost to nothing. Raises ValueError.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(schema):
            raise ValueError(f"columns {_columns(file.schema_arrow)} where {_columns(schema)} are expected")
        groups = [_row_group(file, k) for k in range(file.metadata.num_row_groups)]
        values = sum(group.column(k).num_values for group in groups for k in range(group.num_columns))
        unpacked = max(sum(group.total_byte_size for group in groups), values * np.dtype(np.int32).itemsize)
        if unpacked > max_bytes:
            raise ValueError(f"it unpacks to {unpacked} bytes, more than {max_bytes}")
        return file.read()
    except OSError as error:  # in memory, an OSError is a damaged file
        raise ValueError(str(error)) from None


def _row_group(file: pq.ParquetFile, number: int) -> pq.RowGroupMetaData:
    """What the file says of a row group. Raises OSError.

    pyarrow reads a column's entry when it is asked for it, and ends the process over one that contradicts itself; when
    a reader of the columns is made, which reads no value until it is asked, that is an error like others.
    """
    columns = list(range(file.metadata.num_columns))
    for _ in file.reader.iter_batches(0, row_groups=[number], column_indices=columns, use_threads=False):
        raise AssertionError("a batch of no rows")
    return file.metadata.row_group(number)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}{'' if field.nullable else ' not null'}" for field in schema)


class PartReader(ABC):
    """Random access by image id to the rows of a finished artifact; each kind of artifact has its own `decode`.

    Follows the manifest's list of parts, never the directory. The first access to an image of which nothing is known
    reads every part once, to learn which images it holds; who was told where an image is (`know`) reads that part only.
    Unpacked parts are kept while they fit into `cache_bytes`, the least recently used go first. Not for several threads
    at once; it can be pickled and then starts anew.

    Raises ValueError when there is no manifest, a part is not what the manifest says, or an image is in two parts.
    """

    @staticmethod
    @abstractmethod
    def decode(data: bytes, max_bytes: int) -> pa.Table:
        """The table of one part. Raises ValueError for what is none."""

    def __init__(self, storage: Storage, cache_bytes: int = CACHE_BYTES) -> None:
        self.storage = storage
        self.cache_bytes = cache_bytes
        self._parts: list[Part] = read_manifest(storage)["parts"]
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._known: dict[str, tuple[int, int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage, self.cache_bytes)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._index

    @property
    def image_ids(self) -> tuple[str, ...]:
        """In the order of parts and rows."""
        return tuple(self._index)

    def image_size(self, image_id: str) -> tuple[int, int]:
        """(height, width) in pixels, after EXIF rotation."""
        table, k = self._row(image_id)
        return table["image_height"][k].as_py(), table["image_width"][k].as_py()

    def place(self, image_id: str) -> tuple[int, int]:
        """(number of its part in the manifest, row in it). Raises KeyError for an image without a row."""
        known = self._known.get(image_id)
        return self._index[image_id] if known is None else known

    def know(self, image_id: str, place: tuple[int, int]) -> None:
        """Where another reader of the same artifact has found an image; believed when its row says so, too."""
        self._known[image_id] = place

    def _row(self, image_id: str) -> tuple[pa.Table, int]:
        """The table of its part and the row in it. Raises as `place`."""
        number, k = self.place(image_id)
        table = self._table(number)
        if k >= table.num_rows or table["image_id"][k].as_py() != image_id:
            raise ValueError(f"part {self._parts[number]['name']}: image {image_id!r} is not in row {k}; start again")
        return table, k

    @cached_property
    def _index(self) -> dict[str, tuple[int, int]]:
        index: dict[str, tuple[int, int]] = {}
        for number, table in self._all_tables():
            for k, image_id in enumerate(table["image_id"].to_pylist()):
                if image_id in index:
                    raise ValueError(f"part {self._parts[number]['name']}: image {image_id!r} was there already")
                index[image_id] = (number, k)
        return index

    def _all_tables(self) -> Iterator[tuple[int, pa.Table]]:
        """All parts in order, several being read at once: a network disk answers many."""
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(0, len(self._parts), READERS):
                numbers = range(first, min(first + READERS, len(self._parts)))
                for number, table in zip(numbers, pool.map(self._read, numbers), strict=True):
                    yield number, self._keep(number, table)

    def _table(self, number: int) -> pa.Table:
        table = self._cache.get(number)
        return self._keep(number, self._read(number) if table is None else table)

    def _read(self, number: int) -> pa.Table:
        return read_part(self.storage, self._parts[number], type(self).decode)

    def _keep(self, number: int, table: pa.Table) -> pa.Table:
        if number not in self._cache:
            self._cached_bytes += table.nbytes
            self._cache[number] = table
        self._cache.move_to_end(number)
        while len(self._cache) > 1 and self._cached_bytes > self.cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return table
