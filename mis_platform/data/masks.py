"""Ground-truth files of the benchmarks, and what in them is an object, background, or ignored.

The rules are those of RITM's readers, which SimpleClick and the official MIS code share. A reader takes the content of
a file and the id of the object in it, and raises ValueError for whatever is no such mask.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mis_platform.data.matfile import read_instances

MASK_FORMATS = ("PNG", "BMP", "JPEG", "GIF", "TIFF")
MAX_MASK_PIXELS = 100_000_000
MAX_MASK_BYTES = 256 * 2**20  # of a file

IGNORE = -1
_IGNORE_GREY = 128  # GrabCut's "unknown" band
_VOC_VOID = 255  # palette index
_VOC_VOID_GREY = 220  # grey value of the void colour (224, 224, 192)
_BUGGY_SHARE = 0.08


class ObjectMask(NamedTuple):
    """One object to segment."""

    object_id: str  # the label in the benchmark's file; "1" where a file holds one object
    mask: np.ndarray  # int8 [H, W], pixels of the image: 1 object, 0 background, -1 ignored


Reader = Callable[[bytes, str], tuple[ObjectMask, ...]]  # content of a file, object id -> objects


def read_binary(content: bytes, object_id: str) -> tuple[ObjectMask, ...]:
    """GrabCut, Berkeley, generic folders: above 128 object, exactly 128 ignored.

    Of a colour image the channel that OpenCV decodes first, blue, counts.
    """
    grey = _decode(content)[:, :, 2]
    mask = (grey > _IGNORE_GREY).astype(np.int8)
    mask[grey == _IGNORE_GREY] = IGNORE
    return (ObjectMask(object_id, mask),)


def read_union(content: bytes, object_id: str) -> tuple[ObjectMask, ...]:
    """DAVIS, COCO_MVal: any channel above 0 is object, all objects of a frame are one; nothing is ignored."""
    return (ObjectMask(object_id, (_decode(content).max(axis=2) > 0).astype(np.int8)),)


def read_palette(content: bytes, _: str) -> tuple[ObjectMask, ...]:
    """PascalVOC: one object per palette index, 0 background, 255 ignored in every object of the image."""
    with _open_mask(content) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"mode {image.mode}; the objects should be palette indices")
        return _split_labels(np.asarray(image), void=_VOC_VOID)


def read_palette_as_grey(content: bytes, _: str) -> tuple[ObjectMask, ...]:
    """PascalVOC with the object ids of RITM and SimpleClick: grey values of the palette's colours, 220 ignored.

    Two colours of the palette may have one grey value; then two objects become one, as they do there.
    """
    return _split_labels(cv2.cvtColor(_decode(content), cv2.COLOR_RGB2GRAY), void=_VOC_VOID_GREY)


def read_sbd(content: bytes, _: str) -> tuple[ObjectMask, ...]:
    """SBD: one object per nonzero label; nothing is ignored, no object is left out."""
    return _split_labels(read_instances(content), void=None)


def is_buggy(mask: np.ndarray) -> bool:
    """Whether an object of SBD, bool [H, W], is left out of supervised training: it fills less than 8 % of its box.

    A rule of RITM's training reader, there the object becomes background; the evaluation leaves no object out.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return False
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return bool(np.count_nonzero(mask) / box < _BUGGY_SHARE)


def _labels(label_map: np.ndarray) -> list[int]:
    return [int(label) for label in np.unique(label_map) if label != 0]


def _split_labels(label_map: np.ndarray, void: int | None) -> tuple[ObjectMask, ...]:
    """One object per nonzero label, ascending; pixels with the label `void` are ignored in all of them."""
    ignored = None if void is None else label_map == void
    objects = []
    for label in _labels(label_map):
        if label == void:
            continue
        mask = (label_map == label).view(np.int8)
        if ignored is not None:
            mask[ignored] = IGNORE
        objects.append(ObjectMask(str(label), mask))
    return tuple(objects)


@contextmanager
def _open_mask(content: bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning (our limit decides) and odd metadata
            image = Image.open(io.BytesIO(content), formats=MASK_FORMATS)
        with image:
            if image.width * image.height > MAX_MASK_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels; a mask may have {MAX_MASK_PIXELS}")
            yield image
    except (ValueError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"a mask may have {MAX_MASK_PIXELS} pixels, this one has far more") from None
    except UnidentifiedImageError:
        raise ValueError(f"the content is no picture; allowed are {', '.join(MASK_FORMATS)}") from None
    except Exception as error:  # decoders raise anything on damaged data, Pillow SyntaxError for a PNG
        raise ValueError(str(error) or type(error).__name__) from None


def _decode(content: bytes) -> np.ndarray:
    """uint8 [H, W, 3], RGB, as OpenCV decodes it: 16-bit values lose their lower byte, transparency is dropped."""
    with _open_mask(content) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            grey = (np.asarray(upright).astype(np.int64) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))
