"""A Run as its stages: photos -> trees -> checkpoint -> clicks.

Each function only describes a stage; `artifacts.ensure` runs what is missing. Settings that do not affect a stage are
not in its identity: four values of alpha share one set of trees.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mis_platform.artifacts import MANIFEST, REPAIR, Stage, read_manifest, sha256
from mis_platform.baselines.sources import source_settings
from mis_platform.config import (
    PIN,
    TRAINED,
    Resources,
    Run,
    Settings,
    check_fbrs,
    check_simpleclick,
    fingerprint,
    plain,
)
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.labels import labelled_subset
from mis_platform.errors import DataError
from mis_platform.evaluation.protocol import robot_settings
from mis_platform.model.features import build_extractor, features_identity, hub_file
from mis_platform.model.weights import WEIGHTS_FILE, family_of, mae_file, mae_hub_file
from mis_platform.saved_models import describe
from mis_platform.stages import evaluate, initial, precompute, train
from mis_platform.stages.products import SourceProposals
from mis_platform.storage import Storage

TARGETS = ("trees", "proposals")  # names of the stages that make what a training learns to segment

OnMetrics = Callable[[int, dict[str, float]], None]


def training_photos(run: Run, data_root: Path | None, untrusted: bool = False) -> Dataset:
    """What a training learns from. Raises DataError as `open_dataset`."""
    return open_dataset(run.dataset, data_root, split="train", untrusted=untrusted)


def benchmark(spec: str, data_root: Path | None, untrusted: bool = False) -> Dataset:
    """What a model is scored on. Raises DataError as `open_dataset`."""
    return open_dataset(spec, data_root, split="val", untrusted=untrusted)


def trees_stage(dataset: Dataset, run: Run, resources: Resources) -> Stage:
    """Merge trees of all photos of `dataset` (paper section 3.1, bottom-up merging)."""
    identity = features_identity(run.features)
    features, downloads = _pinned(run.features, "weights", hub_file(run.features), identity)
    return Stage(
        name="trees",
        version=precompute.VERSION,
        config={"dataset": dataset.digest(), "data": plain(run.data), "features": identity},
        run=lambda inputs, out: precompute.precompute(dataset, features, run.data, resources, out),
        check=functools.partial(build_extractor, features),
        downloads=downloads,
    )


def proposals_stage(dataset: Dataset, run: Run, resources: Resources) -> Stage:
    """Proposals of run.target.source (TokenCut, DSM, FreeMask) for all photos of `dataset`, from the same features."""
    product, identity = SourceProposals(run.target.source, run.sources), features_identity(run.features)
    features, downloads = _pinned(run.features, "weights", hub_file(run.features), identity)
    return Stage(
        name=product.name,
        version=precompute.VERSION,
        config={
            "dataset": dataset.digest(),
            "data": plain(run.data),
            "features": identity,
            "source": product.source,
            "settings": source_settings(product.source, run.sources),
        },
        run=lambda inputs, out: precompute.precompute(dataset, features, run.data, resources, out, product),
        check=functools.partial(build_extractor, features),
        downloads=downloads,
    )


def target_inputs(dataset: Dataset, run: Run, resources: Resources) -> dict[str, Stage]:
    """What a training learns to segment, by the name of its stage; nothing for labels."""
    if run.target.source == "labels":
        return {}
    make = trees_stage if run.target.source == "tree" else proposals_stage
    stage = make(dataset, run, resources)
    return {stage.name: stage}


def _first(given: Mapping[str, Storage], names: Iterable[str]) -> Storage | None:
    return next((given[name] for name in names if name in given), None)


def checkpoint_stage(
    dataset: Dataset, run: Run, resources: Resources, on_metrics: OnMetrics, pretraining: Stage | None = None
) -> Stage:
    """A click model trained on simulated interactions (paper section 3.2). on_metrics: called with step and losses.

    pretraining: a stage that leaves a model, which is the start of this training instead of model.init (Table 2).
    Raises DataError when target.source=labels and `dataset` has none, ValueError for a pretraining of another variant
    and for a click protocol that the model could not be scored with.
    """
    check_simpleclick(run.eval)
    inputs = target_inputs(dataset, run, resources)
    if pretraining is not None:
        _check_variant(run, pretraining)
        inputs["pretraining"] = pretraining
    model, pinned, downloads = _start(run) if pretraining is None else (_shape_identity(run), run, {})
    groups = {name: plain(getattr(run, name)) for name in ("clicks", "augment", "train")}
    return Stage(
        name="checkpoint",
        version=train.VERSION,
        config=groups | _target_identity(dataset, run) | {"model": model},
        inputs=inputs,
        run=lambda given, out: train.train(
            dataset, pinned, _first(given, TARGETS), resources, out, on_metrics, given.get("pretraining")
        ),
        check=lambda: train.check(pinned, resources, has_pretraining=pretraining is not None),
        downloads=downloads,
    )


def initial_stage(run: Run) -> Stage:
    """The model as it is before its first training step: the untrained row of a comparison."""
    model, pinned, downloads = _start(run)
    return Stage(
        name="initial",
        version=initial.VERSION,
        config={"model": model, "seed": run.train.seed},
        run=lambda inputs, out: initial.write_initial_model(pinned, out),
        downloads=downloads,
    )


def clicks_stage(dataset: Dataset, run: Run, resources: Resources, model: Stage | Storage) -> Stage:
    """Every click of the robot on every object of a benchmark. model: a stage, or a directory with a saved model.

    Raises ValueError for a click protocol that the model cannot follow.
    """
    described = None if isinstance(model, Stage) else describe(model)
    if described is None or family_of(described) == "simpleclick":
        check_simpleclick(run.eval)
    elif described.get("refine"):
        check_fbrs(run.eval)
    zoom_size = zoom_size_of(dataset, run)
    config: dict[str, Any] = {"dataset": dataset.digest(masks=True), "eval": plain(run.eval), "zoom_size": zoom_size}
    evaluate_on = functools.partial(evaluate.evaluate_model, dataset)
    if isinstance(model, Stage):
        return Stage(
            name=f"clicks/{dataset.name}",
            version=evaluate.VERSION,
            config=config,
            inputs={"model": model},
            run=lambda inputs, out: evaluate_on(inputs["model"], run.eval, zoom_size, resources, out),
        )
    return Stage(
        name=f"clicks/{dataset.name}",
        version=evaluate.VERSION,
        config=config | {"model": _model_digest(model)},
        run=lambda inputs, out: evaluate_on(model, run.eval, zoom_size, resources, out),
    )


def _model_digest(model: Storage) -> str:
    """SHA-256 of its weights. Raises DataError if it is a training of ours that was altered since."""
    digest = sha256(model.read_bytes(WEIGHTS_FILE))
    parts = read_manifest(model)["parts"] if model.exists(MANIFEST) else []
    if any(part["name"] == WEIGHTS_FILE and part["sha256"] != digest for part in parts):
        raise DataError(f"{model}/{WEIGHTS_FILE} was altered since its training; {REPAIR}")
    return digest


def method_clicks_stage(dataset: Dataset, run: Run, resources: Resources) -> Stage:
    """As `clicks_stage`, for a run whose `method` is another than the trained model."""
    config = {
        "dataset": dataset.digest(masks=True),
        "eval": robot_settings(run.eval),
        "method": evaluate.method_identity(run.method, run.classical),
    }
    return Stage(
        name=f"clicks/{dataset.name}",
        version=evaluate.VERSION,
        config=config,
        run=lambda inputs, out: evaluate.evaluate_method(dataset, run.method, run.classical, run.eval, resources, out),
    )


def protocol(dataset: Dataset, run: Run) -> dict[str, Any]:
    """What `run` is scored under on `dataset`, before it is."""
    if run.method == TRAINED:
        return evaluate.protocol_of_model(run.eval, zoom_size_of(dataset, run))
    return evaluate.protocol_of_method(run.method, run.eval)


def overlap_stage(dataset: Dataset, run: Run, resources: Resources) -> Stage:
    """The best IoU that any proposal reaches on each benchmark object: their quality without training.

    Raises ValueError for target.source=labels.
    """
    if run.target.source == "labels":
        raise ValueError("labels are no proposals: --proposals needs another target.source")
    inputs = target_inputs(dataset, run, resources)
    return Stage(
        name=f"overlap/{dataset.name}",
        version=evaluate.OVERLAP_VERSION,
        config={"dataset": dataset.digest(masks=True)},
        inputs=inputs,
        run=lambda given, out: evaluate.evaluate_proposals(dataset, _only(given), "trees" in given, resources, out),
    )


def _only(given: Mapping[str, Storage]) -> Storage:
    (storage,) = given.values()
    return storage


def method_fingerprint(run: Run) -> str:
    """In place of a training's fingerprint, for a run whose `method` needs no training."""
    return fingerprint(evaluate.method_identity(run.method, run.classical))


def zoom_size_of(dataset: Dataset, run: Run) -> int:
    """Pixels of the zoomed-in crop: DAVIS has its own (SimpleClick's evaluation)."""
    return run.eval.davis_zoom_size if dataset.name == "davis" else run.eval.zoom_size


Pinned = TypeVar("Pinned", bound=Settings)


def _pinned(
    settings: Pinned, name: str, file: str | None, identity: Mapping[str, Any]
) -> tuple[Pinned, dict[str, str]]:
    """Settings whose weights, where they come from the hub, are those of `identity` on every machine that fetches them;
    and what they read of the hub. name: of the setting; file: REPOSITORY/FILE, None if it is none of the hub's."""
    if file is None:
        return settings, {}
    return settings.model_copy(update={name: PIN + identity[name]}), {file: identity[name]}


def _start(run: Run) -> tuple[dict[str, Any], Run, dict[str, str]]:
    """The model's settings, with the content of its MAE weights in place of their path (missing weights show here);
    the run and what it reads of the hub, as `_pinned`."""
    settings = plain(run.model)
    if run.model.init != "mae":
        return settings, run, {}
    given = run.model.init_weights
    settings["init_weights"] = _file_digest(mae_file(run.model.variant, given))
    model, downloads = _pinned(run.model, "init_weights", mae_hub_file(run.model.variant, given), settings)
    return settings, run.model_copy(update={"model": model}), downloads


def _shape_identity(run: Run) -> dict[str, Any]:
    """The model's settings where another training gives its weights."""
    return {name: value for name, value in plain(run.model).items() if name not in ("init", "init_weights")}


def _target_identity(dataset: Dataset, run: Run) -> dict[str, Any]:
    """What decides the targets of a training beside its trees.

    Labels: the content of the images that may be seen and of their masks. The digest is that of the subset, because the
    first images of a list depend on its order, which a digest of all of them does not tell.
    """
    if run.target.source == "tree":  # addresses of unsupervised models are older than `target`, and stay
        return {"sampling": plain(run.sampling)}
    if run.target.source != "labels":
        return {"target": {"source": run.target.source}}  # the proposals themselves are an input
    unused = {"subset_seed"} if run.target.subset == "first" else set()
    target = {name: value for name, value in plain(run.target).items() if name not in unused}
    return {"target": target, "dataset": labelled_subset(dataset, run.target).digest(masks=True)}


def _check_variant(run: Run, pretraining: Stage) -> None:
    """Before hours of pretraining, not after."""
    variant = pretraining.config["model"]["variant"]
    if variant != run.model.variant:
        raise ValueError(f"model.variant={run.model.variant} cannot start from a pretraining of {variant}")


def _file_digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read model.init_weights={path}: {error.strerror}") from None
