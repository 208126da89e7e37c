"""Losses: values measured on the official code, double loops over pixels, and gradients checked numerically."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mis_platform.model import losses
from mis_platform.model.losses import (
    FORMS,
    SmoothForm,
    binary_cross_entropy_per_sample,
    normalized_focal_loss_per_sample,
    smoothness_loss,
    smoothness_loss_per_sample,
)

FOCAL_LOGITS = torch.tensor([[[[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]]]], dtype=torch.float64)
FOCAL_TARGET = torch.tensor([[[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]])

OFFICIAL_OFFSETS = [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 2), (2, -2), (2, 0), (2, 2)]
PAPER_OFFSETS = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if (dy, dx) != (0, 0)]
YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])


def golden_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(logits [1, 1, 6, 7], image [1, 3, 6, 7]) of the measured values."""
    i = torch.arange(42, dtype=torch.float64)
    levels = torch.stack([(37 * i) % 256, (91 * i + 13) % 256, (53 * i + 101) % 256]) / 8 + 100
    return (3 * torch.sin(0.9 * i)).reshape(1, 1, 6, 7).to(dtype), (levels / 255).reshape(1, 3, 6, 7).to(dtype)


def random_case(height: int, width: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Colours that differ by a few levels, so that affinities lie well between 0 and 1."""
    rng = np.random.default_rng(seed)
    return (
        torch.from_numpy(rng.normal(size=(batch, 1, height, width))),
        torch.from_numpy(0.5 + 0.03 * rng.normal(size=(batch, 3, height, width))),
    )


# -- cross-entropy and focal loss ------------------------------------------------------------------------------------


def test_golden_values() -> None:
    assert binary_cross_entropy_per_sample(FOCAL_LOGITS, FOCAL_TARGET).item() == pytest.approx(0.3282105, abs=5e-8)
    assert normalized_focal_loss_per_sample(FOCAL_LOGITS, FOCAL_TARGET).item() == pytest.approx(0.2601706, abs=5e-8)
    ignored = FOCAL_TARGET.clone()
    ignored[..., -1, -1] = -1
    assert normalized_focal_loss_per_sample(FOCAL_LOGITS, ignored).item() == pytest.approx(0.2611328, abs=5e-8)


def focal_loop(logits: np.ndarray, target: np.ndarray) -> float:
    """alpha 0.5, gamma 2, one image."""
    valid = [(z, y) for z, y in zip(logits.flat, target.flat) if y != -1]
    p_true = [1 / (1 + np.exp(-z)) if y == 1 else 1 / (1 + np.exp(z)) for z, y in valid]
    scale = len(valid) / sum((1 - p) ** 2 for p in p_true)
    return -sum(0.5 * scale * (1 - p) ** 2 * np.log(p) for p in p_true) / len(valid)


def test_losses_per_sample() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(3, 1, 5, 4)) * 3)
    target = torch.from_numpy(rng.integers(-1, 2, size=(3, 1, 5, 4)).astype(np.float64))
    expected = [focal_loop(z, y) for z, y in zip(logits.numpy(), target.numpy())]
    np.testing.assert_allclose(normalized_focal_loss_per_sample(logits, target), expected, rtol=1e-9)
    soft = torch.from_numpy(rng.random((3, 1, 5, 4)))
    expected = [F.binary_cross_entropy_with_logits(z, y).item() for z, y in zip(logits, soft)]
    np.testing.assert_allclose(binary_cross_entropy_per_sample(logits, soft), expected)


def test_focal_scale_takes_no_part_in_the_gradient() -> None:
    """With the scale constant, the gradient is that of the plain focal loss times the scale."""
    logits = FOCAL_LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(normalized_focal_loss_per_sample(logits, FOCAL_TARGET).sum(), logits)
    p_true = torch.where(FOCAL_TARGET == 1, logits.sigmoid(), 1 - logits.sigmoid())
    weight = (1 - p_true) ** 2
    scale = (weight.numel() / weight.sum()).item()
    (expected,) = torch.autograd.grad((-0.5 * weight * p_true.log()).mean() * scale, logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss", [binary_cross_entropy_per_sample, normalized_focal_loss_per_sample])
def test_extremes_stay_finite(loss: object) -> None:
    assert callable(loss)
    for target in (0.0, 1.0):
        logits = torch.tensor([[[[-1e4, 1e4, 0.0]]]], requires_grad=True)
        value = loss(logits, torch.full((1, 1, 1, 3), target))
        value.backward()
        assert torch.isfinite(value)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_focal_loss_of_an_ignored_image_is_zero() -> None:
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    value = normalized_focal_loss_per_sample(logits, torch.full((1, 1, 4, 4), -1.0))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("loss", [binary_cross_entropy_per_sample, normalized_focal_loss_per_sample])
def test_shapes_that_would_broadcast_are_refused(loss: object) -> None:
    assert callable(loss)
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))


# -- smoothness ------------------------------------------------------------------------------------------------------


def affinity_loop(image: np.ndarray, form: str) -> np.ndarray:
    """Affinity of every pixel and neighbour, [H, W, neighbours], as defined; image [3, H, W] in [0, 1]."""
    offsets = OFFICIAL_OFFSETS if form == "official" else PAPER_OFFSETS
    matrix, two_var = (YUV.T, (32, 32, 16)) if form == "official" else (YUV, (512, 512, 128))
    luv = np.einsum("lc,chw->lhw", matrix, image * 255)
    _, height, width = image.shape
    affinity = np.zeros((height, width, len(offsets)))
    for y, x, n in np.ndindex(affinity.shape):
        ny, nx = np.clip(y + offsets[n][0], 0, height - 1), np.clip(x + offsets[n][1], 0, width - 1)
        d_xy = (y - ny) ** 2 + (x - nx) ** 2
        d_l, d_u, d_v = (luv[:, y, x] - luv[:, ny, nx]) ** 2
        affinity[y, x, n] = np.exp(-d_xy / two_var[0] - d_l / two_var[1] - (d_u + d_v) / two_var[2])
    return affinity


def smoothness_loop(logits: np.ndarray, image: np.ndarray, form: str) -> float:
    """logits [H, W], image [3, H, W]."""
    prediction = logits if form == "official" else 1 / (1 + np.exp(-logits))
    offsets = OFFICIAL_OFFSETS if form == "official" else PAPER_OFFSETS
    affinity, total = affinity_loop(image, form), 0.0
    height, width = logits.shape
    for y, x, n in np.ndindex(affinity.shape):
        ny, nx = np.clip(y + offsets[n][0], 0, height - 1), np.clip(x + offsets[n][1], 0, width - 1)
        total += affinity[y, x, n] * (prediction[y, x] - prediction[ny, nx]) ** 2
    return total / affinity.size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smoothness_golden_values(dtype: torch.dtype) -> None:
    logits, image = golden_case(dtype)
    assert smoothness_loss(logits, image).item() == pytest.approx(0.0541723, abs=6e-8)
    assert smoothness_loss(logits, image, "official").item() == pytest.approx(0.0541723, abs=6e-8)
    assert smoothness_loss(logits.sigmoid(), image).item() == pytest.approx(0.0015338, abs=6e-8)
    assert smoothness_loss(logits, image, "paper").item() == pytest.approx(0.0538137, abs=6e-8)
    assert smoothness_loss(logits, image, "paper").item() * 42 == pytest.approx(2.2601757, abs=6e-6)
    corrected = dataclasses.replace(FORMS["official"], to_luv=FORMS["paper"].to_luv)
    # Measured in float32, where the exponents of this matrix round worse; in float64 it is 0.03303256.
    assert losses._smoothness(logits, image, corrected).item() == pytest.approx(0.0330325, rel=5e-6)


def laplacian(image: Tensor, form: str) -> np.ndarray:
    """Gradient of the loss in its (quadratic) prediction, as a matrix [pixels, pixels]."""
    pixels = image.shape[-2] * image.shape[-1]
    units = torch.eye(pixels, dtype=image.dtype).reshape(pixels, 1, *image.shape[-2:]).requires_grad_()
    plain = dataclasses.replace(FORMS[form], on_probabilities=False)
    losses._smoothness(units, image.expand(pixels, -1, -1, -1), plain).sum().backward()
    assert units.grad is not None
    return units.grad.flatten(1).numpy()


def test_official_affinities() -> None:
    """Read off the gradient: at a unit prediction on p, the derivative in q is -4 A_pq / (8 HW)."""
    _, image = golden_case()
    affinity = -laplacian(image, "official") * 8 * 42 / 4
    at = 7 * 2 + 3
    measured = [affinity[at, 7 * (2 + dy) + 3 + dx] for dy, dx in OFFICIAL_OFFSETS]
    expected = [3.3614e-3, 6.9663e-11, 8.9312e-8, 2.2590e-3, 3.2228e-9, 5.0383e-4, 5.7608e-1, 3.8592e-11]
    np.testing.assert_allclose(measured, expected, rtol=4e-5)  # five digits, measured in float32: exponents to -24
    np.testing.assert_allclose(measured, affinity_loop(image[0].numpy(), "official")[2, 3], rtol=1e-9)
    # The loop, which agrees with the loss everywhere (below), has the mean measured on the official code.
    assert affinity_loop(image[0].numpy(), "official").mean() == pytest.approx(0.2063375, abs=5e-8)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["official", "paper"]), st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000))
def test_smoothness_equals_a_double_loop(form: SmoothForm, height: int, width: int, seed: int) -> None:
    logits, image = random_case(height, width, seed)
    expected = [smoothness_loop(logits[i, 0].numpy(), image[i].numpy(), form) for i in range(2)]
    np.testing.assert_allclose(smoothness_loss_per_sample(logits, image, form), expected, rtol=1e-10, atol=1e-15)
    assert smoothness_loss(logits, image, form).item() == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (6, 5)])
def test_smoothness_gradient(form: SmoothForm, size: tuple[int, int]) -> None:
    logits, image = random_case(*size)
    assert torch.autograd.gradcheck(lambda z: smoothness_loss_per_sample(z, image, form), logits.requires_grad_())


@pytest.mark.parametrize(("form", "planes"), [("official", 1), ("paper", 2)])
def test_smoothness_keeps_planes_not_neighbourhoods_for_backward(form: SmoothForm, planes: int) -> None:
    """The gradient, and for probabilities the sigmoid: not 8 or 24 copies."""
    logits, image = random_case(32, 40, batch=3)
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        smoothness_loss(logits.requires_grad_(), image, form)
    assert sum(kept.values()) <= planes * logits.numel()


def test_smoothness_of_a_batch_is_that_of_its_images_to_the_bit() -> None:
    logits, image = (part.float() for part in random_case(19, 23, batch=4))
    whole = smoothness_loss_per_sample(logits, image)
    parts = torch.cat([smoothness_loss_per_sample(logits[i : i + 1], image[i : i + 1]) for i in range(4)])
    assert torch.equal(whole, parts)


def test_smoothness_in_half_precision() -> None:
    logits, image = golden_case(torch.float32)
    half = logits.bfloat16().requires_grad_()
    value = smoothness_loss(half, image)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(smoothness_loss(half.detach().float(), image).item())
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_the_losses_alone(form: SmoothForm) -> None:
    logits, image = (part.float() for part in random_case(20, 24))
    target = (logits > 0.3).float()

    def values() -> list[Tensor]:
        parts = [binary_cross_entropy_per_sample(logits, target), normalized_focal_loss_per_sample(logits, target)]
        return [*parts, smoothness_loss_per_sample(logits, image, form)]

    plain = values()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, values(), plain))


def test_smoothness_without_gradient_and_of_nan() -> None:
    logits, image = golden_case()
    with torch.no_grad():
        assert smoothness_loss(logits, image).item() == pytest.approx(0.0541723, abs=6e-8)
    logits[0, 0, 2, 3] = torch.nan
    assert torch.isnan(smoothness_loss(logits, image))


def test_smoothness_refuses_what_it_cannot_mean() -> None:
    logits, image = golden_case()
    with pytest.raises(ValueError, match="there are: official, paper"):
        smoothness_loss(logits, image, "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(1, 1, 6, 7\) and \(1, 3, 6, 6\)"):
        smoothness_loss(logits, image[..., :-1])
