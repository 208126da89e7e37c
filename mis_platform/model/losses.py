"""Training losses: binary cross-entropy (Equation 6), normalised focal loss (RITM), smoothness (Equation 7).

Each takes logits and returns one value per image. All arithmetic is at least float32: half-precision logits are widened
first, float64 stays float64.

Shape suffixes: B images, C channels, H W pixels.
"""

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SmoothForm = Literal["official", "paper"]

FOCAL_EPS = 1e-12


def binary_cross_entropy_per_sample(logits_B1HW: Tensor, target_B1HW: Tensor) -> Tensor:
    """[B]: mean over the pixels of each image of the cross-entropy with a target in [0, 1] (Equation 6)."""
    logits, target = _matched(logits_B1HW, target_B1HW)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(dim=1)


def normalized_focal_loss_per_sample(logits_B1HW: Tensor, target_B1HW: Tensor) -> Tensor:
    """[B]: focal loss rescaled per image so that its weights (1 - p_t)^2 average to one, with RITM's settings.

    The normalised focal loss of Sofiiuk et al., AdaptIS (ICCV 2019).
    target: 1 object, 0 background, -1 ignored. The rescaling factor takes no part in the gradient. An image whose
    pixels are all ignored has loss 0.
    """
    logits, target = (tensor.flatten(1) for tensor in _matched(logits_B1HW, target_B1HW))
    valid = target != -1
    p_true = torch.where(valid, 1 - (target - logits.sigmoid()).abs(), 1.0)
    weight = (1 - p_true) ** 2
    num_valid = valid.sum(dim=1)
    scale = (num_valid / (weight.sum(dim=1) + FOCAL_EPS)).detach()
    # RITM's alpha is 0.5: object and background weigh the same.
    losses = -0.5 * scale[:, None] * weight * (p_true + FOCAL_EPS).clamp(max=1).log()
    return losses.sum(dim=1) / num_valid.clamp(min=1)


def _matched(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the working precision; ValueError if the shapes differ (they would broadcast silently)."""
    if logits.shape != target.shape:
        raise ValueError(f"logits and target must have one shape, got {tuple(logits.shape)} and {tuple(target.shape)}")
    logits = _widen(logits)
    return logits, target.to(logits.dtype)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# -- smoothness ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """One reading of Equation 7: mean over pixels and neighbours of affinity times squared difference.

    The affinity is exp(-d_xy^2/(2 var_xy) - d_l^2/(2 var_l) - d_uv^2/(2 var_uv)), colours on the scale 0..255. Beyond
    the frame the border pixel repeats, with its coordinates, colour and prediction.
    """

    spacing: int  # pixels between neighbours
    radius: int  # neighbours on each side, in steps of `spacing`
    var_xy: float  # pixels squared
    var_l: float  # levels squared
    var_uv: float
    to_luv: tuple[tuple[float, float, float], ...]  # rows l, u, v; columns R, G, B
    on_probabilities: bool

    @property
    def margin(self) -> int:
        """Pixels that a neighbour can lie beyond the frame."""
        return self.spacing * self.radius

    @property
    def num_neighbours(self) -> int:
        return (2 * self.radius + 1) ** 2 - 1

    @property
    def scaled_rows(self) -> tuple[tuple[float, float, float], ...]:
        """`to_luv` for colours in [0, 1], scaled so that squared differences of l, u and v add up in the exponent."""
        scales = (255 / math.sqrt(2 * variance) for variance in (self.var_l, self.var_uv, self.var_uv))
        return tuple((r * scale, g * scale, b * scale) for (r, g, b), scale in zip(self.to_luv, scales, strict=True))

    def half_offsets(self) -> Iterator[tuple[int, int]]:
        """(rows, columns), one of each opposite pair."""
        steps = range(-self.margin, self.margin + 1, self.spacing)
        return ((dy, dx) for dy in steps for dx in steps if (dy, dx) > (0, 0))


_YUV = ((0.299, 0.587, 0.114), (-0.147, -0.289, 0.436), (0.615, -0.515, -0.100))

FORMS: dict[str, _Form] = {
    # Official MIS code: logits, dilated 3x3 neighbourhood, sigma not squared, colour matrix transposed.
    "official": _Form(2, 1, 16.0, 16.0, 8.0, tuple(zip(*_YUV, strict=True)), on_probabilities=False),
    # Equation 7 as printed; the paper gives no sigma, so those of the official code: 16, 16, 8.
    "paper": _Form(1, 2, 16.0**2, 16.0**2, 8.0**2, _YUV, on_probabilities=True),
}


def smoothness_loss(logits_B1HW: Tensor, image_B3HW: Tensor, form: SmoothForm = "official") -> Tensor:
    """Mean over the batch of the smoothness loss (Equation 7): neighbours of like colour should be predicted alike.

    image: RGB in [0, 1], before any in-model colour augmentation. form: a key of FORMS. ValueError for another form, or
    for an image of another size than the logits.
    """
    return smoothness_loss_per_sample(logits_B1HW, image_B3HW, form).mean()


def smoothness_loss_per_sample(logits_B1HW: Tensor, image_B3HW: Tensor, form: SmoothForm = "official") -> Tensor:
    """[B]: mean over the pixels and neighbours of each image.

    The affinity and its gradient are computed pair by pair in one pass, forward and backward together, so that what is
    kept is one plane (the gradient) and what is touched is a handful of planes, whatever the number of neighbours.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form of the smoothness loss {form!r}; there are: {', '.join(FORMS)}")
    return _smoothness(logits_B1HW, image_B3HW, FORMS[form])


def _smoothness(logits_B1HW: Tensor, image_B3HW: Tensor, form: _Form) -> Tensor:
    batch, _, height, width = logits_B1HW.shape
    if logits_B1HW.shape[1] != 1 or image_B3HW.shape != (batch, 3, height, width):
        raise ValueError(
            "smoothness needs logits [B, 1, H, W] and an image [B, 3, H, W], "
            f"got {tuple(logits_B1HW.shape)} and {tuple(image_B3HW.shape)}"
        )
    prediction = _widen(logits_B1HW)
    if form.on_probabilities:
        prediction = prediction.sigmoid()
    values = _Smoothness.apply(prediction.squeeze(1), image_B3HW.to(prediction.dtype), form)
    assert isinstance(values, Tensor)
    return values


class _Smoothness(torch.autograd.Function):
    """Mean affinity-weighted squared difference [B] of a prediction [B, H, W]; differentiable once, in the prediction.

    float32 on a GPU has a kernel; all else goes through PyTorch, pair by pair.
    """

    @staticmethod
    def forward(ctx: Any, prediction_BHW: Tensor, image_B3HW: Tensor, form: _Form) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        has_kernel = prediction_BHW.is_cuda and prediction_BHW.dtype == torch.float32
        compute = _fused if has_kernel and _kernel_works(prediction_BHW.device, form) else _pair_by_pair
        values, gradient = compute(prediction_BHW, image_B3HW, form, needs_gradient)
        if needs_gradient:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values_B: Tensor) -> tuple[Tensor, None, None]:
        (gradient_BHW,) = ctx.saved_tensors
        return gradient_BHW * grad_values_B[:, None, None], None, None


def _fused(
    prediction_BHW: Tensor, image_B3HW: Tensor, form: _Form, needs_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """(values [B], gradient [B, H, W]) by the kernel. Triton is imported here: a CPU can do without."""
    from mis_platform.model.smoothness_kernel import fused_smoothness

    return fused_smoothness(
        prediction_BHW,
        image_B3HW,
        spacing=form.spacing,
        margin=form.margin,
        var_xy=form.var_xy,
        scaled_rows=form.scaled_rows,
        needs_gradient=needs_gradient,
    )


@functools.cache
def _kernel_works(device: torch.device, form: _Form) -> bool:
    """Whether the kernel can be compiled and started here; if not, it says why, once.

    That takes Triton, a C compiler, Python's headers, a directory for compiled code and a GPU that Triton knows.
    """
    try:
        _fused(torch.zeros(1, 1, 1, device=device), torch.zeros(1, 3, 1, 1, device=device), form)
    except Exception as error:  # of imports, of compilers, of drivers, of the disk: any of it only costs time
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        logging.getLogger(__name__).warning("the smoothness loss goes without its fast kernel: %s", reason)
        return False
    return True


def _pair_by_pair(
    prediction_BHW: Tensor, image_B3HW: Tensor, form: _Form, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(values [B], gradient [B, H, W]); the gradient means nothing unless asked for.

    On a CPU images are taken one at a time, because the working planes of one image stay in the cache.
    """
    log_weights = _log_weights(prediction_BHW, form)
    gradient = torch.empty_like(prediction_BHW) if needs_gradient else prediction_BHW
    values = prediction_BHW.new_empty(len(prediction_BHW))
    images_at_once = 1 if prediction_BHW.device.type == "cpu" else max(1, len(values))
    for first in range(0, len(values), images_at_once):
        chunk = slice(first, first + images_at_once)
        part = _accumulate(prediction_BHW[chunk], image_B3HW[chunk], form, log_weights, needs_gradient)
        values[chunk] = part[0]
        if needs_gradient:
            gradient[chunk] = part[1]
    return values, gradient


def _accumulate(
    prediction_BHW: Tensor, image_B3HW: Tensor, form: _Form, log_weights: list[Tensor], needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(values [B], gradient [B, H, W]); the gradient means nothing unless asked for.

    Everything lives on the frame extended by the margin. There, the pair (pixel, pixel + offset) serves both the
    pixel and, seen backwards, its neighbour, so half of the offsets do; `log_weights` holds how often a pair counts.
    """
    height, width = prediction_BHW.shape[-2:]
    margin = form.margin
    prediction = _extend(prediction_BHW, margin)
    planes = [_extend(plane, margin) for plane in _scaled_luv(image_B3HW, form)]
    gradient = torch.zeros_like(prediction) if needs_gradient else prediction
    total = prediction.new_zeros(len(prediction))
    for (dy, dx), log_weight in zip(form.half_offsets(), log_weights, strict=True):
        here, there = _pair_slices(height + 2 * margin, width + 2 * margin, dy, dx)
        difference = planes[0][here] - planes[0][there]
        exponent = torch.addcmul(log_weight, difference, difference, value=-1)
        for plane in planes[1:]:
            torch.sub(plane[here], plane[there], out=difference)
            exponent.addcmul_(difference, difference, value=-1)
        torch.sub(prediction[here], prediction[there], out=difference)
        pull = exponent.exp_().mul_(difference)
        if needs_gradient:
            gradient[here] += pull
            gradient[there] -= pull
        total += pull.mul_(difference).sum(dim=(1, 2))  # not a dot product: autocast would round it to half precision
    scale = 1 / (height * width * form.num_neighbours)
    return total * scale, _fold(gradient, margin) * (2 * scale) if needs_gradient else prediction_BHW


def _scaled_luv(image_B3HW: Tensor, form: _Form) -> Iterator[Tensor]:
    """Luma and the two chroma planes [B, H, W], scaled so that their squared differences add up in the exponent."""
    red, green, blue = image_B3HW.unbind(1)
    for row in form.scaled_rows:
        yield (red * row[0]).add_(green, alpha=row[1]).add_(blue, alpha=row[2])


def _log_weights(like_BHW: Tensor, form: _Form) -> list[Tensor]:
    """One [h, w] plane per half offset: log(how often the pair counts) - d_xy^2 / (2 var_xy).

    A pair counts once for each end that is a pixel of the image rather than a repetition beyond the frame: 0, 1 or 2
    times. Coordinates repeat beyond the frame too, so distances shrink there.
    """
    height, width = like_BHW.shape[-2:]
    rows, columns = (torch.arange(-form.margin, size + form.margin, device=like_BHW.device) for size in (height, width))
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    y = rows.clamp(0, height - 1).to(like_BHW.dtype)
    x = columns.clamp(0, width - 1).to(like_BHW.dtype)
    planes = []
    for dy, dx in form.half_offsets():
        (_, here_y, here_x), (_, there_y, there_x) = _pair_slices(len(rows), len(columns), dy, dx)
        count = inside[here_y, here_x].to(like_BHW.dtype) + inside[there_y, there_x]
        squared = (y[here_y] - y[there_y])[:, None] ** 2 + (x[here_x] - x[there_x]) ** 2
        planes.append(count.log() - squared / (2 * form.var_xy))
    return planes


def _pair_slices(height: int, width: int, dy: int, dx: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Index of the pixels that have a neighbour at (dy, dx) within [B, height, width], and of those neighbours."""

    def along(size: int, step: int) -> tuple[slice, slice]:
        return slice(max(0, -step), size - max(0, step)), slice(max(0, step), size - max(0, -step))

    (here_y, there_y), (here_x, there_x) = along(height, dy), along(width, dx)
    return (slice(None), here_y, here_x), (slice(None), there_y, there_x)


def _extend(plane_BHW: Tensor, margin: int) -> Tensor:
    """The plane with its border repeated `margin` pixels outwards."""
    return F.pad(plane_BHW, (margin,) * 4, mode="replicate")


def _fold(extended_BHW: Tensor, margin: int) -> Tensor:
    """The adjoint of `_extend`: what lies beyond the frame is added to the border pixel it repeats."""
    rows = extended_BHW[:, margin:-margin].clone()
    rows[:, 0] += extended_BHW[:, :margin].sum(dim=1)
    rows[:, -1] += extended_BHW[:, -margin:].sum(dim=1)
    inner = rows[:, :, margin:-margin].contiguous()
    inner[:, :, 0] += rows[:, :, :margin].sum(dim=2)
    inner[:, :, -1] += rows[:, :, -margin:].sum(dim=2)
    return inner
