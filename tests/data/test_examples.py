"""Training examples: pure functions of their number, photo and mask aligned to the pixel, the redraw rule."""

import copy
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from training_material import make_material, tiny_run

from mis_platform.config import AugmentConfig
from mis_platform.data import examples
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.examples import ExampleStream, augment, draw_colors, draw_geometry, generator, open_stream
from mis_platform.data.images import ImageRefused
from mis_platform.storage import Storage

STILL = AugmentConfig(
    scale_min=1.0,
    scale_max=1.0,
    flip_probability=0.0,
    rotate90_probability=0.0,
    shift_rotate_probability=0.0,
    brightness_contrast_probability=0.0,
    rgb_shift_probability=0.0,
)
MOVING = AugmentConfig(brightness_contrast_probability=0.0, rgb_shift_probability=0.0)


def changed(config: AugmentConfig, **settings: float) -> AugmentConfig:
    return AugmentConfig.model_validate({**config.model_dump(), **settings})


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Storage]:
    return make_material(tmp_path_factory.mktemp("material"), count=5)


@pytest.fixture(scope="module")
def stream(material: tuple[Dataset, Storage]) -> ExampleStream:
    return open_stream(*material, tiny_run(seed=3))


def augment_one(
    image: np.ndarray, mask: np.ndarray, size: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    crop, (moved,) = augment(image, [mask], size, config, rng)
    return crop, moved


def assert_same(one: examples.Example, other: examples.Example) -> None:
    assert (one.image_id, one.number) == (other.image_id, other.number)
    for a, b in zip(one[:3], other[:3], strict=True):
        np.testing.assert_array_equal(a, b)


# -- the stream ------------------------------------------------------------------------------------------------------


def test_an_example_depends_on_its_number_alone(stream: ExampleStream) -> None:
    forwards = [stream.example(k) for k in range(8)]
    travelled = copy.deepcopy(stream)
    examples._reader.cache_clear()
    for k in reversed(range(8)):
        assert_same(travelled.example(k), forwards[k])
    assert travelled.proposals is not None
    assert "_index" not in vars(examples._reader(travelled.proposals, "tree"))  # it read only what it needed


def test_examples_are_what_the_network_takes(stream: ExampleStream) -> None:
    slots = stream.run.clicks.max_clicks
    for k in range(40):
        image, mask, points, image_id, number = stream.example(k)
        assert image.shape == (224, 224, 3)
        assert image.dtype == np.uint8
        assert mask.shape == (224, 224)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}
        assert points.shape == (2 * slots, 3)
        assert points.dtype == np.float32
        assert image_id in stream.image_ids
        assert number == k
        assert mask.sum() == 0 or mask.sum() >= stream.run.augment.min_object_area
        positive, negative = (rows[rows[:, 0] >= 0][:, :2].astype(int) for rows in (points[:slots], points[slots:]))
        assert mask[tuple(positive.T)].all()
        assert not mask[tuple(negative.T)].any()
        assert len(positive) >= 1 or not mask.any()


def test_every_epoch_visits_every_photo_once_in_a_new_order(stream: ExampleStream) -> None:
    count = len(stream.image_ids)
    epochs = [[stream.visit(epoch * count + k) for k in range(count)] for epoch in range(6)]
    for epoch, visits in enumerate(epochs):
        assert {number for number, _ in visits} == {epoch}
        assert sorted(image_id for _, image_id in visits) == sorted(stream.image_ids)
    assert len({tuple(image_id for _, image_id in visits) for visits in epochs}) > 3


def test_a_photo_is_new_at_every_visit_and_with_every_seed(material: tuple[Dataset, Storage]) -> None:
    first, second = (open_stream(*material, tiny_run(seed=seed)) for seed in (0, 1))
    visits = [first.example(k) for k in range(30) if first.visit(k)[1] == first.image_ids[0]]
    assert len(visits) == 6
    assert len({visit.image.tobytes() for visit in visits}) == len({visit.points.tobytes() for visit in visits}) == 6
    assert first.example(0).points.tobytes() != second.example(0).points.tobytes()


def test_generators_of_other_seeds_purposes_and_numbers_are_unrelated() -> None:
    keys = [(seed, purpose, number) for seed in (0, 1) for purpose in range(5) for number in (0, 1, 2**40)]
    draws = np.stack([generator(*key).random(1000) for key in keys])
    correlations = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlations).max() < 5 / math.sqrt(1000)
    np.testing.assert_array_equal(generator(*keys[3]).random(1000), draws[3])


def test_photos_without_a_tree_are_left_out(material: tuple[Dataset, Storage], tmp_path: Path) -> None:
    dataset, trees = material
    (tmp_path / "new").mkdir()
    more = Dataset("more", "train", dataset.root, (*dataset.samples[:2], dataset.samples[2]), dataset.read, False)
    unknown = dataset.samples[0]._replace(image_id="not there")
    assert open_stream(more, trees, tiny_run()).image_ids == more.image_ids
    mixed = Dataset("mixed", "train", dataset.root, (unknown, *dataset.samples[1:]), dataset.read, False)
    assert open_stream(mixed, trees, tiny_run()).image_ids == dataset.image_ids[1:]
    none = Dataset("none", "train", dataset.root, (unknown,), dataset.read, False)
    with pytest.raises(ValueError, match="none of the 1 photos of none has a proposal"):
        open_stream(none, trees, tiny_run())


def test_a_photo_that_has_changed_is_refused(tmp_path: Path) -> None:
    dataset, trees = make_material(tmp_path, count=2)
    stream = open_stream(dataset, trees, tiny_run())
    path = dataset.image_path(stream.visit(0)[1])
    Image.new("RGB", (100, 90)).save(path)
    with pytest.raises(ValueError, match=r"90x100 pixels.*but was \d+x\d+ when its proposals were made"):
        stream.example(0)
    path.write_bytes(b"not a photo")
    with pytest.raises(ImageRefused):
        stream.example(0)


# -- geometry --------------------------------------------------------------------------------------------------------


def turns_of(image: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
    flips = {"": image, "x": image[:, ::-1], "y": image[::-1], "xy": image[::-1, ::-1]}
    return {(quarter, flip): np.rot90(flipped, quarter) for quarter in range(4) for flip, flipped in flips.items()}


def test_flips_and_quarter_turns_are_exact() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8), rng.random((96, 96)) < 0.5
    images, masks = turns_of(image), turns_of(mask)
    seen = []
    for seed in range(400):
        config = changed(STILL, flip_probability=0.5, rotate90_probability=0.5)
        crop, moved = augment_one(image, mask, 96, config, np.random.default_rng(seed))
        fits = {key for key in images if np.array_equal(images[key], crop) and np.array_equal(masks[key], moved)}
        assert fits
        seen.append(crop.tobytes())
    # The eight symmetries of a square. Nothing flipped (1/2) and not turned (1/2 + 1/8): 5/16; both ways and by a half
    # turn (1/6 x 1/8): 1/48.
    assert len(set(seen)) == 8
    share = seen.count(image.tobytes()) / len(seen)
    assert abs(share - (5 / 16 + 1 / 48)) < 4 * math.sqrt(0.33 * 0.67 / 400)


def test_without_augmentation_a_crop_is_a_window_of_the_photo() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (150, 200, 3), dtype=np.uint8)
    rows = np.arange(150 * 200).reshape(150, 200)
    places = set()
    for _ in range(50):
        geometry = draw_geometry(150, 200, 128, STILL, rng)
        _, inside = geometry.move_mask(rows > 0)
        crop = geometry.move_image(image, inside)
        x, y = geometry.to_source[:, 2].astype(int)
        np.testing.assert_array_equal(crop, image[y : y + 128, x : x + 128])
        places.add((y, x))
    assert {y for y, _ in places} <= set(range(23))
    assert {x for _, x in places} <= set(range(73))
    assert len(places) > 40


def test_a_small_photo_is_centred_on_black() -> None:
    image = np.full((50, 81, 3), 200, np.uint8)
    crop, moved = augment_one(image, np.ones((50, 81), bool), 128, STILL, np.random.default_rng(0))
    expected = np.zeros((128, 128), bool)
    expected[39:89, 23:104] = True
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(crop, 200 * np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("scale", [0.75, 0.9, 1.25])
def test_rescaling_is_that_of_opencv(scale: float) -> None:
    rng = np.random.default_rng(2)
    image = cv2.GaussianBlur(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8), (0, 0), 3)
    height, width = round(120 * scale), round(160 * scale)
    expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    config = changed(STILL, scale_min=scale, scale_max=scale)
    crop, moved = augment_one(image, np.ones((120, 160), bool), 256, config, rng)
    top, left = (256 - height) // 2, (256 - width) // 2
    window = (slice(top, top + height), slice(left, left + width))
    assert moved[window].all()
    assert moved.sum() == height * width
    assert np.abs(crop[window].astype(int) - expected).max() <= 2  # coordinates are rounded to 1/32 pixel


def test_a_mask_drawn_into_the_photo_stays_on_the_mask() -> None:
    """The photo is its own mask, white on black: bilinear and nearest may differ at the contour only, and evenly."""
    yy, xx = np.mgrid[:300, :400]
    mask = ((yy - 140) ** 2 / 50**2 + (xx - 210) ** 2 / 70**2 < 1) & ~((yy - 150) ** 2 + (xx - 180) ** 2 < 20**2)
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    drift = []
    for seed in range(60):
        crop, moved = augment_one(image, mask, 256, MOVING, np.random.default_rng(seed))
        grey = crop[..., 0].astype(float) / 255
        away = ndimage.distance_transform_edt(moved) + ndimage.distance_transform_edt(~moved) > 1.5
        np.testing.assert_array_equal((grey > 0.5)[away], moved[away])
        frame = np.zeros((256, 256), bool)
        frame[2:-2, 2:-2] = True
        if not (moved & ~frame).any():  # the whole object is in the crop: compare centres of mass
            drift.append(np.subtract(ndimage.center_of_mass(grey), ndimage.center_of_mass(moved)))
    assert len(drift) > 15
    # Pixels. Nearest neighbours round ties one way: at a scale of 3/4, a third of them by half a pixel.
    assert np.abs(np.mean(drift, axis=0)).max() < 0.05
    assert np.abs(drift).max() < 0.25


def test_shift_and_rotation_keep_to_their_limits() -> None:
    config = changed(STILL, shift_rotate_probability=1.0)
    angles, shifts = [], []
    for seed in range(500):
        matrix = draw_geometry(200, 300, 400, config, np.random.default_rng(seed)).to_source
        np.testing.assert_allclose(matrix[:, :2] @ matrix[:, :2].T, np.eye(2), atol=1e-9)
        angles.append(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])))
        centre = matrix @ (199.5, 199.5, 1)  # the centre of the crop, where an unmoved photo has its centre
        shifts.append((matrix[:, :2].T @ (centre - (149.5, 99.5))) / (300, 200))
    assert np.abs(angles).max() < 3
    assert np.std(angles) == pytest.approx(6 / math.sqrt(12), rel=0.1)
    assert np.abs(shifts).max() < 0.03
    assert np.std(shifts) == pytest.approx(0.06 / math.sqrt(12), rel=0.1)


def test_the_mask_covers_exactly_what_the_photo_covers() -> None:
    for seed in range(40):
        image = np.full((140, 190, 3), 255, np.uint8)
        crop, moved = augment_one(image, np.ones((140, 190), bool), 224, MOVING, np.random.default_rng(seed))
        np.testing.assert_array_equal((crop > 0).all(axis=2), moved)
        assert set(np.unique(crop)) <= {0, 255}  # borders do not fade


# -- what is kept ----------------------------------------------------------------------------------------------------


def corner_object() -> tuple[np.ndarray, np.ndarray]:
    """An object that most crops of 32 pixels miss."""
    mask = np.zeros((32, 256), bool)
    mask[:, :16] = True
    return np.zeros((32, 256, 3), np.uint8), mask


def test_a_lost_object_is_drawn_again() -> None:
    image, mask = corner_object()
    config = changed(STILL, keep_background_probability=0.0, min_object_area=1)
    rng = np.random.default_rng(0)
    assert all(augment_one(image, mask, 32, config, rng)[1].any() for _ in range(200))


def test_a_lost_object_is_kept_at_its_probability() -> None:
    image, mask = corner_object()
    lost = 1 - 16 / 225  # of the 225 crop positions, 16 see the object
    for keep in (0.01, 0.3, 1.0):
        config = changed(STILL, keep_background_probability=keep, min_object_area=1)
        rng = np.random.default_rng(1)
        share = np.mean([not augment_one(image, mask, 32, config, rng)[1].any() for _ in range(700)])
        expected = lost * keep / (1 - lost * (1 - keep))  # the sum of a geometric series
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 700)


def test_a_mask_without_object_ends_as_background() -> None:
    config = changed(STILL, keep_background_probability=0.0)
    _, moved = augment_one(
        np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), bool), 32, config, np.random.default_rng(0)
    )
    assert not moved.any()


@pytest.mark.parametrize(("pixels", "survives"), [(79, False), (80, True)])
def test_small_objects_are_removed_but_not_drawn_again(pixels: int, survives: bool) -> None:
    mask = np.zeros((64, 64), bool)
    mask[10, :].flat[: min(pixels, 64)] = True
    mask[11, : pixels - 64] = True
    _, moved = augment_one(np.zeros((64, 64, 3), np.uint8), mask, 64, STILL, np.random.default_rng(0))
    assert moved.sum() == (pixels if survives else 0)


def test_several_objects_move_together_and_are_removed_one_by_one() -> None:
    masks = [np.zeros((200, 200), bool) for _ in range(2)]
    masks[0][40:160, 50:150] = True
    masks[1][100:104, 100:104] = True  # inside the other; 16 pixels
    for seed in range(20):
        image = np.zeros((200, 200, 3), np.uint8)
        together = augment(image, masks, 224, MOVING, np.random.default_rng(seed))[1]
        alone = augment_one(image, masks[0], 224, MOVING, np.random.default_rng(seed))[1]
        np.testing.assert_array_equal(together[0], alone)
        assert not together[1].any()
        kept = augment(image, masks, 224, changed(MOVING, min_object_area=1), np.random.default_rng(seed))[1]
        assert 0 < kept[1].sum() == (kept[1] & kept[0]).sum()


# -- colours ---------------------------------------------------------------------------------------------------------


def test_colours_stay_without_colour_augmentation() -> None:
    table = draw_colors(STILL, np.random.default_rng(0))
    np.testing.assert_array_equal(table, np.repeat(np.arange(256)[:, None], 3, axis=1))


def test_brightness_and_contrast_are_one_line_clipped() -> None:
    config = changed(STILL, brightness_contrast_probability=1.0)
    fits = []
    for seed in range(300):
        table = draw_colors(config, np.random.default_rng(seed)).astype(float)
        assert (table == table[:, :1]).all()
        inner = (table[:, 0] > 0) & (table[:, 0] < 255)
        slope, offset = np.polyfit(np.arange(256)[inner], table[inner, 0], 1)
        np.testing.assert_allclose(table[:, 0], np.clip(slope * np.arange(256) + offset, 0, 255), atol=0.6)
        fits.append((slope - 1, offset / 255))
    contrast, brightness = np.transpose(fits)
    assert -0.16 < contrast.min() < -0.13
    assert 0.38 < contrast.max() < 0.41
    assert abs(contrast.mean() - 0.125) < 0.04
    assert np.abs(brightness).max() < 0.26
    assert abs(brightness.mean()) < 0.04


def test_channels_shift_apart_by_at_most_ten_levels() -> None:
    config = changed(STILL, rgb_shift_probability=1.0)
    shifts = np.array([draw_colors(config, np.random.default_rng(seed))[128].astype(int) - 128 for seed in range(300)])
    assert np.abs(shifts).max() == 10
    assert np.abs(shifts.mean(axis=0)).max() < 1.5
    assert np.abs(np.corrcoef(shifts.T) - np.eye(3)).max() < 0.25
