"""The instance maps of SBD: field `Segmentation` of the MATLAB variable `GTinst`.

SciPy's reader trusts its input: files with a few changed bytes end the process (SciPy 1.17), and claimed sizes are
allocated unseen. Annotations come from anywhere, so this reads the little that is needed, with every length checked.
Format: MathWorks, "MAT-File Format", level 5; names of types and classes are those of that document.
"""

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_FILE_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**20  # of all variables of a file together
MAX_LABEL = 2**16 - 1

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15
_STRUCT_CLASS = 2
_NUMERIC_CLASSES = range(6, 16)  # double, single, and the signed and unsigned integers
_COMPLEX = 0x0800
_DTYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}


class _Element(NamedTuple):
    kind: int
    payload: memoryview
    end: int  # where the next element begins


def read_instances(source: Path | bytes) -> np.ndarray:
    """Instance map of one image: int32 [H, W], 0 background, 1..k instances.

    source: a path, or the content of a file. Raises ValueError, naming the file if there is one, when it is missing,
    truncated, too large, damaged, or holds something else.
    """
    if isinstance(source, bytes):
        return _instances(source)
    try:
        if (size := source.stat().st_size) > MAX_FILE_BYTES:
            raise ValueError(_too_large(size))
        return _instances(source.read_bytes())
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _instances(data: bytes) -> np.ndarray:
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(_too_large(len(data)))
    try:
        return _labels(_segmentation(_variable(data, "GTinst")))
    except (struct.error, zlib.error) as error:
        raise ValueError(str(error)) from None


def _too_large(size: int) -> str:
    return f"{size} bytes are more than the {MAX_FILE_BYTES} an instance map may have"


def _variable(data: bytes, name: str) -> memoryview:
    """The content of the matrix element of the variable `name`."""
    if data[126:_HEADER_BYTES] != b"IM":
        raise ValueError("not a little-endian level 5 MAT-file, or only the beginning of one")
    position, budget = _HEADER_BYTES, MAX_UNPACKED_BYTES
    while position < len(data):
        element = _element(memoryview(data), position)
        position = element.end
        if element.kind == _COMPRESSED:
            unpacked = _unpack(element.payload, budget)
            budget -= len(unpacked)
            element = _element(unpacked, 0)
        if element.kind != _MATRIX:
            raise ValueError(f"damaged: element type {element.kind} where a variable should begin")
        if _describe(element.payload).name == name:
            return element.payload
    raise ValueError(f"no variable {name} in it")


def _element(data: memoryview, position: int) -> _Element:
    """The data element at `position`; all its bytes are there."""
    kind, length = struct.unpack_from("<II", data, position)
    if kind >> 16:  # small data element: the length sits in the upper half of the type, up to 4 bytes follow
        kind, length, start = kind & 0xFFFF, kind >> 16, position + 4
        end = position + 8
    else:
        start = position + 8
        end = start + length + (0 if kind == _COMPRESSED else -length % 8)
    if start + length > min(len(data), end):
        raise ValueError("the file is truncated or damaged")
    return _Element(kind, data[start : start + length], end)


def _unpack(payload: memoryview, budget: int) -> memoryview:
    stream = zlib.decompressobj()
    unpacked = stream.decompress(payload, budget + 1)
    if len(unpacked) > budget:
        raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
    if not stream.eof:
        raise ValueError("the compressed data end too early")
    return memoryview(unpacked)


class _Description(NamedTuple):
    array_class: int
    is_complex: bool
    shape: tuple[int, ...]
    name: str
    end: int  # where the content begins


def _describe(matrix: memoryview) -> _Description:
    """The first three sub-elements of a matrix element: array flags, dimensions, name."""
    flags = _element(matrix, 0)
    dimensions = _element(matrix, flags.end)
    name = _element(matrix, dimensions.end)
    flag_word = struct.unpack_from("<I", flags.payload)[0]
    shape = tuple(np.frombuffer(dimensions.payload, "<i4").tolist())
    if min(shape, default=-1) < 0:
        raise ValueError(f"damaged: dimensions {shape}")
    label = bytes(name.payload).decode("ascii", "replace")
    return _Description(flag_word & 0xFF, bool(flag_word & _COMPLEX), shape, label, name.end)


def _segmentation(matrix: memoryview) -> memoryview:
    """The matrix element of the field Segmentation of a structure (of the first one, if it is an array of them)."""
    found = _describe(matrix)
    if found.array_class != _STRUCT_CLASS:
        raise ValueError("GTinst is not a structure")
    field_length = _element(matrix, found.end)
    field_names = _element(matrix, field_length.end)
    width = struct.unpack_from("<I", field_length.payload)[0]
    text = bytes(field_names.payload)
    if not 0 < width <= len(text):
        raise ValueError(f"damaged: field names of {width} bytes")
    names = [text[k : k + width].split(b"\0")[0].decode("ascii", "replace") for k in range(0, len(text), width)]
    if "Segmentation" not in names:
        raise ValueError(f"GTinst has no field Segmentation, only {', '.join(map(repr, names[:5]))}")
    end = field_names.end
    for _ in range(names.index("Segmentation") + 1):
        field = _element(matrix, end)
        end = field.end
    if field.kind != _MATRIX:
        raise ValueError(f"damaged: element type {field.kind} in place of GTinst.Segmentation")
    return field.payload


def _labels(matrix: memoryview) -> np.ndarray:
    found = _describe(matrix)
    if found.array_class not in _NUMERIC_CLASSES or found.is_complex or len(found.shape) != 2 or 0 in found.shape:
        raise ValueError(f"GTinst.Segmentation is not a matrix of integers (class {found.array_class}, {found.shape})")
    content = _element(matrix, found.end)
    if content.kind not in _DTYPES:
        raise ValueError(f"damaged: values of type {content.kind}")
    values = np.frombuffer(content.payload, _DTYPES[content.kind])
    if values.size != found.shape[0] * found.shape[1]:
        raise ValueError(f"damaged: {values.size} values for {found.shape[0]}x{found.shape[1]} pixels")
    whole = values.dtype.kind in "iu" or bool(np.isfinite(values).all() and (values == np.rint(values)).all())
    if not whole or values.min() < 0 or values.max() > MAX_LABEL:
        raise ValueError(f"GTinst.Segmentation should hold whole numbers from 0 to {MAX_LABEL}")
    return values.reshape(found.shape, order="F").astype(np.int32, order="C")
