"""What a CUDA device must compute as the CPU does; run with `pytest -m gpu`."""

import numpy as np
import pytest
import timm
import torch

from mis_platform.config import EvalConfig, FeaturesConfig
from mis_platform.evaluation.protocol import Sample, evaluate
from mis_platform.model.features import build_extractor
from mis_platform.model.losses import smoothness_loss
from mis_platform.model.simpleclick import SimpleClick

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("form", ["official", "paper"])
def test_the_smoothness_loss_and_its_gradient(form):
    rng = torch.Generator().manual_seed(0)
    logits, image = torch.randn(2, 1, 64, 64, generator=rng), torch.rand(2, 3, 64, 64, generator=rng)
    gradients, losses = [], []
    for device in ("cpu", "cuda"):
        prediction = logits.detach().to(device).requires_grad_()
        loss = smoothness_loss(prediction, image.to(device), form)
        loss.backward()
        losses.append(loss.item())
        gradients.append(prediction.grad.cpu())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-8)


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
