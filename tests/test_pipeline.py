"""What decides a checkpoint: its identity under trees, under labels, and with a pretraining."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from training_material import make_labelled, tiny_run

from mis_platform import jobs, pipeline, sweep
from mis_platform.artifacts import Stage, ensure, sha256
from mis_platform.config import FeaturesConfig, Resources, Run, override
from mis_platform.data.benchmarks import Dataset
from mis_platform.errors import DataError
from mis_platform.model.features import weights_file
from mis_platform.model.weights import load_model, mae_file, read_config
from mis_platform.report import read_history
from mis_platform.stages.training_loop import initial_model
from mis_platform.storage import Storage

LABELS = ("target.source=labels",)
COLORS = ("features.extractor=color_texture",)  # needs no weights


@pytest.fixture
def labelled(tmp_path: Path) -> Dataset:
    return make_labelled(tmp_path / "set", count=4)


def checkpoint(dataset: Dataset, *assignments: str, pretraining: Stage | None = None) -> Stage:
    run = override(tiny_run(), [*COLORS, *assignments])
    return pipeline.checkpoint_stage(dataset, run, Resources(), lambda step, metrics: None, pretraining)


def pretrained(seed: int = 7, **model: object) -> Stage:
    run = tiny_run(seed=seed)
    return pipeline.initial_stage(run.model_copy(update={"model": run.model.model_copy(update=model)}))


@pytest.mark.parametrize(
    ("assignment", "matters"),
    [
        ("sampling.alpha=0.5", False),
        ("features.layer=last_block", False),
        ("data.min_side=16", False),
        ("target.subset_seed=1", False),  # the first images are the first images
        ("eval.threshold=0.4", False),
        ("target.fraction=0.5", True),
        ("clicks.gamma=0.7", True),
        ("augment.rotate_limit=4", True),
        ("train.seed=1", True),
        ("model.image_size=448", True),
        ("model.previous_mask=binary", True),
    ],
)
def test_what_decides_a_training_on_labels(labelled: Dataset, assignment: str, matters: bool) -> None:
    one, other = checkpoint(labelled, *LABELS), checkpoint(labelled, *LABELS, assignment)
    assert (one.fingerprint != other.fingerprint) == matters


@pytest.mark.parametrize("assignment", ["eval.zoom_size=400", "eval.davis_zoom_size=300", "eval.zoom_skip_clicks=1"])
def test_a_protocol_that_the_model_cannot_follow_is_refused_before_its_training(
    labelled: Dataset, assignment: str
) -> None:
    run = override(tiny_run(), [assignment])
    with pytest.raises(ValueError, match=f"{assignment}: SimpleClick takes"):
        checkpoint(labelled, *LABELS, assignment)
    with pytest.raises(ValueError, match=f"{assignment}: SimpleClick takes"):
        pipeline.clicks_stage(labelled, run, Resources(), pretrained())


def test_a_precision_that_f_brs_cannot_work_in_is_refused_before_ray_starts(labelled: Dataset, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"family": "ritm", "refine": "fbrs", "variant": "hrnet18s", "image_size": 400}'
    )
    run = override(tiny_run(), ["eval.precision=bf16"])
    with pytest.raises(ValueError, match=r"eval\.precision=bf16 is not for f-BRS"):
        pipeline.clicks_stage(labelled, run, Resources(), Storage(str(tmp_path)))


@pytest.mark.parametrize("source", ["tree", "tokencut"])
def test_settings_that_features_ignore_do_not_decide(labelled: Dataset, source: str, tmp_path: Path) -> None:
    """A row of such a setting alone shares trees and training; at the defaults the address is what it was."""
    usual = checkpoint(labelled, f"target.source={source}")
    ignored = ["position_resize=bilinear", "layer=last_block", "precision=bf16", "batch_size=4"]
    for name in ignored:
        assert checkpoint(labelled, f"target.source={source}", f"features.{name}").fingerprint == usual.fingerprint
    (target,) = usual.inputs.values()
    defaults = {"position_resize": "bicubic", "layer": "final_norm", "precision": "fp32"}
    assert target.config["features"] == {"extractor": "color_texture", "weights": "none", **defaults}
    (tmp_path / "weights.pth").write_bytes(b"weights")
    network = [f"target.source={source}", "features.extractor=dino_vits8", f"features.weights={tmp_path}/weights.pth"]
    prints = {checkpoint(labelled, *network, *map("features.{}".format, given)).fingerprint for given in ([], ignored)}
    assert len(prints | {usual.fingerprint}) == 3


def test_labels_need_no_trees_and_masks_decide(labelled: Dataset) -> None:
    half = (*LABELS, "target.fraction=0.5")
    whole_before, half_before = checkpoint(labelled, *LABELS), checkpoint(labelled, *half)
    assert whole_before.inputs == {}
    assert checkpoint(labelled).inputs.keys() == {"trees"}
    trees_before = checkpoint(labelled)
    reordered = dataclasses.replace(labelled, samples=labelled.samples[::-1])
    assert checkpoint(reordered, *half).fingerprint != half_before.fingerprint  # other images come first
    Image.fromarray(np.zeros((224, 224), np.uint8)).save(labelled.root / "masks" / "003_1.png")
    assert checkpoint(labelled, *LABELS).fingerprint != whole_before.fingerprint
    assert checkpoint(labelled, *half).fingerprint == half_before.fingerprint  # it may not see that label
    assert checkpoint(labelled).fingerprint == trees_before.fingerprint


def test_random_images_depend_on_their_seed(labelled: Dataset) -> None:
    random = (*LABELS, "target.fraction=0.5", "target.subset=random")
    stages = [checkpoint(labelled, *random, f"target.subset_seed={seed}") for seed in (0, 0, 1)]
    assert stages[0].fingerprint == stages[1].fingerprint != stages[2].fingerprint


def test_an_unsupervised_training_keeps_its_address(labelled: Dataset) -> None:
    """Models that were trained before there were labelled targets are still found."""
    assert checkpoint(labelled).config.keys() == {"sampling", "clicks", "augment", "train", "model"}
    assert checkpoint(labelled).config["model"].keys() == {"variant", "image_size", "init", "init_weights"}
    assert checkpoint(labelled, "sampling.alpha=0.5").fingerprint != checkpoint(labelled).fingerprint


def test_photos_alone_are_no_labels(labelled: Dataset) -> None:
    photos = dataclasses.replace(labelled, is_labelled=False)
    with pytest.raises(DataError, match=r"target\.source=labels needs object masks"):
        checkpoint(photos, *LABELS)


def test_a_pretraining_is_an_input_in_place_of_the_initial_weights(labelled: Dataset) -> None:
    plain = checkpoint(labelled)
    tuned = checkpoint(labelled, pretraining=pretrained())
    assert tuned.inputs.keys() == {"trees", "pretraining"}
    assert len({plain.fingerprint, tuned.fingerprint, checkpoint(labelled, pretraining=pretrained(8)).fingerprint}) == 3
    weights = ("model.variant=vit_b", "model.init=mae", "model.init_weights=/not/there.pth")
    with pytest.raises(DataError, match=r"cannot read model\.init_weights=/not/there\.pth"):
        checkpoint(labelled, *LABELS, *weights)
    stage = checkpoint(labelled, *LABELS, *weights, pretraining=pretrained(variant="vit_b"))
    assert stage.inputs.keys() == {"pretraining"}
    assert stage.config["model"] == {"variant": "vit_b", "image_size": 224}
    binary = checkpoint(labelled, "model.previous_mask=binary", pretraining=pretrained())
    assert binary.fingerprint != tuned.fingerprint


def test_another_variant_is_refused_before_its_pretraining(labelled: Dataset) -> None:
    with pytest.raises(ValueError, match=r"model\.variant=vit_xt cannot start from a pretraining of vit_b"):
        checkpoint(labelled, *LABELS, pretraining=pretrained(variant="vit_b"))


def test_titles_name_the_share_of_labels() -> None:
    run = override(Run(), ["target.source=labels", "target.fraction=0.05", "train.smooth_weight=0"])
    assert jobs.title(run) == "vit_b sbd 5% labels lambda 0"


@pytest.mark.ray
def test_fine_tuning_on_labels_starts_from_the_pretrained_weights(
    ray_cluster: None, labelled: Dataset, tmp_path: Path
) -> None:
    """Two steps at a learning rate that moves nothing; then the model is still the pretrained one."""
    settings = ("target.fraction=0.5", "train.batch_size=2", "train.max_steps=2", "train.learning_rate=1e-12")
    run = override(tiny_run(loss="normalized_focal", smooth_weight=0), [*LABELS, *settings])
    root, start = Storage(str(tmp_path / "root")), pretrained()
    resources = Resources(log_every=1)
    directory = jobs.train(labelled, run, resources, root, pretraining=start)
    assert [step for step, _ in read_history(directory)] == [1, 2]
    assert directory.local is not None
    assert read_config(directory.local)["run"]["target"]["source"] == "labels"
    begun = ensure(start, root).local
    assert begun is not None
    expected, found = load_model(begun).state_dict(), load_model(directory.local).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    unlike = initial_model(run).state_dict()
    assert not torch.allclose(unlike["head.fusion_conv.conv.weight"], found["head.fusion_conv.conv.weight"])
    assert not root.exists("trees")
    assert jobs.train(labelled, run, resources, root, pretraining=start) == directory


# -- weights of the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], str]:
    """Puts a file into a cache of the hub's own form, as its newest revision; its SHA-256. The hub is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, content: bytes) -> str:
        digest = sha256(content)
        folder, revision = tmp_path / "hub" / f"models--{repository.replace('/', '--')}", digest[:40]
        for name in ("blobs", "refs", f"snapshots/{revision}"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(revision)
        (folder / "blobs" / digest).write_bytes(content)
        (folder / "snapshots" / revision / "model.safetensors").symlink_to(folder / "blobs" / digest)
        return digest

    return put


DINO, MAE = "timm/vit_small_patch8_224.dino", "timm/vit_base_patch16_224.mae"


def test_a_pin_is_no_other_run(labelled: Dataset, hub_cache: Callable[[str, bytes], str]) -> None:
    """What the hub gave decides, not how it was asked for: unpinned, pinned, or as a file."""
    digests = hub_cache(DINO, b"dino"), hub_cache(MAE, b"mae")
    run = override(Run(), ['eval_datasets=["grabcut"]'])
    pinned = override(run, [f"features.weights=sha256:{digests[0]}", f"model.init_weights=sha256:{digests[1]}"])
    one, other = (pipeline.checkpoint_stage(labelled, each, Resources(), lambda *_: None) for each in (run, pinned))
    assert one.fingerprint == other.fingerprint
    assert sweep._absolute(pinned) == pinned  # no path to be made absolute for a trial
    assert one.downloads == other.downloads == {f"{MAE}/model.safetensors": digests[1]}
    assert one.inputs["trees"].downloads == {f"{DINO}/model.safetensors": digests[0]}
    files = override(run, [f"features.weights={labelled.root}/dino.pth", f"model.init_weights={labelled.root}/mae.pth"])
    (labelled.root / "dino.pth").write_bytes(b"dino")
    (labelled.root / "mae.pth").write_bytes(b"mae")
    given = pipeline.checkpoint_stage(labelled, files, Resources(), lambda *_: None)
    assert given.fingerprint == one.fingerprint
    assert given.downloads == given.inputs["trees"].downloads == {}  # a file is the user's own choice


def test_workers_take_no_other_weights_than_the_address_says(
    labelled: Dataset, hub_cache: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that fetches later, when the hub has other weights, must not make a part of the same artifact."""
    first = hub_cache(DINO, b"dino"), hub_cache(MAE, b"mae")
    given: list[str | None] = []
    monkeypatch.setattr("mis_platform.stages.precompute.precompute", lambda _, features, *__: given.append(features))
    monkeypatch.setattr("mis_platform.stages.train.train", lambda _, run, *__: given.append(run))
    stage = pipeline.checkpoint_stage(labelled, Run(), Resources(), lambda *_: None)
    trees = stage.inputs["trees"]
    trees.run({}, Storage(str(labelled.root)))
    stage.run({}, Storage(str(labelled.root)))
    features, run = given
    assert weights_file(features).read_bytes() == b"dino"
    assert mae_file("vit_b", run.model.init_weights).read_bytes() == b"mae"
    hub_cache(DINO, b"exchanged"), hub_cache(MAE, b"exchanged")
    assert weights_file(FeaturesConfig()).read_bytes() == b"exchanged"
    assert weights_file(features).read_bytes() == b"dino"  # the cache still has it
    assert mae_file("vit_b", run.model.init_weights).read_bytes() == b"mae"
    for blob in labelled.root.parent.rglob("blobs/*"):
        if blob.name in first:
            blob.unlink()  # as on a node that never had it
    with pytest.raises(ValueError, match=DINO):
        weights_file(features)
    with pytest.raises(ValueError, match=MAE):
        mae_file("vit_b", run.model.init_weights)


@pytest.mark.parametrize("wrong", ["sha256:", "sha256:abc", f"sha256:{'G' * 64}", f"sha256:{'A' * 64}"])
def test_a_pin_has_all_its_digits(wrong: str) -> None:
    for name in ("features.weights", "model.init_weights"):
        with pytest.raises(ValueError, match=f"{name}=.* 64 hexadecimal digits") as told:
            override(Run(), [f"{name}={wrong}"])
        assert "\n" not in str(told.value)
