"""Self-supervised vision transformers as feature extractors: DINO, DINOv2, DINOv3, built by timm.

A file may have timm's key names or the authors', flat or as a training checkpoint (the teacher is taken); it must fit
exactly. Position embeddings are resized as the authors' own code does, not as timm does, hence the forward pass here.

Shape suffixes: B images, H W pixels, h w patches, N patches, T tokens, D width.
"""

import argparse
import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as rename_dinov3
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as rename_vit
from torch import Tensor, nn

from mis_platform.config import FeaturesConfig
from mis_platform.model.features import BACKBONES, Backbone
from mis_platform.model.transfer import to_numpy
from mis_platform.model.weights import read_state_dict

# All three families were trained on pixels in [0, 1] normalised with these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OFFSET = 0.1  # patches, added to the target grid before it becomes a scale factor (DINO, DINOv2 without registers)


def load(config: FeaturesConfig, backbone: Backbone, path: Path, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from uint8 [B, H, W, 3] RGB to float32 [B, N, D], in one forward pass: patch tokens, row-major.

    Sides are multiples of the patch. Tokens of the class and of registers are left out, nothing is normalised to length
    1. features.precision "bf16" computes matrix products in bfloat16 (autocast), all else in float32. Raises ValueError
    as `load_network`.
    """
    network = load_network(backbone, path).to(device)
    if config.precision == "bf16":
        _round_factors(network)
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1)
    kind = torch.device(device).type

    @torch.inference_mode()
    def describe(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
        normal = (pixels.float() / 255 - mean) / std
        # TF32 is off for matrix products by default but on for convolutions, here the patch embedding.
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16"),
        ):
            tokens = patch_tokens(network, normal, config.position_resize, config.layer)
        return to_numpy(tokens.float())

    return describe


def _round_factors(network: nn.Module) -> None:
    """The weights of matrix products as autocast would round them at every photo; that is a third of its launches."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)


# -- forward pass ----------------------------------------------------------------------------------------------------


def patch_tokens(network: VisionTransformer | Eva, image_B3HW: Tensor, position_resize: str, layer: str) -> Tensor:
    """Tokens [B, N, D] of the last block, after the final LayerNorm if layer is "final_norm"."""
    if isinstance(network, Eva):  # rotary positions follow the grid; nothing to resize
        return network.forward_intermediates(
            image_B3HW, indices=1, norm=layer == "final_norm", output_fmt="NLC", intermediates_only=True
        )[0]
    tokens_BTD = network.norm_pre(_embedded(network, image_B3HW, position_resize))
    for block in network.blocks:
        tokens_BTD = block(tokens_BTD)
    if layer == "final_norm":
        tokens_BTD = network.norm(tokens_BTD)
    return tokens_BTD[:, network.num_prefix_tokens :]


def _embedded(network: VisionTransformer, image_B3HW: Tensor, position_resize: str) -> Tensor:
    patches_BDhw = network.patch_embed.proj(image_B3HW)
    grid = (patches_BDhw.shape[2], patches_BDhw.shape[3])
    class_token, registers = network.cls_token, network.reg_token
    assert class_token is not None
    assert network.pos_embed is not None
    position: Tensor = network.pos_embed
    if registers is None:
        prefix, position = class_token + position[:, :1], position[:, 1:]
    else:  # the position of the class token is already part of it
        prefix = torch.cat([class_token, registers], dim=1)
    patches_BND = patches_BDhw.flatten(2).transpose(1, 2)
    patches_BND = patches_BND + resize_position(position, grid, position_resize, exact=registers is not None)
    return torch.cat([prefix.expand(len(image_B3HW), -1, -1), patches_BND], dim=1)


def resize_position(position_1ND: Tensor, grid: tuple[int, int], method: str, exact: bool = False) -> Tensor:
    """Position embedding of a square grid, resized to `grid` (rows, columns) patches: [1, rows * columns, D].

    method "bicubic": DINO's own code. It resizes by the factors (rows + 0.1) / side, meant to guard against rounding,
    and samples with them too, so the lower right border falls short by 0.1 of a new patch. exact=True: to the exact
    size with antialiasing, as DINOv2 with registers does. method "bilinear": the paper's words, exact size. The
    original grid is returned as it is.
    """
    side = int(position_1ND.shape[1] ** 0.5)
    assert side * side == position_1ND.shape[1], position_1ND.shape
    if grid == (side, side):
        return position_1ND
    square_1Dhw = position_1ND.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if method == "bilinear":
        resized = F.interpolate(square_1Dhw, size=grid, mode="bilinear")
    elif exact:
        resized = F.interpolate(square_1Dhw, size=grid, mode="bicubic", antialias=True)
    else:
        factors = [(length + OFFSET) / side for length in grid]
        resized = F.interpolate(square_1Dhw, scale_factor=factors, mode="bicubic")
    assert resized.shape[2:] == grid, resized.shape
    return resized.flatten(2).transpose(1, 2)


# -- weights ---------------------------------------------------------------------------------------------------------


def load_network(backbone: Backbone, path: Path) -> VisionTransformer | Eva:
    """timm's network with the weights at `path`, in evaluation mode on the CPU.

    Raises ValueError naming the file and the first keys that are missing, unexpected, of another shape, not floating
    point or not finite. bfloat16 and float16 become float32.
    """
    state = _backbone_of(_read(path))
    _check_patch(state, backbone, path)
    has_registers = "register_tokens" in state or "reg_token" in state  # of DINOv2; DINOv3 always has them
    network = _build(backbone.architecture.replace("_dinov2", "_reg4_dinov2" if has_registers else "_dinov2"))
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        state = _timm_names(state, network, path)
    except (AttributeError, IndexError, KeyError, RuntimeError) as error:  # timm takes the parts it needs for granted
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {backbone.architecture}: {type(error).__name__}: {reason}") from None
    _check(state, expected, backbone, path)
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return network.eval().requires_grad_(False)


def _build(architecture: str) -> VisionTransformer | Eva:
    with torch.random.fork_rng(devices=[]):  # initial weights are replaced; they must not use up random numbers
        network = timm.create_model(architecture, pretrained=False, num_classes=0)
    assert isinstance(network, VisionTransformer | Eva)
    return network


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; training checkpoints as they are, with their settings (a Namespace) beside the weights."""
    if path.suffix == ".safetensors":
        return dict(read_state_dict(path))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged, or with code in it, or no pickle at all: the reader of all weights knows to say what
        return dict(read_state_dict(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no weights by name, but a {type(content).__name__}")
    return content


def _backbone_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The flat state dict of the backbone in a file: the teacher's, without prefixes and projection heads."""
    for key in ("teacher", "student", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    state = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    if any(name.startswith("backbone.") for name in state):
        return {name.removeprefix("backbone."): each for name, each in state.items() if name.startswith("backbone.")}
    return state


def _check_patch(state: Mapping[str, Any], backbone: Backbone, path: Path) -> None:
    """timm would quietly resample the patch embedding and positions of another network; here they must fit."""
    weight = state.get("patch_embed.proj.weight")
    if not isinstance(weight, Tensor):
        names = ", ".join(sorted(map(str, state))[:3])
        raise ValueError(
            f"{path} has no patch_embed.proj.weight (it has {names}, ...): it is not a vision transformer with the "
            f"key names of timm or of its authors, {backbone.original}"
        )
    expected = (backbone.dim, 3, backbone.patch, backbone.patch)
    if tuple(weight.shape) != expected:
        fitting = [
            name for name, each in BACKBONES.items() if tuple(weight.shape) == (each.dim, 3, each.patch, each.patch)
        ]
        hint = f"; it may be {' or '.join(fitting)}" if fitting else ""
        raise ValueError(
            f"{path} does not fit {backbone.architecture}: patch_embed.proj.weight has shape {tuple(weight.shape)}, "
            f"needed is {expected}{hint}"
        )


def _timm_names(state: Mapping[str, Tensor], network: VisionTransformer | Eva, path: Path) -> dict[str, Tensor]:
    if isinstance(network, VisionTransformer):
        _check_position(state, network, path)
        return rename_vit(dict(state), network)
    with contextlib.redirect_stdout(io.StringIO()):  # timm prints what it probes
        renamed = rename_dinov3(dict(state), network)
    if "blocks.0.attn.q_bias" not in renamed:  # timm's files leave out biases that are all zero
        biases = (name for name in network.state_dict() if name.endswith((".q_bias", ".v_bias")))
        renamed.update({name: torch.zeros(network.embed_dim) for name in biases})
    return renamed


def _check_position(state: Mapping[str, Any], network: VisionTransformer, path: Path) -> None:
    """timm would resample positions of another grid, or stumble over them."""
    tokens = network.patch_embed.num_patches + ("reg_token" not in state)
    expected = (1, tokens, network.embed_dim)
    position = state.get("pos_embed")
    if position is not None and tuple(position.shape) != expected:
        raise ValueError(f"{path}: pos_embed has shape {tuple(position.shape)}, needed is {expected}")


def _check(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], backbone: Backbone, path: Path) -> None:
    fault = f"{path} does not fit {backbone.architecture}"
    for problem, names in (("missing", expected.keys() - state.keys()), ("unexpected", state.keys() - expected.keys())):
        if names:
            raise ValueError(f"{fault}: {problem} {_listed(names)}. The authors' file is {backbone.original}")
    for name, shape in expected.items():
        tensor = state[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{fault}: {name} is no floating-point tensor")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{fault}: {name} has shape {tuple(tensor.shape)}, needed is {shape}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")


def _listed(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")
