"""RITM's network: published sizes, official names and shapes, and its arithmetic against a literal second writing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mis_platform.config import EvalConfig
from mis_platform.evaluation.predictor import Predictor
from mis_platform.model.ritm import UNUSED, VARIANTS, Ritm
from mis_platform.model.simpleclick import click_maps
from mis_platform.model.weights import FAMILIES, empty_model, load_model, save_model

State = dict[str, Tensor]


def test_its_variants_are_those_that_files_may_name() -> None:
    assert FAMILIES["ritm"] == tuple(VARIANTS)


@pytest.fixture(scope="module")
def model() -> Ritm:
    """Random weights, also of what the norms of a new network leave out (means 0, deviations and factors 1)."""
    generator = torch.Generator().manual_seed(0)
    model = Ritm("hrnet18s").eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            low = 0.5 if name.endswith(("running_var", "weight")) else -0.2
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + low)
        elif tensor.ndim == 4:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
    return model


def inputs(height: int = 70, width: int = 93, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(batch, 3, height, width, generator=generator)
    previous = torch.rand(batch, 1, height, width, generator=generator)
    points = torch.tensor([[20.5, 30, 0], [-1, -1, -1], [50, 60, 1], [0, 92, 2]]).repeat(batch, 1, 1)
    return image, previous, points


@pytest.mark.parametrize(
    ("variant", "millions", "megabytes"),
    [("hrnet18s", 4.22, 16.5), ("hrnet18", 10.03, 38.8), ("hrnet32", 30.95, 119)],
)
def test_sizes_are_the_published_ones(variant: str, millions: float, megabytes: float) -> None:
    """Parameters of the paper's Table; sizes of the released files, which hold names as well."""
    model = empty_model("ritm", variant, 400)
    assert round(sum(each.numel() for each in model.parameters()) / 1e6, 2) == millions
    found = sum(each.numel() * each.element_size() for each in model.state_dict().values()) / 2**20
    assert 0.96 * megabytes < found < megabytes


OFFICIAL = {
    "maps_transform.0.weight": (16, 3, 1, 1),
    "maps_transform.2.bias": (64,),
    "maps_transform.3.scale": (1,),
    "feature_extractor.conv1.weight": (64, 3, 3, 3),
    "feature_extractor.bn2.num_batches_tracked": (),
    "feature_extractor.layer1.0.downsample.1.running_var": (256,),
    "feature_extractor.layer1.3.conv3.weight": (256, 64, 1, 1),
    "feature_extractor.transition1.1.0.0.weight": (36, 256, 3, 3),
    "feature_extractor.transition3.3.0.1.bias": (144,),
    "feature_extractor.stage2.0.branches.1.3.bn2.weight": (36,),
    "feature_extractor.stage3.3.fuse_layers.2.0.1.0.weight": (72, 18, 3, 3),
    "feature_extractor.stage4.2.fuse_layers.0.3.0.weight": (18, 144, 1, 1),
    "feature_extractor.conv3x3_ocr.0.bias": (128,),
    "feature_extractor.conv3x3_ocr.1.running_mean": (128,),
    "feature_extractor.ocr_distri_head.object_context_block.f_pixel.3.0.weight": (64,),
    "feature_extractor.ocr_distri_head.object_context_block.f_object.2.weight": (64, 64, 1, 1),
    "feature_extractor.ocr_distri_head.object_context_block.f_down.0.weight": (64, 128, 1, 1),
    "feature_extractor.ocr_distri_head.object_context_block.f_up.1.0.running_mean": (128,),
    "feature_extractor.ocr_distri_head.conv_bn_dropout.0.weight": (128, 256, 1, 1),
    "feature_extractor.cls_head.weight": (1, 128, 1, 1),
    "feature_extractor.aux_head.0.weight": (270, 270, 1, 1),
    "feature_extractor.aux_head.3.bias": (1,),
}


def test_names_and_shapes_are_the_official_ones() -> None:
    found = {name: tuple(each.shape) for name, each in empty_model("ritm", "hrnet18", 400).state_dict().items()}
    assert found.items() >= OFFICIAL.items()
    roots = {name.split(".")[1] for name in found if name.startswith("feature_extractor.")}
    assert roots == {
        *("conv1", "bn1", "conv2", "bn2", "layer1", "transition1", "stage2", "transition2", "stage3", "transition3"),
        *("stage4", "conv3x3_ocr", "ocr_distri_head", "cls_head", "aux_head"),
    }
    baseline = empty_model("ritm", "hrnet18_baseline", 400).state_dict()
    assert baseline["maps_transform.0.weight"].shape == (16, 2, 1, 1)
    assert baseline.keys() == found.keys()


# -- a second writing, from names and numbers alone ------------------------------------------------------------------


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=weight.shape[2] // 2)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{each}"] for each in ("running_mean", "running_var", "weight", "bias"))
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * weight[:, None, None] + bias[:, None, None]


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


def block(state: State, name: str, x: Tensor) -> Tensor:
    out, count = x, 3 if f"{name}.conv3.weight" in state else 2
    for k in range(1, count + 1):
        out = norm(state, f"{name}.bn{k}", conv(state, f"{name}.conv{k}", out))
        out = out.relu() if k < count else out
    if f"{name}.downsample.0.weight" in state:
        x = norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x))
    return (out + x).relu()


def blocks(state: State, name: str, x: Tensor) -> Tensor:
    k = 0
    while f"{name}.{k}.conv1.weight" in state:
        x, k = block(state, f"{name}.{k}", x), k + 1
    return x


def exchange(state: State, name: str, levels: list[Tensor], i: int) -> Tensor:
    total = torch.zeros_like(levels[i])
    for j, level in enumerate(levels):
        term, part = level, f"{name}.fuse_layers.{i}.{j}"
        if j > i:
            term = up(norm(state, f"{part}.1", conv(state, f"{part}.0", level)), levels[i])
        for k in range(i - j):
            term = norm(state, f"{part}.{k}.1", conv(state, f"{part}.{k}.0", term, stride=2))
            term = term.relu() if k < i - j - 1 else term
        total = total + term
    return total.relu()


def stage(state: State, name: str, levels: list[Tensor]) -> list[Tensor]:
    k = 0
    while f"{name}.{k}.branches.0.0.conv1.weight" in state:
        levels = [blocks(state, f"{name}.{k}.branches.{i}", level) for i, level in enumerate(levels)]
        levels, k = [exchange(state, f"{name}.{k}", levels, i) for i in range(len(levels))], k + 1
    return levels


def attention(state: State, pixels: Tensor, region: Tensor) -> Tensor:
    """All of the object attention: query, key, softmax over the one region, value."""

    def layers(name: str, x: Tensor, count: int) -> Tensor:
        for k in range(0, 2 * count, 2):
            part = f"ocr_distri_head.object_context_block.{name}"
            x = norm(state, f"{part}.{k + 1}.0", conv(state, f"{part}.{k}", x)).relu()
        return x

    query, key = layers("f_pixel", pixels, 2).flatten(2).transpose(1, 2), layers("f_object", region, 2).flatten(2)
    weights = (query @ key * key.shape[1] ** -0.5).softmax(dim=-1)  # [B, h*w, 1]
    value = layers("f_down", region, 1).flatten(2).transpose(1, 2)
    return layers("f_up", (weights @ value).transpose(1, 2).unflatten(2, pixels.shape[2:]), 1)


def head(state: State, features: Tensor) -> Tensor:
    aux = norm(state, "aux_head.1", conv(state, "aux_head.0", features)).relu()
    share = conv(state, "aux_head.3", aux).flatten(2).softmax(dim=2)
    pixels = norm(state, "conv3x3_ocr.1", conv(state, "conv3x3_ocr.0", features)).relu()
    region = (pixels.flatten(2) * share).sum(dim=2)[:, :, None, None]
    joined = torch.cat([attention(state, pixels, region), pixels], dim=1)
    name = "ocr_distri_head.conv_bn_dropout"
    return conv(state, "cls_head", norm(state, f"{name}.1.0", conv(state, f"{name}.0", joined)).relu())


def second_writing(whole: State, image: Tensor, previous: Tensor, points: Tensor) -> Tensor:
    maps = torch.cat([previous, click_maps(points, *image.shape[2:])], dim=1)
    maps = F.leaky_relu(conv(whole, "maps_transform.0", maps), 0.2)
    maps = conv(whole, "maps_transform.2", maps, stride=2) * whole["maps_transform.3.scale"].abs()
    state = {name.removeprefix("feature_extractor."): each for name, each in whole.items()}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image - mean[:, None, None]) / std[:, None, None]
    x = norm(state, "bn1", conv(state, "conv1", x, stride=2)).relu() + maps
    x = blocks(state, "layer1", norm(state, "bn2", conv(state, "conv2", x, stride=2)).relu())
    first = norm(state, "transition1.0.1", conv(state, "transition1.0.0", x)).relu()
    second = norm(state, "transition1.1.0.1", conv(state, "transition1.1.0.0", x, stride=2)).relu()
    levels = stage(state, "stage2", [first, second])
    for k in (3, 4):
        name = f"transition{k - 1}.{k - 1}.0"
        coarser = norm(state, f"{name}.1", conv(state, f"{name}.0", levels[-1], stride=2)).relu()
        levels = stage(state, f"stage{k}", [*levels, coarser])
    features = torch.cat([up(level, levels[0]) for level in levels], dim=1)
    return up(head(state, features), image)


def test_arithmetic(model: Ritm) -> None:
    given = inputs()
    with torch.inference_mode():
        found, expected = model(*given), second_writing(dict(model.state_dict()), *given)
    assert found.shape == (2, 1, 70, 93)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_all_inputs_count(model: Ritm) -> None:
    image, previous, points = inputs(batch=1)
    with torch.inference_mode():
        answers = [
            model(image, previous, points),
            model(image.flip(3), previous, points),
            model(image, 1 - previous, points),
            model(image, previous, points.roll(2, 1)),
        ]
    assert all((other - answers[0]).abs().max() > 1e-4 for other in answers[1:])


def test_the_baseline_does_not_see_the_previous_answer() -> None:
    torch.manual_seed(0)
    image, previous, points = inputs(40, 48, 1)
    model = Ritm("hrnet18_baseline").eval()
    with torch.inference_mode():
        assert torch.equal(model(image, previous, points), model(image, 1 - previous, points))


def test_what_is_unused_changes_nothing(model: Ritm) -> None:
    given = inputs(40, 48, 1)
    other = Ritm("hrnet18s").eval()
    other.load_state_dict(model.state_dict())
    for name, parameter in other.named_parameters():
        if name.startswith(UNUSED):
            nn.init.constant_(parameter, 3.0)
            assert not parameter.requires_grad
    with torch.inference_mode():
        assert torch.equal(model(*given), other(*given))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 97), (64, 128)])
def test_any_size(size: tuple[int, int], model: Ritm) -> None:
    with torch.inference_mode():
        answer = model(*inputs(*size, batch=1))
    assert answer.shape == (1, 1, *size)
    assert torch.isfinite(answer).all()


def test_saved_and_predicting_under_its_own_protocol(model: Ritm, tmp_path) -> None:
    own = {"threshold": 0.49, "zoom_skip_clicks": 1, "zoom_size": 120, "zoom_min_crop": 20}
    save_model(tmp_path, model, {"eval": own})
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Ritm)
    image = (torch.rand(60, 90, 3, generator=torch.Generator().manual_seed(2)) * 255).byte().numpy()
    config = EvalConfig(threshold=0.49, zoom_skip_clicks=1, zoom_min_crop=20)
    predictors = [
        Predictor.from_pretrained(tmp_path, zoom_size=120),
        Predictor(model, zoom_size=120, config=config),
        Predictor(model, zoom_size=120),
    ]
    for predictor in predictors:
        predictor.set_image(image)
    for click in ((30, 40, True), (10, 80, False), (35, 45, True)):
        first, same, paper = (predictor.click(*click).probability for predictor in predictors)
        assert (first == same).all()
    assert (first != paper).any()


def test_wrong_variants(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"there are: {', '.join(VARIANTS)}"):
        Ritm("hrnet64")
    save_model(tmp_path, Ritm("hrnet18s"), {})
    config = tmp_path / "config.json"
    text = config.read_text()
    for old, new, message in [
        ("ritm", "fcn", "family must be one of: simpleclick, ritm, got 'fcn'"),
        ("hrnet18s", "vit_b", "variant set to one of: hrnet18s"),
        ("hrnet18s", "hrnet32", "does not fit hrnet32"),
    ]:
        config.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
