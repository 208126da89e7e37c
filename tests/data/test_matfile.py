"""The reader of SBD's instance maps against SciPy's, and against files that should not be trusted."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from mis_platform.data.matfile import MAX_FILE_BYTES, read_instances


def mat_bytes(fields: dict[str, object], compress: bool, **variables: object) -> bytes:
    """A MAT-file with the structure GTinst, written by SciPy."""
    structure = np.zeros((1, 1), dtype=[(name, object) for name in fields])
    for name, value in fields.items():
        structure[0, 0][name] = value
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {**variables, "GTinst": structure}, do_compression=compress)
    return buffer.getvalue()


def instance_map(dtype: str = "uint8") -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 4, (37, 53)) * (rng.random((37, 53)) < 0.3)).astype(dtype)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_reads_what_scipy_writes(tmp_path: Path, dtype: str, compress: bool) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(mat_bytes({"Segmentation": instance_map(dtype)}, compress))
    found = read_instances(path)
    assert found.dtype == np.int32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, scipy.io.loadmat(path)["GTinst"][0][0][0])


@pytest.mark.parametrize("compress", [False, True])
def test_skips_the_other_fields_and_variables_of_sbd(tmp_path: Path, compress: bool) -> None:
    boundaries = np.empty((2, 1), dtype=object)
    boundaries[:, 0] = [scipy.sparse.eye(5, format="csc"), scipy.sparse.csc_matrix((5, 5))]
    fields = {"Boundaries": boundaries, "Categories": np.array([[3.0], [7.0]]), "Segmentation": instance_map()}
    path = tmp_path / "a.mat"
    path.write_bytes(mat_bytes(fields, compress, other=np.arange(9), text="some text"))
    np.testing.assert_array_equal(read_instances(path), instance_map())


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_reads_maps_of_a_few_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    """Up to four bytes are stored inside the tag of their element."""
    labels = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    path = tmp_path / "a.mat"
    path.write_bytes(mat_bytes({"Segmentation": labels}, compress=False))
    np.testing.assert_array_equal(read_instances(path), labels)


def test_equals_scipy_on_real_annotations(real_data: Path) -> None:
    paths = sorted((real_data / "COCO-sbd-layout" / "inst").glob("*.mat"))
    assert len(paths) == 50
    for path in paths:
        np.testing.assert_array_equal(read_instances(path), scipy.io.loadmat(path)["GTinst"][0][0][0])


@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, compress: bool) -> None:
    whole = mat_bytes({"Segmentation": instance_map(), "Categories": np.array([[1]])}, compress)
    path = tmp_path / "2008_000123.mat"
    for end in np.random.default_rng(0).integers(0, len(whole), 100):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"2008_000123\.mat"):
            read_instances(path)


@pytest.mark.parametrize("compress", [False, True])
def test_a_damaged_file_gives_an_error_or_a_map(tmp_path: Path, compress: bool) -> None:
    """SciPy's reader ends the process on such files."""
    whole = mat_bytes({"Segmentation": instance_map(), "Categories": np.array([[1]])}, compress)
    path = tmp_path / "a.mat"
    rng = np.random.default_rng(1)
    messages = []
    for _ in range(600):
        data = bytearray(whole)
        for position in rng.integers(128, min(len(whole), 420), rng.integers(1, 4)):
            data[position] = rng.choice([0, 1, 8, 14, 15, 127, 128, 255])
        path.write_bytes(data)
        try:
            assert read_instances(path).ndim == 2
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def test_claims_of_huge_sizes_are_not_believed(tmp_path: Path) -> None:
    whole = bytearray(mat_bytes({"Segmentation": instance_map()}, compress=False))
    path = tmp_path / "a.mat"
    struct.pack_into("<I", whole, 132, 2**32 - 1)  # bytes of the variable
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_instances(path)
    bomb = zlib.compress(bytes(300 * 2**20), 9)
    path.write_bytes(bytes(whole[:128]) + struct.pack("<II", 15, len(bomb)) + bomb)
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_instances(path)
    with open(path, "wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="more than"):
        read_instances(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segmentation": np.ones((3, 3), np.uint8)}, "no field Segmentation"),
        ({"Segmentation": np.ones((3, 3, 2), np.uint8)}, "not a matrix of integers"),
        ({"Segmentation": np.ones((3, 0), np.uint8)}, "not a matrix of integers"),
        ({"Segmentation": "text"}, "not a matrix of integers"),
        ({"Segmentation": np.ones((3, 3), complex)}, "not a matrix of integers"),
        ({"Segmentation": np.full((3, 3), 0.5)}, "whole numbers"),
        ({"Segmentation": np.full((3, 3), np.nan)}, "whole numbers"),
        ({"Segmentation": np.full((3, 3), -1, np.int8)}, "whole numbers"),
        ({"Segmentation": np.full((3, 3), 70000, np.int32)}, "whole numbers"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(mat_bytes(fields, compress=True))
    with pytest.raises(ValueError, match=message):
        read_instances(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"GTcls": np.ones((3, 3))})
    with pytest.raises(ValueError, match="no variable GTinst"):
        read_instances(path)
    scipy.io.savemat(path, {"GTinst": np.ones((3, 3))})
    with pytest.raises(ValueError, match="not a structure"):
        read_instances(path)
    for data in (b"", bytes(500), b"\x89HDF\r\n\x1a\n" + bytes(200)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="level 5"):
            read_instances(path)
    with pytest.raises(ValueError, match=r"none\.mat"):
        read_instances(tmp_path / "none.mat")
