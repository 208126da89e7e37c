"""Training examples as a pure function of their number: photo, target, augmentation and clicks of number k.

The whole training is one stream of k = 0, 1, 2, ...; visit e of all photos is k = e*n ... e*n + n-1, in an order of its
own. Everything random about an example comes from (seed, k), so it is the same whoever makes it, in whatever order.

Augmentation has SimpleClick's steps and settings for SBD (albumentations 0.5.2). The geometric ones are composed into
one affine map, so that a photo is interpolated once and photo and mask cannot drift apart. Coordinates are (x, y) with
pixel edges at whole numbers, unless said otherwise.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from mis_platform.config import AugmentConfig, Run
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.images import ImageRefused
from mis_platform.data.labels import choose_target, images_with_objects, labelled_subset, objects_of
from mis_platform.data.proposals import ProposalReader
from mis_platform.data.trees import TreeReader
from mis_platform.simulation.clicks import sample_clicks
from mis_platform.simulation.proposals import mask_at_image_size
from mis_platform.simulation.sampling import draw_proposal
from mis_platform.storage import Storage

MAX_AUGMENTATIONS = 100  # draws for one example; then a crop without the object is kept

# What a random stream is for: streams of different purposes are independent.
ORDER, EXAMPLE, NETWORK, PASSES, COLORS = range(5)


class Example(NamedTuple):
    """One training example at S = model.image_size."""

    image: np.ndarray  # uint8 [S, S, 3], RGB
    mask: np.ndarray  # uint8 [S, S]: 1 object, 0 background; all 0 in a background sample
    points: np.ndarray  # float32 [2 * clicks.max_clicks, 3]: rows (row, column, order), positives first, unused -1
    image_id: str
    number: int  # k


@dataclass(frozen=True)
class ExampleStream:
    """The training examples of a run, by number."""

    dataset: Dataset
    proposals: Storage | None  # a finished trees or proposals artifact; None: targets are labelled objects
    image_ids: tuple[str, ...]  # photos that have a tree, a proposal or an object
    run: Run
    # int32 [n, 2]: where the proposals of each photo are, see `PartReader.place`; it saves each process that makes
    # examples reading all of them first.
    places: np.ndarray | None = field(default=None, compare=False, repr=False)

    def visit(self, number: int) -> tuple[int, str]:
        """(epoch, image id) of example `number`; every epoch visits each photo once, in a new order."""
        epoch, photo = self._visit(number)
        return epoch, self.image_ids[photo]

    def _visit(self, number: int) -> tuple[int, int]:
        """(epoch, index of the photo in `image_ids`)."""
        epoch, position = divmod(number, len(self.image_ids))
        return epoch, int(_order(self.run.train.seed, epoch, len(self.image_ids))[position])

    def example(self, number: int) -> Example:
        """Example `number` >= 0: a fresh proposal (Algorithm 2) or object of its photo, augmented, with clicks.

        Raises ImageRefused when the photo cannot be read any more, ValueError when it is not the one that was
        precomputed or its tree is damaged.
        """
        run = self.run
        _, photo = self._visit(number)
        image_id = self.image_ids[photo]
        rng = generator(run.train.seed, EXAMPLE, number)
        image = self._read(image_id)
        if self.proposals is None:
            objects = objects_of(self.dataset, image_id)
        else:
            objects = (self._draw_mask(self.proposals, photo, image.shape[:2], rng),)
        crop, moved = augment(image, objects, run.model.image_size, run.augment, rng)
        target = choose_target(moved, rng)
        points = sample_clicks(target.mask, rng, run.clicks, target.other, target.parts)
        return Example(crop, target.mask.astype(np.uint8), points, image_id, number)

    def _read(self, image_id: str) -> np.ndarray:
        path, limits = self.dataset.image_path(image_id), self.run.data
        try:
            return self.dataset.read_image(image_id, max_megapixels=limits.max_megapixels, min_side=limits.min_side)
        except ImageRefused as error:
            raise ImageRefused(error.reason, f"{path}: {error.message}") from None

    def columns(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Examples of the numbers in the column `number`, a column for each field of Example; for Ray Data tasks."""
        cv2.setNumThreads(1)  # tasks run side by side
        made = [self.example(int(number)) for number in rows["number"]]
        return {name: np.stack(column) for name, column in zip(Example._fields, zip(*made), strict=True)}

    def _draw_mask(self, proposals: Storage, photo: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """A proposal at image size, bool [H, W]: of a tree by Algorithm 2, else any of the photo's masks."""
        reader, image_id = _reader(proposals, self.run.target.source), self.image_ids[photo]
        if self.places is not None:
            reader.know(image_id, (int(self.places[photo, 0]), int(self.places[photo, 1])))
        if reader.image_size(image_id) != size:
            raise ValueError(
                f"photo {image_id!r} is {size[0]}x{size[1]} pixels (height x width), but was "
                "{}x{} when its proposals were made; run mis precompute again".format(*reader.image_size(image_id))
            )
        if isinstance(reader, ProposalReader):
            return reader.mask(image_id, int(rng.integers(reader.count(image_id))))
        sampling = self.run.sampling
        proposal = draw_proposal(
            reader.tree(image_id),
            rng,
            strategy=sampling.strategy,
            alpha=sampling.alpha,
            min_area=sampling.min_area,
            max_redraws=sampling.max_redraws,
        )
        return mask_at_image_size(proposal.mask, *size)


def open_stream(dataset: Dataset, proposals: Storage | None, run: Run) -> ExampleStream:
    """The examples of `run` on the photos of `dataset` that have a proposal (refused ones have none).

    proposals: None for target.source=labels; then on the photos of the labelled subset that have an object.
    Raises ValueError when no photo has one, or the artifact is damaged; DataError for masks that are missing or cannot
    be read, ImageRefused for a labelled photo that is no usable file.
    """
    if run.target.source == "labels":
        subset = labelled_subset(dataset, run.target)
        return ExampleStream(subset, None, images_with_objects(subset, run.data), run)
    assert proposals is not None, "only labels need no proposals"
    reader = _reader(proposals, run.target.source)
    image_ids = tuple(image_id for image_id in dataset.image_ids if image_id in reader)
    if isinstance(reader, ProposalReader):  # a method may find nothing in a photo
        image_ids = tuple(image_id for image_id in image_ids if reader.count(image_id))
    if not image_ids:
        raise ValueError(
            f"none of the {len(dataset.image_ids)} photos of {dataset.name} has a proposal in {proposals}; "
            "its quarantine file says why"
        )
    places = np.array([reader.place(image_id) for image_id in image_ids], np.int32)
    return ExampleStream(dataset, proposals, image_ids, run, places)


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """The random stream of (seed, purpose, number): independent of all others."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, purpose, number))))


@functools.lru_cache(maxsize=1)  # a process makes examples of one run at a time
def _reader(proposals: Storage, source: str) -> TreeReader | ProposalReader:
    return TreeReader(proposals) if source == "tree" else ProposalReader(proposals)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, ORDER, epoch).permutation(count)


# -- augmentation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of a crop come from."""

    to_source: np.ndarray  # float64 [2, 3]: centre of a crop pixel -> centre of a photo pixel, both (x, y) from 0
    size: int  # pixels: side of the crop
    rows: slice  # of the crop, that the moved photo's frame covers; the rest is padding
    columns: slice

    def move_mask(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mask, inside), both bool [size, size]: the nearest pixel of a mask [H, W]; which pixels show the photo."""
        labels = self._warp(mask.astype(np.uint8) + np.uint8(1), cv2.INTER_NEAREST, cv2.BORDER_CONSTANT)
        return labels == 2, labels > 0

    def move_image(self, image: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """uint8 [size, size, 3]: a photo [H, W, 3], bilinear; black outside."""
        # Borders repeat so that they do not fade into the black around them; `inside` cuts where the mask is cut.
        crop = self._warp(image, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        return cv2.copyTo(crop, inside.view(np.uint8))

    def _warp(self, pixels: np.ndarray, interpolation: int, border: int) -> np.ndarray:
        crop = np.zeros((self.size, self.size, *pixels.shape[2:]), pixels.dtype)
        window = self.to_source @ _translation(self.columns.start, self.rows.start)
        width, height = self.columns.stop - self.columns.start, self.rows.stop - self.rows.start
        flags = interpolation | cv2.WARP_INVERSE_MAP
        crop[self.rows, self.columns] = cv2.warpAffine(
            pixels, window, (width, height), flags=flags, borderMode=border, borderValue=0
        )
        return crop


def augment(
    image: np.ndarray, objects: Sequence[np.ndarray], size: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(crop uint8 [size, size, 3], masks bool [size, size]) of a photo uint8 [H, W, 3] and objects, bool [H, W] each.

    A crop that has lost all objects is drawn again, but kept with probability `keep_background_probability`. Only then
    are objects smaller than `min_object_area` pixels removed (RITM), so background samples can come from both.
    """
    height, width = image.shape[:2]
    for _ in range(MAX_AUGMENTATIONS):
        geometry = draw_geometry(height, width, size, config, rng)
        moves = [geometry.move_mask(mask) for mask in objects]
        if any(moved.any() for moved, _ in moves) or rng.random() < config.keep_background_probability:
            break
    inside = moves[0][1]
    crop = cv2.LUT(geometry.move_image(image, inside), draw_colors(config, rng)[None])
    kept = [moved if np.count_nonzero(moved) >= config.min_object_area else np.zeros_like(moved) for moved, _ in moves]
    return crop, kept


def draw_geometry(height: int, width: int, size: int, config: AugmentConfig, rng: np.random.Generator) -> Geometry:
    """Rescale, flip, turn by quarters, shift and rotate a little, pad to `size` and crop, in this order."""
    scale = rng.uniform(config.scale_min, config.scale_max)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))  # of the moved photo
    forward = np.diag([w / width, h / height, 1.0])
    if rng.random() < config.flip_probability:
        flip_x, flip_y = ((True, False), (False, True), (True, True))[rng.integers(3)]
        forward = _flip(w, h, flip_x, flip_y) @ forward
    if rng.random() < config.rotate90_probability:
        for _ in range(rng.integers(4)):
            forward = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, w], [0.0, 0.0, 1.0]]) @ forward  # like numpy.rot90
            w, h = h, w
    if rng.random() < config.shift_rotate_probability:
        degrees = rng.uniform(-config.rotate_limit, config.rotate_limit)
        dx, dy = rng.uniform(-config.shift_limit, config.shift_limit, size=2)
        forward = _translation(dx * w, dy * h) @ _rotation(math.radians(degrees), w / 2, h / 2) @ forward
    # Where the moved photo begins in the crop: padding is split evenly, a crop position is uniform.
    x, y = ((size - side) // 2 if side < size else -int(rng.integers(side - size + 1)) for side in (w, h))
    forward = _translation(x, y) @ forward
    centres = _translation(-0.5, -0.5) @ np.linalg.inv(forward) @ _translation(0.5, 0.5)
    rows, columns = (slice(max(0, at), min(size, at + side)) for at, side in ((y, h), (x, w)))
    return Geometry(centres[:2], size, rows, columns)


def draw_colors(config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Brightness and contrast, then a shift per channel, as a table: uint8 [256, 3], old level -> new level."""
    levels = np.repeat(np.arange(256.0)[:, None], 3, axis=1)
    if rng.random() < config.brightness_contrast_probability:
        contrast = rng.uniform(config.contrast_min, config.contrast_max)
        brightness = rng.uniform(-config.brightness_limit, config.brightness_limit)
        levels = np.clip(levels * (1 + contrast) + 255 * brightness, 0, 255)
    if rng.random() < config.rgb_shift_probability:
        levels = levels + rng.uniform(-config.rgb_shift_limit, config.rgb_shift_limit, size=3)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _translation(dx: float, dy: float) -> np.ndarray:
    return np.array([[1.0, 0.0, dx], [0.0, 1.0, dy], [0.0, 0.0, 1.0]])


def _rotation(angle: float, x: float, y: float) -> np.ndarray:
    """By `angle` radians about (x, y)."""
    cos, sin = math.cos(angle), math.sin(angle)
    return _translation(x, y) @ np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]]) @ _translation(-x, -y)


def _flip(width: int, height: int, flip_x: bool, flip_y: bool) -> np.ndarray:
    x = (-1.0, width) if flip_x else (1.0, 0.0)
    y = (-1.0, height) if flip_y else (1.0, 0.0)
    return np.array([[x[0], 0.0, x[1]], [0.0, y[0], y[1]], [0.0, 0.0, 1.0]])
