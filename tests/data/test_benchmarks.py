"""The benchmark readers, on small sets written in each layout and on the real photographs."""

import dataclasses
import itertools
import os
import pickle
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
from hostile_files import png_of_zeros
from PIL import Image

from mis_platform.data import masks
from mis_platform.data.benchmarks import (
    LAYOUTS,
    Dataset,
    list_datasets,
    open_dataset,
    verify,
)
from mis_platform.data.images import ImageRefused, Reason
from mis_platform.data.masks import is_buggy
from mis_platform.errors import DataError

SIZE = (20, 30)  # height, width of most images here


def write_image(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8)).save(path)


def square(value: int = 255, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[5:15, 5:15] = value
    return mask


def write_sbd(root: Path, train: dict[str, np.ndarray], val: dict[str, np.ndarray]) -> None:
    for name, samples in (("train", train), ("val", val)):
        for image_id, instances in samples.items():
            write_image(root / "img" / f"{image_id}.jpg", instances.shape)
            (root / "inst").mkdir(exist_ok=True)
            structure = np.zeros((1, 1), dtype=[("Segmentation", object)])
            structure[0, 0]["Segmentation"] = instances.astype(np.uint8)
            scipy.io.savemat(root / "inst" / f"{image_id}.mat", {"GTinst": structure}, do_compression=True)
        (root / f"{name}.txt").write_text("".join(f"{image_id}\n" for image_id in samples))


def write_folder(root: Path, images: dict[str, dict[str, np.ndarray]]) -> Dataset:
    """images: file name -> mask file name -> mask."""
    (root / "masks").mkdir(parents=True)
    for k, (file, owned) in enumerate(images.items()):
        write_image(root / "images" / file, seed=k)
        for mask_file, mask in owned.items():
            write_mask(root / "masks" / mask_file, mask)
    return open_dataset(f"folder:{root}", split="val")


def kinds(dataset: Dataset) -> list[str]:
    return [problem.kind for problem in verify(dataset).problems]


# -- mask rules ------------------------------------------------------------------------------------------------------


def test_grabcut_ignores_128_only(tmp_path: Path) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[0, :7] = [0, 1, 127, 128, 129, 200, 255]
    write_image(tmp_path / "data_GT" / "a.bmp")
    write_mask(tmp_path / "boundary_GT" / "a.png", mask)
    (found,) = open_dataset(f"grabcut:{tmp_path}").read_objects("a")
    assert found.object_id == "1"
    assert found.mask.dtype == np.int8
    assert found.mask[0, :7].tolist() == [0, 0, 0, -1, 1, 1, 1]
    assert (found.mask[1:] == 0).all()


def test_of_a_coloured_mask_blue_counts(tmp_path: Path) -> None:
    """RITM takes channel 0 of what OpenCV decodes, which is blue."""
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[0, :3] = [(255, 255, 0), (0, 0, 255), (255, 0, 128)]
    (found,) = write_folder(tmp_path / "set", {"a.jpg": {"a.png": colours}}).read_objects("a")
    assert found.mask[0, :3].tolist() == [0, 1, -1]


@pytest.mark.parametrize("name", ["davis", "coco_mval"])
def test_davis_takes_any_channel_and_ignores_nothing(tmp_path: Path, name: str) -> None:
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[0, :4] = [(0, 0, 0), (1, 0, 0), (0, 128, 0), (0, 0, 255)]
    write_image(tmp_path / "img" / "000.jpg")
    write_mask(tmp_path / "gt" / "000.png", colours)
    (found,) = open_dataset(f"{name}:{tmp_path}").read_objects("000")
    assert found.mask[0, :4].tolist() == [0, 1, 1, 1]
    assert set(np.unique(found.mask)) == {0, 1}


def test_masks_decode_as_opencv_does(tmp_path: Path) -> None:
    """RITM reads masks with cv2.imread: every kind of PNG must give the same pixels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (*SIZE, 4), dtype=np.uint8)
    grey16 = Image.fromarray(rng.integers(0, 65536, SIZE, dtype=np.uint16))
    rgb = Image.fromarray(colours[:, :, :3])
    pictures = [rgb, Image.fromarray(colours), rgb.convert("L"), rgb.convert("1"), rgb.convert("P"), grey16]
    for picture in [*pictures, rgb.convert("LA")]:
        path = tmp_path / f"{picture.mode.replace(';', '')}.png"
        picture.save(path)
        expected = cv2.imread(str(path))[:, :, ::-1]
        np.testing.assert_array_equal(masks._decode(path.read_bytes()), expected, err_msg=picture.mode)


def voc_palette() -> np.ndarray:
    """uint8 [256, 3]: the colour map of PASCAL VOC; bit k of an index sets bit 7 - k // 3 of channel k % 3."""
    index = np.arange(256)
    bits = (index[:, None] >> np.arange(24)) & 1
    return np.stack([(bits[:, c::3] << (7 - np.arange(8))).sum(axis=1) for c in range(3)], axis=1).astype(np.uint8)


def write_voc(root: Path, labels: np.ndarray) -> None:
    write_image(root / "JPEGImages" / "2007_000033.jpg", labels.shape)
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette(voc_palette().reshape(-1).tolist())
    path = root / "SegmentationObject" / "2007_000033.png"
    path.parent.mkdir(parents=True)
    picture.save(path)
    list_file = root / "ImageSets" / "Segmentation" / "val.txt"
    list_file.parent.mkdir(parents=True)
    list_file.write_text("2007_000033\n")


def test_pascal_voc_objects_are_palette_indices(tmp_path: Path) -> None:
    labels = np.zeros(SIZE, np.uint8)
    labels[2:6, 2:6], labels[8:12, 8:12], labels[0, :] = 3, 1, 255
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", labels)
    objects = open_dataset("pascalvoc", tmp_path, "val").read_objects("2007_000033")
    assert [each.object_id for each in objects] == ["1", "3"]
    for each in objects:
        assert ((each.mask == 1) == (labels == int(each.object_id))).all()
        assert ((each.mask == -1) == (labels == 255)).all()


def test_pascal_voc_in_ritms_numbering(tmp_path: Path) -> None:
    """Ids are OpenCV's grey values of the palette; the void colour is 220."""
    labels = np.repeat(np.arange(20, dtype=np.uint8), 30).reshape(20, 30)
    labels[:, 0] = 255
    write_voc(tmp_path, labels)
    grey = cv2.cvtColor(cv2.imread(str(tmp_path / "SegmentationObject" / "2007_000033.png")), cv2.COLOR_BGR2GRAY)
    objects = open_dataset(f"pascalvoc_grey:{tmp_path}", split="val").read_objects("2007_000033")
    assert [int(each.object_id) for each in objects] == [k for k in np.unique(grey) if k not in (0, 220)]
    for each in objects:
        expected = np.where(grey == 220, -1, grey == int(each.object_id))
        np.testing.assert_array_equal(each.mask, expected)


def test_sbd_objects_are_labels_in_file_order_and_unfiltered(tmp_path: Path) -> None:
    instances = np.zeros(SIZE, np.uint8)
    instances[3, 3], instances[10:15, 10:20], instances[0, :5] = 7, 2, 4
    empty = np.zeros(SIZE, np.uint8)
    write_sbd(tmp_path / "SBD" / "dataset", {"b": empty, "a": instances}, {"d": instances, "c": instances})
    train, val = open_dataset("sbd", tmp_path), open_dataset("sbd", tmp_path, "val")
    assert (train.image_ids, val.image_ids) == (("b", "a"), ("d", "c"))
    objects = val.read_objects("c")
    assert [each.object_id for each in objects] == ["2", "4", "7"]
    assert [int(each.mask.sum()) for each in objects] == [50, 5, 1]
    assert all(set(np.unique(each.mask)) == {0, 1} for each in objects)
    assert train.read_objects("b") == ()


def test_buggy_objects_are_dropped_for_training_only() -> None:
    """The rule of RITM's training reader: less than 8 % of the box, edges included."""
    instances = np.zeros((100, 100), np.uint8)
    np.fill_diagonal(instances[:10, :10], 1)  # 10 of 100 pixels: stays
    np.fill_diagonal(instances[20:33, 20:33], 2)  # 13 of 169: 7.7 %
    instances[50:52, 50:52] = 3
    assert [is_buggy(instances == label) for label in (1, 2, 3)] == [False, True, False]
    assert not is_buggy(np.zeros((5, 5), bool))


def test_generic_folder_pairs_masks_with_images(tmp_path: Path) -> None:
    """STEM.png is the only object, STEM_K.png is object K; an image's own name goes before "object of another"."""
    dataset = write_folder(
        tmp_path / "set",
        {
            "cat.jpg": {"cat_1.png": square(), "cat_2.png": square(200)},
            "cat_3.jpg": {"cat_3.png": square()},
            "two.dots.jpg": {"two.dots.png": square()},
            "ritm.dots.jpg": {"ritm.png": square()},
        },
    )
    assert dataset.image_ids == ("cat", "cat_3", "ritm.dots", "two.dots")
    found = {image_id: [each.object_id for each in dataset.read_objects(image_id)] for image_id in dataset.image_ids}
    assert found == {"cat": ["1", "2"], "cat_3": ["1"], "ritm.dots": ["1"], "two.dots": ["1"]}
    assert not verify(dataset).problems


# -- order, ids, digests, subsets ------------------------------------------------------------------------------------


def test_order_is_pythons_order_of_paths(tmp_path: Path) -> None:
    names = ["b.jpg", "B.jpg", "a10.jpg", "a2.jpg", "é.jpg", "-x.jpg", "a b.jpg", "z;rm.jpg"]
    for name in names:
        write_image(tmp_path / "images" / name)
    dataset = open_dataset(f"folder:{tmp_path}")
    paths = [dataset.image_path(image_id) for image_id in dataset.image_ids]
    assert paths == sorted((tmp_path / "images").glob("*.*"))
    assert len(set(dataset.image_ids)) == len(names)


def test_equal_stems_get_ids_of_their_own(tmp_path: Path) -> None:
    dataset = write_folder(tmp_path / "set", {"a.jpg": {}, "a.png": {"a.png": square()}, "b.jpg": {"b.png": square()}})
    assert dataset.image_ids == ("a.jpg", "a.png", "b")
    assert kinds(dataset) == ["duplicate stem", "duplicate stem"]


def test_digest_depends_on_content_alone(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", {"a.jpg": {"a.png": square()}, "b.jpg": {"b.png": square()}})
    two = write_folder(tmp_path / "two", {"a.jpg": {"a.png": square()}, "b.jpg": {"b.png": square(200)}})
    assert one.digest() == two.digest() == dataclasses.replace(one, samples=one.samples[::-1]).digest()
    assert one.digest(masks=True) != two.digest(masks=True)
    write_image(tmp_path / "two" / "images" / "b.jpg", seed=9)
    assert one.digest() != two.digest()
    os.rename(tmp_path / "one" / "images" / "a.jpg", tmp_path / "one" / "images" / "c.jpg")
    assert open_dataset(f"folder:{tmp_path}/one").digest() != one.digest()


@pytest.fixture
def hundred(tmp_path: Path) -> Dataset:
    root = tmp_path / "hundred"
    root.mkdir()
    for k in range(100):
        (root / f"{k:03d}.jpg").write_bytes(b"x")
    return open_dataset(f"folder:{root}")


def test_subsets_are_seeded_and_nested(hundred: Dataset) -> None:
    shares = [set(hundred.subset(share, seed=3).image_ids) for share in (0.0001, 0.01, 0.05, 0.1, 0.5, 1.0)]
    assert [len(share) for share in shares] == [1, 1, 5, 10, 50, 100]
    assert all(small <= large for small, large in itertools.pairwise(shares))
    assert hundred.subset(0.1, seed=3) == hundred.subset(0.1, seed=3) != hundred.subset(0.1, seed=4)
    picked = hundred.subset(0.5, seed=0).image_ids
    assert list(picked) == sorted(picked)


def test_both_shares_round_down(hundred: Dataset) -> None:
    for share in (0.199, 0.015, 0.999):
        assert len(hundred.subset(share, seed=0)) == len(hundred.first_lines(share)) == int(100 * share)


def test_first_lines_are_the_official_share(hundred: Dataset) -> None:
    assert hundred.first_lines(0.199).image_ids == hundred.image_ids[:19]
    assert len(hundred.first_lines(0.001)) == 1
    assert hundred.first_lines(1.0) == hundred


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_impossible_shares_are_refused(hundred: Dataset, fraction: float) -> None:
    with pytest.raises(ValueError, match="up to 100 %"):
        hundred.subset(fraction, seed=0)
    with pytest.raises(ValueError, match="up to 100 %"):
        hundred.first_lines(fraction)


def test_the_root_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("folder:photos", "folder:~/photos", "folder:./x/../photos/"):
        assert open_dataset(spec).image_path("a") == tmp_path / "photos" / "a.jpg"


def test_datasets_travel_to_other_processes(hundred: Dataset) -> None:
    assert hundred.image_path("007").name == "007.jpg"
    assert pickle.loads(pickle.dumps(hundred)) == hundred  # noqa: S301, our own bytes


# -- what people get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grabcat:x", "did you mean 'grabcut'"),
        ("zzz", "there are: grabcut, berkeley, sbd, davis"),
        ("sbd:", "empty path"),
        ("folder", "folder:PATH"),
        ("grabcut:{root}/nothing", "no folder .*nothing/data_GT"),
        ("berkeley", "no folder .*Berkeley/images"),
        ("folder:{root}/nothing", "no folder"),
        ("folder:{root}/empty", r"no images in .*empty .*\.jpg"),
        ("sbd:{root}/listless", "train.txt"),
        ("sbd:{root}/evil", "not the name of an image"),
        ("sbd:{root}/twice", "2 times"),
    ],
)
def test_a_wrong_spec_is_answered_in_one_line(tmp_path: Path, spec: str, message: str) -> None:
    for name, lines in (("evil", "../../etc/passwd\n"), ("twice", "a\na\n"), ("listless", None)):
        (tmp_path / name / "img").mkdir(parents=True)
        if lines is not None:
            (tmp_path / name / "train.txt").write_text(lines)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as refused:
        open_dataset(spec.format(root=tmp_path), tmp_path)
    assert "\n" not in str(refused.value)


def test_a_name_alone_needs_a_data_root() -> None:
    with pytest.raises(DataError, match="--data-root or MIS_DATA"):
        open_dataset("davis")


def test_verify_lists_everything_that_is_wrong(tmp_path: Path) -> None:
    dataset = write_folder(
        tmp_path / "set",
        {
            "good.jpg": {"good.png": square()},
            "bare.jpg": {},
            "broken.jpg": {"broken.png": square()},
            "empty.jpg": {"empty.png": square(0)},
            "large.jpg": {"large.png": square(size=(20, 31))},
            "torn.jpg": {"torn.png": square()},
            "twice.jpg": {"twice.png": square(), "twice_1.png": square()},
        },
    )
    masks = tmp_path / "set" / "masks"
    write_mask(masks / "orphan.png", square())
    (masks / "torn.png").write_bytes((masks / "torn.png").read_bytes()[:60])
    (tmp_path / "set" / "images" / "broken.jpg").write_text("not a photo")
    os.mkfifo(tmp_path / "set" / "images" / "pipe.jpg")
    report = verify(open_dataset(f"folder:{tmp_path}/set"))
    assert (report.images, report.objects) == (7, 2)
    found = {(problem.kind, Path(problem.file).name) for problem in report.problems}
    assert found == {
        ("skipped file", "pipe.jpg"),
        ("extra mask", "orphan.png"),
        ("missing mask", "bare.jpg"),
        ("unreadable image", "broken.jpg"),
        ("empty mask", "empty.jpg"),
        ("mask of another size", "large.jpg"),
        ("unreadable mask", "torn.jpg"),
        ("unreadable mask", "twice.jpg"),
    }
    assert len(str(report).splitlines()) == 2 + len(found)
    with pytest.raises(DataError, match=r"large\.png: the mask is 20x31 pixels, its image images/large\.jpg is 20x30"):
        dataset.read_objects("large")
    with pytest.raises(DataError, match=r"bare\.jpg: it has no mask"):
        dataset.read_objects("bare")
    with pytest.raises(DataError, match="more than one mask"):
        dataset.read_objects("twice")


@pytest.mark.parametrize("name", ["grabcut", "davis", "pascalvoc", "sbd"])
def test_hostile_masks_are_told_by_name_and_never_block(tmp_path: Path, name: str) -> None:
    """Bombs, torn files, other formats, pipes and devices in place of a mask, for every reader."""
    layout = LAYOUTS[name]
    suffix = layout.mask_suffix or ".png"
    write_image(tmp_path / layout.images / "a.jpg")
    mask = tmp_path / layout.masks / f"a{suffix}"
    mask.parent.mkdir(parents=True)
    if layout.list_file:
        listed = tmp_path / layout.list_file.format(split="val")
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("a\n")
    else:
        write_mask(mask, square())
    dataset = open_dataset(f"{name}:{tmp_path}", split="val")
    harm = {
        "huge": png_of_zeros(10_100, 10_000),
        "above Pillow's own limit": png_of_zeros(13_400, 13_400),
        "torn": png_of_zeros(30, 20)[:45],
        "text": b"no mask",
        "empty": b"",
        "other format": b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(100),
    }
    start = time.perf_counter()
    for what, content in harm.items():
        mask.unlink(missing_ok=True)
        mask.write_bytes(content)
        with pytest.raises(DataError, match=re.escape(mask.name)) as caught:
            dataset.read_objects("a")
        assert "\n" not in str(caught.value), what
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        mask.unlink()
        make(mask)
        with pytest.raises(DataError, match="not a file"):
            dataset.read_objects("a")
        assert kinds(dataset)[-1] == "unreadable mask"
        if mask.is_dir():
            mask.rmdir()
            mask.touch()
    assert time.perf_counter() - start < 20


def test_samples_with_missing_files_can_be_left_out(tmp_path: Path) -> None:
    write_sbd(tmp_path, {}, {"a": square(1), "b": square(1), "c": square(1)})
    dataset = open_dataset(f"sbd:{tmp_path}", split="val")
    assert dataset.without_missing() == (dataset, ())
    (tmp_path / "inst" / "a.mat").unlink()
    (tmp_path / "img" / "c.jpg").unlink()
    whole, missing = dataset.without_missing()
    assert (whole.image_ids, missing) == (("b",), ("a", "c"))
    (tmp_path / "inst" / "b.mat").unlink()
    with pytest.raises(DataError, match="none of the 3 images"):
        dataset.without_missing()


def test_verify_follows_the_list_of_sbd(tmp_path: Path) -> None:
    write_sbd(tmp_path, {"a": square(1)}, {"b": square(1), "c": square(1), "d": square(1)})
    (tmp_path / "img" / "b.jpg").unlink()
    (tmp_path / "inst" / "c.mat").unlink()
    (tmp_path / "inst" / "d.mat").write_bytes(b"MATLAB 5.0")
    assert kinds(open_dataset(f"sbd:{tmp_path}", split="val")) == ["missing image", "missing mask", "unreadable mask"]
    assert kinds(open_dataset(f"sbd:{tmp_path}", split="train")) == []


def test_the_size_of_a_mask_counts_after_rotation(tmp_path: Path) -> None:
    """EXIF orientation 6 turns a stored 20x30 image to 30x20."""
    dataset = write_folder(tmp_path / "set", {"a.jpg": {"a.png": square(size=(30, 20))}})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "set" / "images" / "a.jpg", exif=exif)
    assert dataset.read_objects("a")[0].mask.shape == (30, 20)


def test_photos_without_masks(tmp_path: Path) -> None:
    write_image(tmp_path / "flat" / "a.jpg")
    write_image(tmp_path / "flat" / "trip" / "b.jpg")
    dataset = open_dataset(f"folder:{tmp_path}/flat")
    assert (dataset.image_ids, dataset.is_labelled) == (("a", "trip/b"), False)
    assert kinds(dataset) == []
    with pytest.raises(DataError, match="photos only"):
        dataset.read_objects("a")


def test_an_unusable_photo_is_refused_with_its_reason(tmp_path: Path) -> None:
    dataset = write_folder(tmp_path / "set", {"a.jpg": {"a.png": square()}})
    (tmp_path / "set" / "images" / "a.jpg").write_bytes(b"")
    with pytest.raises(ImageRefused) as refused:
        dataset.read_objects("a")
    assert refused.value.reason is Reason.EMPTY_FILE


def test_every_layout_is_found_below_the_data_root(tmp_path: Path) -> None:
    for layout in LAYOUTS.values():
        for folder in layout.folders[:1]:
            write_image(tmp_path / folder / layout.images / "a.jpg")
            if layout.list_file:
                for split in ("train", "val"):
                    path = tmp_path / folder / layout.list_file.format(split=split)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text("a\n")
    lines = list_datasets(tmp_path)
    assert [line.name for line in lines if line.split == "val"] == [name for name in LAYOUTS if name != "folder"]
    assert all(line.images == 1 and line.root is not None for line in lines)
    assert "1 images in" in str(lines[0])
    assert all(line.root is None and line.note in str(line) for line in list_datasets(tmp_path / "nothing"))
    assert all(line.root is None and line.note for line in list_datasets(None))


# -- real data -------------------------------------------------------------------------------------------------------


def test_grabcut_is_as_published(real_data: Path) -> None:
    dataset = open_dataset("grabcut", real_data)
    report = verify(dataset)
    assert (report.images, report.objects, report.problems) == (50, 50, ())
    assert report.is_published_size
    for image_id in dataset.image_ids:
        path = next((real_data / "GrabCut" / "boundary_GT").glob(f"{image_id}.*"))
        channel = cv2.imread(str(path))[:, :, 0].astype(int)
        expected = np.where(channel == 128, -1, channel > 128)
        np.testing.assert_array_equal(dataset.read_objects(image_id)[0].mask, expected)


def test_coco_in_sbd_layout(real_data: Path) -> None:
    spec = f"sbd:{real_data / 'COCO-sbd-layout'}"
    train, val = open_dataset(spec, split="train"), open_dataset(spec, split="val")
    assert (len(train), len(val)) == (36, 14)
    assert not set(train.image_ids) & set(val.image_ids)
    report = verify(val)
    assert (report.objects, report.problems, report.is_published_size) == (55, (), False)
    assert sum(len(train.read_objects(image_id)) for image_id in train.image_ids) == 174 - 55


def test_a_flat_folder_of_photos_below_the_data_root(tmp_path: Path) -> None:
    write_image(tmp_path / "photos" / "a.png")
    assert len(open_dataset("photos", tmp_path)) == 1
    missing = [line for line in list_datasets(tmp_path) if line.name == "berkeley"]
    assert [line.note for line in missing] == ["not there (wanted: Berkeley/images)"]
