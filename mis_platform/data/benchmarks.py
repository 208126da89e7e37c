"""Benchmarks and photo folders, each a `Dataset`: image ids in the published order, files, object masks.

Layouts, masks and order are those of RITM's readers, which SimpleClick and the official MIS code share. One deviation:
RITM takes the text before the first dot of an image's name as its id, but the text before the last dot of a mask's, so
that names with two dots find no mask. Here both are the text before the last dot, and a mask that only fits RITM's
reading is accepted too.
"""

import difflib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mis_platform.data import sandbox
from mis_platform.data.digests import ABSENT, Memory
from mis_platform.data.images import MAX_MEGAPIXELS, MIN_SIDE, SUFFIXES, ImageRefused, Refusal, list_images, read_file
from mis_platform.data.masks import (
    MAX_MASK_BYTES,
    ObjectMask,
    Reader,
    read_binary,
    read_palette,
    read_palette_as_grey,
    read_sbd,
    read_union,
)
from mis_platform.errors import DataError
from mis_platform.storage import READERS

Split = Literal["train", "val"]
Kind = Literal[
    "missing image",
    "unreadable image",
    "skipped file",
    "duplicate stem",
    "missing mask",
    "extra mask",
    "unreadable mask",
    "mask of another size",
    "empty mask",
]

DIGEST_WINDOW, DIGEST_BATCH = 8192, 32  # samples in the hands of the readers, and of each of them at once
SLOW_BYTES = 2**28  # of files, that take long enough to read to be remembered
SAVED_BYTES = 2**36  # after so many they are remembered on the way: a reader who is killed loses minutes
_ONLY = "1"  # object id of a file that holds one object


class MaskSizeMismatch(DataError):
    """A mask has another height or width than its image."""


class MaskFile(NamedTuple):
    """Where the mask of one object is, or of several in one file."""

    object_id: str
    file: str  # relative to the root of the data set


class Sample(NamedTuple):
    """An image and its mask files, relative to the root of the data set."""

    image_id: str
    image: str
    masks: tuple[MaskFile, ...]


class Problem(NamedTuple):
    """One thing that is wrong with the files of a data set."""

    kind: Kind
    file: str
    message: str

    def __str__(self) -> str:
        file = repr(self.file)[1:-1]  # names may hold line breaks and terminal codes
        return f"{self.kind}: {file}: {self.message}" if self.message else f"{self.kind}: {file}"


@dataclass(frozen=True)
class Dataset:
    """Images and, where there are any, their object masks. Nothing but names is held in memory.

    Samples are in the order of the published evaluation: sorted by file name (code points), or as the benchmark's own
    list has them. An id is the file name without its last suffix, or as `list_images` makes it unique.
    """

    name: str
    split: Split
    root: Path
    samples: tuple[Sample, ...]
    read: Reader  # a function of `masks`
    is_labelled: bool
    refused: tuple[Refusal, ...] = ()  # pictures in the folder that are no usable files
    notes: tuple[Problem, ...] = ()  # what else was odd about the folder when it was opened
    untrusted: bool = False  # files are decoded in a child process with limits, see `sandbox`
    read_anew: bool = False  # whether `digest` reads every file, whatever is remembered of it

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """In the order of the samples."""
        return tuple(sample.image_id for sample in self.samples)

    @cached_property
    def _by_id(self) -> dict[str, Sample]:
        return {sample.image_id: sample for sample in self.samples}

    def image_path(self, image_id: str) -> Path:
        """The file of a photo. Raises KeyError for an id that the dataset does not have."""
        return self.root / self._by_id[image_id].image

    def read_image(
        self, image_id: str, *, max_megapixels: float = MAX_MEGAPIXELS, min_side: int = MIN_SIDE
    ) -> np.ndarray:
        """The photo as uint8 [H, W, 3] RGB, upright. Raises ImageRefused. Limits as in `images.read_image`."""
        decoder = sandbox.decoder(self.untrusted)
        return decoder.read_image(self.image_path(image_id), max_megapixels=max_megapixels, min_side=min_side)

    def probe_size(
        self, image_id: str, *, max_megapixels: float = MAX_MEGAPIXELS, min_side: int = MIN_SIDE
    ) -> tuple[int, int]:
        """(height, width) of the photo in pixels, without decoding it. Raises ImageRefused."""
        decoder = sandbox.decoder(self.untrusted)
        return decoder.probe_size(self.image_path(image_id), max_megapixels=max_megapixels, min_side=min_side)

    def read_objects(self, image_id: str) -> tuple[ObjectMask, ...]:
        """All objects of an image, labels ascending, none filtered out (some may have no pixel: see `verify`).

        Raises DataError naming the file: no mask, unreadable, another size than the image, two masks for one object.
        Raises ImageRefused when the size of the image cannot be read.
        """
        sample = self._by_id[image_id]
        if not sample.masks:
            why = "it has no mask" if self.is_labelled else f"{self.root} has photos only, no folder of masks"
            raise DataError(f"{self.root / sample.image}: {why}")
        size = self.probe_size(image_id, max_megapixels=math.inf, min_side=1)
        objects: list[ObjectMask] = []
        for mask in sample.masks:
            found = self._read_mask(mask)
            for each in found:
                if each.mask.shape != size:
                    raise MaskSizeMismatch(
                        f"{self.root / mask.file}: the mask is {each.mask.shape[0]}x{each.mask.shape[1]} pixels, "
                        f"its image {sample.image} is {size[0]}x{size[1]} (height x width)"
                    )
            objects.extend(found)
        repeated = [key for key, count in Counter(each.object_id for each in objects).items() if count > 1]
        if repeated:
            files = ", ".join(mask.file for mask in sample.masks)
            raise DataError(f"{self.root}: object {repeated[0]} of {image_id!r} has more than one mask: {files}")
        return tuple(objects)

    def _read_mask(self, mask: MaskFile) -> tuple[ObjectMask, ...]:
        path = self.root / mask.file
        if not os.path.exists(path):
            raise DataError(f"{path}: there is no such mask")
        try:
            content = read_file(path, MAX_MASK_BYTES)
            if self.untrusted:
                return sandbox.shared().read_masks(self.read, content, mask.object_id)
            return self.read(content, mask.object_id)
        except ValueError as error:
            raise DataError(f"{path}: {' '.join(str(error).split())}") from None

    def digest(self, masks: bool = False) -> str:
        """SHA-256 over ids and contents of the image files, of the mask files too if asked for.

        Independent of the order of the images and of where they lie. Files that cannot be read count as absent. What an
        earlier call has read is not read again, unless it may have changed or `read_anew` is set: see `digests`.
        """
        return self._read_all(masks)[0]

    @cached_property
    def copies(self) -> tuple[tuple[str, ...], ...]:
        """Ids of images whose files had the same bytes when they were last read, by `digest` or for this.

        Two contents are told apart by 64 bits of their SHA-256: who relies on it compares the files.
        """
        return self._read_all(masks=False)[1]

    def _read_all(self, masks: bool) -> tuple[str, tuple[tuple[str, ...], ...]]:
        """What `digest` returns, and `copies`, which come for nothing when files are read."""
        memory = Memory(self.root, is_used=not self.read_anew)

        def of_batch(batch: Sequence[Sample]) -> tuple[bytes, bytes]:
            files = [[sample.image, *(mask.file for mask in sample.masks if masks)] for sample in batch]
            contents = iter(memory.contents(list(chain.from_iterable(files))))
            known = [list(islice(contents, len(own))) for own in files]
            texts = ("\n".join([repr(sample.image_id), *own]) for sample, own in zip(batch, known))
            digests = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
            return digests, b"".join(bytes(8) if own[0] == ABSENT else bytes.fromhex(own[0][-16:]) for own in known)

        total, samples, keys = hashlib.sha256(), sorted(self.samples), bytearray()
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(samples), DIGEST_WINDOW):
                window = samples[start : start + DIGEST_WINDOW]
                batches = [window[k : k + DIGEST_BATCH] for k in range(0, len(window), DIGEST_BATCH)]
                for digests, some in pool.map(of_batch, batches):
                    total.update(digests)
                    keys += some
                memory.save(SAVED_BYTES)
        memory.save(SLOW_BYTES)
        vars(self)["copies"] = found = _copies(samples, np.frombuffer(keys, np.uint64))
        return total.hexdigest(), found

    def without_missing(self) -> tuple["Dataset", tuple[str, ...]]:
        """Only the samples whose image and masks are there, and the ids of the others.

        Raises DataError when nothing is left.
        """
        whole = tuple(sample for sample in self.samples if self._is_there(sample))
        if not whole:
            raise DataError(f"none of the {len(self)} images of {self.name} in {self.root} has its mask")
        kept = {sample.image_id for sample in whole}
        return replace(self, samples=whole), tuple(each for each in self.image_ids if each not in kept)

    def _is_there(self, sample: Sample) -> bool:
        files = [sample.image, *(mask.file for mask in sample.masks)]
        return bool(sample.masks) and all(os.path.exists(self.root / file) for file in files)

    def alone(self, image_id: str) -> "Dataset":
        """Only this image."""
        return replace(self, samples=(self._by_id[image_id],), refused=(), notes=())

    def subset(self, fraction: float, seed: int) -> "Dataset":
        """A seeded share of the images, in their order; smaller shares of one seed lie inside larger ones.

        As many as `first_lines` has. fraction: in (0, 1]. Raises ValueError outside.
        """
        count = max(1, math.floor(len(self) * _checked_fraction(fraction)))
        order = np.random.default_rng(seed).permutation(len(self))[:count]
        return replace(self, samples=tuple(self.samples[k] for k in sorted(order)))

    def first_lines(self, fraction: float) -> "Dataset":
        """The first floor(n * fraction) images, at least one: the official MIS code's label fractions.

        fraction: in (0, 1]. Raises ValueError outside.
        """
        count = max(1, math.floor(len(self) * _checked_fraction(fraction)))
        return replace(self, samples=self.samples[:count])


def _copies(samples: Sequence[Sample], keys: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """Ids of samples with equal keys, uint64 [samples]; 0 is a file that could not be read."""
    ordered = np.sort(keys)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    groups: dict[int, list[str]] = {int(key): [] for key in repeated if key}
    for place in np.flatnonzero(np.isin(keys, repeated[repeated > 0])).tolist() if groups else ():
        groups[int(keys[place])].append(samples[place].image_id)
    return tuple(map(tuple, groups.values()))


# -- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a benchmark keeps its files, how a mask file becomes objects, and how many of both were published."""

    folders: tuple[str, ...]  # names tried below the data root
    images: str
    masks: str
    read: Reader
    inner: tuple[str, ...] = (".",)  # where in the folder the files may lie
    list_file: str = ""  # names the images of a split; without one, all files of `images` are the samples
    mask_suffix: str = ""  # of the masks of listed images
    published: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)  # split -> images, objects
    numbered: bool = False  # masks may be STEM_K: one file per object


_FOLDER = Layout(("synthetic",), "images", "masks", read_binary, numbered=True)
_PASCAL_VOC = Layout(
    ("PascalVOC", "VOC2012", "VOCdevkit", "pascalvoc"),
    "JPEGImages",
    "SegmentationObject",
    read_palette,
    inner=(".", "VOC2012", "VOCdevkit/VOC2012"),
    list_file="ImageSets/Segmentation/{split}.txt",
    mask_suffix=".png",
    published={"val": (1449, 3417)},  # objects: RITM's list, which was never published
)

LAYOUTS: dict[str, Layout] = {
    "grabcut": Layout(("GrabCut", "grabcut"), "data_GT", "boundary_GT", read_binary, published={"val": (50, 50)}),
    "berkeley": Layout(("Berkeley", "berkeley"), "images", "masks", read_binary, published={"val": (100, 100)}),
    "sbd": Layout(
        ("SBD", "sbd", "benchmark_RELEASE"),
        "img",
        "inst",
        read_sbd,
        inner=(".", "dataset", "benchmark_RELEASE/dataset"),
        list_file="{split}.txt",
        mask_suffix=".mat",
        published={"train": (8498, None), "val": (2857, 6671)},
    ),
    "davis": Layout(("DAVIS", "davis"), "img", "gt", read_union, published={"val": (345, 345)}),
    "pascalvoc": _PASCAL_VOC,
    "pascalvoc_grey": replace(_PASCAL_VOC, read=read_palette_as_grey),
    "coco_mval": Layout(("COCO_MVal", "coco_mval"), "img", "gt", read_union, published={"val": (800, 800)}),
    "folder": replace(_FOLDER, folders=()),
    "photos": replace(_FOLDER, folders=("photos",)),
    "synthetic": _FOLDER,
}
_MAY_BE_FLAT = ("folder", "photos")  # a folder of photos will do


def open_dataset(spec: str, data_root: Path | None = None, split: Split = "train", untrusted: bool = False) -> Dataset:
    """The data set that `spec` names: NAME, to be found below `data_root`, or NAME:PATH.

    Names: the keys of LAYOUTS. `folder:PATH` is a folder with images/ and, if it is labelled, masks/ (one mask per
    image, STEM.png, or one per object, STEM_K.png), or simply a folder of photos.
    split: which list of SBD and PascalVOC is meant, train to learn from or val to evaluate on; others have no lists.
    untrusted: decode its files in a child process with limits on memory and time (see `sandbox`).

    Raises DataError that says what was searched for and which names there are.
    """
    name, colon, given = spec.partition(":")
    if name not in LAYOUTS:
        raise DataError(f"unknown data set {name!r}{_nearest(name)}; there are: {', '.join(LAYOUTS)}, or NAME:PATH")
    if colon and not given:
        raise DataError(f"{spec!r} has an empty path; write {name}:PATH")
    layout = LAYOUTS[name]
    root, photos, masks = _locate(name, layout, _absolute(given), _absolute(data_root))
    if layout.list_file:
        opened = _open_listed(name, layout, root, split)
    else:
        opened = _open_folder(name, layout, root, photos, masks, split)
    return replace(opened, untrusted=untrusted)


class Available(NamedTuple):
    """One line of `list_datasets`."""

    name: str
    split: Split
    root: Path | None  # None: not there
    images: int
    note: str  # why it could not be opened

    def __str__(self) -> str:
        found = f"{self.images} images in {self.root}" if self.root else self.note
        return f"{self.name:<14} {self.split:<5}  {found}"


def list_datasets(data_root: Path | None) -> list[Available]:
    """The benchmarks below `data_root`, those that are missing too."""
    lines = []
    for name, layout in LAYOUTS.items():
        if not layout.folders:
            continue
        splits: tuple[Split, ...] = ("train", "val") if layout.list_file else ("val",)
        for split in splits:
            try:
                dataset = open_dataset(name, data_root, split)
                lines.append(Available(name, split, dataset.root, len(dataset), ""))
            except DataError as error:
                wanted = f"{layout.folders[0]}/{layout.images}"
                note = f"not there (wanted: {wanted})" if "there is no folder" in str(error) else str(error)
                lines.append(Available(name, split, None, 0, note))
    return lines


def _absolute(path: str | Path | None) -> Path | None:
    """Workers have working directories of their own; and no shell expands the ~ of `folder:~/photos`."""
    return Path(os.path.abspath(Path(path).expanduser())) if path else None


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), LAYOUTS, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _locate(name: str, layout: Layout, given: Path | None, data_root: Path | None) -> tuple[Path, Path, Path]:
    """Root of the data set and its folders of images and masks."""
    if given is not None:
        candidates = [given]
    elif not layout.folders:
        raise DataError(f"{name} needs a path: {name}:PATH")
    elif data_root is None:
        raise DataError(f"where is {name}? Say {name}:PATH, or give the folder that holds it (--data-root or MIS_DATA)")
    else:
        candidates = [data_root / folder for folder in layout.folders]
    for root in (candidate / inner for candidate in candidates for inner in layout.inner):
        if (root / layout.images).is_dir():
            return root, root / layout.images, root / layout.masks
    flat = next((root for root in candidates if root.is_dir()), None)
    if name in _MAY_BE_FLAT and flat is not None:
        return flat, flat, flat / layout.masks
    wanted = candidates if name in _MAY_BE_FLAT else [candidate / layout.images for candidate in candidates]
    searched = ", ".join(map(str, wanted))
    inside = f" (also inside {', '.join(layout.inner[1:])})" if layout.inner[1:] else ""
    hint = "" if given is not None else f"; put it there or say {name}:PATH"
    raise DataError(f"no {name} data: there is no folder {searched}{inside}{hint}")


def _open_listed(name: str, layout: Layout, root: Path, split: Split) -> Dataset:
    path = root / layout.list_file.format(split=split)
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise DataError(f"cannot read the list of {name} images {path}: {reason}") from None
    if not ids:
        raise DataError(f"the list of {name} images {path} is empty")
    for image_id, count in Counter(ids).items():
        if count > 1:
            raise DataError(f"{path} lists {image_id!r} {count} times")
        if "/" in image_id or "\\" in image_id or image_id.startswith(".") or "\0" in image_id:
            raise DataError(f"{path} lists {image_id!r}, which is not the name of an image in {root / layout.images}")
    samples = tuple(
        Sample(
            image_id,
            f"{layout.images}/{image_id}.jpg",
            (MaskFile(_ONLY, f"{layout.masks}/{image_id}{layout.mask_suffix}"),),
        )
        for image_id in ids
    )
    return Dataset(name, split, root, samples, layout.read, is_labelled=True)


def _open_folder(name: str, layout: Layout, root: Path, images: Path, masks: Path, split: Split) -> Dataset:
    is_labelled = masks.is_dir()
    listing = list_images(images, recursive=layout.numbered and not is_labelled)
    if not listing.images:
        refused = f"; {len(listing.refused)} others are no usable files" if listing.refused else ""
        raise DataError(f"no images in {images} (searched for {', '.join(sorted(SUFFIXES))}{refused})")
    mask_listing = list_images(masks, recursive=False) if is_labelled else None
    mask_names = [file for _, file in mask_listing.images] if mask_listing else []
    folder = "" if images == root else f"{images.relative_to(root).as_posix()}/"
    # Of ten million photos every index counts: one by id is made only where there are masks to match.
    names = {image_id: folder + file for image_id, file in listing.images} if mask_names else {}
    owned, extra = _match_masks(names, mask_names, layout.numbered) if mask_names else ({}, [])
    samples = tuple(
        Sample(
            image_id,
            folder + file,
            tuple(MaskFile(key, f"{layout.masks}/{mask}") for key, mask in owned.get(image_id, ())),
        )
        for image_id, file in listing.images
    )
    repeated = [(key, file) for key, file, _ in samples if key.rpartition("/")[2] == file.rpartition("/")[2]]
    notes = [Problem("duplicate stem", file, f"its id is {key!r}") for key, file in repeated]
    notes += [Problem("extra mask", f"{layout.masks}/{mask}", "it fits no image") for mask in extra]
    if mask_listing:
        notes += [_skipped(refusal) for refusal in mask_listing.refused]
    return Dataset(name, split, root, samples, layout.read, is_labelled, listing.refused, tuple(notes))


def _skipped(refusal: Refusal) -> Problem:
    return Problem("skipped file", str(refusal.path), f"{refusal.reason.value}: {refusal.message}")


def _match_masks(
    images: Mapping[str, str], masks: Sequence[str], numbered: bool
) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Image id -> (object id, mask file) pairs, and the mask files that fit no image. images: id -> file.

    A mask named like an image belongs to it; if `numbered`, STEM_K is object K of image STEM.
    """
    by_stem: dict[str, list[str]] = {}
    by_first_part: dict[str, list[str]] = {}
    for image_id, file in images.items():
        by_stem.setdefault(Path(file).stem, []).append(image_id)
        by_first_part.setdefault(Path(file).name.split(".")[0], []).append(image_id)
    owned: dict[str, list[tuple[str, str]]] = {}
    extra = []
    for mask in masks:
        stem = Path(mask).stem
        owners, key = by_stem.get(stem) or by_first_part.get(stem, []), _ONLY
        head, _, tail = stem.rpartition("_")
        if not owners and numbered and tail:
            owners, key = by_stem.get(head) or by_first_part.get(head, []), tail
        for image_id in owners:
            owned.setdefault(image_id, []).append((key, mask))
        if not owners:
            extra.append(mask)
    return owned, extra


# -- verification ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    name: str
    split: Split
    root: Path
    images: int
    objects: int
    published: tuple[int, int | None] | None  # images, objects of the published benchmark; None: not published
    digest: str  # of images and masks
    problems: tuple[Problem, ...]

    @property
    def is_published_size(self) -> bool:
        """As many images and objects as the benchmark has, so that scores may be compared with published ones."""
        if self.published is None:
            return False
        return self.images == self.published[0] and self.published[1] in (None, self.objects)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Counts, digest, and a line for each problem."""
        counts = f"{self.name} ({self.root}): {self.images} images, {self.objects} objects"
        if self.published is not None and not self.is_published_size:
            images, objects = self.published
            expected = f"{images} images" + (f", {objects} objects" if objects is not None else "")
            counts += f"; published: {expected}, so scores are not comparable"
        elif self.published is not None:
            counts += ", as published"
        return [counts, f"SHA-256 of all files: {self.digest}", *map(str, self.problems)]


def verify(dataset: Dataset, *, on_image: Callable[[int], object] = lambda done: None) -> Report:
    """Decode every image and every mask; list whatever is missing, unreadable, of the wrong size or empty.

    Its digest is of what the files hold now, whatever is remembered of them.

    on_image: told how many are done.
    """
    problems = [*map(_skipped, dataset.refused), *dataset.notes]
    objects = 0
    for done, sample in enumerate(dataset.samples, 1):
        found, wrong = check_sample(dataset, sample)
        objects += found
        problems += wrong
        on_image(done)
    published = LAYOUTS[dataset.name].published.get(dataset.split if LAYOUTS[dataset.name].list_file else "val")
    return Report(
        dataset.name,
        dataset.split,
        dataset.root,
        len(dataset),
        objects,
        published,
        replace(dataset, read_anew=True).digest(masks=True),
        tuple(problems),
    )


def check_sample(dataset: Dataset, sample: Sample) -> tuple[int, list[Problem]]:
    """Number of objects of one image, and what is wrong with its files."""
    path = dataset.root / sample.image
    if not path.exists():
        return 0, [Problem("missing image", str(path), "")]
    try:
        dataset.read_image(sample.image_id)
    except ImageRefused as error:
        return 0, [Problem("unreadable image", str(path), str(error))]
    if not dataset.is_labelled:
        return 0, []
    absent = [mask.file for mask in sample.masks if not (dataset.root / mask.file).exists()]
    if absent or not sample.masks:
        return 0, [Problem("missing mask", str(path), ", ".join(absent))]
    try:
        objects = dataset.read_objects(sample.image_id)
    except MaskSizeMismatch as error:
        return 0, [Problem("mask of another size", str(path), str(error))]
    except DataError as error:
        return 0, [Problem("unreadable mask", str(path), str(error))]
    empty = [each.object_id for each in objects if not (each.mask == 1).any()]
    problems = [Problem("empty mask", str(path), f"object {key} has no pixel") for key in empty]
    if not objects:
        problems.append(Problem("empty mask", str(path), "no object in it"))
    return len(objects), problems


def _checked_fraction(fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise ValueError(f"a share of the images must lie in (0, 1] (above 0 %, up to 100 %), not {fraction}")
    return fraction
