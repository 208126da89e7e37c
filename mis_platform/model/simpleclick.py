"""SimpleClick (Liu et al., ICCV 2023): a plain vision transformer from photo, previous mask and clicks to one mask.

Names, shapes and arithmetic are those of the released SimpleClick v1.0 code, so its state dicts load strictly. Five
groups of parameters exist for that reason alone and take part in nothing: UNUSED lists them, and they need no
gradient.

Shape suffixes: B images, H W pixels, h w patches, T tokens, D width, C channels, N click slots of one sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mis_platform.config import WINDOW

CLICK_RADIUS = 5  # network pixels, inclusive
DROPOUT = 0.1  # of whole channels before the last convolution
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNUSED = ("backbone.cls_token", "backbone.fc_norm.", "backbone.head.", "head.up_conv1.", "head.up_conv2.")


@dataclass(frozen=True)
class Variant:
    """Sizes of one SimpleClick model."""

    patch: int  # pixels
    dim: int
    depth: int  # transformer blocks
    heads: int
    neck_dims: tuple[int, int, int, int]  # channels of the pyramid, finest level first
    head_channels: int

    @property
    def window(self) -> int:
        """Side of an attention window, in patches."""
        return WINDOW // self.patch

    @property
    def global_every(self) -> int:
        """Every so many blocks, one attends to the whole image; the others stay within their windows."""
        return 6 if self.depth == 12 else self.depth // 4


VARIANTS = {
    "vit_b": Variant(16, 768, 12, 12, (128, 256, 512, 1024), 256),
    "vit_l": Variant(16, 1024, 24, 16, (192, 384, 768, 1536), 256),
    "vit_h": Variant(14, 1280, 32, 16, (240, 480, 960, 1920), 256),
    "vit_xt": Variant(16, 160, 8, 4, (96, 192, 288, 384), 128),
}


PREVIOUS_MASKS = ("soft", "binary")


class SimpleClick(nn.Module):
    """The click model.

    variant: a key of VARIANTS. image_size: pixels, one side of a square or (height, width), each a multiple of 224;
    it fixes the position embedding (`resize_position_embedding` changes it). previous_mask: "soft", or "binary" for a
    model that sees of its last answer only which pixels are above 0.5 (B in the paper's section 3). New weights come
    from torch's global generator. Raises ValueError for any other variant, size or previous_mask.
    """

    licence: str | None = None  # what a user of these weights has to know; None: they come from nowhere else

    def __init__(
        self, variant: str = "vit_b", image_size: int | Sequence[int] = 448, previous_mask: str = "soft"
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown model variant {variant!r}; there are: {', '.join(VARIANTS)}")
        if previous_mask not in PREVIOUS_MASKS:
            raise ValueError(f"previous_mask must be one of: {', '.join(PREVIOUS_MASKS)}, got {previous_mask!r}")
        self.variant = variant
        self.previous_mask = previous_mask
        sizes = VARIANTS[variant]
        self.patch_embed_coords = PatchEmbedding(sizes)
        self.backbone = Backbone(sizes, token_grid(sizes, image_size))
        self.neck = Neck(sizes)
        self.head = Head(sizes)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(UNUSED))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that `forward` takes."""
        height, width = self.backbone.grid
        patch = VARIANTS[self.variant].patch
        return height * patch, width * patch

    def forward(
        self, image_B3HW: Tensor, previous_B1HW: Tensor, points_B2N3: Tensor, dropout_BC: Tensor | None = None
    ) -> Tensor:
        """Logits [B, 1, H, W] at the size of the input, at least float32; the sigmoid is the caller's.

        image: RGB in [0, 1]. previous: probabilities of the last round in [0, 1], zeros before the first click.
        points: float32, N positive then N negative rows (row, column, order) in pixels, unused rows (-1, -1, -1).
        dropout: what multiplies the head's channels in training, 0 or 1/(1-DROPOUT); drawn by torch when None. Passed
        in, it makes a step independent of how the batch is split over workers. Evaluation mode ignores it.
        Raises ValueError for an input that is not `image_size`.
        """
        self._check_inputs(image_B3HW, previous_B1HW, points_B2N3, dropout_BC)
        height, width = image_B3HW.shape[-2:]
        clicks_B2HW = click_maps(points_B2N3, height, width).to(image_B3HW.dtype)
        if self.previous_mask == "binary":
            previous_B1HW = (previous_B1HW > 0.5).to(previous_B1HW.dtype)
        coordinates_BTD = self.patch_embed_coords(torch.cat([previous_B1HW, clicks_B2HW], dim=1))
        features_BDhw = self.backbone(_normalise(image_B3HW), coordinates_BTD)
        logits = self.head(self.neck(features_BDhw), dropout_BC)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()  # eight bits of mantissa would show as steps in the upsampled mask
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=True)

    def _check_inputs(self, image: Tensor, previous: Tensor, points: Tensor, dropout: Tensor | None) -> None:
        size, batch = tuple(image.shape[-2:]), image.shape[0]
        token_grid(VARIANTS[self.variant], size)
        if size != self.image_size:
            raise ValueError(
                f"this model is set up for inputs of {_size(self.image_size)} pixels, got {_size(size)}; "
                "call resize_position_embedding first"
            )
        for name, tensor, expected in [
            ("image", image, (batch, 3, *size)),
            ("previous mask", previous, (batch, 1, *size)),
            ("points", points, (batch, points.shape[1] // 2 * 2, 3)),
            ("dropout", dropout, (batch, VARIANTS[self.variant].head_channels)),
        ]:
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def click_maps(points_B2N3: Tensor, height: int, width: int) -> Tensor:
    """Discs around the clicks, float32 [B, 2, height, width] in {0, 1}: channel 0 positive, 1 negative (RITM).

    A pixel belongs to a disc if its squared distance to the centre is at most CLICK_RADIUS squared; centres are float
    (row, column) in pixels of this map and may lie outside. A row with both coordinates negative is no click.
    All shapes are static. Time and memory go with the number of clicks and pixels, not with their product: only the
    12x12 pixels around each click are looked at.
    """
    batch, slots, _ = points_B2N3.shape
    centre = points_B2N3[..., :2].float().reshape(batch, 2, slots // 2, 2)
    # One pixel further than from a whole number: just below the next one, distances round to what they are from there.
    reach = torch.arange(-CLICK_RADIUS, CLICK_RADIUS + 2, device=centre.device)
    # The clamp only keeps the conversion to integers defined; such pixels are too far away or outside.
    near = centre.floor().clamp(-2 * CLICK_RADIUS, max(height, width) + 2 * CLICK_RADIUS).long()
    row = (near[..., 0, None] + reach)[..., :, None]  # [B, 2, N, 12, 1]
    column = (near[..., 1, None] + reach)[..., None, :]  # [B, 2, N, 1, 12]
    squared = (row - centre[..., 0, None, None]) ** 2 + (column - centre[..., 1, None, None]) ** 2
    is_click = (centre.amax(dim=-1) >= 0)[..., None, None]
    is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    is_disc = (squared <= CLICK_RADIUS**2) & is_click & is_inside
    pixel = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    maps = torch.zeros(batch, 2, height * width, device=centre.device)
    maps.scatter_add_(2, pixel.flatten(2), is_disc.float().flatten(2))  # counts: exact in any order
    return maps.clamp_(max=1).reshape(batch, 2, height, width)


def resize_position_embedding(model: SimpleClick, image_size: int | Sequence[int]) -> None:
    """Set `model` up, in place, for inputs of `image_size` pixels (a side, or (height, width)).

    The embedding of the patches is resized bicubically, the class entry kept, as SimpleClick does before evaluating at
    672 pixels. `backbone.pos_embed` becomes a new Parameter: build optimisers afterwards. Resizing loses detail, so
    start from the trained weights each time rather than from an already resized model.
    Raises ValueError unless both sides are multiples of 224.
    """
    grid = token_grid(VARIANTS[model.variant], image_size)
    backbone = model.backbone
    resized = interpolate_position(backbone.pos_embed.detach(), backbone.grid, grid)
    backbone.pos_embed = nn.Parameter(resized, requires_grad=backbone.pos_embed.requires_grad)
    backbone.grid = grid


def interpolate_position(position_1TD: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embedding [1, 1+h*w, D] from the grid `old` (h, w) to `new`: bicubic, the class entry stays."""
    if old == new:
        return position_1TD
    patches_1Dhw = position_1TD[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    resized_1Dhw = F.interpolate(patches_1Dhw, size=new, mode="bicubic", align_corners=False)
    return torch.cat([position_1TD[:, :1], resized_1Dhw.flatten(2).transpose(1, 2)], dim=1)


def token_grid(sizes: Variant, image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in patches of an input of `image_size` pixels; ValueError unless multiples of 224."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height <= 0 or width <= 0 or height % WINDOW or width % WINDOW:
        raise ValueError(
            f"an input of {_size((height, width))} pixels does not divide into attention windows: "
            f"height and width must be multiples of {WINDOW} ({WINDOW}, {2 * WINDOW}, {3 * WINDOW}, ...)"
        )
    return height // sizes.patch, width // sizes.patch


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _normalise(image_B3HW: Tensor) -> Tensor:
    channels = zip(image_B3HW.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


# -- backbone --------------------------------------------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """[B, 3, H, W] -> [B, T, D]: one linear map per patch."""

    def __init__(self, sizes: Variant) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.dim, kernel_size=sizes.patch, stride=sizes.patch)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """[B, T, D], patches in row-major order. H and W must be multiples of the patch's side."""
        tokens: Tensor = self.proj(x_B3HW).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention over T tokens, without relative positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D]: each token mixed with all T of its own row of the batch."""
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, T, D/heads]
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D]: each token by itself, four times as wide in between, GELU."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTD)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D]: attention, then perceptron, each added to its input."""
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class Backbone(nn.Module):
    """A plain ViT on a fixed patch grid; most blocks attend within 224-pixel windows, some globally (ViTDet)."""

    def __init__(self, sizes: Variant, grid: tuple[int, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.grid = grid  # (height, width) in patches
        self.patch_embed = PatchEmbedding(sizes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, sizes.dim))  # MAE's; no class token enters the sequence
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], sizes.dim))
        self.blocks = nn.ModuleList(Block(sizes.dim, sizes.heads) for _ in range(sizes.depth))
        self.fc_norm = nn.LayerNorm(sizes.dim, eps=1e-6)
        self.head = nn.Linear(sizes.dim, 1000)
        self._initialise()

    def _initialise(self) -> None:
        """As MAE initialises its encoder."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view: fans of a linear layer
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, image_B3HW: Tensor, coordinates_BTD: Tensor) -> Tensor:
        """Output of the last block, [B, D, h, w]; there is no final norm. image: normalised."""
        x_BTD = self.patch_embed(image_B3HW) + coordinates_BTD + self.pos_embed[:, 1:]
        every = self.sizes.global_every
        for first in range(0, self.sizes.depth, every):
            # Norms and perceptrons act on single tokens, so windows need cutting once per group, not once per block.
            x_BTD = split_windows(x_BTD, self.grid, self.sizes.window)
            for block in self.blocks[first : first + every - 1]:
                x_BTD = block(x_BTD)
            x_BTD = join_windows(x_BTD, self.grid, self.sizes.window)
            x_BTD = self.blocks[first + every - 1](x_BTD)
        return x_BTD.transpose(1, 2).unflatten(2, self.grid)


def split_windows(x_BTD: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """[B, h*w, D] -> [B * windows, window*window, D], windows in row-major order."""
    height, width = grid
    x = x_BTD.reshape(-1, height // window, window, width // window, window, x_BTD.shape[-1])
    return x.transpose(2, 3).reshape(-1, window * window, x_BTD.shape[-1])


def join_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `split_windows`."""
    height, width = grid
    x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height * width, x.shape[-1])


# -- neck and head ---------------------------------------------------------------------------------------------------


class _Norm(nn.GroupNorm):
    """Over all channels and pixels of an image. On a GPU PyTorch's own gives an image to one multiprocessor."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        if not x_BChw.is_cuda:
            return super().forward(x_BChw)
        with torch.autocast("cuda", enabled=False):
            return group_norm(x_BChw, self.weight, self.bias, self.eps)


def group_norm(x_BChw: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """`F.group_norm` with one group, as a handful of steps that each use a whole device. At least in float32, then in
    the type of `x`.
    """
    x = x_BChw if x_BChw.dtype == torch.float64 else x_BChw.float()
    variance, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
    scale = weight_C[:, None, None] * torch.rsqrt(variance + eps)
    return torch.addcmul(bias_C[:, None, None] - mean * scale, x, scale).to(x_BChw.dtype)


def _norm(channels: int) -> nn.GroupNorm:
    return _Norm(1, channels)


def _double(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2)


class Neck(nn.Module):
    """Simple feature pyramid (ViTDet): one map [B, D, h, w] to strides 4, 8, 16 and 32 (of patch-16 models)."""

    def __init__(self, sizes: Variant) -> None:
        super().__init__()
        dim, (out4, out8, out16, out32) = sizes.dim, sizes.neck_dims
        mid4, mid8, mid32 = max(2 * out4, dim // 2), max(out8, dim // 2), max(out32, 2 * dim)
        self.down_4 = nn.Sequential(
            *(_double(dim, mid4), _norm(mid4), nn.GELU()),
            *(_double(mid4, mid4 // 2), _norm(mid4 // 2)),
            *(nn.Conv2d(mid4 // 2, out4, 1), _norm(out4), nn.GELU()),
        )
        self.down_8 = nn.Sequential(
            *(_double(dim, mid8), _norm(mid8)),
            *(nn.Conv2d(mid8, out8, 1), _norm(out8), nn.GELU()),
        )
        self.down_16 = nn.Sequential(nn.Conv2d(dim, out16, 1), _norm(out16), nn.GELU())
        self.down_32 = nn.Sequential(
            *(nn.Conv2d(dim, mid32, 2, stride=2), _norm(mid32)),
            *(nn.Conv2d(mid32, out32, 1), _norm(out32), nn.GELU()),
        )

    def forward(self, x_BDhw: Tensor) -> list[Tensor]:
        """Four maps, finest first: [B, neck_dims[k], ...] at 4, 2, 1 and 1/2 times the size h x w."""
        return [self.down_4(x_BDhw), self.down_8(x_BDhw), self.down_16(x_BDhw), self.down_32(x_BDhw)]


class ConvReLU(nn.Module):
    """1x1 convolution and ReLU, with mmcv's initialisation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.get_parameter("bias"))

    def forward(self, x_BChw: Tensor) -> Tensor:
        """[B, outputs, h, w], not negative."""
        return F.relu(self.conv(x_BChw))


class Head(nn.Module):
    """All-MLP head (SegFormer): pyramid levels to one channel, joined at the finest level."""

    def __init__(self, sizes: Variant) -> None:
        super().__init__()
        channels = sizes.head_channels
        self.conv_seg = nn.Conv2d(channels, 1, 1)
        self.convs = nn.ModuleList(ConvReLU(dim, channels) for dim in sizes.neck_dims)
        self.fusion_conv = ConvReLU(4 * channels, channels)
        # Of SimpleClick's "x2" and "x4 upsample" models; in every checkpoint, unused here.
        self.up_conv1 = self._up_conv(channels)
        self.up_conv2 = self._up_conv(channels // 2)

    @staticmethod
    def _up_conv(channels: int) -> nn.Sequential:
        half = channels // 2
        return nn.Sequential(_double(channels, half), _norm(half), nn.Conv2d(half, half, 1), _norm(half), nn.GELU())

    def forward(self, levels: list[Tensor], dropout_BC: Tensor | None) -> Tensor:
        """Logits [B, 1, ...] at the size of levels[0]."""
        fused = self._fuse([conv(level) for conv, level in zip(self.convs, levels, strict=True)])
        if self.training and dropout_BC is not None:
            fused = fused * dropout_BC.to(fused.dtype)[:, :, None, None]
        else:
            fused = F.dropout2d(fused, DROPOUT, self.training)
        logits: Tensor = self.conv_seg(fused)
        return logits

    def _fuse(self, levels: list[Tensor]) -> Tensor:
        """`fusion_conv` of all levels enlarged to the first and joined.

        A 1x1 convolution commutes with enlarging, so each level gets its share of it while it is small.
        """
        conv = self.fusion_conv.conv
        finest, *others = zip(levels, conv.weight.chunk(len(levels), dim=1), strict=True)
        fused = F.conv2d(*finest, conv.bias)
        for level, weight in others:
            fused = fused + _enlarge(F.conv2d(level, weight), fused.shape[-2:])
        return F.relu(fused)


def _enlarge(x_BChw: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, in the type that `x` has: autocast would widen it first, and round it just the same after that."""
    with torch.autocast(x_BChw.device.type, enabled=False):
        return F.interpolate(x_BChw, size=size, mode="bilinear", align_corners=False)
