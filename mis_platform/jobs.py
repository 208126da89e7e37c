"""What the commands do: stages, with the record in MLflow around them.

One MLflow run is one model under one click protocol: training fills in the losses, each evaluation its scores and
pictures. The same model and protocol always find the same MLflow run again; only where several rows of a sweep have
both in common has each its own.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from mis_platform import figures, pipeline, report, tracking
from mis_platform.artifacts import MANIFEST, Stage, check_missing, ensure, read_manifest, sha256
from mis_platform.config import Resources, Run, build, fingerprint, flatten, plain
from mis_platform.data.benchmarks import Dataset
from mis_platform.errors import DataError
from mis_platform.evaluation.predictor import Predictor
from mis_platform.model.weights import family_of
from mis_platform.saved_models import describe
from mis_platform.simulation.clicks import Click
from mis_platform.stages.cluster import cluster
from mis_platform.stages.evaluate import build_click_model
from mis_platform.storage import Storage

EXPERIMENT = "mis"
TARGETS = (0.80, 0.85, 0.90, 0.95)  # IoU
PICTURES = 4  # objects drawn for each benchmark: the easiest, the hardest and two between

Replay = Callable[[np.ndarray, list[Click]], list[np.ndarray]]  # photo and clicks -> the mask after each click


def train(
    photos: Dataset,
    run: Run,
    resources: Resources,
    root: Storage,
    experiment: str = EXPERIMENT,
    pretraining: Stage | None = None,
    name: str | None = None,
    parent: str | None = None,
    identity: str | None = None,
) -> Storage:
    """The directory of the trained model; trees and training are only made where they are missing.

    pretraining: a stage that leaves the model to start from; it is finished first. name: of the MLflow run; parent:
    fingerprint of the one it belongs to; identity: as in `record`.
    """
    stage = pipeline.checkpoint_stage(photos, run, resources, lambda step, metrics: log(step, metrics), pretraining)
    about = (root, experiment, name or title(run), stage.fingerprint, run, resources, parent)
    settings = started(run, pretraining.fingerprint if pretraining else None)
    with record(*about, settings=settings, identity=identity, computes=not stage.is_done(root)) as tracker:

        def log(step: int, metrics: dict[str, float]) -> None:
            tracker.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step)

        digest = photos.digest(masks=run.target.source == "labels")
        tracker.log_dataset(photos.name, digest, str(photos.root), "training")
        directory = finish(stage, root)
        history = report.read_history(directory)
        for step, metrics in history:  # what a process that was killed after its last step had no time to say
            log(step, metrics)
        tracker.log_figure(figures.loss_curve(history), "figures/loss.png")
        tracker.set_model(directory)
    return directory


def evaluate(
    benchmarks: Sequence[Dataset],
    model: Storage,
    run: Run,
    resources: Resources,
    root: Storage,
    experiment: str = EXPERIMENT,
    name: str | None = None,
    pictures: int = PICTURES,
    parent: str | None = None,
    identity: str | None = None,
) -> list[report.Score]:
    """Scores of a saved model on each benchmark, in MLflow too: `grabcut/noc85`, `grabcut/iou` by clicks, pictures.

    run: only its `eval` settings are used; the others are those that the model was trained with, as far as it says.
    name: of the row and the MLflow run, default `model_title`. pictures: objects drawn for each benchmark. parent,
    identity: as in `train`.
    """
    name, settings = name or model_title(model), settings_of(model, run)
    stages = [pipeline.clicks_stage(each, run, resources, model) for each in _labelled(benchmarks)]

    def replay(benchmark: Dataset) -> Replay:
        return replay_of(model, benchmark, run)

    about = (root, experiment, name, model_fingerprint(model), run, resources, parent)
    with record(*about, settings=settings, identity=identity, computes=not _are_done(stages, root)) as tracker:
        tracker.set_model(model)
        return _score(tracker, benchmarks, stages, root, name, replay, pictures)


def evaluate_method(
    benchmarks: Sequence[Dataset],
    run: Run,
    resources: Resources,
    root: Storage,
    experiment: str = EXPERIMENT,
    name: str | None = None,
    pictures: int = PICTURES,
    parent: str | None = None,
    identity: str | None = None,
) -> list[report.Score]:
    """As `evaluate`, for run.method other than the trained model."""
    name, answering = name or run.method, pipeline.method_fingerprint(run)
    stages = [pipeline.method_clicks_stage(each, run, resources) for each in _labelled(benchmarks)]

    def replay(benchmark: Dataset) -> Replay:
        model = build_click_model(run.method, run.classical)
        return functools.partial(report.replay_answers, model, run.eval.threshold)

    about = (root, experiment, name, answering, run, resources, parent)
    with record(*about, identity=identity, computes=not _are_done(stages, root)) as tracker:
        return _score(tracker, benchmarks, stages, root, name, replay, pictures)


def _score(
    tracker: tracking.Tracker,
    benchmarks: Sequence[Dataset],
    stages: Sequence[Stage],
    root: Storage,
    name: str,
    replay: Callable[[Dataset], Replay],
    pictures: int,
) -> list[report.Score]:
    """Finish the evaluations; their scores, with clicks and masks of a few objects (Figure 7), go to the tracker."""
    scores = []
    for benchmark, stage in zip(benchmarks, stages, strict=True):
        clicks = finish(stage, root)
        score = report.read_score(clicks, name)
        log_benchmarks(tracker, [benchmark])
        _log_score(tracker, score, clicks)
        for rank, figure in enumerate(draw_objects(benchmark, replay(benchmark), clicks, pictures)):
            tracker.log_figure(figure, f"figures/{benchmark.name}/object-{rank}.png")
        scores.append(score)
    tracker.log_text(report.summary_table(scores, markdown=True), "noc.md")
    return scores


def score_proposals(benchmarks: Sequence[Dataset], runs: Sequence[Run], resources: Resources, root: Storage) -> str:
    """The table of best overlaps: how well the proposals of each run could name the objects, without training."""
    overlaps: list[tuple[str, str, dict[str, Any]]] = []
    for benchmark, run in itertools.product(_labelled(benchmarks), runs):
        name = f"proposals {run.target.source} {run.features.extractor}"
        stage = pipeline.overlap_stage(benchmark, run, resources)
        about = (root, f"{EXPERIMENT}-proposals", name, stage.fingerprint, run, resources)
        with record(*about, computes=not stage.is_done(root)) as tracker:
            summary = read_manifest(finish(stage, root))["summary"]
            numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
            tracker.log_metrics({f"{benchmark.name}/{key}": value for key, value in numbers.items()})
            log_benchmarks(tracker, [benchmark])
        overlaps.append((run.target.source, benchmark.name, summary))
    return report.overlap_table(overlaps)


def finish(stage: Stage, root: Storage) -> Storage:
    """The directory of the finished stage; Ray is only started if something is missing that can be made."""
    if stage.is_done(root):
        return ensure(stage, root)
    check_missing(stage, root)
    with cluster(root):
        return ensure(stage, root)


def _are_done(stages: Sequence[Stage], root: Storage) -> bool:
    return all(stage.is_done(root) for stage in stages)


def title(run: Run) -> str:
    """What people call a run: what it was trained on and the settings of the paper's ablations."""
    source = run.dataset.rstrip("/").rsplit("/", 1)[-1]
    return f"{run.model.variant} {source} {_target_title(run)} lambda {run.train.smooth_weight:g}"


def _target_title(run: Run) -> str:
    if run.target.source == "labels":
        return f"{100 * run.target.fraction:g}% labels"
    return f"alpha {run.sampling.alpha:g}" if run.sampling.strategy == "top_down" else "uniform"


def model_title(model: Storage) -> str:
    """What a saved model is called: `title` of its training if that is known, else its family, variant and origin."""
    described = describe(model)
    if (trained := _training_of(described)) is not None:
        return title(trained)
    origin = _source_file(described) or model.uri.rstrip("/").rpartition("/")[2].partition("?")[0]
    words = [family_of(described), described["variant"], described.get("refine"), origin]
    return " ".join(word for word in words if word)


def started(run: Run, pretraining: str | None) -> dict[str, Any]:
    """Dotted name -> value of what decides a training. pretraining: fingerprint of that whose model it starts from."""
    start = {"model.init": f"checkpoint/{pretraining}", "model.init_weights": None}
    return flatten(run) | (start if pretraining else {})


def settings_of(model: Storage, run: Run) -> dict[str, Any]:
    """Dotted name -> value: what is known to have decided a saved model, and the click protocol of `run`.

    Of a model that was not trained here that is its network and the file it came from; nothing is made up.
    """
    described, protocol = describe(model), flatten(run.eval, "eval.")
    if (trained := _training_of(described)) is not None:
        inputs = read_manifest(model).get("inputs", {}) if model.exists(MANIFEST) else {}
        return started(trained, inputs.get("pretraining")) | protocol
    known = {name: described.get(name) for name in ("variant", "image_size", "refine")}
    known |= {"family": family_of(described), "source": _source_file(described)}
    return {f"model.{name}": value for name, value in known.items() if value is not None} | protocol


def _training_of(described: Mapping[str, Any]) -> Run | None:
    """The settings that the model with this config.json was trained with, if it says so."""
    if not isinstance(run := described.get("run"), dict) or not run:
        return None
    try:
        return cast(Run, build(Run, {name: part for name, part in run.items() if name != "eval"}))
    except ValueError:  # written by another version: its settings cannot be told
        return None


def _source_file(described: Mapping[str, Any]) -> str | None:
    """Name of the checkpoint that a model was imported from."""
    source = described.get("source")
    return str(source["file"]) if isinstance(source, dict) and source.get("file") else None


def model_fingerprint(model: Storage) -> str:
    """The fingerprint of the training that made a model, or of the weights if they came from elsewhere."""
    if model.exists(MANIFEST):
        return str(read_manifest(model)["fingerprint"])
    return sha256(model.read_bytes("model.safetensors"))[:16]


def record(
    root: Storage,
    experiment: str,
    name: str,
    model: str,
    run: Run,
    resources: Resources,
    parent: str | None = None,
    wait: bool = True,
    settings: Mapping[str, Any] | None = None,
    identity: str | None = None,
    computes: bool = True,
) -> tracking.Tracker:
    """The MLflow run of a model, by the fingerprint of its training, under the click protocol of `run`.

    wait, computes: as in `tracking.open_run`. settings: as of `settings_of`, where not those of `run` decided the
    model. identity: fingerprint of the MLflow run, where another run has that of the model and the protocol.
    """
    return tracking.open_run(
        root,
        experiment=experiment,
        name=name,
        fingerprint=identity or fingerprint({"model": model, "eval": plain(run.eval)}),
        params=dict(flatten(run) if settings is None else settings) | flatten(resources, "resources."),
        parent=parent,
        wait=wait,
        computes=computes,
    )


def log_benchmarks(tracker: tracking.Tracker, benchmarks: Sequence[Dataset]) -> None:
    """What a run was scored on, as its inputs."""
    for benchmark in benchmarks:
        tracker.log_dataset(benchmark.name, benchmark.digest(masks=True), str(benchmark.root), "evaluation")


def _labelled(benchmarks: Sequence[Dataset]) -> Sequence[Dataset]:
    for each in benchmarks:
        if not each.is_labelled:
            raise DataError(f"{each.name} in {each.root} has no masks; evaluation needs a benchmark with masks")
    return benchmarks


def _log_score(tracker: tracking.Tracker, score: report.Score, clicks: Storage) -> None:
    """NoC and its companions as metrics, and the IoU after each click as a curve over clicks (Figure 6)."""
    summary, prefix = score.summary, score.summary.dataset
    metrics = {"objects": summary.objects, "seconds_per_click": summary.seconds_per_click}
    for target in TARGETS:
        at, percent = summary.at(target), round(100 * target)
        if at.noc == at.noc:  # known: sessions did not stop before this target
            metrics |= {f"noc{percent}": at.noc, f"noc{percent}_low": at.low, f"noc{percent}_high": at.high}
            metrics |= {f"never{percent}": at.failures, f"at_limit{percent}": at.at_limit}
    tracker.log_metrics({f"{prefix}/{name}": float(value) for name, value in metrics.items()})
    tracker.set_tags({f"mis.protocol.{prefix}": score.protocol["fingerprint"]})
    curve = report.mean_iou(report.read_table(clicks), summary.max_clicks)
    tracker.log_curve(f"{prefix}/iou", curve)
    tracker.log_figure(figures.iou_curve({score.model: curve}), f"figures/{prefix}/iou.png")


def replay_of(model: Storage, benchmark: Dataset, run: Run) -> Replay:
    """What a saved model answers to clicks, at the size and under the protocol that `run` scores it with.

    On the CPU, so the masks can differ by a few pixels from those that were scored on a GPU.
    """
    size = pipeline.zoom_size_of(benchmark, run)
    return functools.partial(report.replay, Predictor.from_pretrained(model.uri, zoom_size=size, config=run.eval))


def draw_objects(benchmark: Dataset, replay: Replay, clicks: Storage, count: int = PICTURES) -> list[Any]:
    """Figures of `count` objects, evenly spread from the one that took the fewest clicks to the one that took most."""
    table = report.read_table(clicks)
    needed: dict[tuple[str, str], int] = {}
    for image_id, object_id in zip(table["image_id"].to_pylist(), table["object_id"].to_pylist()):
        needed[image_id, object_id] = needed.get((image_id, object_id), 0) + 1
    ranked = sorted(needed, key=lambda key: (needed[key], key))
    places = sorted({round(k * (len(ranked) - 1) / max(count - 1, 1)) for k in range(count)})
    return [_draw_object(benchmark, replay, table, *ranked[place]) for place in places]


def _draw_object(benchmark: Dataset, replay: Replay, table: Any, image_id: str, object_id: str) -> Any:
    image = benchmark.read_image(image_id)
    target = next(each.mask for each in benchmark.read_objects(image_id) if each.object_id == object_id)
    made, ious = report.clicks_on(table, image_id, object_id)
    return figures.clicks_and_masks(image, target, made, replay(image, made), ious)
