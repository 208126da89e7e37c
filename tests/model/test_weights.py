"""Weights: what is written comes back to the bit; every file that does not belong is refused with the key named."""

import contextlib
import json
import math
import shutil
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mis_platform.model import weights
from mis_platform.model.simpleclick import SimpleClick, resize_position_embedding
from mis_platform.model.weights import load_mae, load_mae_state, load_model, read_config, read_state_dict, save_model

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> SimpleClick:
    torch.manual_seed(0)
    return SimpleClick("vit_xt", 224)


@pytest.fixture
def saved(model: SimpleClick, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", model, {"run": "abc"})
    return tmp_path / "model"


def mae_state(seed: int = 0, dim: int = 160, depth: int = 8, patch: int = 16, side: int = 14) -> State:
    """An encoder as MAE and timm name it; by default of ViT-xT's width, which MAE itself does not offer."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + side * side, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        for name, outputs, inputs in [
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ]:
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (dim,), f"blocks.{i}.{name}.bias": (dim,)}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# -- saved models ----------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_to_the_bit(model: SimpleClick, saved: Path) -> None:
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    loaded = load_model(saved)
    assert torch.equal(torch.get_rng_state(), random_state)  # loading draws no random numbers
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for (name, tensor), parameter in zip(model.state_dict().items(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, tensor), name
        assert parameter.device.type == "cpu"
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    image, previous, points = torch.rand(1, 3, 224, 224), torch.zeros(1, 1, 224, 224), torch.full((1, 2, 3), 50.0)
    with torch.no_grad():
        assert torch.equal(loaded(image, previous, points), model.eval()(image, previous, points))
    about = {"variant": "vit_xt", "image_size": 224, "licence": weights.OWN_LICENCE}
    assert read_config(saved) == {"run": "abc", **about}
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_twice_writes_the_same_bytes(model: SimpleClick, saved: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "again", model, {"run": "abc"})
    for name in ("model.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_rectangular_model_comes_back(tmp_path: Path) -> None:
    model = SimpleClick("vit_xt", 224)
    resize_position_embedding(model, (224, 448))
    save_model(tmp_path, model, {})
    assert load_model(tmp_path).image_size == (224, 448)


def test_the_form_of_the_previous_mask_is_part_of_the_model(model: SimpleClick, saved: Path, tmp_path: Path) -> None:
    binary = SimpleClick("vit_xt", 224, "binary")
    binary.load_state_dict(model.state_dict())
    save_model(tmp_path / "binary", binary, {})
    assert (load_model(saved).previous_mask, load_model(tmp_path / "binary").previous_mask) == ("soft", "binary")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (saved, tmp_path / "binary")]
    assert weights[0] != weights[1], "their digest stands for the model"
    shutil.copyfile(saved / "config.json", tmp_path / "binary" / "config.json")
    with pytest.raises(ValueError, match=r"says previous_mask=None, model\.safetensors was made with .*=binary; train"):
        load_model(tmp_path / "binary")


def test_a_loaded_model_does_not_follow_its_file(model: SimpleClick, saved: Path) -> None:
    loaded = load_model(saved)
    with (saved / "model.safetensors").open("r+b") as file:  # in place: a mapping of the file would change too
        file.write(bytes((saved / "model.safetensors").stat().st_size))
    assert torch.equal(loaded.head.fusion_conv.conv.weight, model.head.fusion_conv.conv.weight)


def damage(change: Callable[[State], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        state = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
        change(state)
        safetensors.torch.save_file(state, path)

    return apply


def configure(text: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / "config.json").write_text(text)

    return apply


def set_nan(state: State) -> None:
    state["neck.down_16.0.bias"][3] = torch.nan


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage(lambda s: s.pop("head.conv_seg.bias")), "missing head.conv_seg.bias"),
        (damage(lambda s: (s.pop("head.conv_seg.bias"), s.pop("neck.down_4.0.bias"))), "conv_seg.bias and 1 more"),
        (damage(lambda s: s.update(extra=torch.zeros(1))), "unexpected extra"),
        (
            damage(lambda s: s.update({"backbone.head.weight": s["backbone.head.weight"].T.contiguous()})),
            r"backbone.head.weight has shape \(160, 1000\), vit_xt needs \(1000, 160\)",
        ),
        (damage(lambda s: s.update({"backbone.cls_token": s["backbone.cls_token"].half()})), "cls_token is float16"),
        (damage(set_nan), "neck.down_16.0.bias holds NaN"),
        (
            damage(lambda s: s.update({"head.conv_seg.bias": torch.tensor([math.inf])})),
            "conv_seg.bias holds NaN or inf",
        ),
        (
            configure('{"variant": "vit_b", "image_size": 448}'),
            r"does not fit vit_b: .* it fits vit_xt \(model.variant=vit_xt\)",
        ),
        (
            configure('{"variant": "vit_xt", "image_size": 448}'),
            r"backbone.pos_embed has shape \(1, 197, 160\), vit_xt needs \(1, 785, 160\)$",
        ),
        (configure('{"variant": "vit_xt", "image_size": 300}'), "multiples of 224"),
        (configure('{"variant": "vit_xt", "image_size": true}'), "image_size must be pixels"),
        (configure('{"variant": "vit_xt"}'), "image_size must be pixels"),
        (configure('{"variant": "vit_xt", "image_size": 224, "previous_mask": []}'), "must be one of: soft, binary"),
        (configure('{"variant": ["vit_xt"]}'), "variant set to one of: vit_b, vit_l, vit_h, vit_xt"),
        (configure("[" * 100_000), "not readable JSON"),
        (configure("{"), "not readable JSON"),
        (lambda directory: (directory / "config.json").unlink(), "config.json is missing"),
        (lambda directory: (directory / "model.safetensors").unlink(), "no weights file at"),
    ],
)
def test_a_damaged_model_is_refused(saved: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(saved)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


def test_a_mae_file_is_not_a_click_model(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "mae.pth"
    torch.save({"model": mae_state()}, path)
    with pytest.raises(ValueError, match=r"MAE's encoder, not a saved model: .*model.init_weights set to this file"):
        load_model(path)
    safetensors.torch.save_file(mae_state(), saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"MAE's encoder that does not fit vit_xt: unexpected blocks.0.attn.proj.bias"):
        load_model(saved)


def test_a_weights_file_in_place_of_the_directory(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"is a click model .*give the directory that holds model.safetensors"):
        load_model(saved / "model.safetensors")


# -- MAE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("mae_pretrain.pth", lambda state, path: torch.save({"model": state}, path)),  # MAE's own
        ("model.safetensors", safetensors.torch.save_file),  # timm's
        ("pytorch_model.bin", torch.save),
    ],
)
@pytest.mark.parametrize("size", [224, 448])
def test_mae_goes_into_the_backbone_only(name: str, write: Callable[..., None], size: int, tmp_path: Path) -> None:
    model, state = SimpleClick("vit_xt", size), mae_state()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    write(state, tmp_path / name)
    load_mae(model, tmp_path / name)
    grid = [size // 16, size // 16]
    expected = {f"backbone.{key}": tensor for key, tensor in state.items() if not key.startswith("norm.")}
    expected["backbone.pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], grid, num_prefix_tokens=1, interpolation="bicubic", antialias=False
    )
    assert torch.equal(expected["backbone.pos_embed"][:, :1], state["pos_embed"][:, :1])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.pop(key, before[key])), key
    assert not expected
    assert model.backbone.pos_embed.requires_grad


@pytest.mark.parametrize(("variant", "name"), sorted(weights.MAE_REPOSITORIES.items()))
def test_timm_names_its_mae_encoders_as_expected(variant: str, name: str) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(name.removeprefix("timm/"), num_classes=0).state_dict()
        model = SimpleClick(variant)
    shapes = {key: tuple(tensor.shape) for key, tensor in encoder.items() if key not in weights.MAE_LEFT_OUT}
    assert shapes == weights._mae_shapes(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.7.mlp.fc2.bias"), "missing blocks.7.mlp.fc2.bias"),
        (lambda s: s.update(mask_token=torch.zeros(1, 1, 160)), "unexpected mask_token"),
        (lambda s: s.update({"head.weight": torch.zeros(1000, 160)}), r"classifier \(head.weight\).*labels"),
        (lambda s: s.update({"fc_norm.weight": torch.zeros(160)}), r"classifier \(fc_norm.weight\).*labels"),
        (lambda s: s["blocks.2.norm1.weight"].fill_(torch.nan), "blocks.2.norm1.weight holds"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 190, 160)), r"pos_embed has shape \(1, 190, 160\)"),
        (lambda s: s.update(pos_embed=s["pos_embed"].double()), "pos_embed is float64, expected float32"),
    ],
)
def test_a_damaged_mae_file_is_refused_and_nothing_is_loaded(
    change: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    state = mae_state()
    change(state)
    torch.save({"model": state}, tmp_path / "mae.pth")
    model = SimpleClick("vit_xt", 224)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_mae(model, tmp_path / "mae.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("file", "variant", "message"),
    [
        (
            "vit_large_patch16_224.mae",
            "vit_b",
            r"attn.proj.bias has shape \(1024,\), vit_b needs \(768,\); it fits vit_l",
        ),
        (
            "vit_base_patch16_224.mae",
            "vit_h",
            r"attn.proj.bias has shape \(768,\), vit_h needs \(1280,\); it fits vit_b",
        ),
        (
            "vit_huge_patch14_224.mae",
            "vit_l",
            r"attn.proj.bias has shape \(1280,\), vit_l needs \(1024,\); it fits vit_h",
        ),
        ("vit_base_patch16_224.augreg_in1k", "vit_b", "has a classifier"),
        ("vit_small_patch16_224.dino", "vit_b", "it fits none of: vit_b, vit_l, vit_h, vit_xt"),
        ("vit_base_patch8_224.dino", "vit_b", r"\(768, 3, 8, 8\), vit_b needs \(768, 3, 16, 16\); it fits none"),
    ],
)
def test_weights_of_another_size_name_the_variant_that_fits(file: str, variant: str, message: str) -> None:
    num_classes = 1000 if "in1k" in file else 0
    with torch.device("meta"):
        state = timm.create_model(file, num_classes=num_classes).state_dict()
        model = SimpleClick(variant)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        load_mae_state(model, state, file)


def test_a_click_model_is_not_a_mae_file(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"is a click model \(SimpleClick\): MAE initialisation needs"):
        load_mae(SimpleClick("vit_xt", 224), saved / "model.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine that is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_mae_weights_that_cannot_be_had(hub: Path) -> None:
    with torch.device("meta"):
        model = SimpleClick("vit_b")
    with pytest.raises(ValueError, match=r"timm/vit_base_patch16_224.mae.*model.init_weights.*model.init=random"):
        load_mae(model)
    with pytest.raises(ValueError, match="no MAE weights for vit_xt; there are for: vit_b, vit_l, vit_h"):
        load_mae(SimpleClick("vit_xt", 224))


def test_mae_weights_come_from_the_hub_cache(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.MAE_REPOSITORIES, "vit_xt", "timm/tiny")
    snapshot = hub / "models--timm--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "models--timm--tiny" / "refs").mkdir()
    (hub / "models--timm--tiny" / "refs" / "main").write_text("0" * 40)
    state = mae_state()
    safetensors.torch.save_file(state, snapshot / "model.safetensors")
    model = SimpleClick("vit_xt", 224)
    load_mae(model)
    name = "blocks.3.attn.qkv.weight"
    assert torch.equal(model.backbone.get_parameter(name), state[name])


# -- foreign files ---------------------------------------------------------------------------------------------------


class Malicious:
    """Runs a command when unpickled without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def assert_no_advice(error: ValueError) -> None:
    """torch tells who meets such a file how to load it without care."""
    assert "weights_only" not in str(error)
    assert "trust" not in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    torch.save({"model": mae_state(), "x": Malicious(canary)}, path, _use_new_zipfile_serialization=zipped)
    expected = r"plain values \([\w.]+\), which could run code when loaded; it was refused, and nothing in it was run"
    with pytest.raises(ValueError, match=expected) as said:
        read_state_dict(path)
    assert not canary.exists()
    assert_no_advice(said.value)
    torch.load(path, weights_only=False)  # the trap works
    assert canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_official_checkpoints_are_recognised(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SimpleClick saves them: weights beside a configuration that pickles an object of its own."""
    module = types.ModuleType("isegm.model.losses")
    loss = type("CrossEntropyLoss", (), {"__module__": "isegm.model.losses"})
    module.CrossEntropyLoss = loss  # type: ignore[attr-defined]
    for name in ("isegm", "isegm.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "isegm.model.losses", module)
    config = {"class": "isegm.model.is_plainvit_model.PlainVitModel", "params": {"head_params": {"value": loss()}}}
    path = tmp_path / "sbd_vit_base.pth"
    content = {"state_dict": {"head.conv_seg.bias": torch.zeros(1)}, "config": config}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"official checkpoint of a click model: it pickles Python objects.*mis import"
    ):
        read_state_dict(path)


def test_plain_values_beside_the_weights_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    assert read_state_dict(path).keys() == {"a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "but a list"),
        ({}, "but a dict"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"model": {"a": [1]}}, "'a' is a list"),
        ({3: torch.ones(1)}, "3 is a Tensor, not"),
    ],
)
def test_a_pickle_without_named_tensors_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "x.pth")


def safetensors_with(header: dict[str, Any], data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"not weights at all",
        b"PK\x03\x04 torn zip",
        struct.pack("<Q", 2**60) + b"{}",
        safetensors_with(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            }
        ),
        safetensors_with({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        safetensors_with({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
        safetensors_with({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7),
    ],
)
def test_a_damaged_file_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as said:
        read_state_dict(tmp_path / name)
    assert_no_advice(said.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize(
    ("content", "start"),
    [
        (b"\n<!DOCTYPE html>\n<html>quota exceeded</html>\n", "<!DOCTYPE html> <html>quota exceeded</html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "version https://git-lfs.github.com/spec/v1"),
        ("Ein Fehler: kein Zugriff für Gäste".encode(), "kein Zugriff für Gäste"),
    ],
)
def test_a_web_page_is_called_one(content: bytes, start: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is a web page or text, no file of weights; it begins with") as said:
        read_state_dict(tmp_path / name)
    assert start in str(said.value)
    assert_no_advice(said.value)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(ValueError, match="no weights file at"):
            read_state_dict(path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    folder = tmp_path_factory.mktemp("whole")
    safetensors.torch.save_file(state, folder / "x.safetensors")
    torch.save({"model": state}, folder / "x.pth")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["x.safetensors", "x.pth"]),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_any_damage_is_a_value_error_or_no_damage(
    name: str,
    keep: float,
    flips: list[tuple[float, int]],
    whole_files: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = bytearray(whole_files[name][: round(keep * len(whole_files[name]))])
    for position, value in flips:
        if content:
            content[int(position * len(content))] = value
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        state = read_state_dict(path)
        assert all(isinstance(tensor, Tensor) for tensor in state.values())
        if name.endswith(".safetensors"):
            assert len(content) == len(whole_files[name])  # a truncated file never loads


# -- licences --------------------------------------------------------------------------------------------------------


def test_the_licence_of_mae_stays_with_all_that_starts_from_it(tmp_path: Path) -> None:
    """Written into config.json, and handed on by a model that is loaded, trained further and saved again."""
    started = SimpleClick("vit_xt", 224)
    save_model(tmp_path / "own", started, {})
    assert read_config(tmp_path / "own")["licence"] == weights.OWN_LICENCE
    load_mae_state(started, mae_state(), "mae")
    save_model(tmp_path / "first", started, {"run": {"model": {"init": "mae"}}})
    save_model(tmp_path / "second", load_model(tmp_path / "first"), {"run": {"model": {"init": "random"}}})
    for name in ("first", "second"):
        assert read_config(tmp_path / name)["licence"] == weights.MAE_LICENCE
        assert "no commercial use" in weights.licence_of(read_config(tmp_path / name))


@pytest.mark.parametrize(
    ("config", "licence"),
    [
        ({"run": {"model": {"init": "mae"}}}, weights.MAE_LICENCE),
        ({"run": {"model": {"init": "random"}}}, weights.OWN_LICENCE),
        ({"source": {"file": "mis.pth"}}, weights.MAE_LICENCE),  # the official models started from MAE
        ({"source": {"file": "ritm.pth"}, "family": "ritm"}, weights.FOREIGN_LICENCE),
        ({"run": "unreadable"}, weights.MAE_LICENCE),  # in doubt, the narrower one
    ],
)
def test_models_without_a_licence_get_the_narrower_one_in_doubt(config: dict[str, object], licence: str) -> None:
    assert weights.licence_of(config) == licence
