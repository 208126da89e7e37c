"""Small photos, and what precompute should make of them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mis_platform.artifacts import Output, combine_digests
from mis_platform.config import DataConfig, FeaturesConfig, Resources
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.images import read_image
from mis_platform.data.trees import tree_row
from mis_platform.model.features import build_extractor
from mis_platform.simulation.ward import merge
from mis_platform.stages import precompute
from mis_platform.stages.products import TREES_PRODUCT
from mis_platform.storage import Storage

FEATURES = FeaturesConfig(extractor="color_texture")


def write_photos(folder: Path, count: int, scale: int = 1) -> Dataset:
    """Photos of blurred noise, sides of 30 to 70 times `scale` pixels; a few share a size, one has an EXIF rotation."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        height, width = (40 * scale, 56 * scale) if k % 3 == 0 else rng.integers(30, 70, 2) * scale
        blobs = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if k == 1 else 1
        image.save(folder / f"photo_{k:03d}.jpg", quality=95, exif=exif)
    return open_dataset(f"folder:{folder}")


def run(dataset: Dataset, out: Path | Storage, **resources: Any) -> Output:
    storage = out if isinstance(out, Storage) else Storage(str(out))
    return precompute.precompute(dataset, FEATURES, DataConfig(), Resources(**resources), storage)


def listed(dataset: Dataset) -> list[precompute.Photo]:
    return [precompute.Photo(image_id, os.fsencode(dataset.image_path(image_id))) for image_id in dataset.image_ids]


def row_of(dataset: Dataset, image_id: str) -> dict[str, Any]:
    """The row computed here and now, step by step, with the public functions."""
    image = read_image(dataset.image_path(image_id))
    extractor = build_extractor(FEATURES)
    features = extractor(extractor.prepare(image)[None])[0]
    return tree_row(image_id, image.shape[:2], merge(features, extractor.grid(*image.shape[:2])))


def expected_rows(dataset: Dataset) -> list[dict[str, Any]]:
    return [row_of(dataset, image_id) for image_id in dataset.image_ids]


def expected_digest(dataset: Dataset) -> str:
    return combine_digests([TREES_PRODUCT.digest(row) for row in expected_rows(dataset)])


def rows_in(out: Path) -> dict[str, dict[str, Any]]:
    """image id -> row, as any Parquet reader sees them."""
    rows = [row for path in sorted(out.glob("trees-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["image_id"] for row in rows}) == len(rows), "an image is there twice"
    return {row["image_id"]: row for row in rows}


def quarantine_in(out: Path) -> dict[str, tuple[str, str]]:
    """image id -> (stage, reason)."""
    rows = pq.read_table(out / "quarantine.parquet").to_pylist()
    return {row["image_id"]: (row["stage"], row["reason"]) for row in rows}


def files_of(out: Path) -> dict[str, tuple[int, int]]:
    """name -> (inode, time of the last change) of each part: a part that is written again gets another inode."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("trees-*.parquet")}
