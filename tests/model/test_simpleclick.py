"""SimpleClick: the released names, shapes and counts; the arithmetic re-computed from the state dict."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mis_platform.model.simpleclick import (
    UNUSED,
    VARIANTS,
    SimpleClick,
    click_maps,
    group_norm,
    resize_position_embedding,
)

# variant: parameters, tensors, parameters that no forward pass uses (counted on the released code)
COUNTS = {
    "vit_b": (98_025_513, 214, 956_776),
    "vit_l": (324_206_377, 358, 1_213_544),
    "vit_h": (662_184_793, 454, 1_470_312),
    "vit_xt": (4_053_577, 166, 208_136),
}
# variant: patch, width, blocks, pyramid channels, head channels
SIZES = {
    "vit_b": (16, 768, 12, (128, 256, 512, 1024), 256),
    "vit_l": (16, 1024, 24, (192, 384, 768, 1536), 256),
    "vit_h": (14, 1280, 32, (240, 480, 960, 1920), 256),
    "vit_xt": (16, 160, 8, (96, 192, 288, 384), 128),
}


def on_meta(variant: str, image_size: int = 448) -> SimpleClick:
    with torch.device("meta"):
        return SimpleClick(variant, image_size)


def small_model(image_size: int | tuple[int, int] = 224, seed: int = 0) -> SimpleClick:
    torch.manual_seed(seed)
    return SimpleClick("vit_xt", image_size).double().eval()


def inputs(height: int, width: int, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.random((batch, 3, height, width)))
    previous = torch.from_numpy(rng.random((batch, 1, height, width)))
    points = torch.full((batch, 6, 3), -1.0)
    points[:, 0] = torch.tensor([height * 0.3, width * 0.6, 0.0])
    points[:, 3] = torch.tensor([height - 1.0, 2.0, 1.0])
    points[0, 1] = torch.tensor([50.5, 60.25, 2.0])
    return image, previous, points


# -- names, shapes, counts -------------------------------------------------------------------------------------------


def layer(name: str, *shape: int, bias: int | None = None) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0] if bias is None else bias,)}


def expected_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint at 448 pixels."""
    p, d, depth, (o4, o8, o16, o32), c = SIZES[variant]
    c4, c8, c32 = max(2 * o4, d // 2), max(o8, d // 2), max(o32, 2 * d)
    shapes = layer("patch_embed_coords.proj", d, 3, p, p)
    shapes |= {"backbone.cls_token": (1, 1, d), "backbone.pos_embed": (1, 1 + (448 // p) ** 2, d)}
    shapes |= layer("backbone.patch_embed.proj", d, 3, p, p)
    for i in range(depth):
        block = f"backbone.blocks.{i}"
        shapes |= layer(f"{block}.norm1", d) | layer(f"{block}.norm2", d)
        shapes |= layer(f"{block}.attn.qkv", 3 * d, d) | layer(f"{block}.attn.proj", d, d)
        shapes |= layer(f"{block}.mlp.fc1", 4 * d, d) | layer(f"{block}.mlp.fc2", d, 4 * d)
    shapes |= layer("backbone.fc_norm", d) | layer("backbone.head", 1000, d)
    shapes |= layer("neck.down_4.0", d, c4, 2, 2, bias=c4) | layer("neck.down_4.1", c4)
    shapes |= layer("neck.down_4.3", c4, c4 // 2, 2, 2, bias=c4 // 2) | layer("neck.down_4.4", c4 // 2)
    shapes |= layer("neck.down_4.5", o4, c4 // 2, 1, 1) | layer("neck.down_4.6", o4)
    shapes |= layer("neck.down_8.0", d, c8, 2, 2, bias=c8) | layer("neck.down_8.1", c8)
    shapes |= layer("neck.down_8.2", o8, c8, 1, 1) | layer("neck.down_8.3", o8)
    shapes |= layer("neck.down_16.0", o16, d, 1, 1) | layer("neck.down_16.1", o16)
    shapes |= layer("neck.down_32.0", c32, d, 2, 2) | layer("neck.down_32.1", c32)
    shapes |= layer("neck.down_32.2", o32, c32, 1, 1) | layer("neck.down_32.3", o32)
    shapes |= layer("head.conv_seg", 1, c, 1, 1) | layer("head.fusion_conv.conv", c, 4 * c, 1, 1)
    for i, channels in enumerate((o4, o8, o16, o32)):
        shapes |= layer(f"head.convs.{i}.conv", c, channels, 1, 1)
    for name, half in (("head.up_conv1", c // 2), ("head.up_conv2", c // 4)):
        shapes |= layer(f"{name}.0", 2 * half, half, 2, 2, bias=half) | layer(f"{name}.1", half)
        shapes |= layer(f"{name}.2", half, half, 1, 1) | layer(f"{name}.3", half)
    return shapes


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_that_of_the_released_checkpoints(variant: str) -> None:
    state = on_meta(variant).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts(variant: str) -> None:
    parameters = dict(on_meta(variant).named_parameters())
    unused = sum(p.numel() for name, p in parameters.items() if name.startswith(UNUSED))
    assert (sum(p.numel() for p in parameters.values()), len(parameters), unused) == COUNTS[variant]


@pytest.mark.parametrize(("variant", "blocks"), [("vit_b", 2), ("vit_l", 4), ("vit_h", 4), ("vit_xt", 4)])
def test_number_of_global_blocks(variant: str, blocks: int) -> None:
    sizes = VARIANTS[variant]
    assert sizes.depth == blocks * sizes.global_every
    assert sizes.window * sizes.patch == 224


def test_parameter_counts_of_the_parts_of_vit_b() -> None:
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in on_meta("vit_b").named_children()}
    assert parts == {
        "patch_embed_coords": 590_592,
        "backbone": 87_019_240,
        "neck": 9_475_008,
        "head": 940_673,
    }


def test_every_trainable_parameter_and_no_other_gets_a_gradient() -> None:
    model = small_model().train()  # or DistributedDataParallel waits for gradients that never come
    model(*inputs(224, 224)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(UNUSED)), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


# -- forward ---------------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def reference_backbone(state: dict[str, Tensor], tokens: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """All blocks with full attention; windows are a mask on the pairs of tokens. Global blocks of 8: 2, 4, 6, 8."""
    row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    window = row // 14 * 1000 + column // 14
    apart = window[:, None] != window
    x = tokens
    for i in range(8):
        name = f"backbone.blocks.{i}"
        q, k, v = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv").chunk(3, dim=-1)
        attended = []
        for q_head, k_head, v_head in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v))):
            score = q_head @ k_head.transpose(1, 2) / math.sqrt(q_head.shape[-1])
            if (i + 1) % 2:
                score = score.masked_fill(apart, -math.inf)
            attended.append(score.softmax(dim=-1) @ v_head)
        x = x + linear(torch.cat(attended, dim=-1), state, f"{name}.attn.proj")
        hidden = gelu(linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
        x = x + linear(hidden, state, f"{name}.mlp.fc2")
    return x


def reference_forward(
    state: dict[str, Tensor], image: Tensor, previous: Tensor, discs: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The forward pass of ViT-xT written down from the state dict, without a module."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride)

    def double(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), correction=0, keepdim=True)
        scaled = (x - mean) / (variance + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    mean = torch.tensor([0.485, 0.456, 0.406], dtype=image.dtype)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=image.dtype)[:, None, None]
    tokens = conv((image - mean) / std, "backbone.patch_embed.proj", 16)
    tokens = tokens + conv(torch.cat([previous, discs], 1), "patch_embed_coords.proj", 16)
    tokens = tokens.flatten(2).transpose(1, 2) + state["backbone.pos_embed"][:, 1:]
    x = reference_backbone(state, tokens, grid, heads=4).transpose(1, 2).unflatten(2, grid)

    finest = norm(double(gelu(norm(double(x, "neck.down_4.0"), "neck.down_4.1")), "neck.down_4.3"), "neck.down_4.4")
    levels = [
        gelu(norm(conv(finest, "neck.down_4.5"), "neck.down_4.6")),
        gelu(norm(conv(norm(double(x, "neck.down_8.0"), "neck.down_8.1"), "neck.down_8.2"), "neck.down_8.3")),
        gelu(norm(conv(x, "neck.down_16.0"), "neck.down_16.1")),
        gelu(norm(conv(norm(conv(x, "neck.down_32.0", 2), "neck.down_32.1"), "neck.down_32.2"), "neck.down_32.3")),
    ]
    size = (4 * grid[0], 4 * grid[1])
    joined = torch.cat(
        [
            F.interpolate(conv(level, f"head.convs.{i}.conv").relu(), size, mode="bilinear")
            for i, level in enumerate(levels)
        ],
        dim=1,
    )
    logits = conv(conv(joined, "head.fusion_conv.conv").relu(), "head.conv_seg")
    return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize("size", [(224, 224), (448, 224)])
def test_forward_equals_a_plain_recomputation(size: tuple[int, int]) -> None:
    model = small_model(size)
    with torch.no_grad():  # away from the zeros and ones of a fresh model
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        image, previous, points = inputs(*size, batch=1)
        expected = reference_forward(
            model.state_dict(), image, previous, click_maps(points, *size).double(), (size[0] // 16, size[1] // 16)
        )
        torch.testing.assert_close(model(image, previous, points), expected, rtol=1e-9, atol=1e-9)


def test_a_binary_previous_mask_is_what_is_above_one_half() -> None:
    soft, binary = small_model(), small_model()
    binary.previous_mask = "binary"
    image, previous, points = inputs(224, 224)
    previous[0, 0, 0, :3] = torch.tensor([0.5, 0.50001, 0.49999])
    with torch.no_grad():
        assert torch.equal(binary(image, previous, points), soft(image, (previous > 0.5).double(), points))
        assert not torch.equal(binary(image, previous, points), soft(image, previous, points))
    with pytest.raises(ValueError, match="previous_mask must be one of: soft, binary, got 'hard'"):
        SimpleClick("vit_xt", 224, "hard")


def test_half_precision_still_gives_float32_logits() -> None:
    model = small_model().float()
    image, previous, points = inputs(224, 224)
    with torch.no_grad():
        full = model(image.float(), previous.float(), points)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(image.float(), previous.float(), points)
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 0.1 * full.abs().max()
    assert len(half.unique()) > 10_000  # bfloat16 upsampling would leave a few hundred levels


ROUNDING = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)]


@pytest.mark.parametrize(("dtype", "tolerance"), ROUNDING)
def test_the_norm_for_gpus_and_its_gradients_are_those_of_pytorch(dtype: torch.dtype, tolerance: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x, pull = (2 * torch.randn(3, 8, 6, 5, generator=rng, dtype=torch.float64) + 3 for _ in range(2))
    weight, bias = (torch.randn(8, generator=rng, dtype=torch.float64) for _ in range(2))
    x, pull = x.to(dtype), pull.to(dtype)
    of_weights = torch.float32 if dtype == torch.bfloat16 else dtype
    found, expected = (
        [each.to(kind, copy=True).requires_grad_() for each, kind in zip((x, weight, bias), kinds)]
        for kinds in ((dtype, of_weights, of_weights), [torch.float64] * 3)
    )
    ours, theirs = group_norm(*found, eps=1e-5), F.group_norm(expected[0], 1, *expected[1:], eps=1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    ours.backward(pull)
    theirs.backward(pull.double())
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("size", [(200, 224), (448, 300), (0, 224)])
def test_sizes_that_do_not_divide_into_windows_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 224 \(224, 448, 672"):
        small_model()(*inputs(*size))
    with pytest.raises(ValueError, match="multiples of 224"):
        SimpleClick("vit_xt", size)


def test_inputs_of_another_size_or_shape_are_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="224x224 pixels, got 448x224; call resize_position_embedding"):
        model(*inputs(448, 224))
    image, previous, points = inputs(224, 224)
    with pytest.raises(ValueError, match="previous mask must have shape"):
        model(image, image, points)
    with pytest.raises(ValueError, match="points must have shape"):
        model(image, previous, points[:, :5])
    with pytest.raises(ValueError, match=r"dropout must have shape \(2, 128\)"):
        model(image, previous, points, torch.ones(2, 256))
    with pytest.raises(ValueError, match="vit_b, vit_l, vit_h, vit_xt"):
        SimpleClick("vit_s")


# -- position embedding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), [(448, [28, 28]), (672, [42, 42]), ((224, 448), [14, 28])])
def test_position_embedding_resizes_like_timm_without_antialiasing(
    size: int | tuple[int, int], grid: list[int]
) -> None:
    model = small_model().float()
    before = model.backbone.pos_embed.detach().clone()
    expected = resample_abs_pos_embed(before, grid, num_prefix_tokens=1, interpolation="bicubic", antialias=False)
    resize_position_embedding(model, size)
    torch.testing.assert_close(model.backbone.pos_embed.detach(), expected, rtol=0, atol=0)
    assert model.image_size == (16 * grid[0], 16 * grid[1])
    assert model.backbone.pos_embed.requires_grad


def test_a_resized_model_takes_the_new_size() -> None:
    model = small_model()
    before = model.backbone.pos_embed.detach().clone()
    resize_position_embedding(model, 224)
    assert torch.equal(model.backbone.pos_embed, before)
    resize_position_embedding(model, (224, 448))
    with torch.no_grad():
        assert model(*inputs(224, 448)).shape == (2, 1, 224, 448)
    with pytest.raises(ValueError, match="multiples of 224"):
        resize_position_embedding(model, 400)


# -- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_can_be_passed_in() -> None:
    model = small_model()
    batch = inputs(224, 224)
    masks = (torch.from_numpy(np.random.default_rng(0).random((2, 128))) > 0.1) / 0.9
    with torch.no_grad():
        plain = model(*batch)
        assert torch.equal(model(*batch, masks), plain)  # evaluation mode: ignored
        model.train()
        torch.testing.assert_close(model(*batch, torch.ones(2, 128)), plain)
        dropped = model(*batch, masks)
        assert torch.equal(model(*batch, masks), dropped)
        assert not torch.allclose(dropped, plain)
        alone = torch.cat([model(*(part[i : i + 1] for part in batch), masks[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(alone, dropped)  # does not depend on how the batch is split
        bias = model.head.conv_seg.get_parameter("bias").detach()
        silent = model(*batch, torch.zeros(2, 128))
        torch.testing.assert_close(silent, bias.expand_as(silent))
        assert not torch.equal(model(*batch), model(*batch))  # drawn anew by torch


# -- click maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("centre", "area"), [((20, 20), 81), ((20.5, 20.5), 80), ((20.25, 20), 76), ((0, 0), 26)])
def test_disc_areas(centre: tuple[float, float], area: int) -> None:
    points = torch.full((1, 4, 3), -1.0)
    points[0, 2] = torch.tensor([*centre, 0.0])
    maps = click_maps(points, 64, 48)
    assert maps.shape == (1, 2, 64, 48)
    assert maps[0, 0].sum() == 0
    assert maps[0, 1].sum() == area


coordinate = st.one_of(st.floats(-12, 45, width=32), st.integers(-12, 45).map(float), st.just(-1.0), st.just(1e30))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate), min_size=4, max_size=4))
@example([(-1.0, -1.0), (0.0, -1.0), (0.99999994, 7.0), (0.0, -1.1754943508222875e-38)])  # distances that round to 5
def test_click_maps_equal_a_double_loop(centres: list[tuple[float, float]]) -> None:
    height, width = 33, 21
    points = torch.tensor([[(*centre, 0.0) for centre in centres]])
    expected = np.zeros((2, height, width), np.float32)
    for slot, (row, column) in enumerate(np.array(centres, np.float32)):
        for y in range(height):
            for x in range(width):
                with np.errstate(over="ignore"):
                    near = (y - row) ** 2 + (x - column) ** 2 <= 25
                if max(row, column) >= 0 and near:
                    expected[slot // 2, y, x] = 1
    np.testing.assert_array_equal(click_maps(points, height, width)[0].numpy(), expected)


def test_click_maps_without_slots_are_empty() -> None:
    assert torch.equal(click_maps(torch.zeros(3, 0, 3), 16, 20), torch.zeros(3, 2, 16, 20))


# -- initialisation --------------------------------------------------------------------------------------------------


def test_initialisation() -> None:
    torch.manual_seed(0)
    state = SimpleClick("vit_xt", 448).state_dict()
    for name, fan_in, fan_out in [
        ("backbone.blocks.3.attn.qkv", 160, 480),
        ("backbone.blocks.0.mlp.fc1", 160, 640),
        ("backbone.patch_embed.proj", 768, 160),  # over the flattened kernel
    ]:
        bound = math.sqrt(6 / (fan_in + fan_out))
        weight = state[f"{name}.weight"]
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not state["backbone.blocks.3.attn.qkv.bias"].any()
    assert state["backbone.pos_embed"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["backbone.cls_token"].std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(state["backbone.blocks.7.norm1.weight"], torch.ones(160))
    # mmcv: Kaiming normal over the outgoing channels, zero bias.
    assert state["head.fusion_conv.conv.weight"].std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert not state["head.convs.2.conv.bias"].any()
    # The final convolution keeps the framework's uniform initialisation.
    assert state["head.conv_seg.weight"].abs().max() <= 1 / math.sqrt(128)
