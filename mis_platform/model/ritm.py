"""RITM (Sofiiuk et al., ICIP 2022): a high-resolution convolutional network with object context, for imported weights.

Names, shapes and arithmetic are those of the released code, so its state dicts load strictly. The backbone's layers are
timm's HRNet; only its fusion is our own, because RITM resizes coarse maps bilinearly where timm repeats pixels. It is
not trained here: new weights are random and serve tests.

Shape suffixes: B images, H W pixels, h w quarter-resolution pixels, C channels, N click slots of one sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.hrnet import HighResolutionModule, HighResolutionNet, cfg_cls
from torch import Tensor, nn

from mis_platform.model.simpleclick import IMAGENET_MEAN, IMAGENET_STD, click_maps

_CONTEXT = "feature_extractor.ocr_distri_head.object_context_block."
UNUSED = (f"{_CONTEXT}f_pixel.", f"{_CONTEXT}f_object.")  # in every checkpoint; see ObjectContext


@dataclass(frozen=True)
class Variant:
    """Sizes of one RITM model."""

    backbone: str  # timm's name of the HRNet configuration
    ocr_width: int  # channels of the object context's keys; its pixels have twice as many
    sees_previous: bool = True  # the answer before the last click; the non-iterative baseline does not


VARIANTS = {
    "hrnet18s": Variant("hrnet_w18_small_v2", 48),
    "hrnet18": Variant("hrnet_w18", 64),
    "hrnet32": Variant("hrnet_w32", 128),
    "hrnet18_baseline": Variant("hrnet_w18", 64, sees_previous=False),
}


class Ritm(nn.Module):
    """The click model. It takes inputs of any size.

    variant: a key of VARIANTS. image_size: pixels, what its protocol makes of the longest side of a zoomed-in window;
    the network does not depend on it. Raises ValueError for any other variant.
    """

    licence: str | None = None  # what a user of these weights has to know; None: they come from nowhere else

    def __init__(self, variant: str = "hrnet18", image_size: int | Sequence[int] = 400) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown RITM variant {variant!r}; there are: {', '.join(VARIANTS)}")
        self.variant = variant
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = (height, width)
        sizes = VARIANTS[variant]
        self.maps_transform = nn.Sequential(
            nn.Conv2d(3 if sizes.sees_previous else 2, 16, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 64, 3, stride=2, padding=1),
            Scale(),
        )
        self.feature_extractor = HRNetOCR(sizes)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(UNUSED))

    def forward(self, image_B3HW: Tensor, previous_B1HW: Tensor, points_B2N3: Tensor) -> Tensor:
        """Logits [B, 1, H, W] at the size of the input; the sigmoid is the caller's.

        image: RGB in [0, 1]. previous: probabilities of the last round in [0, 1], zeros before the first click.
        points: float32, N positive then N negative rows (row, column, order) in pixels, unused rows (-1, -1, -1).
        """
        height, width = image_B3HW.shape[-2:]
        return self.decode(self.features(image_B3HW, previous_B1HW, points_B2N3), (height, width))

    def features(self, image_B3HW: Tensor, previous_B1HW: Tensor, points_B2N3: Tensor) -> Tensor:
        """The four resolutions of the backbone, brought to the finest and joined: [B, C, h, w]."""
        maps = click_maps(points_B2N3, *image_B3HW.shape[-2:]).to(image_B3HW.dtype)
        if VARIANTS[self.variant].sees_previous:
            maps = torch.cat([previous_B1HW, maps], dim=1)
        features: Tensor = self.feature_extractor.features(_normalise(image_B3HW), self.maps_transform(maps))
        return features

    def decode(self, features_BChw: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B, 1, *size] from `features`, which f-BRS changes in between."""
        return _resize(self.feature_extractor.classify(features_BChw), size)


class Scale(nn.Module):
    """One learned, non-negative factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, times the absolute value of the factor."""
        return x * self.scale.abs()


def _normalise(image_B3HW: Tensor) -> Tensor:
    mean, std = (image_B3HW.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image_B3HW - mean) / std


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


# -- backbone --------------------------------------------------------------------------------------------------------


class HRNetOCR(HighResolutionNet):
    """timm's HRNet without its classifier, with RITM's fusion and the head of object-contextual representations.

    The object context is that of Yuan et al., "Object-Contextual Representations for Semantic Segmentation" (ECCV
    2020), with one class.
    """

    def __init__(self, sizes: Variant) -> None:
        super().__init__(cfg_cls[sizes.backbone], head="")
        self.channels: int = sum(self.stage4_cfg["num_channels"])
        pixels = 2 * sizes.ocr_width
        self.conv3x3_ocr = nn.Sequential(
            nn.Conv2d(self.channels, pixels, 3, padding=1), nn.BatchNorm2d(pixels), nn.ReLU()
        )
        self.ocr_distri_head = ContextHead(pixels, sizes.ocr_width)
        self.cls_head = nn.Conv2d(pixels, 1, 1)
        self.aux_head = nn.Sequential(
            nn.Conv2d(self.channels, self.channels, 1),
            nn.BatchNorm2d(self.channels),
            nn.ReLU(),
            nn.Conv2d(self.channels, 1, 1),
        )

    def features(self, image_B3HW: Tensor, maps: Tensor) -> Tensor:
        """[B, C, h, w]. image: normalised. maps: the encoded clicks, [B, 64, H/2, W/2], added after the first layer."""
        x = F.relu(self.bn1(self.conv1(image_B3HW))) + maps
        x = self.layer1(F.relu(self.bn2(self.conv2(x))))
        levels = _run(self.stage2, [change(x) for change in self.transition1])
        for transition, stage in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            coarser = transition[len(levels)](levels[-1])  # the transitions of the levels there are do nothing
            levels = _run(stage, [*levels, coarser])
        size = levels[0].shape[-2:]
        return torch.cat([levels[0], *(_resize(level, size) for level in levels[1:])], dim=1)

    def classify(self, features_BChw: Tensor) -> Tensor:
        """Logits [B, 1, h, w]."""
        pixels = self.conv3x3_ocr(features_BChw)
        share = self.aux_head(features_BChw).flatten(2).softmax(dim=2)  # [B, 1, h*w]: where the object probably is
        region = (pixels.flatten(2) @ share.transpose(1, 2)).unsqueeze(3)  # [B, C, 1, 1]: its mean pixel
        logits: Tensor = self.cls_head(self.ocr_distri_head(pixels, region))
        return logits


def _run(stage: nn.Module, levels: list[Tensor]) -> list[Tensor]:
    """One stage on maps of falling resolution."""
    for module in stage.children():
        assert isinstance(module, HighResolutionModule)
        levels = [branch(level) for branch, level in zip(module.branches, levels, strict=True)]
        levels = [_fuse(i, row, levels) for i, row in enumerate(module.fuse_layers)]
    return levels


def _fuse(i: int, layers: nn.ModuleList, levels: list[Tensor]) -> Tensor:
    """Level i after its exchange with all others; timm's own `forward` would upsample to the nearest pixel."""
    total: Tensor | None = None
    for j, (layer, level) in enumerate(zip(layers, levels, strict=True)):
        if j > i:
            convolution, norm, _ = layer.children()  # the third is timm's upsampling, which has no weights
            term = _resize(norm(convolution(level)), levels[i].shape[-2:])
        else:
            term = layer(level)
        total = term if total is None else total + term
    assert total is not None
    return F.relu(total)


# -- object context --------------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int) -> tuple[nn.Conv2d, nn.Sequential]:
    return nn.Conv2d(inputs, outputs, 1, bias=False), nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU())


class ObjectContext(nn.Module):
    """What each pixel learns from the regions it belongs to.

    With one class there is one region. The softmax over regions of the attention is then exactly 1 whatever pixel and
    region say, so the value alone decides, and f_pixel and f_object only exist because checkpoints have them.
    """

    def __init__(self, channels: int, keys: int) -> None:
        super().__init__()
        self.f_pixel = nn.Sequential(*_conv(channels, keys), *_conv(keys, keys))
        self.f_object = nn.Sequential(*_conv(channels, keys), *_conv(keys, keys))
        self.f_down = nn.Sequential(*_conv(channels, keys))
        self.f_up = nn.Sequential(*_conv(keys, channels))

    def forward(self, region_BC11: Tensor) -> Tensor:
        """[B, C, 1, 1], the same for every pixel."""
        context: Tensor = self.f_up(self.f_down(region_BC11))
        return context


class ContextHead(nn.Module):
    """Pixels joined with their object context."""

    def __init__(self, channels: int, keys: int) -> None:
        super().__init__()
        self.object_context_block = ObjectContext(channels, keys)
        self.conv_bn_dropout = nn.Sequential(*_conv(2 * channels, channels), nn.Dropout2d(0.05))

    def forward(self, pixels_BChw: Tensor, region_BC11: Tensor) -> Tensor:
        """[B, C, h, w], like `pixels`: each pixel joined with the context of its image's region."""
        context = self.object_context_block(region_BC11).expand_as(pixels_BChw)
        out: Tensor = self.conv_bn_dropout(torch.cat([context, pixels_BChw], dim=1))
        return out
