"""Photos from anywhere: every file is either uint8 [H, W, 3] RGB pixels or an `ImageRefused` that says why.

Which formats: JPEG, PNG, WebP, TIFF, BMP and GIF; of a file with several frames or pages the first one counts. No other
decoder ever runs. A size above the limit is refused from the header, before anything is decoded, and an incomplete or
damaged file is refused instead of being filled with grey.

What a decoder needs is bounded by the bytes and the pixels of a file for most files, and is seconds at the most. Where
it is not, or the file is large, another process with limits can be asked to decode it: see `Elsewhere` and `sandbox`.

How pixels become 8-bit RGB:

    RGB, YCbCr                   as they are (ICC profiles are ignored: the same bytes give the same pixels everywhere)
    grey, 1 bit                  the same value in all channels; 1 bit is 0 and 255
    palette                      the palette's colours
    transparency of any kind     composited over white
    CMYK, YCCK                   light left over by ink and black, without profiles (inverted Adobe files too)
    CIELAB (D50)                 to sRGB, perceptual intent
    16-bit grey                  value / 257, rounded (not clipped)
    16 bits per colour channel   the high byte
    32-bit float grey            [0, 1] times 255; files with any other value are refused, there is no common scale
    32-bit integer grey          like 16-bit grey if all values fit, else refused

The orientation that EXIF (or XMP, as Pillow reads it) states is applied once; metadata that cannot be read is ignored.
"""

import errno
import hashlib
import io
import os
import re
import stat
import struct
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageCms

MAX_MEGAPIXELS = 50.0
MIN_SIDE = 8  # pixels: one patch of the default extractor
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"))
# Suffixes of pictures that people expect to be read; they are reported rather than passed over.
OTHER_SUFFIXES = frozenset((".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".svg", ".pdf", ".eps", ".fits", ".dng"))

_LARGE_BYTES = 8 << 20  # of a file; one of 4-byte segments keeps a walk over them busy for seconds
_ORDINARY_SCANS = 16  # of a progressive JPEG; encoders write a dozen
_METADATA_BYTES = 64 << 20  # a file may be this much longer than its pixels at 16 bytes each
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC = re.compile(  # first bytes of the allowed formats
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|II[*+]\0|MM\0[*+]|BM|GIF8[79]a", re.DOTALL
)
_OTHER_MAGIC = {  # to say what a refused file is; nothing of it is parsed
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "Photoshop": rb"8BPS",
    "FITS": rb"SIMPLE  =|\x1f\x8b",
    "Windows metafile": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
    "HEIC or AVIF": rb"....ftyp(?:heic|heix|hevc|mif1|msf1|avif|avis)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "icon": rb"\0\0[\1\2]\0",
    "SVG": rb"<svg|<\?xml[^>]*>\s*<svg",
    "portable pixmap": rb"P[1-7fF]\s",
}


class Reason(StrEnum):
    """Why a file is not used; the values are stored in quarantine tables."""

    EMPTY_FILE = "EMPTY_FILE"
    NOT_AN_IMAGE = "NOT_AN_IMAGE"
    FORMAT_NOT_ALLOWED = "FORMAT_NOT_ALLOWED"
    TRUNCATED = "TRUNCATED"
    CORRUPT = "CORRUPT"
    TOO_LARGE = "TOO_LARGE"
    TOO_SMALL = "TOO_SMALL"
    PIXELS_NOT_SUPPORTED = "PIXELS_NOT_SUPPORTED"
    UNREADABLE = "UNREADABLE"  # permissions, broken link, changed while it was read
    GONE = "GONE"  # where it was listed there is nothing, or nothing on this machine
    NOT_A_FILE = "NOT_A_FILE"  # pipe, socket, device, folder
    OUTSIDE_FOLDER = "OUTSIDE_FOLDER"  # a link that leaves the folder
    DECODER_DIED = "DECODER_DIED"  # these three: in a child process with limits, see `sandbox`
    MEMORY_LIMIT = "MEMORY_LIMIT"
    TIMEOUT = "TIMEOUT"


class ImageRefused(ValueError):
    """A file that is no usable photo. `reason` is for tables, `message` is one line for people."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        self.message = _one_line(message)
        super().__init__(f"{reason.value}: {self.message}")

    def __reduce__(self) -> tuple[type["ImageRefused"], tuple[Reason, str]]:
        return type(self), (self.reason, self.message)  # it must survive the way back from another process


class Refusal(NamedTuple):
    """One file of a folder that was passed over."""

    path: Path
    reason: Reason
    message: str


class Listing(NamedTuple):
    """What a folder holds: (image id, path below it, with "/") in the order of the paths' bytes, and what was refused.

    Text, not paths: of ten million photos those alone would take 6 GB.
    """

    images: tuple[tuple[str, str], ...]
    refused: tuple[Refusal, ...]


class Picture(NamedTuple):
    """What a file shows."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB, upright
    has_more: bool  # frames or pages, which are not shown; what phones put behind a JPEG does not count


class Elsewhere(Protocol):
    """Who decodes, in a process that can be ended, the content of a file that may keep its decoder busy for long."""

    def read_picture(self, source: bytes, *, max_megapixels: float, min_side: int) -> Picture:
        """As `read_picture`."""

    def probe_size(self, source: bytes, *, max_megapixels: float, min_side: int) -> tuple[int, int]:
        """As `probe_size`."""


def read_image(
    source: str | Path | bytes, *, max_megapixels: float = MAX_MEGAPIXELS, min_side: int = MIN_SIDE
) -> np.ndarray:
    """The photo as uint8 [H, W, 3] RGB, upright.

    source: a path, or the content of a file. max_megapixels: 10^6 pixels; Pillow's own ceiling of 178.9 stays above it.
    min_side: pixels, of the shorter side. Raises ImageRefused; never blocks on pipes or devices.
    """
    return read_picture(source, max_megapixels=max_megapixels, min_side=min_side).pixels


def read_picture(
    source: str | Path | bytes,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    min_side: int = MIN_SIDE,
    elsewhere: Elsewhere | None = None,
) -> Picture:
    """As `read_image`, and whether the file has more frames or pages.

    elsewhere: decodes TIFFs, run-length BMPs, JPEGs of more than 16 scans and files of more than 8 MiB. Without it,
    nothing bounds the time.
    """
    limit = file_limit(max_megapixels)
    with _opened(source) as (file, name):
        if elsewhere is not None and _may_be_slow(file):
            content = _read_all(file, limit, name)
            return elsewhere.read_picture(content, max_megapixels=max_megapixels, min_side=min_side)
        with _header(file, max_megapixels, min_side) as image:
            file.seek(0)
            content = _read_all(file, limit, name)
            scans = _check_complete(image.format or "", content)
    if elsewhere is not None and scans > _ORDINARY_SCANS:
        return elsewhere.read_picture(content, max_megapixels=max_megapixels, min_side=min_side)
    with _header(io.BytesIO(content), max_megapixels, min_side) as image:
        pixels = _to_rgb(_upright(_loaded(image, len(content))))
    with _header(io.BytesIO(content), max_megapixels, min_side) as image:  # anew: the question may move to other frames
        return Picture(pixels, _has_more(image))


def probe_size(
    source: str | Path | bytes,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    min_side: int = MIN_SIDE,
    elsewhere: Elsewhere | None = None,
) -> tuple[int, int]:
    """(height, width) in pixels of what `read_image` would return, from the header alone. Raises ImageRefused.

    elsewhere: as in `read_picture`. It is given the whole file.
    """
    with _opened(source) as (file, name):
        if elsewhere is not None and _may_be_slow(file):
            content = _read_all(file, file_limit(min(max_megapixels, MAX_MEGAPIXELS)), name)
            return elsewhere.probe_size(content, max_megapixels=max_megapixels, min_side=min_side)
        return _size_of(file, max_megapixels, min_side)


def _size_of(file: BinaryIO, max_megapixels: float, min_side: int) -> tuple[int, int]:
    with _header(file, max_megapixels, min_side) as image:
        width, height = image.size
        # A TIFF reports its upright size by itself.
        turned = image.format != "TIFF" and _orientation(image) >= 5
        return (width, height) if turned else (height, width)


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """The content of a picture's file; nothing in it is looked at.

    Raises ImageRefused for a larger file, for what is no file (it never blocks on pipes or devices), cannot be read, or
    changes meanwhile.
    """
    with _opened(path) as (file, name):
        return _read_all(file, max_bytes, name)


def file_limit(max_megapixels: float) -> int:
    """Bytes that the file of a photo within `max_megapixels` may have: 16 a pixel, and 64 MiB of metadata."""
    return int(max_megapixels * 16e6) + _METADATA_BYTES


def list_images(folder: str | Path, recursive: bool = True) -> Listing:
    """The photos below `folder`, by file name only: nothing is opened here.

    Files with an image suffix (any case) are listed; pictures of other kinds, links out of the folder or to folders,
    broken links, pipes, sockets and devices are refused; hidden files and everything else are passed over.

    An image id is the path below `folder` with "/" and without suffix. Images that would share an id, also on a file
    system that ignores case or Unicode composition ("a.jpg" and "A.png"), keep their suffix. Control characters,
    bytes that are not UTF-8, and "%" before two hexadecimal digits are written %XX, so an id is printable and no two
    files share one. Raises ValueError when `folder` is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder")
    files: list[str] = []
    refused: list[Refusal] = []
    resolved = root.resolve()
    for path in _walk(root, recursive, refused):
        refusal = _refusal(path, resolved)
        if refusal is None:
            files.append(path.relative_to(root).as_posix())
        else:
            refused.append(Refusal(path, *refusal))
    files.sort(key=os.fsencode)
    images = tuple(zip(_image_ids(files), files))
    return Listing(images, tuple(sorted(refused, key=lambda item: os.fsencode(item.path))))


# -- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[tuple[BinaryIO, str]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source), "the content"
        return
    try:
        # O_NONBLOCK: opening a pipe nobody writes to would wait for ever.
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise ImageRefused(*_why_unopened(Path(source), error)) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise ImageRefused(Reason.NOT_A_FILE, _kind(mode))
    with open(handle, "rb") as file:
        yield file, Path(source).name


def _why_unopened(path: Path, error: OSError | ValueError) -> tuple[Reason, str]:
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ESTALE):
        return Reason.GONE, os.strerror(error.errno)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        return Reason.NOT_A_FILE, _kind(mode)
    return Reason.UNREADABLE, getattr(error, "strerror", None) or str(error)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return f"{kinds.get(stat.S_IFMT(mode), 'something else')}, not a file"


def _read_all(file: BinaryIO, limit: int, name: str) -> bytes:
    """The whole file, once; decoding then works on bytes that can no longer change."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    before = os.fstat(file.fileno())
    content = file.read(min(before.st_size, limit) + 1)  # no more: a buffer of this size is allocated first
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ImageRefused(Reason.UNREADABLE, f"{name} changed while it was read")
    if len(content) > limit:
        raise ImageRefused(Reason.TOO_LARGE, f"{len(content) >> 20} MiB or more of file for one image")
    return content


def _may_be_slow(file: BinaryIO) -> bool:
    """Whether the time that its decoder takes has no bound, or not a low one.

    Strips of a TIFF may all be the same megabytes that unpack to nothing; Pillow unpacks run lengths in Python; and
    walks from segment to segment, theirs and ours, take 1 us for each. Leaves `file` at its start.
    """
    start = file.read(34)
    is_large = file.seek(0, os.SEEK_END) > _LARGE_BYTES
    file.seek(0)
    is_run_length_bmp = start[:2] == b"BM" and start[30:34] in (b"\1\0\0\0", b"\2\0\0\0")
    return is_large or is_run_length_bmp or start[:4] in (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+")


@contextmanager
def _header(file: BinaryIO, max_megapixels: float, min_side: int) -> Iterator[Image.Image]:
    """The image with its header read and its size checked; pixels are not decoded yet."""
    start = file.read(256)
    _check_magic(start)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's bomb warning (our limit decides) and odd metadata
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            limit = (Image.MAX_IMAGE_PIXELS or 0) * 2 / 1e6
            message = f"more than {limit:.0f} megapixels; the limit data.max_megapixels is {max_megapixels:g}"
            raise ImageRefused(Reason.TOO_LARGE, message) from None
        except MemoryError:
            raise  # the machine's fault, or that of a limit; not to be mistaken for damage
        except Exception as error:  # decoders raise anything on damaged headers
            raise ImageRefused(*_why_unidentified(file, start, error)) from None
        with image:
            _check_size(*image.size, max_megapixels, min_side)
            yield image


def _check_magic(start: bytes) -> None:
    if not start:
        raise ImageRefused(Reason.EMPTY_FILE, "the file has no bytes")
    if _MAGIC.match(start):
        return
    for name, pattern in _OTHER_MAGIC.items():
        if re.match(pattern, start, re.DOTALL):
            raise ImageRefused(Reason.FORMAT_NOT_ALLOWED, f"{name} file; allowed are {', '.join(FORMATS)}")
    raise ImageRefused(Reason.NOT_AN_IMAGE, f"the content is no image; allowed are {', '.join(FORMATS)}")


def _why_unidentified(file: BinaryIO, start: bytes, error: Exception) -> tuple[Reason, str]:
    file.seek(0)
    for name, magic in (("JPEG", b"\xff\xd8"), ("PNG", b"\x89PNG"), ("WEBP", b"RIFF")):
        if start.startswith(magic):
            try:
                _check_complete(name, file.read(_METADATA_BYTES))
            except ImageRefused as refused:
                return refused.reason, refused.message
    return Reason.CORRUPT, "the header is damaged" if isinstance(error, OSError) else f"the header: {error}"


def _check_size(width: int, height: int, max_megapixels: float, min_side: int) -> None:
    if width * height > max_megapixels * 1e6:
        raise ImageRefused(
            Reason.TOO_LARGE,
            f"{width}x{height} pixels are {width * height / 1e6:.1f} megapixels; "
            f"the limit data.max_megapixels is {max_megapixels:g}",
        )
    if min(width, height) < min_side:
        raise ImageRefused(
            Reason.TOO_SMALL, f"{width}x{height} pixels; both sides need data.min_side={min_side} or more"
        )


# -- completeness ----------------------------------------------------------------------------------------------------
# Pillow accepts a JPEG without its end and a PNG without IEND, and checks no checksum of PNG pixel data.


def _check_complete(image_format: str, content: bytes) -> int:
    """How many times its decoder walks over all pixels. Raises ImageRefused for what has no end."""
    if image_format in ("JPEG", "MPO"):
        return _check_jpeg(content)
    if image_format == "PNG":
        _check_png(content)
    elif image_format == "WEBP" and len(content) < 8 + int.from_bytes(content[4:8], "little"):
        raise ImageRefused(Reason.TRUNCATED, "the WebP file is shorter than it says")
    return 1


# In entropy-coded data FF 00 is a byte and FF D0 to FF D7 are restarts; everything else after FF is a marker.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA
_MAX_SCANS = 256  # encoders write a dozen; each costs a walk over all pixels, for a few bytes of file


def _check_jpeg(content: bytes) -> int:
    """Follow the segments to the end marker, and count scans. What lies behind (thumbnails, notes) does not count."""
    position = 2
    scans = 0
    while match := _JPEG_MARKER.search(content, position):
        marker = match.group(1)[0]
        if marker == _JPEG_END and scans:
            return scans
        scans += marker == _JPEG_SCAN
        if scans > _MAX_SCANS:
            raise ImageRefused(Reason.CORRUPT, f"more than {_MAX_SCANS} scans in a JPEG")
        length = int.from_bytes(content[match.end() : match.end() + 2], "big")
        position = match.end() + max(2, length)
    raise ImageRefused(Reason.TRUNCATED, "the JPEG ends before its end marker")


def _check_png(content: bytes) -> None:
    position = 8
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content):
            break
        checksum = int.from_bytes(content[end - 4 : end], "big")
        if zlib.crc32(memoryview(content)[position + 4 : end - 4]) != checksum:
            raise ImageRefused(Reason.CORRUPT, f"wrong checksum of the PNG chunk {kind.decode('latin1')!a}")
        if kind == b"IEND":
            return
        position = end
    raise ImageRefused(Reason.TRUNCATED, "the PNG ends before its IEND chunk")


def _check_tiff(image: Image.Image, size: int) -> None:
    """libtiff may fill a missing strip or tile with zeros."""
    tags = getattr(image, "tag_v2", {})
    for offsets, counts in ((273, 279), (324, 325)):  # strips; tiles
        for offset, count in zip(_values(tags.get(offsets)), _values(tags.get(counts))):
            if offset + count > size:
                raise ImageRefused(Reason.TRUNCATED, "the TIFF is shorter than it says")


def _values(tag: object) -> tuple[int, ...]:
    return tag if isinstance(tag, tuple) else () if tag is None else (int(tag),)  # type: ignore[call-overload]


# -- pixels ----------------------------------------------------------------------------------------------------------


def _loaded(image: Image.Image, size: int) -> Image.Image:
    """Decode. size: bytes of the file."""
    try:
        if image.format == "TIFF":
            _check_tiff(image, size)
        image.load()
    except (ImageRefused, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on damaged data
        is_short = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise ImageRefused(Reason.TRUNCATED if is_short else Reason.CORRUPT, str(error) or repr(error)) from None
    return image


def _has_more(image: Image.Image) -> bool:
    """Whether there are more frames or pages, be they damaged."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except MemoryError:
        raise
    except Exception:  # a GIF is asked for its second frame, whose data may be cut off or say anything
        return True


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # garbage where EXIF should be says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, unless Pillow already did, as it does when it loads a TIFF."""
    method = None if image.format == "TIFF" else _TRANSPOSE.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]; the table of conversions is at the top."""
    if image.mode.startswith("I"):
        grey = np.array(image, dtype=np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageRefused(Reason.PIXELS_NOT_SUPPORTED, "32-bit integer pixels outside 0..65535 have no scale")
        grey += 128  # in place: copies of 50 megapixels add up
        grey //= 257
        return _repeat_grey(grey)
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ImageRefused(Reason.PIXELS_NOT_SUPPORTED, "float pixels outside [0, 1] have no scale")
        return _repeat_grey(np.rint(values * np.float32(255)))
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    elif image.has_transparency_data:
        image = _over_white(image)
    return np.array(image.convert("RGB"))


def _over_white(image: Image.Image) -> Image.Image:
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")  # no copy of 50 megapixels
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), transparent)


def _repeat_grey(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # only None when converted in place
    return converted


# -- folders ---------------------------------------------------------------------------------------------------------


def _walk(root: Path, recursive: bool, refused: list[Refusal]) -> Iterator[Path]:
    """All files below, hidden ones left out; folders that cannot be entered are added to `refused`."""

    def cannot_enter(error: OSError) -> None:
        refused.append(Refusal(Path(error.filename), Reason.UNREADABLE, _one_line(error.strerror or str(error))))

    for folder, folders, files in os.walk(root, onerror=cannot_enter):
        here = Path(folder)
        visible = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in visible if (here / name).is_symlink()]
        refused.extend(Refusal(here / name, Reason.NOT_A_FILE, "links to folders are not followed") for name in linked)
        folders[:] = [name for name in visible if name not in linked] if recursive else []
        yield from (here / name for name in sorted(files) if not name.startswith(".") and _is_picture(name))


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES | OTHER_SUFFIXES


def _refusal(path: Path, root: Path) -> tuple[Reason, str] | None:
    try:
        mode = path.stat().st_mode  # follows links, opens nothing
    except (OSError, RuntimeError) as error:
        return Reason.UNREADABLE, _one_line(getattr(error, "strerror", None) or str(error))
    if not stat.S_ISREG(mode):
        return Reason.NOT_A_FILE, _kind(mode)
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        return Reason.OUTSIDE_FOLDER, "the link leaves the folder"
    if path.suffix.lower() in OTHER_SUFFIXES:
        return Reason.FORMAT_NOT_ALLOWED, f"{path.suffix.lower()} file; allowed are {', '.join(FORMATS)}"
    return None


def _image_ids(names: list[str]) -> list[str]:
    """An id for each relative path; see `list_images`."""

    def keys() -> Iterator[str]:
        for name in names:
            yield _folded(os.path.splitext(name)[0])
            yield _folded(name)

    taken = _repeated(keys)
    stems = (os.path.splitext(name)[0] for name in names)
    return [_printable(name if taken and _folded(stem) in taken else stem) for stem, name in zip(stems, names)]


def _repeated(keys: Callable[[], Iterator[str]]) -> set[str]:
    """The keys that come more than once; never holds all of them, of millions of files that would be gigabytes."""

    def digest(key: str) -> int:
        return int.from_bytes(hashlib.blake2b(key.encode("utf8", "surrogateescape"), digest_size=8).digest(), "little")

    digests = np.fromiter(map(digest, keys()), np.uint64)
    digests.sort()
    again = set(digests[1:][digests[1:] == digests[:-1]].tolist())
    counts = Counter(key for key in keys() if digest(key) in again) if again else Counter[str]()
    return {key for key, count in counts.items() if count > 1}  # two digests may also agree by chance


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _printable(name: str) -> str:
    def escape(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in match.group().encode("utf8", "surrogateescape"))

    return re.sub(r"%(?=[0-9a-fA-F]{2})|[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escape, name)


def _one_line(text: str) -> str:
    return " ".join(text.split())
