"""Parquet parts of an artifact, checked against the manifest's entry before anything in them is believed."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mis_platform.artifacts import REPAIR
from mis_platform.errors import DataError
from mis_platform.storage import Storage

Part = Mapping[str, Any]  # an entry of the manifest's "parts": name, rows, sha256, ...

MAX_PART_BYTES = 2**30  # of a part, packed or unpacked


def read_part(
    storage: Storage, part: Part, decode: Callable[[bytes, int], pa.Table], max_bytes: int = MAX_PART_BYTES
) -> pa.Table:
    """One part of an artifact. decode: (content, max_bytes) -> table, raises ValueError for what is none.

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
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        values = sum(group.column(k).num_values for group in groups for k in range(group.num_columns))
        unpacked = max(sum(group.total_byte_size for group in groups), values * np.dtype(np.int32).itemsize)
        if unpacked > max_bytes:
            raise ValueError(f"it unpacks to {unpacked} bytes, more than {max_bytes}")
        return file.read()
    except OSError as error:  # in memory, an OSError is a damaged file
        raise ValueError(str(error)) from None


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}{'' if field.nullable else ' not null'}" for field in schema)
