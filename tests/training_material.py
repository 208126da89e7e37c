"""A few real photos with merge trees of their mean colours, or labelled noise: all that a training needs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mis_platform.artifacts import Output, Part, Stage, ensure, sha256
from mis_platform.config import Run
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.images import read_image
from mis_platform.data.synthetic import write_photos
from mis_platform.data.trees import rows_to_table, tree_row
from mis_platform.simulation.ward import merge
from mis_platform.storage import Storage

PATCH = 16  # pixels


def make_material(folder: Path, count: int) -> tuple[Dataset, Storage]:
    """`count` photos in folder/photos and the finished trees artifact of them below folder/artifacts."""
    write_photos(folder / "photos", count=count)
    dataset = open_dataset(f"folder:{folder / 'photos'}")
    return dataset, ensure(trees_stage(dataset), Storage(str(folder / "artifacts")))


def trees_stage(dataset: Dataset) -> Stage:
    def run(inputs: dict[str, Storage], out: Storage) -> Output:
        rows = []
        for image_id in dataset.image_ids:
            image = read_image(dataset.image_path(image_id), max_megapixels=50, min_side=8)
            height, width = image.shape[0] // PATCH, image.shape[1] // PATCH
            patches = image[: height * PATCH, : width * PATCH].reshape(height, PATCH, width, PATCH, 3)
            features = patches.mean(axis=(1, 3)).astype(np.float32)
            rows.append(tree_row(image_id, image.shape[:2], merge(features)))
        buffer = pa.BufferOutputStream()
        pq.write_table(rows_to_table(rows), buffer)
        data = buffer.getvalue().to_pybytes()
        out.write_bytes("part-0.parquet", data)
        part = Part(name="part-0.parquet", rows=len(rows), bytes=len(data), sha256=sha256(data), digest=sha256(data))
        return Output(parts=(part,), digest=part.digest)

    return Stage(name="trees", version=1, config={"images": list(dataset.image_ids)}, run=run)


def tiny_run(**train: object) -> Run:
    """The smallest model at 224 pixels from random weights; `train`: settings of TrainConfig."""
    return Run.model_validate(
        {"model": {"variant": "vit_xt", "image_size": 224, "init": "random"}, "train": {"learning_rate": 1e-4, **train}}
    )


def make_labelled(folder: Path, count: int, size: int = 224) -> Dataset:
    """`count` square photos of noise in the generic layout, each with three square objects (masks STEM_1 to STEM_3)."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / "images" / f"{k:03d}.png")
        for number, mask in enumerate(three_squares(size), 1):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{k:03d}_{number}.png")
    return open_dataset(f"folder:{folder}")


def three_squares(size: int = 224) -> list[np.ndarray]:
    """bool [size, size] each: objects of 48, 64 and 80 pixels, apart from each other."""
    masks = [np.zeros((size, size), bool) for _ in range(3)]
    for mask, (top, left, side) in zip(masks, ((10, 10, 48), (10, 120, 64), (120, 20, 80)), strict=True):
        mask[top : top + side, left : left + side] = True
    return masks
