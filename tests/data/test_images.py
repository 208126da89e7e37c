"""Every kind of bad or unusual file that reached annotation tools, made here byte by byte."""

import contextlib
import io
import os
import pickle
import random
import shutil
import socket
import struct
import tempfile
import time
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile_files import jpeg_of_scans
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo
from processes import common_ground, without_rights

from mis_platform.data import images
from mis_platform.data.images import ImageRefused, Reason, list_images, probe_size, read_image, read_picture


def photo(height: int = 37, width: int = 53, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: smooth colours, so that lossy formats stay close, with noise that no codec folds away."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (height + width)], axis=-1)
    noise = np.random.default_rng(seed).integers(0, 9, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, image_format: str, **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def refusal(content: bytes | str | Path, **limits: float) -> ImageRefused:
    with pytest.raises(ImageRefused) as caught:
        read_image(content, **limits)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    assert caught.value.message
    return caught.value


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# -- incomplete and damaged files (B1 to B4) ---------------------------------------------------------------------------

CODECS = [
    ("JPEG", {"quality": 90}),
    ("JPEG", {"quality": 90, "progressive": True}),
    ("JPEG", {"quality": 90, "restart_marker_blocks": 2}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("BMP", {}),
    ("GIF", {}),
]


@pytest.mark.parametrize(("image_format", "options"), CODECS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
def test_a_part_of_a_file_is_refused(image_format: str, options: dict, share: float) -> None:
    whole = encoded(photo(120, 160), image_format, **options)
    assert read_image(whole).shape == (120, 160, 3)
    part = whole[: int(share * len(whole))]
    assert refusal(part).reason in (Reason.TRUNCATED, Reason.CORRUPT)


@pytest.mark.parametrize(("image_format", "options"), [each for each in CODECS if each[0] in ("JPEG", "PNG", "WEBP")])
@pytest.mark.parametrize("missing", [1, 2, 3, 13])
def test_missing_last_bytes_are_noticed(image_format: str, options: dict, missing: int) -> None:
    whole = encoded(photo(120, 160), image_format, **options)
    assert refusal(whole[:-missing]).reason is Reason.TRUNCATED


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 1, exclude_max=True), st.sampled_from([each for each in CODECS if each[0] in ("JPEG", "PNG", "WEBP")])
)
def test_no_prefix_of_a_file_is_read(share: float, codec: tuple[str, dict]) -> None:
    whole = encoded(photo(), codec[0], **codec[1])
    refusal(whole[: int(share * len(whole))])


@pytest.mark.parametrize("codec", ["GIF", "PNG", "WEBP", "TIFF"])
def test_damaged_animations_are_read_or_refused(codec: str) -> None:
    """Whatever is wrong with the frames that do not count."""
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(3)]
    whole = encoded(frames[0], codec, save_all=True, append_images=frames[1:])
    assert read_picture(whole).has_more
    first, readable = read_image(whole), 0
    changed = [bytearray(whole) for _ in range(200)]
    for each, place, value in zip(changed, rng.integers(len(whole), size=200), rng.integers(256, size=200)):
        each[place] = value
    for content in [*(whole[:end] for end in range(0, len(whole), 7)), *map(bytes, changed)]:
        with contextlib.suppress(ImageRefused):
            readable += np.array_equal(read_picture(content).pixels, first)
    assert readable > 20 or codec == "PNG", "which has checksums"


def test_a_jpeg_thumbnail_does_not_stand_in_for_the_missing_end() -> None:
    thumbnail = b"Exif\0\0" + encoded(photo(16, 16), "JPEG")  # holds an end marker of its own
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    whole = b"\xff\xd8" + segment + encoded(photo(), "JPEG")[2:]
    assert whole.count(b"\xff\xd9") == 2
    assert read_image(whole).shape == (37, 53, 3)
    assert refusal(whole[:-2]).reason is Reason.TRUNCATED


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm() -> None:
    whole = encoded(photo(), "JPEG")
    np.testing.assert_array_equal(read_image(whole + b"trailing maker's note" * 10), read_image(whole))


@pytest.mark.parametrize("chunk", [b"IDAT", b"IHDR", b"IEND", b"tEXt"])
def test_a_wrong_png_checksum_is_corrupt(chunk: bytes) -> None:
    info = PngInfo()
    info.add_text("Comment", "hello")
    whole = bytearray(encoded(photo(), "PNG", pnginfo=info))
    start = whole.index(chunk)
    (length,) = struct.unpack(">I", whole[start - 4 : start])
    whole[start + 4 + length] ^= 1  # first byte of the checksum
    assert refusal(bytes(whole)).reason is Reason.CORRUPT


def test_empty_text_and_directory(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("<html>please log in</html>\n")
    (tmp_path / "zeros.png").write_bytes(bytes(5000))
    assert refusal(tmp_path / "empty.jpg").reason is Reason.EMPTY_FILE
    assert refusal(b"").reason is Reason.EMPTY_FILE
    assert refusal(tmp_path / "text.jpg").reason is Reason.NOT_AN_IMAGE
    assert refusal(tmp_path / "zeros.png").reason is Reason.NOT_AN_IMAGE
    assert refusal(tmp_path).reason is Reason.NOT_A_FILE
    assert refusal(tmp_path / "missing.jpg").reason is Reason.GONE
    assert refusal("nul\0byte.jpg").reason is Reason.UNREADABLE


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_give_an_image_or_a_refusal_and_nothing_else(data: st.DataObject) -> None:
    image_format, options = data.draw(st.sampled_from(CODECS))
    content = bytearray(encoded(photo(24, 24), image_format, **options))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        result = read_image(bytes(content), max_megapixels=1)
    except ImageRefused:
        return
    assert result.dtype == np.uint8
    assert result.ndim == 3
    assert result.shape[2] == 3


# -- size limits (B5, B6, B8, B14 to B16) ------------------------------------------------------------------------------


def test_a_huge_png_is_refused_from_its_header(tmp_path: Path) -> None:
    row = zlib.compressobj(9)
    data = b"".join(row.compress(bytes(20_001)) for _ in range(20_000)) + row.flush()
    path = tmp_path / "zeros.png"
    path.write_bytes(png_header(20_000, 20_000) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b""))
    assert path.stat().st_size < 1_000_000
    start = time.perf_counter()
    refused = refusal(path)
    with pytest.raises(ImageRefused):
        probe_size(path)
    assert time.perf_counter() - start < 0.5
    assert refused.reason is Reason.TOO_LARGE


@pytest.mark.parametrize("side", [13_400, 9_460, 7_072])
def test_the_configured_limit_decides(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warning must not get out
        refused = refusal(png_header(side, side) + png_chunk(b"IDAT", b""))
    assert refused.reason is Reason.TOO_LARGE
    assert "data.max_megapixels is 50" in refused.message


def test_size_limits_are_inclusive() -> None:
    content = encoded(photo(8, 100), "PNG")
    assert read_image(content, max_megapixels=800e-6).shape == (8, 100, 3)
    assert refusal(content, max_megapixels=799e-6).reason is Reason.TOO_LARGE
    assert refusal(content, min_side=9).reason is Reason.TOO_SMALL
    assert probe_size(content, min_side=8) == (8, 100)


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (7, 7)])
def test_images_below_one_patch_are_too_small(size: tuple[int, int]) -> None:
    content = encoded(photo(*size), "PNG")
    assert refusal(content).reason is Reason.TOO_SMALL
    assert read_image(content, min_side=1).shape == (*size, 3)


@pytest.mark.parametrize("size", [(449, 337), (8, 400), (9, 31)])
def test_odd_and_long_sizes_are_kept(size: tuple[int, int]) -> None:
    np.testing.assert_array_equal(read_image(encoded(photo(*size), "PNG")), photo(*size))


def test_of_several_pages_and_frames_the_first_counts() -> None:
    frames = [Image.fromarray(photo(seed=k)) for k in range(3)]
    options = {"save_all": True, "append_images": frames[1:]}
    for image_format, more in [("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})]:
        np.testing.assert_array_equal(read_image(encoded(frames[0], image_format, **options, **more)), photo(seed=0))
    first, second = (np.full((20, 30, 3), level, np.uint8) for level in (10, 200))
    gif = encoded(Image.fromarray(first), "GIF", save_all=True, append_images=[Image.fromarray(second)])
    np.testing.assert_array_equal(read_image(gif), first)


@pytest.mark.parametrize("image_format", ["TIFF", "PNG", "WEBP", "GIF"])
def test_more_pages_and_frames_are_noticed(image_format: str) -> None:
    frames = [Image.fromarray(photo(seed=k)) for k in range(3)]
    assert read_picture(encoded(frames[0], image_format, save_all=True, append_images=frames[1:])).has_more is True
    assert read_picture(encoded(frames[0], image_format)).has_more is False


def test_what_a_phone_puts_behind_a_jpeg_is_no_frame() -> None:
    """A gain map or a depth image, as a second picture of the same file."""
    two = encoded(Image.fromarray(photo()), "MPO", save_all=True, append_images=[Image.fromarray(photo(seed=1))])
    assert Image.open(io.BytesIO(two)).n_frames == 2
    found = read_picture(two)
    assert not found.has_more
    np.testing.assert_array_equal(found.pixels, read_image(encoded(Image.fromarray(photo()), "JPEG")))


def test_tiled_and_lzw_tiffs() -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[322] = info[323] = 16  # tile width and length
    for options in ({"tiffinfo": info, "compression": "tiff_lzw"}, {"compression": "tiff_lzw"}):
        np.testing.assert_array_equal(read_image(encoded(photo(), "TIFF", **options)), photo())
    bomb = encoded(np.zeros((8000, 8000), np.uint8), "TIFF", compression="tiff_lzw")
    start = time.perf_counter()
    assert refusal(bomb).reason is Reason.TOO_LARGE
    assert time.perf_counter() - start < 0.5


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """A few bytes each, and a walk over all pixels: without a limit, a file of 1 MB takes minutes."""
    assert read_image(jpeg_of_scans(64, 200)).shape == (64, 64, 3)
    start = time.perf_counter()
    refused = refusal(jpeg_of_scans(7_000, 10_000))
    assert refused.reason is Reason.CORRUPT
    assert "more than 256 scans" in refused.message
    assert time.perf_counter() - start < 10


# -- formats (B7, B13) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"8BPS\0\1",
        b"SIMPLE  =                    T",
        b"\x1f\x8b\x08\0",
        b"\xd7\xcd\xc6\x9a",
        b"\0\0\0\x18ftypheic",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\0\0\1\0\1\0",
        b"P6 4 4 255\n",
    ],
)
def test_other_formats_meet_no_decoder(start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder_called(*_: object, **__: object) -> None:
        raise AssertionError("a decoder saw the file")

    monkeypatch.setattr(images.Image, "open", decoder_called)
    path = tmp_path / "renamed.png"
    path.write_bytes(start + bytes(2000))
    assert refusal(path).reason is Reason.FORMAT_NOT_ALLOWED


@pytest.mark.parametrize("image_format", ["PPM", "TGA", "ICO", "PCX", "JPEG2000", "EPS", "PDF"])
def test_what_pillow_could_read_but_is_not_allowed(image_format: str) -> None:
    refused = refusal(encoded(photo(32, 32), image_format))
    assert refused.reason in (Reason.FORMAT_NOT_ALLOWED, Reason.NOT_AN_IMAGE)
    assert "JPEG, PNG, WEBP, TIFF, BMP, GIF" in refused.message


# -- orientation and metadata (B9, B10, B12) ---------------------------------------------------------------------------

UPRIGHT_TO_STORED = {  # NumPy's words for the inverse of each EXIF orientation
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_orientation_is_applied_once(orientation: int, image_format: str, options: dict) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(UPRIGHT_TO_STORED[orientation](photo()))
    content = encoded(stored, image_format, exif=exif, **options)
    np.testing.assert_array_equal(read_image(content), photo())
    assert probe_size(content) == (37, 53)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_jpegs(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)  # blocks of 16 survive JPEG
    upright[:16, :16] = 250
    upright[:16, 16:] = 100
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(np.ascontiguousarray(UPRIGHT_TO_STORED[orientation](upright)), "JPEG", exif=exif))
    np.testing.assert_allclose(read_image(path).astype(int), upright, atol=2)
    assert probe_size(path) == (32, 48)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\1\0\0\0\x2a\0\0\0",
    ],
)
def test_garbage_exif_is_ignored(exif: bytes) -> None:
    content = encoded(photo(), "JPEG", exif=exif)
    np.testing.assert_array_equal(read_image(content), read_image(encoded(photo(), "JPEG")))
    assert probe_size(content) == (37, 53)


def test_twenty_megabytes_of_metadata() -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 20_000_000)
    np.testing.assert_array_equal(read_image(encoded(photo(), "PNG", pnginfo=info)), photo())
    np.testing.assert_array_equal(read_image(encoded(photo(), "PNG", exif=b"Exif\0\0" + bytes(20_000_000))), photo())


def test_colour_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()  # as far from sRGB as there is
    np.testing.assert_array_equal(read_image(encoded(photo(), "PNG", icc_profile=profile)), photo())


# -- pixel formats (B11) -----------------------------------------------------------------------------------------------


def of_one_colour(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (16, 16), colour)  # type: ignore[arg-type]


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((16, 16), value, np.uint16))


def lab8(*rgb: int) -> tuple[int, int, int]:
    """Photoshop's 8-bit CIELAB: lightness times 2.55, a and b plus 128; white is D50 (Bradford), as in ICC profiles."""
    linear = [(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    to_xyz_d50 = [
        (0.4360747, 0.3850649, 0.1430804),
        (0.2225045, 0.7168786, 0.0606169),
        (0.0139322, 0.0971045, 0.7141733),
    ]
    x, y, z = np.cbrt(np.array(to_xyz_d50) @ linear / (0.96422, 1.0, 0.82521))  # of a colour that is not nearly black
    return round((116 * y - 16) * 2.55), round(500 * (x - y)) + 128, round(200 * (y - z)) + 128


def palette(transparent: bool) -> bytes:
    image = of_one_colour("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encoded(image, "PNG", **({"transparency": bytes([255, 51])} if transparent else {}))


GOLDEN = [
    ("RGB", encoded(of_one_colour("RGB", (1, 2, 3)), "PNG"), (1, 2, 3)),
    ("L", encoded(of_one_colour("L", 77), "PNG"), (77, 77, 77)),
    ("1 bit", encoded(of_one_colour("1", 1), "PNG"), (255, 255, 255)),
    ("1 bit TIFF, fax", encoded(of_one_colour("1", 0), "TIFF", compression="group4"), (0, 0, 0)),
    ("palette", palette(False), (200, 100, 50)),
    ("palette + alpha", palette(True), (244, 224, 214)),  # 0.2 of the colour over white
    ("RGBA, transparent", encoded(of_one_colour("RGBA", (9, 9, 9, 0)), "PNG"), (255, 255, 255)),
    ("RGBA, opaque", encoded(of_one_colour("RGBA", (9, 8, 7, 255)), "PNG"), (9, 8, 7)),
    ("RGBA, one fifth", encoded(of_one_colour("RGBA", (0, 100, 200, 51)), "PNG"), (204, 224, 244)),
    ("RGBA WebP", encoded(of_one_colour("RGBA", (0, 100, 200, 51)), "WEBP", lossless=True), (204, 224, 244)),
    ("LA", encoded(of_one_colour("LA", (0, 51)), "PNG"), (204, 204, 204)),
    (
        "RGB with a transparent colour",
        encoded(of_one_colour("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        (255,) * 3,
    ),
    ("16-bit grey", encoded(grey16(257 * 100), "PNG"), (100, 100, 100)),
    ("16-bit grey, rounded", encoded(grey16(257 * 100 + 129), "PNG"), (101, 101, 101)),
    ("16-bit grey, largest", encoded(grey16(65535), "PNG"), (255, 255, 255)),
    ("16-bit grey TIFF", encoded(grey16(257 * 30), "TIFF"), (30, 30, 30)),
    ("32-bit float TIFF", encoded(of_one_colour("F", 0.5), "TIFF"), (128, 128, 128)),
    ("32-bit integer TIFF", encoded(of_one_colour("I", 65535), "TIFF"), (255, 255, 255)),
    ("CMYK TIFF", encoded(of_one_colour("CMYK", (0, 128, 255, 0)), "TIFF"), (255, 127, 0)),
    ("CMYK TIFF, black", encoded(of_one_colour("CMYK", (10, 20, 30, 255)), "TIFF"), (0, 0, 0)),
    ("YCbCr TIFF", encoded(of_one_colour("YCbCr", (76, 85, 255)), "TIFF"), (254, 0, 0)),
    ("LAB TIFF, white", encoded(of_one_colour("LAB", (255, 128, 128)), "TIFF"), (255, 255, 255)),
    ("LAB TIFF, grey", encoded(of_one_colour("LAB", (137, 128, 128)), "TIFF"), (128, 128, 128)),
    ("LAB TIFF, brown", encoded(of_one_colour("LAB", lab8(180, 90, 60)), "TIFF"), (180, 90, 60)),
]


@pytest.mark.parametrize(("name", "content", "expected"), GOLDEN, ids=[each[0] for each in GOLDEN])
def test_golden_pixels(name: str, content: bytes, expected: tuple[int, int, int]) -> None:
    pixels = read_image(content)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    tolerance = 3 if name.startswith(("LAB", "YCbCr")) else 0  # their coordinates have 8 bits
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(expected, pixels.shape), atol=tolerance)


def test_cmyk_jpegs_are_not_inverted() -> None:
    """Pillow writes CMYK JPEGs the way Photoshop does (Adobe marker, inverted); red must come back as red."""
    content = encoded(of_one_colour("CMYK", (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in content
    np.testing.assert_allclose(read_image(content)[4, 4].astype(int), (255, 0, 0), atol=3)
    # The transform byte of the Adobe segment makes the same samples YCCK: Y=255 stored inverted.
    ycck = bytearray(content)
    ycck[ycck.index(b"Adobe") + 11] = 2
    y, cb, cr, k = 255, 0, 0, 255  # as stored
    stored_rgb = (y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128))
    # libjpeg: cyan is 255 - red of the YCC triple. Adobe's inversion undoes that, and ink becomes light again.
    expected = [(255 - np.clip(value, 0, 255)) * k / 255 for value in stored_rgb]
    np.testing.assert_allclose(read_image(bytes(ycck))[4, 4].astype(int), expected, atol=4)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf")])
def test_float_pixels_without_a_known_scale_are_refused(value: float) -> None:
    assert refusal(encoded(of_one_colour("F", value), "TIFF")).reason is Reason.PIXELS_NOT_SUPPORTED


def test_integer_pixels_without_a_known_scale_are_refused() -> None:
    assert refusal(encoded(of_one_colour("I", 65536), "TIFF")).reason is Reason.PIXELS_NOT_SUPPORTED


# -- the file itself (B21, B23) ----------------------------------------------------------------------------------------


def test_pipes_sockets_and_devices_never_block() -> None:
    folder = Path(tempfile.mkdtemp())  # short: socket paths end at 108 bytes
    try:
        os.mkfifo(folder / "pipe.jpg")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "socket.jpg"))
            start = time.perf_counter()
            for path in (folder / "pipe.jpg", folder / "socket.jpg", Path("/dev/zero"), folder):
                assert refusal(path).reason is Reason.NOT_A_FILE
                with pytest.raises(ImageRefused, match="not a file"):
                    probe_size(path)
            assert time.perf_counter() - start < 1
            listing = list_images(folder)
    finally:
        shutil.rmtree(folder)
    assert not listing.images
    assert {refused.path.name: refused.reason for refused in listing.refused} == dict.fromkeys(
        ("pipe.jpg", "socket.jpg"), Reason.NOT_A_FILE
    )


def test_a_file_without_permission_is_unreadable() -> None:
    with common_ground() as folder:
        path = folder / "secret.jpg"
        path.write_bytes(encoded(photo(), "JPEG"))
        with without_rights():
            read_image(path)
        path.chmod(0)
        with without_rights():
            assert (refusal(path).reason, refusal(path).message) == (Reason.UNREADABLE, "Permission denied")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "growing.jpg"
    path.write_bytes(encoded(photo(), "JPEG"))
    real_fstat, calls = os.fstat, []

    def fstat(handle: int) -> os.stat_result:
        calls.append(handle)
        if len(calls) == 3:  # the first is the kind of file, the second its state before reading
            with open(path, "ab") as file:
                file.write(b"more")
        return real_fstat(handle)

    monkeypatch.setattr(images.os, "fstat", fstat)
    refused = refusal(path)
    assert refused.reason is Reason.UNREADABLE
    assert "changed while it was read" in refused.message


def test_a_refusal_survives_the_way_between_processes() -> None:
    refused = pickle.loads(pickle.dumps(ImageRefused(Reason.TRUNCATED, "two\nlines")))  # noqa: S301
    assert (refused.reason, refused.message, str(refused)) == (Reason.TRUNCATED, "two lines", "TRUNCATED: two lines")
    assert isinstance(refused, ValueError)


# -- folders (B19 to B22) ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def ids_of(folder: Path) -> dict[str, str]:
    return {file: image_id for image_id, file in list_images(folder).images}


def test_ids_are_paths_without_suffix(folder: Path) -> None:
    touch(folder, "b.JPG", "a.jpeg", "deep/er/c.png", "notes.txt", ".hidden.jpg", ".git/x.jpg", "Thumbs.db")
    assert ids_of(folder) == {"a.jpeg": "a", "b.JPG": "b", "deep/er/c.png": "deep/er/c"}
    assert [image_id for image_id, _ in list_images(folder, recursive=False).images] == ["a", "b"]


def test_names_that_differ_in_suffix_or_case_only_keep_both(folder: Path) -> None:
    touch(folder, "a.jpg", "a.png", "B.jpg", "b.jpg", "c.jpg", "c.jpg.png", "d.jpg")
    assert ids_of(folder) == {
        **{name: name for name in ("a.jpg", "a.png", "B.jpg", "b.jpg")},
        **{"c.jpg": "c", "c.jpg.png": "c.jpg.png", "d.jpg": "d"},
    }


HOSTILE = [
    unicodedata.normalize("NFC", "é.jpg"),
    unicodedata.normalize("NFD", "é.png"),
    "\N{GRINNING FACE}.jpg",
    "two words.jpg",
    "line\nbreak.jpg",
    ";rm -rf.jpg",
    "%2e%2e.jpg",
    "100%.jpg",
    "-leading.jpg",
    "x" * 251 + ".jpg",
    "dots...jpg",
    "<img onerror>.jpg",
    os.fsdecode(b"latin1\xe9.jpg"),
]


def test_hostile_names_round_trip(folder: Path) -> None:
    touch(folder, *HOSTILE)
    listing = list_images(folder)
    assert {file for _, file in listing.images} == set(HOSTILE)
    ids = [image_id for image_id, _ in listing.images]
    assert len({unicodedata.normalize("NFC", image_id) for image_id in ids}) == len(HOSTILE)
    for image_id in ids:
        assert image_id.encode("utf8").decode("utf8").splitlines() == [image_id]
    by_name = {file: image_id for image_id, file in listing.images}
    assert by_name["%2e%2e.jpg"] == "%252e%252e"
    assert by_name["100%.jpg"] == "100%"
    assert by_name["line\nbreak.jpg"] == "line%0Abreak"
    assert by_name[os.fsdecode(b"latin1\xe9.jpg")] == "latin1%E9"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("aAbé\u0301%20.\n/"), min_size=1, max_size=6), max_size=8, unique=True))
def test_no_two_names_share_an_id(stems: list[str]) -> None:
    names = list(dict.fromkeys(stem + suffix for stem in stems for suffix in (".jpg", ".PNG")))
    random.Random(0).shuffle(names)
    ids = images._image_ids(names)
    assert len(set(ids)) == len(names)
    assert images._image_ids(names[::-1]) == ids[::-1]


def test_links(folder: Path) -> None:
    touch(folder, "real.jpg")
    touch(folder.parent, "outside.jpg", "elsewhere/x.jpg")
    (folder / "inside.jpg").symlink_to("real.jpg")
    (folder / "outside.jpg").symlink_to(folder.parent / "outside.jpg")
    (folder / "broken.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "self").symlink_to(folder)
    (folder / "other").symlink_to(folder.parent / "elsewhere")
    (folder / "zero.png").symlink_to("/dev/zero")
    listing = list_images(folder)
    assert [image_id for image_id, _ in listing.images] == ["inside", "real"]
    assert {refused.path.name: refused.reason for refused in listing.refused} == {
        "outside.jpg": Reason.OUTSIDE_FOLDER,
        "broken.jpg": Reason.UNREADABLE,
        "loop.jpg": Reason.UNREADABLE,
        "self": Reason.NOT_A_FILE,
        "other": Reason.NOT_A_FILE,
        "zero.png": Reason.NOT_A_FILE,
    }


def test_a_linked_root_is_fine(folder: Path) -> None:
    touch(folder, "a.jpg")
    (folder.parent / "link").symlink_to(folder)
    assert [image_id for image_id, _ in list_images(folder.parent / "link").images] == ["a"]


def test_other_pictures_are_reported(folder: Path) -> None:
    touch(folder, "phone.HEIC", "drawing.svg")
    listing = list_images(folder)
    assert not listing.images
    assert [refused.reason for refused in listing.refused] == [Reason.FORMAT_NOT_ALLOWED] * 2


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        list_images(tmp_path / "none")


def test_real_photographs_have_the_size_of_their_header(real_data: Path) -> None:
    listing = list_images(real_data / "photos")
    assert len(listing.images) == 854
    assert not listing.refused
    for _, file in listing.images[::40]:
        path = real_data / "photos" / file
        pixels = read_image(path)
        assert pixels.shape[:2] == probe_size(path)
        with Image.open(path) as image:
            np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
