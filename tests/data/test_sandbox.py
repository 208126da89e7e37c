"""Decoding in a child: the same arrays and refusals, whatever the file does to the process that decodes it."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile_files import (
    encoded,
    hostile_mats,
    hostile_photos,
    instances_mat,
    jpeg_of_scans,
    picture,
    png_chunk,
    tiff_of_strips,
)
from PIL import Image

from mis_platform.data import images, masks, sandbox
from mis_platform.data.benchmarks import open_dataset, verify
from mis_platform.data.images import ImageRefused, Reason
from mis_platform.data.sandbox import Limits, Sandbox
from mis_platform.errors import DataError

pytestmark = pytest.mark.timeout(200)
SERVE = "import sys, os; sys.path[:] = sys.argv[2:]; from mis_platform.data import sandbox; handle = int(sys.argv[1])\n"


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    box = Sandbox()
    yield box
    box.close()


def refusal(box: Sandbox, content: bytes | Path) -> ImageRefused:
    with pytest.raises(ImageRefused) as caught:
        box.read_image(content)
    return caught.value


# -- the same answers ------------------------------------------------------------------------------------------------


def test_pixels_are_those_of_this_process(box: Sandbox) -> None:
    """In all modes and formats: a decoder that wants to import or open something in the child would fail there."""
    modes = {
        "PNG": ("RGB", "L", "1", "P", "RGBA", "LA", "I;16"),
        "TIFF": ("RGB", "CMYK", "LAB", "YCbCr", "F", "I;16", "1"),
        "JPEG": ("RGB", "L", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "BMP": ("RGB", "L"),
        "GIF": ("P",),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(picture(mode=mode), kind) for kind, each in modes.items() for mode in each]
    files += [encoded(picture(), "JPEG", exif=exif, progressive=True), encoded(picture(), "WEBP", exif=exif)]
    files += [encoded(picture(), "TIFF", compression=each) for each in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    files.append(encoded(picture(mode="1"), "TIFF", compression="group4"))
    for content in files:
        np.testing.assert_array_equal(box.read_image(content), images.read_image(content))
        assert box.probe_size(content) == images.probe_size(content)
    assert box.started == 1


def test_refusals_are_those_of_this_process(box: Sandbox) -> None:
    """Bombs, torn files and other formats; each answer is there within a second of CPU."""
    before = box.started or 1
    for name, (content, reason) in hostile_photos().items():
        refused = refusal(box, content)
        assert refused.reason is reason, name
        with pytest.raises(ImageRefused) as here:
            images.read_image(content)
        assert (refused.reason, refused.message) == (here.value.reason, here.value.message), name
    assert box.started == before, "no child died of them"


def test_masks_are_those_of_this_process(box: Sandbox) -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 1, 2, 128, 220, 255], np.uint8), (30, 40))
    palette = Image.fromarray(labels)
    palette.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tolist())
    contents = {
        masks.read_binary: [encoded(Image.fromarray(labels), "PNG"), encoded(picture(mode="I;16"), "PNG")],
        masks.read_union: [encoded(picture(), "PNG"), encoded(picture(), "BMP")],
        masks.read_palette: [encoded(palette, "PNG"), encoded(palette, "GIF")],
        masks.read_palette_as_grey: [encoded(palette, "PNG")],
        masks.read_sbd: [instances_mat(labels), instances_mat(labels, compress=False)],
    }
    for reader, files in contents.items():
        for content in files:
            expected, found = reader(content, "7"), box.read_masks(reader, content, "7")
            assert [each.object_id for each in found] == [each.object_id for each in expected]
            for one, other in zip(found, expected, strict=True):
                assert one.mask.dtype == np.int8
                np.testing.assert_array_equal(one.mask, other.mask)


def test_hostile_annotations_are_refused(box: Sandbox) -> None:
    before = box.started or 1
    for name, content in hostile_mats().items():
        with pytest.raises(ValueError, match=r"\S"):
            box.read_masks(masks.read_sbd, content, "1")
        with pytest.raises(ValueError, match=r"\S"):
            masks.read_sbd(content, "1")
        assert box.started == before, f"{name} ended a child"


def test_threads_share_a_child(box: Sandbox) -> None:
    files = [encoded(picture(seed=seed), "PNG") for seed in range(12)]
    found: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: box.read_image(files[k])})) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, content in enumerate(files):
        np.testing.assert_array_equal(found[k], images.read_image(content))


def test_a_dataset_is_decoded_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a benchmark reads; this process must not call a decoder."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encoded(picture(), "JPEG"))
    mask = np.zeros((40, 56), np.uint8)
    mask[5:20, 5:20] = 255
    (tmp_path / "masks" / "a.png").write_bytes(encoded(Image.fromarray(mask), "PNG"))
    (tmp_path / "images" / "b.jpg").write_bytes(encoded(picture(), "JPEG"))
    (tmp_path / "masks" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    trusted, untrusted = (open_dataset(f"folder:{tmp_path}", untrusted=choice) for choice in (False, True))
    expected = trusted.read_image("a"), trusted.read_objects("a")[0].mask, str(verify(trusted))
    assert untrusted.digest(masks=True) == trusted.digest(masks=True)
    assert untrusted.alone("a").untrusted

    def decoder_called(*_: object, **__: object) -> None:
        raise AssertionError("this process called a decoder")

    monkeypatch.setattr(Image, "open", decoder_called)
    np.testing.assert_array_equal(untrusted.read_image("a"), expected[0])
    np.testing.assert_array_equal(untrusted.read_objects("a")[0].mask, expected[1])
    with pytest.raises(DataError, match=r"b\.png"):
        untrusted.read_objects("b")
    assert str(verify(untrusted)) == expected[2]


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_file_that_takes_too_long_costs_one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Sandbox(Limits(cpu=1))
    try:
        began = time.monotonic()
        refused = refusal(box, jpeg_of_scans(6_800, 250))
        assert refused.reason is Reason.TIMEOUT
        assert "more than 1 s of CPU" in refused.message
        assert time.monotonic() - began < 60
        good = encoded(picture(), "PNG")
        np.testing.assert_array_equal(box.read_image(good), images.read_image(good))
        for _ in range(3):  # the limit is for each file
            box.read_image(good)
        assert box.started == 2
    finally:
        box.close()


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """The child that photos of trusted folders may meet, with less time than they have."""
    box = Sandbox(sandbox.TRUSTED._replace(cpu=1))
    monkeypatch.setattr(sandbox, "shared", lambda limits: {sandbox.TRUSTED: box}[limits])
    yield box
    box.close()


def run_length_bmp() -> bytes:
    """8 x 8 pixels of palette entry 3, as runs."""
    start = (
        b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, *[0] * 5)
    )
    return start + bytes(1024) + b"\x08\x03\0\0" * 8 + b"\0\1"


SLOW = {
    "tiff": lambda: encoded(picture(), "TIFF", compression="tiff_lzw"),
    "big-endian tiff": lambda: encoded(picture(mode="I;16"), "TIFF", big_tiff=True),
    "run-length bmp": run_length_bmp,
    "large": lambda: encoded(picture(), "PNG")[:-12] + png_chunk(b"prVt", bytes(9 << 20)) + png_chunk(b"IEND", b""),
    "jpeg of 20 scans": lambda: jpeg_of_scans(64, 12),
    "pages": lambda: encoded(picture(), "TIFF", save_all=True, append_images=[picture(seed=1)]),
}
QUICK = {
    "jpeg": lambda: encoded(picture(), "JPEG"),
    "progressive jpeg": lambda: encoded(picture(), "JPEG", progressive=True),
    "png": lambda: encoded(picture(), "PNG"),
    "webp": lambda: encoded(picture(), "WEBP"),
    "gif": lambda: encoded(picture(mode="P"), "GIF"),
    "bmp": lambda: encoded(picture(), "BMP"),
}


@pytest.mark.parametrize("kind", [*SLOW, *QUICK])
def test_of_trusted_folders_only_what_may_be_slow_goes_to_a_child(kind: str, trusted: Sandbox, tmp_path: Path) -> None:
    content = (SLOW | QUICK)[kind]()
    (tmp_path / "a.jpg").write_bytes(content)
    dataset = open_dataset(f"folder:{tmp_path}")
    np.testing.assert_array_equal(dataset.read_image("a"), images.read_image(content))
    assert dataset.probe_size("a") == images.probe_size(content)
    found = sandbox.decoder(untrusted=False).read_picture(tmp_path / "a.jpg")
    assert found.has_more is (kind == "pages")
    assert trusted.started == (kind in SLOW)


def test_a_slow_file_of_a_trusted_folder_ends_with_its_time(trusted: Sandbox, tmp_path: Path) -> None:
    """30 000 strips, that are the same megabyte of blocks without content: 1.2 MB that take half a minute here."""
    few, many = (tiff_of_strips(rows, 200_000) for rows in (300, 30_000))
    began = time.process_time()
    assert (images.read_image(few) == 7).all()
    seconds = 100 * (time.process_time() - began)
    assert seconds > 3 * trusted.limits.cpu, "the file takes longer than it may"
    (tmp_path / "slow.jpg").write_bytes(many)
    (tmp_path / "good.tif").write_bytes(encoded(picture(), "TIFF"))
    dataset = open_dataset(f"folder:{tmp_path}")
    with pytest.raises(ImageRefused, match=r"TIMEOUT: decoding took more than 1 s of CPU time"):
        dataset.read_image("slow")
    np.testing.assert_array_equal(dataset.read_image("good"), np.asarray(picture()))
    assert trusted.started == 2


def test_photos_of_trusted_folders_may_need_memory(tmp_path: Path) -> None:
    """More than those of others: what was within data.max_megapixels before still is."""
    assert sandbox.TRUSTED.memory is None
    assert (sandbox.TRUSTED.cpu, Limits().cpu) == (10, 10)
    box = Sandbox(sandbox.TRUSTED)
    try:
        large = encoded(Image.new("F", (7_800, 7_700), 0.5), "TIFF")  # 60 megapixels
        assert refusal(box, large).reason is Reason.TOO_LARGE
        assert box.read_image(large, max_megapixels=100).shape == (7_700, 7_800, 3)
    finally:
        box.close()


def test_a_file_that_needs_too_much_memory_costs_one_child() -> None:
    box = Sandbox(Limits(memory=64 * 2**20))
    try:
        refused = refusal(box, encoded(Image.new("RGB", (6_000, 5_000)), "PNG"))
        assert refused.reason is Reason.MEMORY_LIMIT
        good = encoded(picture(), "PNG")
        np.testing.assert_array_equal(box.read_image(good), images.read_image(good))
    finally:
        box.close()


DEATHS = {
    b"crash": ("os.kill(os.getpid(), 11)", Reason.DECODER_DIED, "SIGSEGV"),
    b"abort": ("os.abort()", Reason.DECODER_DIED, "SIGABRT"),
    b"leave": ("os._exit(3)", Reason.DECODER_DIED, "exit code 3"),
    b"sleep": ("time.sleep(60)", Reason.TIMEOUT, "more than 3 s"),
    b"raise": ("raise KeyError('any')", Reason.DECODER_DIED, "exit code 1"),
}


def test_however_a_decoder_ends_the_next_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = "".join(f"    if content == {content!r}: {what}\n" for content, (what, _, _) in DEATHS.items())
    decoder = f"import time\ndef read_picture(content, **limits):\n{cases}    return real(content, **limits)\n"
    start = f"{SERVE}real = sandbox.images.read_picture\n{decoder}sandbox.images.read_picture = read_picture\n"
    monkeypatch.setattr(sandbox, "_START", f"{start}sandbox.serve(handle)")
    box, good = Sandbox(Limits(wall=3.0)), encoded(picture(), "PNG")
    try:
        for number, (content, (_, reason, words)) in enumerate(DEATHS.items(), 1):
            refused = refusal(box, content)
            assert refused.reason is reason
            assert words in refused.message
            np.testing.assert_array_equal(box.read_image(good), images.read_image(good))
            assert box.started == number + 1
    finally:
        box.close()


def test_the_child_can_reach_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither files, nor connections, nor our environment; what it tried and got comes back as its error."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    target = tmp_path / "written"
    probes = {
        "read": "open('/etc/hostname').read()",
        "write": f"open({str(target)!r}, 'w').write('x')",
        "connect": "__import__('socket').socket()",
        "pipe": "os.pipe()",
        "run": "__import__('subprocess').run(['true'])",
        "more": "__import__('resource').getrlimit(7)[1] == 0 or 1/0; open('/etc/hostname')",
    }
    code = f"""{SERVE}
import socket, subprocess, json
def read_picture(content, **limits):
    got = {{"environment": sorted(os.environ), "cwd": os.getcwd()}}
    for name, probe in {probes!r}.items():
        try:
            exec(probe); got[name] = "allowed"
        except Exception as error:
            got[name] = type(error).__name__ + " " + str(error)
    raise ValueError(json.dumps(got))
sandbox.images.read_picture = read_picture
sandbox.serve(handle)
"""
    monkeypatch.setattr(sandbox, "_START", code)
    box = Sandbox()
    try:
        with pytest.raises(ValueError, match="environment") as caught:
            box.read_image(b"anything")
    finally:
        box.close()
    got = json.loads(str(caught.value))
    assert "AWS_SECRET_ACCESS_KEY" not in got.pop("environment")
    assert got.pop("cwd") == "/"
    assert all("Too many open files" in result for result in got.values()), got
    assert not target.exists()


@pytest.mark.parametrize(
    "reply",
    [
        "b'\\xff' * 100",
        "_LENGTH.pack(5) + b'{bad}'",
        "_LENGTH.pack(2) + b'[]'",
        "_LENGTH.pack(12) + b'{\"blobs\":[]}'",
        "message({'arrays': [['pixels', 'object', [1]]], 'blobs': [8]}) + bytes(8)",
        "message({'arrays': [['pixels', 'uint8', [10, 10, 3]]], 'blobs': [4]}) + bytes(4)",
        "message({'arrays': [['pixels', 'uint8', [-1]]], 'blobs': [-1]})",
        "message({'arrays': [['pixels', 'uint8', [10**9]]], 'blobs': [10**12]})",
        "message({'arrays': 5, 'blobs': []})",
        "message({'arrays': [['pixels', ['uint8'], [1]]], 'blobs': [1]}) + bytes(1)",
        "message({'arrays': [['pixels', 'uint8', 'x']], 'blobs': [1]}) + bytes(1)",
        "message({'refused': 'NO_SUCH_REASON', 'message': 'x', 'blobs': []})",
        "message({'arrays': [['pixels', 'uint8', [3]]], 'blobs': [3]}) + bytes(3)",
        "message({'arrays': [], 'blobs': []})",
    ],
)
def test_a_lying_child_is_not_believed(reply: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back from a child that a file has taken over is data, and checked."""
    code = f"""import sys, socket, struct, json
_LENGTH = struct.Struct("<I")
def message(value):
    text = json.dumps(value).encode()
    return _LENGTH.pack(len(text)) + text
connection = socket.socket(fileno=int(sys.argv[1]))
connection.recv(10000)
connection.sendall(message({{"blobs": []}}))
connection.recv(10000)
connection.sendall({reply})
"""
    monkeypatch.setattr(sandbox, "_START", code)
    box = Sandbox(Limits(wall=20.0))
    began = time.monotonic()
    try:
        assert refusal(box, b"anything").reason is Reason.DECODER_DIED
        assert time.monotonic() - began < 15
    finally:
        box.close()


def test_a_child_that_cannot_start_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START", "import no_such_module")
    with pytest.raises(RuntimeError, match="did not start"):
        Sandbox().read_image(encoded(picture(), "PNG"))


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))
    code = (
        "import sys, time\nfrom mis_platform.data.sandbox import Sandbox\nbox = Sandbox()\n"
        f"box.read_image({str(tmp_path / 'a.png')!r})\nprint(box._child.process.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        deadline = time.monotonic() + 10
        while _is_running(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _is_running(child)
    finally:
        parent.kill()


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # waiting for its new parent, which may be nobody in a container
