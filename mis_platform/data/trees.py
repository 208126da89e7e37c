"""Merge trees as Parquet rows, and a reader that finds the tree of an image without loading all of them at once."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mis_platform.data import parts
from mis_platform.data.parts import MAX_PART_BYTES, PartReader
from mis_platform.data.schemas import TREES, check_version
from mis_platform.simulation.tree import MergeTree


def tree_row(image_id: str, image_size: tuple[int, int], tree: MergeTree) -> dict[str, Any]:
    """The row of one image. image_size: (height, width) in pixels, after EXIF rotation."""
    return {
        "image_id": image_id,
        "image_height": image_size[0],
        "image_width": image_size[1],
        "grid_height": tree.grid[0],
        "grid_width": tree.grid[1],
        "children": tree.children.reshape(-1),
        "costs": tree.costs,
    }


def rows_to_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows of `tree_row` as a table with the schema TREES."""
    return pa.Table.from_pylist(list(rows), schema=TREES)


def tree_from_row(row: Mapping[str, Any]) -> MergeTree:
    """The tree of a row. Raises ValueError naming the image when the row does not hold a valid tree."""
    children, costs = np.asarray(row["children"], np.int32), np.asarray(row["costs"], np.float32)
    try:
        if min(row["image_height"], row["image_width"], row["grid_height"], row["grid_width"]) < 1:
            raise ValueError("image and grid must have at least one pixel and one patch on each side")
        if len(children) % 2:
            raise ValueError(f"{len(children)} children do not make pairs")
        tree = MergeTree(children.reshape(-1, 2), costs, (row["grid_height"], row["grid_width"]))
        tree.validate()
    except ValueError as error:
        raise ValueError(f"image {row['image_id']!r}: {error}") from None
    return tree


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table with the schema TREES, lists as NumPy arrays that share its memory."""
    return (_row(table, k) for k in range(table.num_rows))


def _row(table: pa.Table, k: int) -> dict[str, Any]:
    cells = {name: table[name][k] for name in table.column_names}
    return {
        name: cell.values.to_numpy(zero_copy_only=False) if pa.types.is_list(cell.type) else cell.as_py()
        for name, cell in cells.items()  # lists of lists cannot share memory
    }


def decode(data: bytes, max_bytes: int = MAX_PART_BYTES) -> pa.Table:
    """The table of one Parquet file of trees. Raises ValueError, also for a version that cannot be read here."""
    try:
        check_version(pq.read_schema(pa.BufferReader(data)))
    except OSError as error:  # in memory, an OSError is a damaged file
        raise ValueError(str(error)) from None
    return parts.decode_parquet(data, TREES, max_bytes)


class TreeReader(PartReader):
    """Random access by image id to the trees of a finished artifact; see `PartReader`."""

    decode = staticmethod(decode)

    def tree(self, image_id: str) -> MergeTree:
        """Raises KeyError when the image has none, ValueError naming part and image when it is not a valid tree."""
        table, k = self._row(image_id)
        try:
            return tree_from_row(_row(table, k))
        except ValueError as error:
            raise ValueError(f"part {self._parts[self.place(image_id)[0]]['name']}: {error}") from None
