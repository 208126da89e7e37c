"""Training on one device, without Ray: schedule, step, checkpoints.

What decides the result is the global batch. Losses are means over it; every random number of an example (dropout,
colours, iterative clicks) comes from the example's own generators, the number of click passes from the step's. So
neither the number of workers nor the size of a forward pass changes more than the order of floating-point additions.
(Over many steps that may grow: a pixel on the edge of an error region can move a click.)

Shape suffixes: B images, H W pixels, N click slots of both signs.
"""

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mis_platform.config import Run, TrainConfig, plain
from mis_platform.data.examples import COLORS, NETWORK, PASSES, generator
from mis_platform.errors import TrainingDiverged
from mis_platform.model.augmentation import augment_colors
from mis_platform.model.interaction import append_clicks, error_clicks, find_errors
from mis_platform.model.losses import (
    binary_cross_entropy_per_sample,
    normalized_focal_loss_per_sample,
    smoothness_loss_per_sample,
)
from mis_platform.model.replay import Replay
from mis_platform.model.simpleclick import DROPOUT, VARIANTS, SimpleClick, resize_position_embedding
from mis_platform.model.transfer import download
from mis_platform.model.weights import CONFIG_FILE, WEIGHTS_FILE, load_mae, load_model, save_model
from mis_platform.storage import Storage
from mis_platform.threads import in_turns, one_ahead

CHECKPOINTS = "steps"  # directory below the artifact's
CHECKPOINTS_KEPT = 2
HISTORY_FILE = "history.jsonl"  # one JSON object per logged step
OPTIMIZER_FILE = "training.pt"
COMPLETE_FILE = "complete.json"  # written last: a checkpoint without it does not exist

MASK_LOSSES = {"bce": binary_cross_entropy_per_sample, "normalized_focal": normalized_focal_loss_per_sample}


@dataclass(frozen=True)
class Schedule:
    """Steps, batches and learning rates of a training on `images` photos.

    An epoch has images // batch_size steps, at least one. The stream of examples runs on over the ends of epochs, so no
    photo is left out for good where the batch does not divide their number.
    """

    images: int
    config: TrainConfig

    @property
    def steps_per_epoch(self) -> int:
        """At least 1; what is left of the photos begins the next epoch."""
        return max(1, self.images // self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Of the whole training, at most max_steps."""
        planned = self.config.epochs * self.steps_per_epoch
        return planned if self.config.max_steps is None else min(planned, self.config.max_steps)

    def learning_rate(self, step: int) -> float:
        """Of step 0, 1, ...: multiplied by decay_factor once for each of decay_epochs that has passed."""
        passed = sum(step >= epoch * self.steps_per_epoch for epoch in self.config.decay_epochs)
        return self.config.learning_rate * self.config.decay_factor**passed

    def numbers(self, step: int, rank: int = 0, workers: int = 1) -> range:
        """The examples of worker `rank` in the global batch of `step`."""
        share = share_of_batch(self.config.batch_size, workers)
        first = step * self.config.batch_size + rank * share
        return range(first, first + share)


def share_of_batch(batch_size: int, workers: int) -> int:
    """Images per worker; ValueError with the allowed numbers of workers when they cannot share the batch evenly."""
    if batch_size % workers:
        allowed = [count for count in range(1, batch_size + 1) if batch_size % count == 0]
        raise ValueError(
            f"train.batch_size={batch_size} cannot be shared by resources.num_workers={workers}; "
            f"numbers of workers that can: {', '.join(map(str, allowed))}"
        )
    return batch_size // workers


def initial_model(run: Run, pretraining: Storage | None = None) -> SimpleClick:
    """The model that the training of `run` starts from, on the CPU: random parts are drawn from train.seed.

    pretraining: a directory with a saved model, whose weights are taken instead (fine-tuning); the position embedding
    is resized if it was trained at another image size, model.init is not looked at.
    Raises ValueError when model.init=mae and the weights cannot be had or do not fit, or `pretraining` holds no model
    or one of another variant.
    """
    if pretraining is not None:
        return _pretrained_model(run, pretraining)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.train.seed)
        model = SimpleClick(run.model.variant, run.model.image_size, run.model.previous_mask)
    if run.model.init == "mae":
        load_mae(model, run.model.init_weights)
    return model


def _pretrained_model(run: Run, pretraining: Storage) -> SimpleClick:
    try:
        model = _load_model(pretraining)
    except FileNotFoundError:
        raise ValueError(f"{pretraining} holds no model to start from") from None
    if model.variant != run.model.variant:
        raise ValueError(
            f"model.variant={run.model.variant} cannot start from {pretraining}, which is a {model.variant}"
        )
    size = run.model.image_size
    if model.image_size != (size, size):
        resize_position_embedding(model, size)
    model.previous_mask = run.model.previous_mask
    return model


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Adam over the parameters that take part, without weight decay (SimpleClick). On a GPU one kernel does it all."""
    used = used_parameters(model)
    return torch.optim.Adam(used, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=used[0].is_cuda)


def used_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that take part: see `simpleclick.UNUSED`."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# -- the step --------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Examples as tensors, on the CPU."""

    images: Tensor  # uint8 [B, H, W, 3]
    masks: Tensor  # uint8 [B, H, W], 1 object
    points: Tensor  # float32 [B, N, 3]
    image_ids: Sequence[str]
    numbers: Sequence[int]


class Prepared(NamedTuple):
    """Examples on the device of their worker."""

    images: Tensor  # float32 [B, 3, H, W], RGB in [0, 1]
    colored: Tensor  # the same in other colours: what the network is trained on
    targets: Tensor  # float32 [B, 1, H, W], 1 object
    points: Tensor  # float32 [B, N, 3]
    image_ids: Sequence[str]
    numbers: Sequence[int]

    def part(self, start: int, stop: int) -> "Prepared":
        """The examples `start` to `stop` - 1 of the batch; the tensors are views."""
        columns: Any = (column[start:stop] for column in self)
        return Prepared(*columns)


def collate(columns: dict[str, np.ndarray]) -> Batch:
    """Columns named like the fields of Example, one row per example."""
    images, masks, points = (torch.from_numpy(np.array(columns[name])) for name in ("image", "mask", "points"))
    return Batch(images, masks, points, columns["image_id"].tolist(), columns["number"].tolist())


@dataclass(frozen=True)
class Learner:
    """One worker's model and optimizer."""

    run: Run
    schedule: Schedule
    model: SimpleClick  # on `device`
    network: nn.Module  # the model, or what averages its gradients over the workers (DistributedDataParallel)
    optimizer: torch.optim.Adam
    device: torch.device
    images_at_once: int  # of a forward pass; gradients are accumulated over the worker's share of the batch

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """What of a step does not depend on the weights."""
        rngs = [generator(self.run.train.seed, COLORS, number) for number in batch.numbers]
        images, targets, points = self._upload(batch)
        colored = augment_colors(images, rngs) if self.run.augment.color_augmentation else images
        return Prepared(images, colored, targets, points, batch.image_ids, batch.numbers)

    def ahead(self, batches: Iterable[Batch]) -> Generator[Prepared, None, None]:
        """Each of them prepared; on a GPU by another thread, while the batch before it is learnt from."""
        if self.device.type != "cuda":
            yield from map(self.prepare, batches)
            return
        stream, iterator = torch.cuda.Stream(self.device), iter(batches)

        def prepare_next() -> Prepared | None:
            with torch.cuda.stream(stream):
                batch = next(iterator, None)
                prepared = None if batch is None else self.prepare(batch)
            stream.synchronize()
            return prepared

        with contextlib.closing(one_ahead(prepare_next)) as made:
            for prepared in made:
                for tensor in prepared[:4]:
                    tensor.record_stream(torch.cuda.current_stream(self.device))
                yield prepared

    def step(self, step: int, batch: Prepared) -> dict[str, float]:
        """Update the weights with this worker's share of the global batch of `step`; metrics of the whole batch.

        All workers call it with the same step. Raises TrainingDiverged, on all of them, before a loss or gradient that
        is not finite reaches the weights.
        """
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._clear_gradients()
        values = self._backward(step, batch)
        mask_loss, smoothness, iou = (all_sum(values.double().sum(dim=0)) / self.run.train.batch_size).tolist()
        loss = mask_loss + self.run.train.smooth_weight * smoothness
        self._check_finite("loss", loss, step, [*zip(batch.image_ids, values.isfinite().all(dim=1).tolist())])
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self._check_finite("gradient", norm, step, [(image_id, False) for image_id in batch.image_ids])
        self.optimizer.step()
        return {
            "loss": loss,
            "loss_mask": mask_loss,
            "loss_smooth": smoothness,
            "iou": iou,
            "gradient_norm": norm,
            "learning_rate": rate,
        }

    def _clear_gradients(self) -> None:
        for parameter in self._used if self._is_replayed else []:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.zero_grad(set_to_none=not self._is_replayed)  # a replay adds to where they were, in place

    def _backward(self, step: int, batch: Prepared) -> Tensor:
        """Accumulate the gradient; [B, 3] on `device`: mask loss, smoothness and IoU of each image.

        The parts of the batch take turns: a GPU answers for one while clicks are found for another.
        """
        passes = int(generator(self.run.train.seed, PASSES, step).integers(self.run.clicks.iterative_clicks + 1))
        count = len(batch.numbers)
        parts = [batch.part(start, start + self.images_at_once) for start in range(0, count, self.images_at_once)]
        rows: list[Tensor] = []
        self.model.eval()
        for part, clicked in zip(parts, in_turns(self._interact(part, passes) for part in parts)):
            self.model.train()  # all have got their answers: there are as many for each
            with self._without_exchange(len(rows) + 1 < len(parts)):
                rows.append(self._descend(part.colored, part.images, part.targets, *clicked, count=count))
        return torch.cat(rows)

    def _without_exchange(self, apply: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients travel between workers once a step, with the last part of the batch."""
        if apply and isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    @functools.cached_property
    def _descend(self) -> Callable[..., Tensor]:
        """(colored, images, targets, previous mask, points, dropout, count=) -> mask loss, smoothness and IoU [B, 3].

        Adds this part's to the gradient of the mean over `count` images, the worker's share. The mean of these over the
        workers is that over the batch.
        """
        config = self.run.train

        def descend(
            colored: Tensor,
            images: Tensor,
            targets: Tensor,
            previous: Tensor,
            points: Tensor,
            dropout: Tensor,
            *,
            count: int,
        ) -> Tensor:
            logits = self._forward(self.network, colored, previous, points, dropout)
            mask_loss = MASK_LOSSES[config.loss](logits, targets)
            smoothness = smoothness_loss_per_sample(logits, images, config.smooth_form)
            ((mask_loss + config.smooth_weight * smoothness).sum() / count).backward()
            return torch.stack([mask_loss, smoothness, overlap(logits, targets)], dim=1).detach()

        gradients = [parameter.grad for parameter in self._used if parameter.grad is not None]
        return Replay(descend, gradients) if self._is_replayed else descend

    @property
    def _used(self) -> list[nn.Parameter]:
        return used_parameters(self.model)

    @property
    def _is_replayed(self) -> bool:
        """Workers that exchange gradients do so in steps that cannot be recorded."""
        return self.device.type == "cuda" and self.network is self.model

    def _upload(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images float32 [B, 3, H, W] in [0, 1], targets float32 [B, 1, H, W], points, on `device`."""
        tensors = [batch.images, batch.masks, batch.points]
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        images, masks, points = (tensor.to(self.device, non_blocking=True) for tensor in tensors)
        return images.permute(0, 3, 1, 2).float().contiguous() / 255, masks[:, None].float(), points

    def _interact(self, batch: Prepared, passes: int) -> Generator[None, None, tuple[Tensor, Tensor, Tensor]]:
        """(previous mask, points, dropout) after `passes` clicks on the model's own errors, in evaluation mode (RITM).

        Yields after each question to the network, whose answer takes a while.
        """
        rngs = [generator(self.run.train.seed, NETWORK, number) for number in batch.numbers]
        previous, points = torch.zeros_like(batch.targets), batch.points
        for index in range(1, passes + 1):
            with torch.no_grad():
                previous = self._answer(batch.images, previous, points)
                errors = download(find_errors(previous, batch.targets))
            yield
            points = append_clicks(points, error_clicks(errors(), rngs), index)
        return previous, points, self._draw_dropout(rngs)

    @functools.cached_property
    def _answer(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(images, previous mask, points) -> probabilities [B, 1, H, W], without gradient."""

        def answer(images: Tensor, previous: Tensor, points: Tensor) -> Tensor:
            return self._forward(self.model, images, previous, points).sigmoid()

        return Replay(answer) if self.device.type == "cuda" else answer

    def _forward(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """Logits, float32. Every pass has its own autocast: its cache of weights must not outlive a no_grad pass."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.train.precision == "bf16"):
            logits: Tensor = network(*inputs)
        return logits.float()

    def _draw_dropout(self, rngs: Sequence[np.random.Generator]) -> Tensor:
        """What multiplies the head's channels: [B, channels]."""
        channels = VARIANTS[self.model.variant].head_channels
        kept = np.stack([rng.random(channels) >= DROPOUT for rng in rngs])
        return torch.from_numpy(kept.astype(np.float32) / np.float32(1 - DROPOUT)).to(self.device, non_blocking=True)

    def _check_finite(self, what: str, value: float, step: int, images: Sequence[tuple[str, bool]]) -> None:
        """images: (id, whether its own values are finite) of this worker's share."""
        if np.isfinite(value):
            return
        names = all_lists([image_id for image_id, is_finite in images if not is_finite])
        config = self.run.train
        raise TrainingDiverged(
            f"the {what} is not finite at step {step + 1} (train.learning_rate={config.learning_rate}, "
            f"train.smooth_weight={config.smooth_weight}, train.precision={config.precision}); "
            f"images: {', '.join(names)}"
        )


def overlap(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU [B] of the predicted and the target masks [B, 1, H, W]; 1 where both are empty."""
    predicted, target = (logits > 0).flatten(1), (targets > 0.5).flatten(1)
    union = (predicted | target).sum(dim=1)
    return torch.where(union > 0, (predicted & target).sum(dim=1) / union.clamp(min=1), 1.0)


def all_sum(values: Tensor) -> Tensor:
    """Sum over the workers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_lists(items: list[str]) -> list[str]:
    """The lists of all workers, one after the other."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return items
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for each in gathered for item in each]


# -- checkpoints -----------------------------------------------------------------------------------------------------

History = list[dict[str, float]]  # a row per logged step


def save_checkpoint(out: Storage, step: int, learner: Learner, history: History) -> None:
    """Write everything that step `step` + 1 needs, then drop all but the newest CHECKPOINTS_KEPT.

    No generator state is needed: all random numbers are functions of the seed, the step and the example.
    """
    directory = out.child(CHECKPOINTS, f"{step:08d}")
    directory.remove(COMPLETE_FILE)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, learner.model, {"step": step, "run": plain(learner.run)})
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            directory.write_bytes(name, Storage(folder).read_bytes(name))
    buffer = io.BytesIO()
    torch.save(learner.optimizer.state_dict(), buffer)
    directory.write_bytes(OPTIMIZER_FILE, buffer.getvalue())
    directory.write_bytes(HISTORY_FILE, "".join(json.dumps(row) + "\n" for row in history).encode())
    directory.write_bytes(COMPLETE_FILE, json.dumps({"step": step}).encode())
    _drop_old(out)


def complete_steps(out: Storage) -> list[int]:
    """Steps that have a whole checkpoint, ascending."""
    names = [name for name in out.child(CHECKPOINTS).names() if name.isdigit()]
    return sorted(int(name) for name in names if out.child(CHECKPOINTS, name).exists(COMPLETE_FILE))


def _drop_old(out: Storage) -> None:
    """Keep the newest checkpoints; also remove what a kill left unfinished before them."""
    kept = complete_steps(out)[-CHECKPOINTS_KEPT:]
    for name in out.child(CHECKPOINTS).names():
        if name.isdigit() and int(name) < kept[0]:
            # The mark goes first: a kill in between leaves an unfinished checkpoint, never a damaged one.
            out.child(CHECKPOINTS, name).remove(COMPLETE_FILE)
            out.child(CHECKPOINTS).remove(name)


def load_checkpoint_model(out: Storage, step: int) -> SimpleClick:
    """On the CPU. Raises ValueError when the file is damaged."""
    return _load_model(out.child(CHECKPOINTS, f"{step:08d}"))


def _load_model(source: Storage) -> SimpleClick:
    """A saved model, on the CPU, wherever it lies."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            Storage(folder).write_bytes(name, source.read_bytes(name))
        return load_model(folder)


def load_optimizer(out: Storage, step: int, optimizer: torch.optim.Adam) -> None:
    """Restore its state at `step`, in place; tensors go to the device of their parameters."""
    data = out.child(CHECKPOINTS, f"{step:08d}").read_bytes(OPTIMIZER_FILE)
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved["fused"] = own["fused"]  # which is a matter of the device
    optimizer.load_state_dict(state)


def load_history(out: Storage, step: int) -> History:
    """What was logged up to the checkpoint of `step`."""
    text = out.child(CHECKPOINTS, f"{step:08d}").read_bytes(HISTORY_FILE).decode()
    return [json.loads(line) for line in text.splitlines()]
