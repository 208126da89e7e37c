"""Files made to harm whoever decodes them, for the tests of everything that reads photos, masks and archives."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from mis_platform.data.images import Reason


def picture(height: int = 40, width: int = 56, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Coloured noise over a slope, in any of Pillow's modes."""
    y, x = np.mgrid[:height, :width]
    slope = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (height + width)], axis=-1)
    noise = np.random.default_rng(seed).integers(0, 9, slope.shape)
    image = Image.fromarray(np.clip(slope + noise, 0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_zeros(width: int, height: int) -> bytes:
    """A grey PNG that is all black: a thousandth of its pixels in bytes."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: a few bytes each, and a walk over all pixels."""
    whole = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def tiff_of_strips(rows: int, useless: int) -> bytes:
    """A TIFF of 64 x `rows` pixels, all 7, whose rows are all the same bytes of the file.

    Before they unpack to a row, they are `useless` deflate blocks of 5 bytes without content.
    """
    packed = zlib.compress(b"\7" * 64)
    strip = packed[:2] + b"\0\0\0\xff\xff" * useless + packed[2:]
    offsets = 8 + 2 + 12 * 9 + 4  # behind the header and nine tags
    values = {256: 64, 257: rows, 258: 8, 259: 8, 262: 1, 273: offsets, 277: 1, 278: 1, 279: offsets + 4 * rows}
    tags = [struct.pack("<HHII", tag, 4, rows if tag in (273, 279) else 1, value) for tag, value in values.items()]
    places = struct.pack("<I", offsets + 8 * rows) * rows + struct.pack("<I", len(strip)) * rows
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4) + places + strip


def hostile_photos() -> dict[str, tuple[bytes, Reason]]:
    """File name -> content and why it is refused: lines B1 to B8 and B14 of docs/reliability.md."""
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
    fits = b"SIMPLE  =                    T" + b" " * 50
    return {
        "half.jpg": (jpeg[: len(jpeg) // 2], Reason.TRUNCATED),
        "end.jpg": (jpeg[:-1], Reason.TRUNCATED),
        "half.png": (png[: len(png) // 2], Reason.TRUNCATED),
        "checksum.png": (png.replace(png[60:64], bytes(4), 1), Reason.CORRUPT),
        "empty.jpg": (b"", Reason.EMPTY_FILE),
        "text.jpg": (b"no picture at all", Reason.NOT_AN_IMAGE),
        "zeros.png": (png_of_zeros(20_000, 20_000), Reason.TOO_LARGE),
        "above_error.png": (png_of_zeros(13_400, 13_400), Reason.TOO_LARGE),
        "above_warning.png": (png_of_zeros(9_460, 9_460), Reason.TOO_LARGE),
        "fits.png": (fits, Reason.FORMAT_NOT_ALLOWED),
        "fits_gz.png": (gzip.compress(fits + bytes(10**7)), Reason.FORMAT_NOT_ALLOWED),
        "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(500), Reason.FORMAT_NOT_ALLOWED),
        "pdf.png": (b"%PDF-1.7\n" + bytes(500), Reason.FORMAT_NOT_ALLOWED),
        "psd.png": (b"8BPS\0\1" + bytes(500), Reason.FORMAT_NOT_ALLOWED),
        "wmf.png": (b"\xd7\xcd\xc6\x9a" + bytes(500), Reason.FORMAT_NOT_ALLOWED),
        "lzw.tif": (
            encoded(Image.new("L", (8_000, 8_000)), "TIFF", compression="tiff_lzw"),
            Reason.TOO_LARGE,
        ),
        "scans.jpg": (jpeg_of_scans(3_000, 3_000), Reason.CORRUPT),
        "one.png": (encoded(picture(1, 1), "PNG"), Reason.TOO_SMALL),
        "line.png": (encoded(picture(1, 1000), "PNG"), Reason.TOO_SMALL),
    }


def instances_mat(labels: np.ndarray, compress: bool = True, field: str = "Segmentation") -> bytes:
    """An annotation of SBD as MATLAB writes it."""
    structure = np.zeros((1, 1), dtype=[(field, object)])
    structure[0, 0][field] = labels
    out = io.BytesIO()
    scipy.io.savemat(out, {"GTinst": structure}, do_compression=compress)
    return out.getvalue()


def hostile_mats(seed: int = 0) -> dict[str, bytes]:
    """Name -> content of annotations that nobody can use: lines B26 and B27 of docs/reliability.md."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (30, 40)).astype(np.uint8)
    plain, packed = instances_mat(labels, compress=False), instances_mat(labels)
    mats = {f"cut_{end}": packed[:end] for end in rng.integers(0, len(packed), 100).tolist()}
    mats |= {"header": plain[:128], "zeros": plain[:128] + bytes(5000), "nothing": b""}
    claims = {
        "type_8": (128, 8),  # where a variable should begin: a type that is reserved
        "10_GB": (132, 10**10 % 2**32),
        "all_bytes": (132, 2**32 - 1),
        "dimensions": (160, -5 % 2**32),
        "long_name": (172, 2**31),
    }
    for name, (position, value) in claims.items():
        bad = bytearray(plain)
        struct.pack_into("<I", bad, position, value)
        mats[name] = bytes(bad)
    bomb = zlib.compress(bytes(257 * 2**20), 9)
    mats["bomb"] = plain[:128] + struct.pack("<II", 15, len(bomb)) + bomb
    cyclic = struct.pack("<II", 14, 8) * 1000  # matrices in matrices
    mats["nested"] = plain[:128] + struct.pack("<II", 14, len(cyclic)) + cyclic
    return mats


def write_all(folder: Path, files: dict[str, tuple[bytes, Reason]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
