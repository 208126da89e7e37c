"""The quickstart's photos and benchmark."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mis_platform.data import synthetic
from mis_platform.data.benchmarks import open_dataset, verify
from mis_platform.data.synthetic import wheel_photos, write_benchmark, write_photos


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic")
    write_benchmark(out, count=16, seed=0)
    return out


def load(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_wheel_photos_are_photographs() -> None:
    photos = wheel_photos()
    assert len(photos) >= 7
    for photo in photos.values():
        assert photo.dtype == np.uint8
        assert photo.shape[2] == 3
        assert min(photo.shape[:2]) >= 300
        assert photo.std() > 20


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_PHOTOS", {("no_such_package", "data"): ("a.png",)})
    with pytest.raises(ValueError, match="no_such_package, which is not installed"):
        wheel_photos()
    monkeypatch.setattr(synthetic, "_PHOTOS", {("skimage", "data"): ("nobody.png",)})
    with pytest.raises(ValueError, match=r"nobody\.png; reinstall"):
        wheel_photos()


def test_training_photos(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", count=14, seed=0)
    dataset = open_dataset(f"folder:{tmp_path}/photos")
    assert (len(dataset), dataset.is_labelled, verify(dataset).problems) == (14, False, ())
    pictures = [load(dataset.image_path(image_id)) for image_id in dataset.image_ids]
    assert {picture.shape for picture in pictures} == {(240, 320, 3), (320, 240, 3)}
    assert len({picture.tobytes() for picture in pictures}) == 14


def test_benchmark_is_valid_and_complete(benchmark: Path) -> None:
    report = verify(open_dataset(f"synthetic:{benchmark}", split="val"))
    assert (report.images, report.objects, report.problems) == (16, 16, ())
    areas = []
    for path in sorted((benchmark / "masks").iterdir()):
        mask = load(path)
        assert set(np.unique(mask)) == {0, 255}
        areas.append((mask == 255).mean())
    assert min(areas) >= 0.05
    assert max(areas) <= 0.40
    assert max(areas) - min(areas) > 0.1


def test_some_objects_have_holes_and_some_two_parts(benchmark: Path) -> None:
    masks = [load(path) == 255 for path in sorted((benchmark / "masks").iterdir())]
    parts = [ndimage.label(mask)[1] for mask in masks]
    holes = [ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)[1] for mask in masks]
    assert set(parts) == {1, 2}
    assert sum(count == 2 for count in parts) >= 3
    assert sum(count >= 1 for count in holes) >= 3


def box_mean(lab: np.ndarray, where: np.ndarray) -> np.ndarray:
    weight = where.astype(np.float32)[:, :, None]
    return cv2.blur(lab * weight, (5, 5)) / np.maximum(cv2.blur(weight, (5, 5)), 1e-6)[:, :, None]


def test_objects_stand_out_but_not_by_their_mean_colour_alone(benchmark: Path) -> None:
    """Colour steps across the contour, measured in boxes of 5x5 pixels: those inside against those outside."""
    for path in sorted((benchmark / "images").iterdir()):
        mask = load(benchmark / "masks" / path.name) == 255
        lab = cv2.cvtColor(load(path).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        inside = cv2.blur(lab * mask[:, :, None], (5, 5)) / np.maximum(cv2.blur(mask * 1.0, (5, 5)), 1e-9)[:, :, None]
        outside = (
            cv2.blur(lab * ~mask[:, :, None], (5, 5)) / np.maximum(cv2.blur(~mask * 1.0, (5, 5)), 1e-9)[:, :, None]
        )
        contour = mask & ~ndimage.binary_erosion(mask, border_value=1)
        step = np.linalg.norm(inside - outside, axis=2)[contour]
        assert np.median(step) > 15, path.name
        assert np.linalg.norm(lab[mask].mean(axis=0) - lab[~mask].mean(axis=0)) < 61, path.name
        assert lab[mask].std(axis=0).max() > 3, path.name


def test_equal_seeds_give_equal_pixels(benchmark: Path, tmp_path: Path) -> None:
    write_benchmark(tmp_path / "again", count=5, seed=0)
    write_benchmark(tmp_path / "other", count=5, seed=1)
    for folder in ("images", "masks"):
        for k in range(5):
            first, again, other = (
                load(root / folder / f"{k:03d}.png") for root in (benchmark, tmp_path / "again", tmp_path / "other")
            )
            np.testing.assert_array_equal(first, again)
            assert not np.array_equal(first, other)


def test_no_pixel_is_trained_and_tested_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With photos that are red on the left and blue on the right, colours tell where every pixel came from."""
    rng = np.random.default_rng(0)
    photos = {}
    for k in range(3):
        photo = np.zeros((400, 640, 3), np.uint8)
        photo[:, :320, 0] = photo[:, 320:, 2] = 60 * (k + 1)
        photo[:, :320, 0] += rng.integers(0, 60, (400, 320), dtype=np.uint8)
        photo[:, 320:, 2] += rng.integers(0, 60, (400, 320), dtype=np.uint8)
        photos[str(k)] = photo
    monkeypatch.setattr(synthetic, "wheel_photos", lambda: photos)
    monkeypatch.setattr(synthetic, "_is_distinct", lambda above, below, mask: True)
    write_photos(tmp_path / "photos", count=12, seed=0)
    write_benchmark(tmp_path / "benchmark", count=12, seed=0)
    for path in (tmp_path / "photos").iterdir():
        assert load(path)[:, :, 2].max() == 0
    for path in (tmp_path / "benchmark" / "images").iterdir():
        assert load(path)[:, :, 0].max() == 0
        assert load(path)[:, :, 2].max() > 0
