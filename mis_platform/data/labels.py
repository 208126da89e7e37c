"""Labelled objects as training targets, as supervised SimpleClick learns from them (RITM's point sampler).

For the label fractions of the paper's Table 2, and for supervised training. Nothing here is used by an unsupervised
run, except that one proposal is a target too.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mis_platform.config import DataConfig, TargetConfig
from mis_platform.data.benchmarks import LAYOUTS, Dataset
from mis_platform.data.images import ImageRefused
from mis_platform.data.masks import is_buggy
from mis_platform.errors import DataError
from mis_platform.storage import READERS

MERGE_PROBABILITY = 0.15  # of two objects becoming one target (SimpleClick)
CACHED_IMAGES = 16  # whose objects a process keeps: a small share of the labels is visited often


class Target(NamedTuple):
    """What an example is about."""

    mask: np.ndarray  # bool [S, S], the object, or the union of two; all False in a background sample
    other: np.ndarray | None  # bool [S, S], the objects that were not chosen; None: there are none
    parts: tuple[np.ndarray, ...]  # bool [S, S], the objects whose union `mask` is; empty unless there are two


def labelled_subset(dataset: Dataset, target: TargetConfig) -> Dataset:
    """The images whose labels `target` allows to see, in the order of `dataset`.

    Raises DataError when `dataset` has no masks.
    """
    if not dataset.is_labelled:
        wanted = dataset.root / LAYOUTS[dataset.name].masks
        raise DataError(
            f"target.source=labels needs object masks, {dataset.name} in {dataset.root} has photos only: "
            f"there is no folder {wanted}"
        )
    if target.subset == "random":
        return dataset.subset(target.fraction, target.subset_seed)
    return dataset.first_lines(target.fraction)


def images_with_objects(dataset: Dataset, limits: DataConfig) -> tuple[str, ...]:
    """Ids of the images that have an object to learn from; decodes all masks (about a minute for all of SBD).

    Raises DataError for a mask that cannot be read and when no image is left, ImageRefused for a photo whose header is
    damaged or outside `limits`: what is labelled by hand should not go missing unnoticed.
    """

    def has_object(image_id: str) -> bool:
        _check_photo(dataset, image_id, limits)
        return bool(objects_of(dataset, image_id))

    with ThreadPoolExecutor(READERS) as pool:
        usable = list(pool.map(has_object, dataset.image_ids))
    image_ids = tuple(image_id for image_id, is_usable in zip(dataset.image_ids, usable) if is_usable)
    if not image_ids:
        raise DataError(f"none of the {len(dataset)} images of {dataset.name} in {dataset.root} has a usable object")
    return image_ids


def objects_of(dataset: Dataset, image_id: str) -> tuple[np.ndarray, ...]:
    """The objects to learn from, bool [H, W] in pixels of the image; none for an image without a mask file.

    Left out are objects without a pixel and, of SBD, those that fill less than 8 % of their bounding box (RITM's
    training reader). Ignored pixels count as background: the losses know two classes, and SBD has none.
    Raises DataError as `Dataset.read_objects` does.
    """
    return _objects(dataset.alone(image_id))


def choose_target(objects: Sequence[np.ndarray], rng: np.random.Generator) -> Target:
    """One of the objects that an augmented crop shows, or, with MERGE_PROBABILITY, the union of two of them.

    objects: bool [S, S] each, at least one; empty ones are gone from the crop. Of a single object nothing is drawn.
    """
    left = [each for each in objects if each.any()]
    if len(left) < 2:
        return Target(left[0] if left else np.zeros_like(objects[0]), None, ())
    count = 2 if rng.random() < MERGE_PROBABILITY else 1
    chosen = rng.permutation(len(left))[:count].tolist()
    parts = tuple(left[k] for k in chosen)
    rest = [left[k] for k in range(len(left)) if k not in chosen]
    return Target(
        mask=np.logical_or.reduce(parts),
        other=np.logical_or.reduce(rest) if rest else None,
        parts=parts if count > 1 else (),
    )


@functools.lru_cache(maxsize=CACHED_IMAGES)
def _objects(photo: Dataset) -> tuple[np.ndarray, ...]:
    """Of a data set of one image: a small key, where hashing thousands of samples would take longer than reading."""
    (sample,) = photo.samples
    if not sample.masks:
        return ()
    masks = [each.mask == 1 for each in photo.read_objects(sample.image_id)]
    if photo.name == "sbd":
        masks = [mask for mask in masks if not is_buggy(mask)]
    return tuple(mask for mask in masks if mask.any())


def _check_photo(dataset: Dataset, image_id: str, limits: DataConfig) -> None:
    try:
        dataset.probe_size(image_id, max_megapixels=limits.max_megapixels, min_side=limits.min_side)
    except ImageRefused as error:
        raise ImageRefused(error.reason, f"{dataset.image_path(image_id)}: {error.message}") from None
