"""Archives are unpacked whole, inside their folder, or refused without a trace."""

import bz2
import gzip
import hashlib
import io
import os
import random
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_platform.data import archives
from mis_platform.data.archives import unpack
from mis_platform.errors import DataError

FILES = {"GrabCut/data_GT/a.jpg": b"photo", "GrabCut/boundary_GT/a.bmp": b"mask" * 1000, "GrabCut/empty": b""}
HOSTILE_NAMES = [
    "../outside",
    "a/../../outside",
    "/tmp/outside",
    "..",
    "a/b/../../../outside",
    "\\outside",
    "..\\outside",
    "C:\\outside",
    "C:outside",
    "line\nbreak",
    "\x1b[2J",
    "./",
]


def tar_of(files: dict[str, bytes], *special: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o6777
            tar.addfile(info, io.BytesIO(content))
        for info in special:
            tar.addfile(info)
    return out.getvalue()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name  # as it is, without zipfile's own cleaning
            archive.writestr(info, content, method)
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


FORMATS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "tar": tar_of,
    "tar.gz": lambda files: gzip.compress(tar_of(files)),
    "tar.bz2": lambda files: bz2.compress(tar_of(files)),
    "zip": zip_of,
    "stored zip": lambda files: zip_of(files, zipfile.ZIP_STORED),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder that holds the archive; nothing else may appear in it or above it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def refused(place: Path, content: bytes, message: str, **options: object) -> None:
    archive = place / "set.archive"
    archive.write_bytes(content)
    before = sorted(place.parent.rglob("*"))
    with pytest.raises(DataError, match=message) as caught:
        unpack(archive, place / "out", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert sorted(place.parent.rglob("*")) == before
    assert not Path("/tmp/outside").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_files_come_out_as_they_went_in(place: Path, kind: str) -> None:
    (place / "set").write_bytes(FORMATS[kind](FILES))
    made = unpack(place / "set", place / "out")
    found = {path.relative_to(place / "out").as_posix(): path for path in (place / "out").rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES
    assert (made.files, made.bytes) == (3, sum(map(len, FILES.values())))
    assert not any(path.stat().st_mode & 0o7000 for path in found.values()), "no bit that runs as somebody else"
    assert sorted(path.name for path in place.iterdir()) == ["out", "set"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_no_member_leaves_the_folder(place: Path, kind: str, name: str) -> None:
    refused(place, FORMATS[kind]({"good": b"x", name: b"y"}), "leave its folder|no name")


@pytest.mark.parametrize(
    "info",
    [
        link("a", "/etc/passwd"),
        link("a", "b"),
        link("a", "../../b", tarfile.LNKTYPE),
        link("a", "", tarfile.FIFOTYPE),
        link("a", "", tarfile.CHRTYPE),
        link("a", "", tarfile.BLKTYPE),
    ],
)
def test_only_files_and_folders_come_out(place: Path, info: tarfile.TarInfo) -> None:
    refused(place, tar_of({"good": b"x"}, info), "link or a device")


def test_a_link_in_a_zip(place: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("a")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    refused(place, out.getvalue(), "link or a device")


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice(place: Path, kind: str) -> None:
    refused(place, FORMATS[kind]({"a": b"x", "./a": b"y"}), "twice")
    refused(place, FORMATS[kind]({"a": b"x", "a/b": b"y"}), "twice")
    refused(place, FORMATS[kind]({"n" * 300: b"x"}), "too long")


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "zip"])
def test_a_bomb_is_stopped_while_it_unpacks(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    bomb = FORMATS[kind]({"zeros": bytes(40 * 2**20)})
    assert len(bomb) * 100 < 39 * 2**20
    refused(place, bomb, "unpacks to more than")
    small = FORMATS[kind]({"noise": random.Random(0).randbytes(3 * 2**20)})
    refused(place, small, "unpacks to more than 2 MiB", max_bytes=2 * 2**20)


def test_sizes_are_counted_not_believed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip that says 10 bytes and holds 40 MiB."""
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    bomb = bytearray(zip_of({"zeros": bytes(40 * 2**20)}))
    directory = bomb.rindex(b"PK\1\2")
    struct.pack_into("<I", bomb, directory + 24, 10)
    refused(place, bytes(bomb), "damaged|unpacks to more")


def test_a_header_that_claims_gigabytes_is_not_read(place: Path) -> None:
    info = tarfile.TarInfo("PaxHeaders/x")
    info.type, info.size = tarfile.XHDTYPE, 8 * 2**30
    began = time.perf_counter()
    refused(place, gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10**6)), "header of 8589934592 bytes")
    info.type = tarfile.REGTYPE
    refused(place, info.tobuf(tarfile.GNU_FORMAT) + bytes(10**6), "damaged|larger")
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>", "web page.*another mirror"),
        (b"\n  <HTML><body>Sign in</body></HTML>", "web page"),
        (b"", "no zip, tar"),
        (b"plain text, no archive" * 100, "no zip, tar"),
        (b"PK\3\4 but no more", "damaged"),
        (b"\x1f\x8b\x08" + bytes(100), "damaged|no zip"),
        (tar_of({}), "empty"),
        (zip_of({}), "empty"),
    ],
)
def test_what_is_no_archive(place: Path, content: bytes, message: str) -> None:
    refused(place, content, message)


def test_the_checksum_comes_first(place: Path) -> None:
    content = FORMATS["tar.gz"](FILES)
    refused(place, content, "not the file it should be: its SHA-256 is", sha256="0" * 64)
    unpack(place / "set.archive", place / "out", sha256=hashlib.sha256(content).hexdigest().upper())
    with pytest.raises(ValueError, match="64 hexadecimal"):
        unpack(place / "set.archive", place / "other", sha256="abc")


def test_a_folder_in_use_and_things_that_are_no_files(place: Path) -> None:
    (place / "out").mkdir()
    (place / "set").write_bytes(tar_of(FILES))
    unpack(place / "set", place / "out")  # an empty folder will do
    with pytest.raises(ValueError, match="in use"):
        unpack(place / "set", place / "out")
    os.mkfifo(place / "pipe")
    for name in ("pipe", "none", "out"):
        with pytest.raises(DataError, match=r"is no file|No such file"):
            unpack(place / name, place / "new")


@pytest.mark.parametrize("kind", FORMATS)
def test_any_damage_is_told_in_a_line_or_does_no_harm(place: Path, kind: str) -> None:
    whole, rng = FORMATS[kind](FILES), random.Random(1)
    told = 0  # in one line
    for number in range(60):
        content = bytearray(whole)
        if number % 3 == 0:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.randrange(1, 6)):
            if content:
                content[rng.randrange(min(len(content), 1600))] = rng.choice((0, 1, 47, 46, 127, 255))
        (place / "set").write_bytes(content)
        try:
            unpack(place / "set", place / f"out{number}")
        except DataError as error:
            told += "\n" not in str(error)
        else:
            continue
        assert not (place / f"out{number}").exists()
    assert told > 5
    assert all(path.name == "set" or path.name.startswith("out") for path in place.iterdir())
