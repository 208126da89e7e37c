"""What precompute makes of a photo and its patch features: a merge tree, or the proposals of another method.

A product knows its rows: how one is made, its schema, and the digest of its content. `precompute` does the rest.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from mis_platform.baselines.sources import DRAWING, propose
from mis_platform.config import SourcesConfig
from mis_platform.data import proposals
from mis_platform.data.schemas import PROPOSALS, TREES
from mis_platform.data.trees import rows_to_table, tree_row
from mis_platform.simulation import ward

Row = dict[str, Any]


class Product(Protocol):
    """One kind of row per photo."""

    name: ClassVar[str]  # of the stage, for people and as the start of the parts' names
    step: ClassVar[str]  # of a photo's way that `make` is, for the quarantine
    schema: ClassVar[pa.Schema]
    encoding: ClassVar[Mapping[str, str]]  # column -> Parquet encoding, where another packs better than plain values
    needs_pixels: ClassVar[bool]

    @property
    def is_drawn(self) -> bool:
        """Whether `make` draws by the image's id, so that files with the same content have rows of their own."""

    def __hash__(self) -> int:
        """Equal products make equal rows: a process keeps what it prepared for one."""

    def warm_up(self) -> None:
        """Compile or load what `make` needs, once a process."""

    def make(self, image_id: str, size: tuple[int, int], features: np.ndarray, pixels: np.ndarray | None) -> Row:
        """The row of a photo of (height, width) pixels.

        features: float32 [gh, gw, C]; pixels: uint8 [H, W, 3], or None where `needs_pixels` is not set.
        """

    def digest(self, row: Mapping[str, Any]) -> str:
        """SHA-256 of the content of one row, whatever file it is in."""

    def table(self, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
        """Rows as a table with the schema."""


@dataclass(frozen=True)
class Trees:
    """Merge trees (Algorithm 1)."""

    name: ClassVar[str] = "trees"
    step: ClassVar[str] = "merge"
    schema: ClassVar[pa.Schema] = TREES
    needs_pixels: ClassVar[bool] = False
    # Differences of node ids and split bytes of costs pack a quarter smaller than plain values.
    encoding: ClassVar[Mapping[str, str]] = {
        "children.list.element": "DELTA_BINARY_PACKED",
        "costs.list.element": "BYTE_STREAM_SPLIT",
    }

    @property
    def is_drawn(self) -> bool:
        """As `Product.is_drawn`: merging draws nothing."""
        return False

    def warm_up(self) -> None:
        """Compile the merging, or load it from numba's cache."""
        ward.warm_up()

    def make(self, image_id: str, size: tuple[int, int], features: np.ndarray, pixels: np.ndarray | None) -> Row:
        """As `Product.make`: the merge tree of the features."""
        return tree_row(image_id, size, ward.merge(features))

    def digest(self, row: Mapping[str, Any]) -> str:
        """As `Product.digest`, over little-endian int32 children and float32 costs."""
        head = [row[name] for name in TREES.names[:-2]]
        digest = hashlib.sha256(json.dumps(head).encode())
        digest.update(np.asarray(row["children"], "<i4").tobytes())
        digest.update(np.asarray(row["costs"], "<f4").tobytes())
        return digest.hexdigest()

    def table(self, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
        """As `Product.table`."""
        return rows_to_table(rows)


@dataclass(frozen=True)
class SourceProposals:
    """Masks of TokenCut, Deep Spectral Methods or FreeMask (Table 1's unsupervised baselines)."""

    source: str
    settings: SourcesConfig
    name: ClassVar[str] = "proposals"
    step: ClassVar[str] = "propose"
    schema: ClassVar[pa.Schema] = PROPOSALS
    needs_pixels: ClassVar[bool] = True
    encoding: ClassVar[Mapping[str, str]] = {"masks.list.element.list.element": "DELTA_BINARY_PACKED"}

    @property
    def is_drawn(self) -> bool:
        """As `Product.is_drawn`."""
        return self.source in DRAWING

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def make(self, image_id: str, size: tuple[int, int], features: np.ndarray, pixels: np.ndarray | None) -> Row:
        """As `Product.make`; random choices depend on the image's id alone."""
        assert pixels is not None
        # Random choices are the photo's own, not those of the process that happens to take it.
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big"))
        return proposals.proposal_row(image_id, propose(self.source, pixels, features, self.settings, rng))

    def digest(self, row: Mapping[str, Any]) -> str:
        """As `Product.digest`."""
        return proposals.row_digest(row)

    def table(self, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
        """As `Product.table`."""
        return proposals.rows_to_table(rows)


TREES_PRODUCT = Trees()
