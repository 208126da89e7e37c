"""Labelled targets: which images and objects of a data set, which of them in an example."""

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from training_material import make_labelled, make_material, three_squares, tiny_run

from mis_platform.config import DataConfig, Run, TargetConfig
from mis_platform.data import labels
from mis_platform.data.benchmarks import Dataset, Sample
from mis_platform.data.examples import ExampleStream, open_stream
from mis_platform.data.images import ImageRefused
from mis_platform.data.labels import choose_target, images_with_objects, labelled_subset, objects_of
from mis_platform.data.masks import read_sbd
from mis_platform.errors import DataError

LIMITS = DataConfig()
STILL = {
    **{"scale_min": 1.0, "scale_max": 1.0, "flip_probability": 0.0, "rotate90_probability": 0.0},
    **{"shift_rotate_probability": 0.0, "brightness_contrast_probability": 0.0, "rgb_shift_probability": 0.0},
}


def target(**settings: object) -> TargetConfig:
    return TargetConfig.model_validate({"source": "labels", **settings})


def labels_run(**settings: object) -> Run:
    return Run.model_validate({**tiny_run(seed=3).model_dump(), "target": target(), **settings})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_labelled(tmp_path_factory.mktemp("labelled") / "set", count=5)


@pytest.fixture(scope="module")
def stream(labelled: Dataset) -> ExampleStream:
    """Examples that show whole, unmoved photos."""
    return open_stream(labelled, None, labels_run(augment=STILL))


# -- images ----------------------------------------------------------------------------------------------------------


def sbd(tmp_path: Path) -> Dataset:
    """As many names as SBD has; there are no files."""
    samples = tuple(Sample(f"2008_{k:06d}", f"img/{k}.jpg", ()) for k in reversed(range(8498)))
    return Dataset("sbd", "train", tmp_path, samples, read_sbd, is_labelled=True)


@pytest.mark.parametrize("subset", ["first", "random"])
def test_fractions_of_sbd_are_the_papers_and_nested(tmp_path: Path, subset: str) -> None:
    dataset = sbd(tmp_path)
    chosen = [labelled_subset(dataset, target(fraction=share, subset=subset)) for share in (1e-5, 0.01, 0.05, 0.1, 1.0)]
    assert [len(each) for each in chosen] == [1, 84, 424, 849, 8498]
    assert all(set(small.image_ids) <= set(large.image_ids) for small, large in itertools.pairwise(chosen))
    place = {image_id: k for k, image_id in enumerate(dataset.image_ids)}
    places = [[place[image_id] for image_id in each.image_ids] for each in chosen]
    assert all(each == sorted(each) for each in places)
    assert (places[2] == list(range(424))) == (subset == "first")


def test_another_seed_draws_other_images(tmp_path: Path) -> None:
    one, again, other = (
        set(labelled_subset(sbd(tmp_path), target(fraction=0.1, subset="random", subset_seed=seed)).image_ids)
        for seed in (0, 0, 1)
    )
    assert one == again
    assert abs(len(one & other) - 849 * 0.1) < 4 * (849 * 0.1 * 0.9) ** 0.5  # as two independent draws share


def test_photos_without_masks_are_refused_by_what_is_missing(tmp_path: Path) -> None:
    dataset, trees = make_material(tmp_path, count=2)
    with pytest.raises(DataError, match=rf"has photos only: there is no folder {dataset.root / 'masks'}"):
        open_stream(dataset, trees, labels_run())


def write_mask(dataset: Dataset, name: str, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint8) * 255).save(dataset.root / "masks" / name)


def test_images_without_an_object_are_left_out(tmp_path: Path) -> None:
    made = make_labelled(tmp_path / "set", count=4)
    for number in (1, 2, 3):
        write_mask(made, f"001_{number}.png", np.zeros((224, 224), bool))
    samples = (made.samples[0]._replace(masks=()), *made.samples[1:])
    dataset = dataclasses.replace(made, samples=samples)
    assert images_with_objects(dataset, LIMITS) == ("002", "003")
    stream = open_stream(dataset, None, labels_run())
    assert {stream.visit(k)[1] for k in range(20)} == {"002", "003"}
    with pytest.raises(DataError, match=r"none of the 2 images of folder in .* has a usable object"):
        open_stream(dataset, None, labels_run(target=target(fraction=0.5)))


def test_damaged_files_are_named_before_the_training(tmp_path: Path) -> None:
    dataset = make_labelled(tmp_path / "set", count=2)
    with pytest.raises(ImageRefused, match=r"000\.png: "):
        images_with_objects(dataset, DataConfig(min_side=300))
    (dataset.root / "masks" / "001_2.png").write_bytes(b"no mask")
    with pytest.raises(DataError, match=r"001_2\.png"):
        images_with_objects(dataset, LIMITS)


# -- objects ---------------------------------------------------------------------------------------------------------


def test_buggy_objects_of_sbd_are_no_targets(tmp_path: Path) -> None:
    dataset = make_labelled(tmp_path / "set", count=1)
    write_mask(dataset, "000_2.png", np.eye(224, dtype=bool))  # 0.4 % of its box
    write_mask(dataset, "000_3.png", np.zeros((224, 224), bool))
    assert len(objects_of(dataset, "000")) == 2  # a rope in a generic folder is a rope
    (only,) = objects_of(dataclasses.replace(dataset, name="sbd"), "000")
    np.testing.assert_array_equal(only, three_squares()[0])


def test_objects_are_chosen_uniformly_and_sometimes_two() -> None:
    objects, rng = three_squares(), np.random.default_rng(0)
    singles, pairs = np.zeros(3, int), np.zeros(3, int)
    for _ in range(6000):
        chosen = choose_target([*objects, np.zeros((224, 224), bool)], rng)
        inside = [k for k, each in enumerate(objects) if chosen.mask[each].all()]
        outside = [k for k in range(3) if k not in inside]
        np.testing.assert_array_equal(chosen.mask, np.logical_or.reduce([objects[k] for k in inside]))
        assert chosen.other is not None
        np.testing.assert_array_equal(chosen.other, np.logical_or.reduce([objects[k] for k in outside]))
        if len(inside) == 1:
            singles[inside[0]] += 1
            assert chosen.parts == ()
        else:
            pairs[outside[0]] += 1
            assert {each.tobytes() for each in chosen.parts} == {objects[k].tobytes() for k in inside}
    assert stats.binomtest(int(pairs.sum()), 6000, 0.15).pvalue > 1e-3
    assert stats.chisquare(singles).pvalue > 1e-3
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_the_first_draw_says_whether_two_are_merged() -> None:
    objects = [np.eye(3, dtype=bool), np.fliplr(np.eye(3, dtype=bool))]
    for seed in range(2000):
        is_merged = bool(choose_target(objects, np.random.default_rng(seed)).parts[1:])
        assert is_merged == (np.random.default_rng(seed).random() < 0.15)


def test_two_merged_objects_leave_no_other() -> None:
    rng = np.random.default_rng(0)
    merged = [each for each in (choose_target(three_squares()[:2], rng) for _ in range(200)) if each.parts]
    assert merged
    assert all(each.other is None for each in merged)


def test_of_one_object_or_none_nothing_is_drawn() -> None:
    """So that an unsupervised example is what it was before there were labels."""
    one, empty = three_squares()[0], np.zeros((224, 224), bool)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert choose_target([one], rng).mask is one
    assert choose_target([empty, one], rng) == (one, None, ())
    assert not choose_target([empty, empty], rng).mask.any()
    assert rng.bit_generator.state == before


# -- the stream ------------------------------------------------------------------------------------------------------


def test_a_labelled_example_depends_on_its_number_alone(labelled: Dataset) -> None:
    stream = open_stream(labelled, None, labels_run())
    forwards = [stream.example(k) for k in range(8)]
    travelled = copy.deepcopy(stream)
    labels._objects.cache_clear()
    for k in reversed(range(8)):
        for one, other in zip(travelled.example(k)[:3], forwards[k][:3], strict=True):
            np.testing.assert_array_equal(one, other)
    other_seed = open_stream(labelled, None, labels_run(train={**tiny_run().train.model_dump(), "seed": 4}))
    assert other_seed.example(0).points.tobytes() != forwards[0].points.tobytes()


def test_examples_show_objects_with_clicks_that_fit(stream: ExampleStream) -> None:
    squares, slots = three_squares(), stream.run.clicks.max_clicks
    chosen: set[tuple[bool, ...]] = set()
    on_other, clicks = 0, 0
    for k in range(400):
        _, mask, points, image_id, _ = stream.example(k)
        assert image_id == stream.visit(k)[1]
        parts = tuple(bool(mask[square].any()) for square in squares)
        np.testing.assert_array_equal(mask > 0, np.logical_or.reduce([s for s, used in zip(squares, parts) if used]))
        positive, negative = (rows[rows[:, 0] >= 0][:, :2].astype(int) for rows in (points[:slots], points[slots:]))
        assert mask[tuple(positive.T)].all()
        assert not mask[tuple(negative.T)].any()
        if sum(parts) == 2:
            assert all(square[tuple(positive.T)].any() for square, used in zip(squares, parts) if used)
        else:
            rest = np.logical_or.reduce([s for s, used in zip(squares, parts) if not used])
            on_other, clicks = on_other + int(rest[tuple(negative.T)].sum()), clicks + len(negative)
        chosen.add(parts)
    assert len(chosen) == 6  # three objects, three pairs
    assert 0.40 < on_other / clicks < 0.46  # 0.4, and what falls there of the tenth on the background
