"""Sessions that share a forward pass get the answers they would get alone; the real network included."""

import numpy as np
import pytest
import torch
from stub_networks import seeing_network
from synthetic_samples import synthetic_samples

from mis_platform.config import EvalConfig
from mis_platform.evaluation.protocol import evaluate
from mis_platform.evaluation.session import Session, _arithmetic, advance, probability, upload
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.simulation.clicks import Click

SIZE = 224  # pixels, the smallest input the network takes


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return SimpleClick("vit_xt", SIZE).eval()


def photos():
    return [upload(sample.image) for sample in synthetic_samples(4)]


def scripts(images, rounds):
    """Clicks drawn for every image: [round][image]."""
    rng = np.random.default_rng(0)
    return [
        [Click(rng.uniform(0, i.shape[1]), rng.uniform(0, i.shape[2]), bool(rng.random() < 0.6)) for i in images]
        for _ in range(rounds)
    ]


def test_sessions_of_different_network_sizes_share_what_they_can():
    shapes = []

    def network(image, previous, points):
        shapes.append(tuple(image.shape))
        return seeing_network(image, previous, points)

    images = photos()
    sessions = [Session(image) for image in images]
    clicks = [Click(20, 30, True)] * len(images)
    advance(network, sessions, clicks, EvalConfig(zoom_skip_clicks=1), 64)
    assert sorted(shapes) == [(2, 3, 41, 130), (2, 3, 90, 70), (4, 3, 60, 80)]  # two photos have the same size
    shapes.clear()
    advance(network, sessions, clicks, EvalConfig(flip=False), 64)
    assert shapes == [(4, 3, 64, 64)]


def test_advancing_leaves_the_old_session_as_it_was():
    image = photos()[0]
    first = advance(seeing_network, [Session(image)], [Click(20, 30, True)], EvalConfig(), 64)[0]
    before = probability(first).clone()
    second = advance(seeing_network, [first], [Click(5, 5, False)], EvalConfig(), 64)[0]
    assert torch.equal(probability(first), before)
    assert not torch.equal(probability(second), before)
    assert second.image is image
    assert (len(first.clicks), len(second.clicks)) == (1, 2)


def test_the_network_sees_pixels_and_the_soft_previous_answer(network):
    seen = []

    def spy(image, previous, points):
        seen.append((image, previous, points))
        return network(image, previous, points)

    image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    session = advance(spy, [Session(image)], [Click(10, 20, True)], EvalConfig(), SIZE)[0]
    advance(spy, [session], [Click(30, 40, False)], EvalConfig(), SIZE)
    (image1, previous1, points1), (_, previous2, points2) = seen
    assert torch.equal(image1[0], image.float() / 255)
    assert torch.equal(image1[1], image1[0].flip(2))
    assert not previous1.any()
    assert torch.equal(previous2[0, 0], probability(session))
    assert 0 < previous2.min() < previous2.max() < 1
    assert torch.equal(previous2[1], previous2[0].flip(2))
    assert points1.tolist() == [[[10, 20, 0], [-1, -1, -1]], [[10, SIZE - 1 - 20, 0], [-1, -1, -1]]]
    assert points2[1].tolist() == [[10, SIZE - 1 - 20, 0], [30, SIZE - 1 - 40, 1]]


def test_the_two_flips_are_averaged_as_logits(network):
    image = photos()[0]
    click = Click(20, 30, True)
    mirrored = Click(20, (SIZE - 1 - 30 * SIZE / 80) * 80 / SIZE, True)  # mirrored on the network input
    plain = EvalConfig(flip=False)
    both = advance(network, [Session(image)], [click], EvalConfig(), SIZE)[0]
    straight = advance(network, [Session(image)], [click], plain, SIZE)[0]
    mirror = advance(network, [Session(image.flip(2))], [mirrored], plain, SIZE)[0]
    expected = torch.sigmoid((straight.answer.logit() + mirror.answer.flip(1).logit()) / 2)
    torch.testing.assert_close(both.answer, expected, atol=1e-4, rtol=0)
    assert (both.answer - straight.answer).abs().max() > 1e-3


def test_the_real_network_answers_a_batch_as_one_by_one(network):
    """PyTorch's kernels round differently for different batch sizes: equal to the last bits, not always bit for bit."""
    images = photos()
    together = [Session(image) for image in images]
    alone = list(together)
    for clicks in scripts(images, rounds=3):
        together = advance(network, together, clicks, EvalConfig(zoom_min_crop=20), SIZE)
        alone = [
            advance(network, [session], [click], EvalConfig(zoom_min_crop=20), SIZE)[0]
            for session, click in zip(alone, clicks)
        ]
    for one, other in zip(together, alone):
        assert one.window == other.window
        torch.testing.assert_close(probability(one), probability(other), atol=1e-4, rtol=0)


def test_the_real_network_in_the_protocol(network):
    """An untrained network's masks are specks near the threshold, the worst case for rounding."""
    config = EvalConfig(max_clicks=3, zoom_min_crop=20)
    alone, together = (
        list(evaluate(network, synthetic_samples(3), config, zoom_size=SIZE, batch=batch)) for batch in (1, 4)
    )
    place = [[(row["image_id"], row["object_id"], row["click"]) for row in rows] for rows in (alone, together)]
    assert place[0] == place[1]
    np.testing.assert_allclose([row["iou"] for row in alone], [row["iou"] for row in together], atol=5e-3)
    clicks = [[(row["y"], row["x"], row["positive"]) for row in rows] for rows in (alone, together)]
    assert np.mean([one == other for one, other in zip(*clicks)]) >= 0.9


# -- precision -------------------------------------------------------------------------------------------------------


def answers(network, precision):
    """To three clicks on each of the photos: float32 [photo, h, w]."""
    sessions = [Session(image) for image in photos()]
    for clicks in scripts([session.image for session in sessions], rounds=3):
        sessions = advance(network, sessions, clicks, EvalConfig(precision=precision), SIZE)
    return torch.stack([session.answer for session in sessions])


def test_half_precision_is_close_and_tf32_is_nothing_to_a_cpu(network):
    full, half = answers(network, "fp32"), answers(network, "bf16")
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, atol=0.01, rtol=0)
    assert torch.equal(answers(network, "tf32"), full)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_the_switches_of_a_gpu_are_put_back(precision, allowed):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]

    def fail():
        with _arithmetic(precision, "cuda"):
            assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [switch.allow_tf32 for switch in switches] == before
    with _arithmetic(precision, "cpu"):
        assert [switch.allow_tf32 for switch in switches] == before


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_network_that_refines_needs_full_precision(precision):
    class Refining:
        def refine(self, inputs, clicks, config, memory):
            return torch.zeros(inputs.shape[1:]), None

    session, click = Session(photos()[0]), Click(20, 30, True)
    with pytest.raises(ValueError, match=f"eval.precision={precision} is not for f-BRS, which needs fp32"):
        advance(Refining(), [session], [click], EvalConfig(precision=precision), SIZE)
    assert not advance(Refining(), [session], [click], EvalConfig(), SIZE)[0].answer.any()
