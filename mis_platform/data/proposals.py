"""Masks of other proposal methods as Parquet rows, and a reader that finds those of a photo without loading all."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mis_platform.data import parts
from mis_platform.data.parts import MAX_PART_BYTES, PartReader
from mis_platform.data.schemas import PROPOSALS

_HEAD = ("image_id", "image_height", "image_width")


class Proposals(NamedTuple):
    """The masks of one photo; there may be none."""

    masks: np.ndarray  # bool [K, H, W], pixels of the photo
    scores: np.ndarray  # float32 [K], the method's confidence in each; 1 where it has no opinion


# -- rows ------------------------------------------------------------------------------------------------------------


def proposal_row(image_id: str, proposals: Proposals) -> dict[str, Any]:
    """The row of one photo."""
    masks, scores = proposals.masks, proposals.scores
    assert masks.dtype == bool, masks.dtype
    assert masks.ndim == 3, masks.shape
    assert scores.shape == masks.shape[:1], (scores.shape, masks.shape)
    return {
        "image_id": image_id,
        "image_height": masks.shape[1],
        "image_width": masks.shape[2],
        "scores": scores.astype(np.float32),
        "areas": masks.sum(axis=(1, 2), dtype=np.int32),
        "masks": [encode_mask(mask) for mask in masks],
    }


def row_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 of the content of a row in hexadecimal, however its lists are held and whatever file it is in."""
    digest = hashlib.sha256(json.dumps([*(row[name] for name in _HEAD), *map(len, row["masks"])]).encode())
    digest.update(np.asarray(row["scores"], "<f4").tobytes())
    digest.update(np.asarray(row["areas"], "<i4").tobytes())
    for runs in row["masks"]:
        digest.update(np.asarray(runs, "<i4").tobytes())
    return digest.hexdigest()


def rows_to_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows of `proposal_row` as a table with the schema PROPOSALS."""
    return pa.Table.from_pylist(list(rows), schema=PROPOSALS)


def encode_mask(mask: np.ndarray) -> np.ndarray:
    """Run lengths of a mask, int32, in the order of COCO's uncompressed RLE. mask: bool [H, W].

    Column by column; zeros and ones take turns, zeros begin, so that a mask with its first pixel set begins with 0.
    """
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    edges = np.concatenate([[0], changes, [pixels.size]])
    first = [0] if pixels.size and pixels[0] else []
    return np.concatenate([first, np.diff(edges)]).astype(np.int32)


def decode_mask(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool [height, width], the inverse of `encode_mask`. Raises ValueError for runs that make no such mask."""
    runs = np.asarray(runs, np.int64)
    if (runs < 0).any():
        raise ValueError(f"a run of {runs.min()} pixels")
    if runs.sum() != height * width:
        raise ValueError(f"runs of {runs.sum()} pixels together, a mask of {height}x{width} has {height * width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def check_row(row: Mapping[str, Any]) -> None:
    """Raises ValueError for a row of PROPOSALS whose columns do not fit each other or whose masks are none."""
    if not len(row["masks"]) == len(row["areas"]) == len(row["scores"]):
        raise ValueError(f"{len(row['masks'])} masks, {len(row['areas'])} areas, {len(row['scores'])} scores")
    for number, (runs, area) in enumerate(zip(row["masks"], row["areas"], strict=True)):
        covered = np.count_nonzero(decode_mask(runs, row["image_height"], row["image_width"]))
        if covered != area:
            raise ValueError(f"mask {number} covers {covered} pixels, its area says {area}")


def best_overlap_of_masks(masks: np.ndarray, object_mask: np.ndarray) -> tuple[float, int]:
    """The best IoU any mask reaches with an object, in [0, 1], and its number (the first of equals).

    masks: bool [K, H, W]; object_mask: int8 [H, W]: 1 object, 0 not, -1 ignored (counted nowhere). No masks give
    (0.0, -1), an object without pixels (0.0, 0) as in `simulation.proposals.best_overlap`.
    """
    assert masks.shape[1:] == object_mask.shape, (masks.shape, object_mask.shape)
    if not len(masks):
        return 0.0, -1
    is_object, is_valid = object_mask == 1, object_mask != -1
    inside = np.count_nonzero(masks & is_object, axis=(1, 2))
    union = np.count_nonzero((masks | is_object) & is_valid, axis=(1, 2))
    ious = inside / np.maximum(union, 1)
    best = int(ious.argmax())
    return float(ious[best]), best


# -- reader ----------------------------------------------------------------------------------------------------------


def decode(data: bytes, max_bytes: int = MAX_PART_BYTES) -> pa.Table:
    """The table of one Parquet file of proposals. Raises ValueError."""
    return parts.decode_parquet(data, PROPOSALS, max_bytes)


class ProposalReader(PartReader):
    """Random access by image id to the masks of a finished artifact; see `PartReader`.

    Photos in which nothing was found are among its images. The methods below raise KeyError for an image without a row
    and ValueError, naming part and image, for a damaged row.
    """

    decode = staticmethod(decode)

    def count(self, image_id: str) -> int:
        """How many masks the photo has, from 0."""
        table, k = self._row(image_id)
        return len(table["masks"][k])

    def scores(self, image_id: str) -> np.ndarray:
        """float32 [K]."""
        table, k = self._row(image_id)
        return table["scores"][k].values.to_numpy()

    def mask(self, image_id: str, number: int) -> np.ndarray:
        """Mask `number` in 0..count-1, bool [H, W]."""
        assert 0 <= number < self.count(image_id), (number, image_id)
        return self._decode(image_id, number)

    def masks(self, image_id: str) -> np.ndarray:
        """bool [K, H, W]."""
        masks = np.empty((self.count(image_id), *self.image_size(image_id)), bool)
        for number in range(len(masks)):
            masks[number] = self._decode(image_id, number)
        return masks

    def _decode(self, image_id: str, number: int) -> np.ndarray:
        table, k = self._row(image_id)
        mask_runs, areas = table["masks"][k].values, table["areas"][k].values
        try:
            if not len(mask_runs) == len(areas) == len(table["scores"][k]):
                raise ValueError(f"{len(mask_runs)} masks, {len(areas)} areas, {len(table['scores'][k])} scores")
            mask = decode_mask(mask_runs[number].values.to_numpy(), *self.image_size(image_id))
            if np.count_nonzero(mask) != areas[number].as_py():
                raise ValueError(f"it covers {np.count_nonzero(mask)} pixels, its area says {areas[number]}")
        except ValueError as error:
            part = self._parts[self.place(image_id)[0]]["name"]
            raise ValueError(f"part {part}: image {image_id!r}: mask {number}: {error}") from None
        return mask
