"""What a CUDA device must compute as the CPU does; run with `pytest -m gpu`."""

import dataclasses

import numpy as np
import pytest
import timm
import torch

from mis_platform.config import EvalConfig, FeaturesConfig, Run
from mis_platform.evaluation.protocol import Sample, evaluate
from mis_platform.model import losses
from mis_platform.model.features import build_extractor
from mis_platform.model.losses import FORMS, smoothness_loss, smoothness_loss_per_sample
from mis_platform.model.replay import Replay
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.stages.training_loop import Learner, Schedule, collate, initial_model, optimizer_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def smoothness_case(batch, height, width):
    """(logits [B, 1, H, W], image [B, 3, H, W]): colours that differ by a few levels, as neighbours in a photo do."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, 1, height, width, generator=rng)
    return logits.cuda(), (0.5 + 0.03 * torch.randn(batch, 3, height, width, generator=rng)).cuda()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(448, 448), (443, 331), (3, 500), (1, 1), (1, 2), (9, 1), (5, 7)])
def test_the_smoothness_kernel_computes_what_float64_does(form, size):
    logits, image = smoothness_case(3, *size)
    assert losses._kernel_works(logits.device, FORMS[form])
    weights = torch.tensor([1.0, -2.0, 0.5], device="cuda")
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        prediction = logits.to(dtype, copy=True).requires_grad_()
        values.append(smoothness_loss_per_sample(prediction, image.to(dtype), form))
        (values[-1] * weights).sum().backward()
        gradients.append(prediction.grad.double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=3e-6, atol=0)
    tolerance = 2e-6 * gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(smoothness_loss_per_sample(logits, image, form), values[0])


@pytest.mark.parametrize("form", FORMS)
def test_the_smoothness_loss_is_the_same_on_both_devices(form):
    logits, image = smoothness_case(2, 64, 70)
    on_gpu, on_cpu = smoothness_loss(logits, image, form), smoothness_loss(logits.cpu(), image.cpu(), form)
    assert on_gpu.item() == pytest.approx(on_cpu.item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_smoothness_kernel_repeats_itself_to_the_bit_in_any_memory_layout(form):
    logits, image = smoothness_case(2, 100, 130)
    strided = torch.stack([logits, logits], dim=-1)[..., 0]
    inputs = [(logits, image), (logits, image), (strided, image.to(memory_format=torch.channels_last))]
    results = [losses._fused(prediction[:, 0], colours, FORMS[form]) for prediction, colours in inputs]
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40e9, reason="needs 40 GB"
)
def test_the_smoothness_kernel_counts_beyond_two_to_the_31_values():
    logits = torch.randn(3600, 1, 448, 448, device="cuda", requires_grad=True)
    image = torch.rand(3600, 3, 448, 448, device="cuda").mul_(0.05)
    assert image.numel() > 2**31
    values = smoothness_loss_per_sample(logits, image)
    values.sum().backward()
    last = logits.detach()[-1:].clone().requires_grad_()
    value = smoothness_loss_per_sample(last, image[-1:].clone())
    value.backward()
    torch.testing.assert_close(values[-1:], value, rtol=1e-6, atol=0)
    assert torch.equal(logits.grad[-1:], last.grad)


def test_the_click_model():
    torch.manual_seed(0)
    model = SimpleClick("vit_xt", 224).eval()
    image, previous = torch.rand(2, 3, 224, 224), torch.rand(2, 1, 224, 224)
    points = torch.tensor([[[100.0, 120.0, 0.0], [-1.0, -1.0, -1.0]]]).repeat(2, 1, 1)
    with torch.inference_mode():
        expected = model(image, previous, points)
        found = model.cuda()(image.cuda(), previous.cuda(), points.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_batched_evaluation_makes_the_clicks_of_one_at_a_time():
    torch.manual_seed(0)
    model = SimpleClick("vit_xt", 224).cuda().eval()
    rng = np.random.default_rng(0)
    samples = []
    for k in range(6):
        mask = np.zeros((120, 160), np.int8)
        mask[20 + 5 * k : 70 + 5 * k, 30:100] = 1
        samples.append(Sample("squares", str(k), rng.integers(0, 255, (120, 160, 3), dtype=np.uint8), [("0", mask)]))
    config = EvalConfig(max_clicks=5)
    alone, together = (
        [
            (row["image_id"], row["click"], row["y"], row["x"], row["positive"])
            for row in evaluate(model, samples, config, zoom_size=224, batch=batch, device="cuda")
        ]
        for batch in (1, 6)
    )
    assert alone == together


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_do_not_depend_on_company(precision, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), tmp_path / "weights.pth")
    config = FeaturesConfig(
        extractor="dino_vits16", weights=str(tmp_path / "weights.pth"), precision=precision, batch_size=8
    )
    extractor, rng = build_extractor(config, "cuda"), np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 2), (5, 7), (14, 14), (30, 40)):
        photos = rng.integers(0, 256, (11, 16 * rows, 16 * columns, 3), dtype=np.uint8)
        alone = np.stack([extractor(each[None])[0] for each in photos])
        for order in (rng.permutation(11), rng.permutation(11)[:5]):
            np.testing.assert_array_equal(extractor(photos[order]), alone[order])


def test_a_step_of_training():
    """Colours made ahead, replayed passes and all: the losses of three steps are those of a CPU."""
    run = Run.model_validate(
        {"model": {"variant": "vit_xt", "image_size": 224, "init": "random"}, "train": {"batch_size": 4}}
    )
    losses = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model = initial_model(run).to(device).train()
        schedule = Schedule(100, run.train)
        learner = Learner(run, schedule, model, model, optimizer_of(model, run.train), device, images_at_once=3)
        batches = (squares(4, 224, step) for step in range(3))
        losses.append([learner.step(step, batch)["loss"] for step, batch in enumerate(learner.ahead(batches))])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_gradients_are_those_of_the_same_steps_one_by_one(precision):
    """Two parts of different sizes, so that the second is recorded when the first has left its gradient."""
    run = Run.model_validate(
        {
            "model": {"variant": "vit_xt", "image_size": 224, "init": "random"},
            "train": {"batch_size": 5, "precision": precision},
            "clicks": {"iterative_clicks": 1},
        }
    )
    device = torch.device("cuda")
    model = initial_model(run).to(device).train()
    recorded = Learner(run, Schedule(100, run.train), model, model, optimizer_of(model, run.train), device, 3)
    plain = dataclasses.replace(recorded, network=Around(model))
    gradients, values = [], []
    for learner in (recorded, plain):
        for step in range(2):  # the second replays what the first recorded
            learner._clear_gradients()
            values.append(learner._backward(step, learner.prepare(squares(5, 224, step))))
            gradients.append([parameter.grad.clone() for parameter in learner._used])
    for first, second in ((0, 2), (1, 3)):
        torch.testing.assert_close(values[first], values[second], rtol=1e-3, atol=1e-4)
        for found, expected in zip(gradients[first], gradients[second], strict=True):
            assert torch.dist(found, expected) <= (1e-3 if precision == "fp32" else 2e-2) * expected.norm() + 1e-7


class Around(torch.nn.Module):
    """A network that is another one: what keeps a Learner from recording."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)


def squares(count, size, seed):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), np.uint8)
    points = np.full((count, 48, 3), -1, np.float32)
    for mask, clicks in zip(masks, points):
        y, x = rng.integers(20, size - 80, 2)
        mask[y : y + 60, x : x + 60] = 1
        clicks[0] = y + 30, x + 30, 0
    images = rng.integers(0, 120, (count, size, size, 3), dtype=np.uint8) + 100 * masks[..., None]
    numbers = seed * count + np.arange(count)
    return collate(
        {"image": images, "mask": masks, "points": points, "image_id": numbers.astype(str), "number": numbers}
    )


def test_a_replay_follows_weights_and_inputs():
    weight = torch.ones(3, device="cuda")
    replay = Replay(lambda a, b: (a * weight + b).relu())
    for scale in (1.0, 2.0, -1.0):
        weight.fill_(scale)
        for shape in ((2, 3), (5, 3)):
            a, b = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")
            torch.testing.assert_close(replay(a, b), (a * weight + b).relu())


def test_a_replay_adds_what_its_function_adds():
    total = torch.full((3,), 5.0, device="cuda")

    def add(values, *, scale):
        total.add_(scale * values.sum(dim=0))
        return values * scale

    replay, expected = Replay(add, [total]), total.clone()
    for scale in (1.0, 2.0, 1.0):
        for count in (2, 4):
            values = torch.randn(count, 3, device="cuda")
            torch.testing.assert_close(replay(values, scale=scale), values * scale)
            expected += scale * values.sum(dim=0)
            torch.testing.assert_close(total, expected)
