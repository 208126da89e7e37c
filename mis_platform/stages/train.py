"""Training with Ray Train: workers that share every global batch, each fed by its own Ray Data pipeline.

A worker's examples are numbers, not places in a shared queue: worker r of w takes its slice of every batch, and tasks
turn the numbers into examples. Interrupted in any way, the same call goes on from the newest checkpoint.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray.data import ExecutionResources, TaskPoolStrategy
from ray.data.block import BlockMetadata

from mis_platform import stopping
from mis_platform.artifacts import Output, Part, sha256
from mis_platform.config import Resources, Run
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.examples import ExampleStream, open_stream
from mis_platform.errors import Preempted, TrainingDiverged
from mis_platform.model.weights import CONFIG_FILE, WEIGHTS_FILE
from mis_platform.progress import Progress
from mis_platform.stages import cluster
from mis_platform.stages.channel import (
    COMPUTING,
    LOADING,
    SAVING,
    Channel,
    News,
    Pulse,
    Watch,
    described,
    end_process,
)
from mis_platform.stages.training_loop import (
    CHECKPOINTS,
    HISTORY_FILE,
    Batch,
    History,
    Learner,
    Schedule,
    all_sum,
    collate,
    complete_steps,
    initial_model,
    load_checkpoint_model,
    load_history,
    load_optimizer,
    optimizer_of,
    save_checkpoint,
    share_of_batch,
)
from mis_platform.storage import Storage, StorageError

VERSION = 2  # 2: colours have random numbers of their own

# Of a forward pass. A GPU answers for some while clicks are found for others; a CPU's caches hold few.
IMAGES_ON_GPU, IMAGES_ON_CPU = 16, 8
HALVINGS = 2  # of the 16, on a GPU that is too small: as many as resources.max_failures allows by default
EXAMPLES_PER_TASK = 8
PIPELINE_BYTES = 2**29  # of examples, at most: of one pipeline, all of which may wait finished for a worker
STORE_SHARE = 0.4  # of the object store that all pipelines may fill
MIN_WORKER_CPU = 0.1
COLLECTIVE_TIMEOUT = 600  # seconds that workers wait for each other; a checkpoint on a slow store takes minutes
STOP_SECONDS = 12.0  # that Ctrl-C leaves the workers for a last checkpoint
PREEMPTED_SECONDS = 25.0  # that SIGTERM leaves them; 30 s after it the machine is gone
SECONDS_BETWEEN_NOTICES = 5.0  # Ray Train itself looks that often whether a node is about to be taken away
NOBODY_SECONDS = 60.0  # without a running worker before people are told
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """What every worker is given."""

    stream: ExampleStream
    schedule: Schedule
    resources: Resources
    out: Storage
    loaders: int  # tasks at once, for each worker
    threads: int  # of torch, in each worker
    pretraining: Storage | None = None  # a saved model to start from

    @property
    def run(self) -> Run:
        """The settings of the training."""
        return self.stream.run


def train(
    dataset: Dataset,
    run: Run,
    proposals: Storage | None,
    resources: Resources,
    out: Storage,
    on_metrics: Callable[[int, dict[str, float]], None],
    pretraining: Storage | None = None,
) -> Output:
    """Train the click model of `run` on the photos of `dataset` and their `proposals`; resumes what is in `out`.

    proposals: a finished trees or proposals artifact; None for target.source=labels. pretraining: a directory with a
    saved model of the same variant, whose weights are the start instead of model.init.

    on_metrics(step, metrics): called in this thread once for each logged step: 1, the multiples of log_every, the last;
    after a restart also for the steps of earlier calls. metrics: loss and its parts loss_mask and loss_smooth (means
    over the global batch), iou (training predictions with the proposals), gradient_norm, learning_rate and
    images_per_second.

    Writes model.safetensors, config.json and history.jsonl (one JSON object per logged step) into `out`, and the newest
    checkpoints into out/steps. The digest is that of the model.

    Raises ValueError for settings that cannot work (batch and workers, a cluster that is too small, missing weights, a
    pretraining of another variant), DataError for missing or damaged masks,
    TrainingDiverged when the loss stops being finite; when workers fail more than resources.max_failures times,
    StorageError if they could not write, else RuntimeError. Ctrl-C and SIGTERM leave a checkpoint and raise
    KeyboardInterrupt and Preempted.
    """
    dataset = dataclasses.replace(dataset, root=dataset.root.resolve())  # workers have their own working directories
    stream = open_stream(dataset, proposals, run)
    schedule = Schedule(len(stream.image_ids), run.train)
    done = complete_steps(out)
    relay = Relay(out, on_metrics)
    relay.catch_up()
    if not done or done[-1] < schedule.total_steps:
        with cluster.cluster(out, dataset):
            _train_on_cluster(stream, schedule, resources, out, relay, pretraining)
        relay.catch_up()
    return _publish(out, schedule)


def check(run: Run, resources: Resources, has_pretraining: bool) -> None:
    """Raises ValueError for a batch that the workers cannot share, and when MAE's weights are missing or wrong."""
    share_of_batch(run.train.batch_size, resources.num_workers)
    if run.model.init == "mae" and not has_pretraining:
        initial_model(run)


def _publish(out: Storage, schedule: Schedule) -> Output:
    """Copy the last checkpoint's model into `out` itself."""
    source = out.child(CHECKPOINTS, f"{schedule.total_steps:08d}")
    history = load_history(out, schedule.total_steps)
    parts = []
    for name, rows in ((WEIGHTS_FILE, 1), (CONFIG_FILE, 1), (HISTORY_FILE, len(history))):
        data = source.read_bytes(name)
        out.write_bytes(name, data)
        digest = sha256(data)
        parts.append(Part(name=name, rows=rows, bytes=len(data), sha256=digest, digest=digest))
    last = {name: history[-1][name] for name in ("loss", "iou")}
    summary = {"steps": schedule.total_steps, "images": schedule.images, **last}
    return Output(parts=tuple(parts), digest=parts[0].digest, summary=summary)


# -- the driver ------------------------------------------------------------------------------------------------------


class Relay:
    """Tells `on_metrics` every logged step once, in order, however often the workers start again.

    A checkpoint may hold steps that were never reported: their driver was killed while a worker still ran.
    """

    def __init__(self, out: Storage, on_metrics: Callable[[int, dict[str, float]], None]) -> None:
        self._out = out
        self._on_metrics = on_metrics
        self._newest = 0  # step that was passed on, or seen and not to be logged

    def catch_up(self, before: float = math.inf) -> None:
        """Pass on what the newest checkpoint has logged of the steps up to `before`, exclusive."""
        done = complete_steps(self._out)
        for row in load_history(self._out, done[-1]) if done else []:
            if row["step"] < before:
                self._tell(row)

    def add(self, row: dict[str, float], is_logged: bool) -> None:
        """The next step of the workers."""
        if row["step"] > self._newest + 1:
            self.catch_up(row["step"])
        if is_logged:
            self._tell(row)
        self._newest = max(self._newest, int(row["step"]))

    def _tell(self, row: dict[str, float]) -> None:
        step = int(row["step"])
        if step > self._newest:
            self._newest = step
            self._on_metrics(step, {name: value for name, value in row.items() if name != "step"})


def _train_on_cluster(
    stream: ExampleStream,
    schedule: Schedule,
    resources: Resources,
    out: Storage,
    relay: Relay,
    pretraining: Storage | None,
) -> None:
    cluster.quiet_data()
    scaling, loaders, threads = plan(resources)
    job = Job(stream, schedule, resources, out, loaders, threads, pretraining)
    halvings = HALVINGS if resources.batch_per_device is None else 1
    channel = cluster.beside(Channel, images_at_once(resources, stream.run.train.batch_size), halvings)
    with cluster.scratch("mis-ray-train-") as storage_path:
        trainer = ray.train.torch.TorchTrainer(
            lambda: _work(job, channel),
            scaling_config=scaling,
            torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT),
            run_config=ray.train.RunConfig(
                name=f"mis-{uuid.uuid4().hex}",  # never one that Ray knows: it would return that run's result
                storage_path=storage_path,
                failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            ),
        )
        _follow(cluster.in_background(trainer.fit), channel, job, relay)


def plan(resources: Resources) -> tuple[ray.train.ScalingConfig, int, int]:
    """(what to reserve, example tasks per worker, torch threads per worker) on this cluster.

    A worker reserves at most one CPU, so that it fits on any node. The example tasks ask for none: where the workers
    hold all CPUs, tasks that need one would wait for ever.
    Raises ValueError with the arithmetic when the cluster is too small.
    """
    workers, cpus, gpus = resources.num_workers, cluster.cpus(), cluster.gpus()
    use_gpu = uses_gpu(resources)
    if use_gpu and workers > gpus:
        raise ValueError(
            f"resources.num_workers={workers} on GPUs needs {workers} GPUs, the cluster has {gpus}; "
            "use fewer workers or resources.use_gpu=false"
        )
    cpus = cluster.cpus_of_trial(resources.trials)
    reserved = min(1.0, math.floor(100 * cluster.CPU_SHARE * cpus / workers) / 100)
    if reserved < MIN_WORKER_CPU:
        raise ValueError(
            f"resources.num_workers={workers} needs at least {workers} x {MIN_WORKER_CPU} = "
            f"{workers * MIN_WORKER_CPU:g} CPUs, training may reserve {cluster.CPU_SHARE:.0%} of the cluster's {cpus}, "
            f"which is {cluster.CPU_SHARE * cpus:g}; at most {int(cluster.CPU_SHARE * cpus / MIN_WORKER_CPU)} workers"
        )
    loaders = resources.loaders or (max(1, cpus - workers) if use_gpu else cpus // 2)
    share = {"GPU": cluster.gpu_share((resources.trials or 1) * workers, gpus)} if use_gpu else {}
    per_worker = {"CPU": reserved, **share}
    scaling = ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=per_worker)
    return scaling, max(1, loaders // workers), max(1, cpus // workers)


def images_at_once(resources: Resources, batch_size: int) -> int:
    """Images of a forward pass, to begin with: a GPU that is too small for them gets half as many, see `Channel`.

    Never more than a worker's share of the batch: halving what it does not have would give it no room.
    """
    wanted = resources.batch_per_device or (IMAGES_ON_GPU if uses_gpu(resources) else IMAGES_ON_CPU)
    return min(wanted, share_of_batch(batch_size, resources.num_workers))


def uses_gpu(resources: Resources) -> bool:
    """Whether a training runs on GPUs; `plan` refuses one that asks for more than there are."""
    return cluster.gpus() > 0 if resources.use_gpu is None else resources.use_gpu


def trials_at_once(resources: Resources) -> int:
    """Trainings of a sweep that share the cluster: resources.trials, else one for each set of GPUs, one without any.

    Trainings of one worker may share a GPU: small models leave most of it idle. Several workers of one training may
    not, since they could meet on it, which NCCL refuses.
    Raises ValueError with the arithmetic when their drivers and workers cannot all be placed: they would wait for each
    other for ever.
    """
    workers, cpus, gpus = resources.num_workers, cluster.cpus(), cluster.gpus()
    use_gpu = uses_gpu(resources)
    trials = resources.trials or (max(1, gpus // workers) if use_gpu else 1)
    if use_gpu and trials * workers > gpus and workers > 1:
        raise ValueError(
            f"resources.trials={trials} x resources.num_workers={workers} = {trials * workers} GPUs, the cluster has "
            f"{gpus}; at most {gpus // workers} trials fit, or more with resources.num_workers=1, which share GPUs"
        )
    if trials > cpus:
        raise ValueError(f"resources.trials={trials} needs a CPU for each, the cluster has {cpus}")
    plan(resources.model_copy(update={"trials": trials}))  # what the workers of each will ask for
    return trials


def _follow(fit: "Future[Any]", channel: Any, job: Job, relay: Relay) -> None:
    """Pass metrics on and show progress until the training ends; raise what ended it early."""
    _say(f"starting {job.resources.num_workers} worker(s)")
    story = Story(job, channel, relay)
    try:
        while True:
            is_over = fit.done()
            story.tell(ray.get(channel.take.remote()))
            if is_over:
                break
            stopping.check()
            time.sleep(POLL_SECONDS)
    except BaseException as reason:  # Ctrl-C, SIGTERM, or on_metrics failed: the workers must not go on
        _say("stopping after this step; the same command resumes")
        channel.stop.remote()
        until = time.monotonic() + seconds_to_stop(reason)
        while not fit.done() and time.monotonic() < until and not cluster.is_lost():
            time.sleep(POLL_SECONDS)
        raise
    finally:
        story.close()
    failure = ray.get(channel.failure.remote())
    if failure is not None:
        raise failure
    try:
        fit.result()
    except ray.train.TrainingFailedError as error:
        raise _explained(error, job) from error


def seconds_to_stop(reason: BaseException) -> float:
    """How long to wait for a last checkpoint."""
    return PREEMPTED_SECONDS if isinstance(reason, Preempted) else STOP_SECONDS


class Story:
    """What the driver does with the news of a training: tell people, pass metrics on, end workers that hang."""

    def __init__(self, job: Job, channel: Any, relay: Relay) -> None:
        self._job, self._channel, self._relay = job, channel, relay
        self._watch = Watch(job.resources.worker_silence)
        self._progress: Progress | None = None
        self._newest = 0  # step
        self._starts = 0
        self._heard = time.monotonic()  # when a worker last gave a sign

    def tell(self, news: News) -> None:
        """Pass the news on and end a worker that hangs; to be called every few seconds, also without news."""
        for note in news.notes:
            _say(note)
        for step in news.starts:
            self._tell_start(step)
        for row in news.rows:
            self._tell_step(row)
        if news.heard:
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > NOBODY_SECONDS:
            self._heard = time.monotonic()
            _say(f"waiting for room on the cluster for {self._job.resources.num_workers} worker(s)")
        hung = self._watch.hung(news.heard)
        if hung is not None:
            if end_process(hung.sign):  # else it has ended by itself, and Ray Train knows
                _say(f"{described(hung)}; it was killed, all workers start again from the last checkpoint")
            self._channel.leave.remote(hung.sign.rank, hung.sign.pid)

    def close(self) -> None:
        """End the line of progress."""
        if self._progress:
            self._progress.close()

    def _tell_start(self, step: int) -> None:
        self._starts += 1
        if self._starts > 1:
            again = max(0, self._newest - step)
            _say(f"restart {self._starts - 1}: the workers go on from step {step}, {again} step(s) are done again")

    def _tell_step(self, row: dict[str, float]) -> None:
        step, batch, total = int(row["step"]), self._job.run.train.batch_size, self._job.schedule.total_steps
        self._newest = max(self._newest, step)
        self._watch.note(batch / row["images_per_second"])
        self._progress = self._progress or Progress("train", total * batch, "images", start=step * batch)
        self._progress.update(step * batch, f"step {step}/{total}, loss {row['loss']:.4f}")
        self._relay.add(row, _is_logged(self._job, step))


def _say(text: str) -> None:
    print(f"train: {text}", file=sys.stderr, flush=True)


def _explained(error: ray.train.TrainingFailedError, job: Job) -> Exception:
    """Ray's report of failed workers as one line; StorageError when a worker could not read or write."""
    causes = list(getattr(error, "worker_failures", {}).values())
    of_storage = [cause for cause in causes if isinstance(cause, OSError)]
    first = (of_storage or causes or [getattr(error, "controller_failure", error)])[0]  # of workers that never started
    first = getattr(first, "cause", None) or first  # without Ray's traceback around it
    cause = (str(first).strip() or type(first).__name__).splitlines()[0]  # a MemoryError says nothing
    message = (
        f"training failed {job.resources.max_failures + 1} time(s), the last time with: {cause}; "
        f"the same command resumes at step {max(complete_steps(job.out), default=0)}"
    )
    return StorageError(message) if of_storage else RuntimeError(message)


def _is_logged(job: Job, step: int) -> bool:
    return step % job.resources.log_every == 0 or step in (1, job.schedule.total_steps)


# -- the workers -----------------------------------------------------------------------------------------------------


def _work(job: Job, channel: Any) -> None:
    """What each worker runs: resume, train, save."""
    if ray.get(channel.failure.remote()) is not None:  # another worker of an earlier attempt met it
        return
    rank = ray.train.get_context().get_world_rank()
    images_at_once = ray.get(channel.images_at_once.remote())
    try:
        with Pulse(channel, rank) as pulse:
            _train_steps(job, channel, pulse, images_at_once)
    except torch.OutOfMemoryError:
        ray.get(channel.out_of_memory.remote(images_at_once))
        raise  # all workers start again: the others may be waiting for this one anywhere in the step
    except TrainingDiverged as error:  # on all workers alike
        ray.get(channel.fail.remote(error))
    except ValueError as error:
        ray.get(channel.fail.remote(_plain(error)))
        if job.resources.num_workers > 1:
            raise  # the others wait for this worker; Ray stops them and starts all again, and they return above


def _plain(error: ValueError) -> ValueError:
    """The user's error of a Ray task without Ray's traceback around it."""
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, ValueError) else ValueError(str(error))


def _train_steps(job: Job, channel: Any, pulse: Pulse, images_at_once: int) -> None:
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(min(job.threads, os.cpu_count() or 1))
    torch.backends.cudnn.benchmark = True  # all inputs have one size
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in convolutions too
    cluster.quiet_data()
    learner, start, history = _resume(job, images_at_once)
    if rank == 0:
        channel.begin.remote(start)
    notices = Notices(pulse, learner.device)
    reported = None
    began = 0.0
    with (
        contextlib.closing(load(job, start, rank, workers)) as loaded,
        contextlib.closing(learner.ahead(loaded)) as batches,
    ):
        pulse.says(LOADING, start)
        for done, batch in zip(range(start + 1, job.schedule.total_steps + 1), batches, strict=True):
            began = began or time.perf_counter()  # waiting for the first batch says nothing about the rest
            pulse.says(COMPUTING, done - 1)
            metrics = learner.step(done - 1, batch)
            notice = notices.agree()
            if rank == 0:
                now = time.perf_counter()
                row = {"step": done, **metrics, "images_per_second": job.run.train.batch_size / (now - began)}
                began = now
                if _is_logged(job, done):
                    history.append(row)
                if notice.is_saving or done % job.resources.checkpoint_every == 0 or done == job.schedule.total_steps:
                    pulse.says(SAVING, done)
                    save_checkpoint(job.out, done, learner, history)
                    notices.saved(time.perf_counter() - now)
                reported = channel.report.remote(row)
            if notice.is_stopping:
                break
            pulse.says(LOADING, done)
    if reported is not None:
        ray.get(reported)  # the last report has arrived before this worker ends


class Notice(NamedTuple):
    """What all workers do after a step."""

    is_stopping: bool
    is_saving: bool


class Notices:
    """The wishes of the driver, and of machines that are about to be taken away, agreed on by all workers.

    As long as such a notice stands, a checkpoint is written every few seconds and the training goes on: when the node
    is gone, Ray Train starts the workers again wherever there is room.
    """

    def __init__(self, pulse: Pulse, device: torch.device) -> None:
        self._pulse, self._device = pulse, device
        self._asked = time.monotonic()
        self._pause = SECONDS_BETWEEN_NOTICES
        self._is_told = False

    def agree(self) -> Notice:
        """Called by all workers after each step. Asking Ray Train makes all wait for all: not at every step."""
        is_due = self._pulse.rank == 0 and time.monotonic() - self._asked >= self._pause
        votes = torch.tensor([float(self._pulse.is_stopping), float(is_due)], device=self._device)
        is_stopping, asks = (all_sum(votes) > 0).tolist()
        is_saving = is_stopping
        if asks:
            self._asked, self._pause = time.monotonic(), SECONDS_BETWEEN_NOTICES
            notice = ray.train.get_preemption_info()
            if notice is not None:
                is_saving = True
                self._tell(notice)
        return Notice(is_stopping, is_saving)

    def _tell(self, notice: ray.train.PreemptionInfo) -> None:
        if self._pulse.rank == 0 and not self._is_told:
            self._is_told = True
            nodes = ", ".join(node[:8] for node in notice.preempted_node_ids)
            self._pulse.note(f"node {nodes} will be taken away; a checkpoint is written every few seconds from now on")

    def saved(self, seconds: float) -> None:
        """Writing a checkpoint took so long: most of the time is for training."""
        self._pause = max(SECONDS_BETWEEN_NOTICES, 3 * seconds)


def _resume(job: Job, images_at_once: int) -> tuple[Learner, int, History]:
    """The learner, the step to go on with, and what was logged before it."""
    device = ray.train.torch.get_device()
    done = complete_steps(job.out)
    start = done[-1] if done else 0
    model = load_checkpoint_model(job.out, start) if done else initial_model(job.run, job.pretraining)
    model = model.to(device).train()
    network = ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    optimizer = optimizer_of(model, job.run.train)
    if done:
        load_optimizer(job.out, start, optimizer)
    learner = Learner(job.run, job.schedule, model, network, optimizer, device, images_at_once)
    return learner, start, load_history(job.out, start) if done else []


# -- the data --------------------------------------------------------------------------------------------------------


def load(job: Job, start: int, rank: int, workers: int) -> Generator[Batch, None, None]:
    """This worker's share of every batch from step `start` on, in order, made ahead by Ray Data tasks.

    A long training is a chain of pipelines, each started before the one before it ends, and each small enough to be
    finished at once: the thread that drives a Ray Data pipeline, in the worker's own process, does not sleep while
    finished tasks wait for room, and took more than half of a training's speed when it had to hold tasks back.
    """
    share = share_of_batch(job.run.train.batch_size, workers)
    length = steps_of_pipeline(job.run, job.resources, workers)
    total = job.schedule.total_steps
    chain = [range(first, min(first + length, total)) for first in range(start, total, length)]
    with ThreadPoolExecutor(max_workers=1) as opener:

        def open_pipeline(steps: range) -> Iterator[dict[str, np.ndarray]]:
            numbers = np.concatenate([job.schedule.numbers(step, rank, workers) for step in steps])
            return _started(examples(job, numbers).iter_batches(batch_size=share, batch_format="numpy"))

        following = [opener.submit(open_pipeline, steps) for steps in chain[:1]]
        for number, steps in enumerate(chain):
            pipeline = following.pop().result()
            for position, columns in enumerate(pipeline):
                if position == len(steps) * 3 // 4 and number + 1 < len(chain):
                    following.append(opener.submit(open_pipeline, chain[number + 1]))
                yield collate(columns)


def steps_of_pipeline(run: Run, resources: Resources, workers: int) -> int:
    """Steps whose examples fit into what a worker's pipeline may fill of the object store, at least one."""
    pipelines = 2 * workers * (resources.trials or 1)  # of all trainings at once; two of a worker overlap
    store = ray.cluster_resources().get("object_store_memory", 2 * PIPELINE_BYTES / STORE_SHARE)
    example = 4 * run.model.image_size**2  # image and mask; clicks and names are small
    share = share_of_batch(run.train.batch_size, workers)
    return max(1, min(PIPELINE_BYTES, int(STORE_SHARE * store / pipelines)) // (share * example))


def _started(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; the first one is there already."""
    iterator = iter(batches)
    return itertools.chain([next(iterator)], iterator)


def examples(job: Job, numbers: np.ndarray) -> ray.data.Dataset:
    """The examples of `numbers` (int64 [n]), in this order: a row each, columns named like the fields of Example."""
    dataset = ray.data.read_datasource(
        Numbers(numbers),
        num_cpus=0,
        compute=TaskPoolStrategy(size=job.loaders),
        override_num_blocks=math.ceil(len(numbers) / EXAMPLES_PER_TASK),
    )
    dataset.context.raise_original_map_exception = True
    options = dataset.context.execution_options
    options.preserve_order = True
    # More than a pipeline makes: see `load`.
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=4 * PIPELINE_BYTES)
    return dataset.map_batches(
        job.stream.columns,
        batch_size=None,
        batch_format="numpy",
        num_cpus=0,
        compute=TaskPoolStrategy(size=job.loaders),
    )


class Numbers(ray.data.Datasource):
    """Example numbers as a Ray Data source, EXAMPLES_PER_TASK to a block."""

    def __init__(self, numbers: np.ndarray) -> None:
        super().__init__()
        self._blocks = [
            pa.table({"number": numbers[first : first + EXAMPLES_PER_TASK]})
            for first in range(0, len(numbers), EXAMPLES_PER_TASK)
        ]

    def estimate_inmemory_data_size(self) -> int:
        """In bytes, for Ray Data's planning."""
        return sum(block.nbytes for block in self._blocks)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        """One task for each block, whatever parallelism Ray Data would like."""
        return [ray.data.ReadTask(_reading(block), _metadata(block)) for block in self._blocks]


def _reading(block: pa.Table) -> Callable[[], list[pa.Table]]:
    # A lambda travels by value: the loading processes need not import this module, and torch with it.
    return lambda: [block]


def _metadata(block: pa.Table) -> BlockMetadata:
    return BlockMetadata(num_rows=block.num_rows, size_bytes=block.nbytes, input_files=None, exec_stats=None)
