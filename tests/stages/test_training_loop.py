"""The training step on one device: schedule, batches, independence of splitting, divergence, checkpoints. No Ray."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_material import make_material, tiny_run

from mis_platform.config import Run, TrainConfig
from mis_platform.data.examples import ExampleStream, open_stream
from mis_platform.model.losses import smoothness_loss
from mis_platform.model.simpleclick import UNUSED, resize_position_embedding
from mis_platform.model.weights import save_model
from mis_platform.stages.training_loop import (
    CHECKPOINTS,
    COMPLETE_FILE,
    Batch,
    Learner,
    Schedule,
    TrainingDiverged,
    collate,
    complete_steps,
    initial_model,
    load_checkpoint_model,
    load_history,
    load_optimizer,
    optimizer_of,
    overlap,
    save_checkpoint,
    share_of_batch,
)
from mis_platform.storage import Storage


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> ExampleStream:
    return open_stream(*make_material(tmp_path_factory.mktemp("material"), count=4), tiny_run(batch_size=4))


@pytest.fixture(scope="module")
def batch(stream: ExampleStream) -> Batch:
    return batch_of(stream, range(4))


def batch_of(stream: ExampleStream, numbers: range) -> Batch:
    return collate(stream.columns({"number": np.array(numbers)}))


def learner_of(run: Run, images_at_once: int = 8) -> Learner:
    model = initial_model(run).train()
    optimizer = optimizer_of(model, run.train)
    return Learner(run, Schedule(4, run.train), model, model, optimizer, torch.device("cpu"), images_at_once)


# -- schedule --------------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_the_paper() -> None:
    schedule = Schedule(8498, TrainConfig())
    assert (schedule.steps_per_epoch, schedule.total_steps) == (265, 55 * 265)
    assert {schedule.learning_rate(step) for step in range(50 * 265)} == {5e-5}
    assert [schedule.learning_rate(step) for step in (50 * 265, 55 * 265 - 1)] == pytest.approx([5e-6, 5e-6])


def test_max_steps_ends_the_training_but_leaves_the_schedule() -> None:
    config = TrainConfig(epochs=4, decay_epochs=(1, 2), batch_size=10, max_steps=25)
    schedule = Schedule(100, config)
    assert schedule.total_steps == 25
    rates = [schedule.learning_rate(step) / config.learning_rate for step in (0, 9, 10, 19, 20, 24)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert Schedule(100, config.model_copy(update={"max_steps": 1000})).total_steps == 40


def test_fewer_photos_than_the_batch_still_make_a_step_an_epoch() -> None:
    assert Schedule(3, TrainConfig(batch_size=8, epochs=5)).total_steps == 5


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_workers_share_out_every_batch(workers: int, share: int, step: int) -> None:
    schedule = Schedule(50, TrainConfig(batch_size=workers * share))
    shares = [list(schedule.numbers(step, rank, workers)) for rank in range(workers)]
    assert {len(each) for each in shares} == {share}
    assert [number for each in shares for number in each] == list(
        range(step * workers * share, (step + 1) * workers * share)
    )


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=12 .*num_workers=5; .*: 1, 2, 3, 4, 6, 12"):
        share_of_batch(12, 5)


# -- the step --------------------------------------------------------------------------------------------------------


def test_the_initial_model_comes_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, again, other = (initial_model(tiny_run(seed=seed)).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def saved_model(folder: Path, run: Run) -> Storage:
    save_model(folder, initial_model(run), {})
    return Storage(str(folder))


def test_a_pretraining_gives_all_weights_to_the_bit(tmp_path: Path) -> None:
    source = saved_model(tmp_path, tiny_run(seed=5))
    expected, found = initial_model(tiny_run(seed=5)), initial_model(tiny_run(seed=6), source)
    assert found.previous_mask == "soft"
    run = tiny_run(seed=6)
    binary = run.model_copy(update={"model": run.model.model_copy(update={"previous_mask": "binary"})})
    assert initial_model(binary, source).previous_mask == initial_model(binary).previous_mask == "binary"
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    trainable = {name for name, parameter in expected.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in found.named_parameters() if parameter.requires_grad} == trainable


def test_a_pretraining_at_another_size_is_resized(tmp_path: Path) -> None:
    source = saved_model(tmp_path, tiny_run(seed=5))
    run = tiny_run(seed=6)
    large = run.model_copy(update={"model": run.model.model_copy(update={"image_size": 448})})
    expected, found = initial_model(tiny_run(seed=5)), initial_model(large, source)
    resize_position_embedding(expected, 448)
    assert found.image_size == (448, 448)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_pretraining_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = tiny_run()
    other = run.model_copy(update={"model": run.model.model_copy(update={"variant": "vit_b"})})
    with pytest.raises(ValueError, match=r"model\.variant=vit_b cannot start from .*, which is a vit_xt"):
        initial_model(other, saved_model(tmp_path / "small", run))
    with pytest.raises(ValueError, match="holds no model to start from"):
        initial_model(run, Storage(str(tmp_path / "nothing")))


def test_every_trained_parameter_gets_a_gradient_and_no_other(batch: Batch) -> None:
    learner = learner_of(tiny_run(batch_size=4))
    learner.step(0, learner.prepare(batch))
    for name, parameter in learner.model.named_parameters():
        assert (parameter.grad is None) == name.startswith(UNUSED), name


@pytest.mark.parametrize("loss", ["bce", "normalized_focal"])
def test_the_size_of_a_forward_pass_does_not_change_the_training(stream: ExampleStream, loss: str) -> None:
    run = tiny_run(batch_size=4, loss=loss)
    whole, parts = learner_of(run, images_at_once=4), learner_of(run, images_at_once=3)
    for step in range(3):
        batch = batch_of(stream, whole.schedule.numbers(step))
        one, other = whole.step(step, whole.prepare(batch)), parts.step(step, parts.prepare(batch))
        pixels = one.pop("iou"), other.pop("iou")  # one on the edge may fall to the other side
        assert pixels[0] == pytest.approx(pixels[1], rel=1e-4)
        assert one == pytest.approx(other, rel=1e-5)
    assert one["loss"] == pytest.approx(one["loss_mask"] + 10 * one["loss_smooth"])


def test_the_step_is_that_of_adam_on_the_mean_loss(stream: ExampleStream, batch: Batch) -> None:
    """One step without clicks and colours, against the formula: p - rate * g / (|g| + eps) for the first step."""
    run = tiny_run(batch_size=4)
    run = run.model_copy(
        update={
            "clicks": run.clicks.model_copy(update={"iterative_clicks": 0}),
            "augment": run.augment.model_copy(update={"color_augmentation": False}),
        }
    )
    learner, reference = learner_of(run, images_at_once=2), learner_of(run)
    metrics = learner.step(0, learner.prepare(batch))
    rngs = [np.random.Generator(np.random.PCG64(np.random.SeedSequence((0, 2, number)))) for number in range(4)]
    dropout = torch.tensor(np.stack([(rng.random(128) >= 0.1) / 0.9 for rng in rngs]), dtype=torch.float32)
    images = batch.images.permute(0, 3, 1, 2) / 255
    logits = reference.model(images, torch.zeros(4, 1, 224, 224), batch.points, dropout)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], batch.masks.float())
    assert metrics["loss_mask"] == pytest.approx(loss.item(), rel=1e-5)
    (loss + 10 * smoothness_loss(logits, images, "official")).backward()
    checked = 0
    for trained, initial in zip(learner.model.parameters(), reference.model.parameters(), strict=True):
        if initial.grad is None:
            assert torch.equal(trained, initial)
            continue
        clear = initial.grad.abs() > 1e-5
        expected = initial.detach() - 1e-4 * initial.grad / (initial.grad.abs() + 1e-8)
        torch.testing.assert_close(trained[clear], expected[clear], rtol=1e-4, atol=2e-6)
        checked += int(clear.sum())
    assert checked > 1_000_000


def test_it_learns(batch: Batch) -> None:
    learner = learner_of(tiny_run(batch_size=2, learning_rate=1e-3, smooth_weight=0))
    losses = [learner.step(step, learner.prepare(batch).part(0, 2))["loss_mask"] for step in range(14)]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_half_precision_follows_full_precision(batch: Batch) -> None:
    full, half = (learner_of(tiny_run(batch_size=4, precision=precision)) for precision in ("fp32", "bf16"))
    a, b = ([learner.step(step, learner.prepare(batch)) for step in range(2)] for learner in (full, half))
    for one, other in zip(a, b, strict=True):
        assert one["loss"] != other["loss"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())


def test_training_overlap_is_the_iou() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0] * 4, [1.0] * 4]).reshape(3, 1, 2, 2)
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4]).reshape(3, 1, 2, 2)
    assert overlap(logits, targets).tolist() == pytest.approx([1 / 3, 1, 0])


# -- divergence ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_images_and_spares_the_weights(batch: Batch) -> None:
    learner = learner_of(tiny_run(batch_size=4), images_at_once=2)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    images = batch.images.float()
    images[2] = float("nan")
    with pytest.raises(
        TrainingDiverged, match=rf"loss is not finite at step 8 .*smooth_weight=10.*{batch.image_ids[2]}$"
    ):
        learner.step(7, learner.prepare(batch._replace(images=images)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_too(batch: Batch) -> None:
    learner = learner_of(tiny_run(batch_size=4))
    learner.model.head.conv_seg.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingDiverged, match=r"gradient is not finite at step 1 "):
        learner.step(0, learner.prepare(batch))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def saved(out: Storage, learner: Learner, batch: Batch, steps: range) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    for step in steps:
        history.append({"step": step + 1, **learner.step(step, learner.prepare(batch))})
        save_checkpoint(out, step + 1, learner, history)
    return history


def test_a_checkpoint_continues_to_the_bit(tmp_path: Path, stream: ExampleStream) -> None:
    run = tiny_run(batch_size=2)
    straight = learner_of(run)
    batches = [batch_of(stream, straight.schedule.numbers(step)) for step in range(4)]
    expected = [straight.step(step, straight.prepare(batch)) for step, batch in enumerate(batches)]
    out = Storage(str(tmp_path))
    first = learner_of(run)
    for step in range(2):
        first.step(step, first.prepare(batches[step]))
    save_checkpoint(out, 2, first, [])
    model = load_checkpoint_model(out, 2).train()
    optimizer = optimizer_of(model, run.train)
    load_optimizer(out, 2, optimizer)
    second = replace(first, model=model, network=model, optimizer=optimizer)
    assert [second.step(step, second.prepare(batches[step])) for step in (2, 3)] == expected[2:]
    assert all(torch.equal(straight.model.state_dict()[name], model.state_dict()[name]) for name in model.state_dict())


def test_the_last_two_checkpoints_are_kept_and_torn_ones_never_listed(tmp_path: Path, batch: Batch) -> None:
    out = Storage(str(tmp_path))
    learner = learner_of(tiny_run(batch_size=4))
    assert complete_steps(out) == []
    history = saved(out, learner, batch, range(3))
    assert complete_steps(out) == [2, 3]
    assert load_history(out, 3) == history
    assert load_history(out, 2) == history[:2]
    # A kill between the files and the mark of a checkpoint, and one between the mark and the files of a removal.
    out.child(CHECKPOINTS, "00000004").write_bytes("model.safetensors", b"torn")
    out.child(CHECKPOINTS, "00000002").remove(COMPLETE_FILE)
    assert complete_steps(out) == [3]
    load_checkpoint_model(out, 3)
    save_checkpoint(out, 5, learner, history)
    assert complete_steps(out) == [3, 5]
    assert out.child(CHECKPOINTS).names() == ["00000003", "00000004", "00000005"]
    save_checkpoint(out, 6, learner, history)
    assert out.child(CHECKPOINTS).names() == ["00000005", "00000006"]
