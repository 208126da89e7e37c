"""The whole method in minutes on two cores: `mis quickstart`.

Photographs that scikit-image and scikit-learn carry in their wheels, a small benchmark with exact masks made from them,
merge trees, a short training, the scores of the untrained and of the trained model, pictures, all of it in MLflow. It
is a demonstration: SimpleClick's smallest model, trained from scratch for minutes on a handful of photos.
"""

import shutil
import sys
import time
from pathlib import Path

import numpy as np

from mis_platform import figures, jobs, pipeline, report
from mis_platform.config import Resources, Run, check_simpleclick, override, split_resources
from mis_platform.data import synthetic
from mis_platform.data.benchmarks import Dataset
from mis_platform.data.images import read_image
from mis_platform.data.trees import TreeReader
from mis_platform.progress import duration
from mis_platform.stages.cluster import cluster
from mis_platform.storage import Storage

PHOTOS, OBJECTS, DRAWN = 36, 10, 2
EXPERIMENT = "quickstart"

# What fits into minutes on two cores: no weights to load, the smallest model, one attention window, many small steps.
SETTINGS = [
    "features.extractor=color_texture",
    "model.variant=vit_xt",
    "model.init=random",
    "model.image_size=224",
    "eval.zoom_size=224",
    "eval.davis_zoom_size=224",
    "train.batch_size=2",
    "train.learning_rate=5e-4",
    "train.epochs=65",
    "train.decay_epochs=[57]",
    "train.smooth_weight=1",
    "clicks.iterative_clicks=1",
    "augment.color_augmentation=false",
]
# Batches of 2 leave the plateau of the mean, where a transformer from scratch begins, after about 1 000 images; batches
# of 4 needed twice as many on one machine and had not left it after 2 000 on another.
# Two processes of one core each are half as fast again as one with two threads: the model's matrices are too small.
# They would need two GPUs; without any, the story is the same on every machine.
RESOURCES = [
    "resources.num_workers=2",
    "resources.use_gpu=false",
    "resources.log_every=5",
    "resources.checkpoint_every=100",
]


def settings(assignments: list[str]) -> tuple[Run, Resources]:
    """The quickstart's Run and Resources, with the command line's changes on top."""
    deciding, wide = split_resources(assignments)
    run = override(override(Run(), SETTINGS), deciding)
    check_simpleclick(run.eval)
    return run, override(Resources(), RESOURCES + wide)


def tell(root: Storage, run: Run, resources: Resources) -> None:
    """Run the story into `root`, a local folder; what an earlier call finished is not done again."""
    if root.local is None:
        raise ValueError(f"the quickstart needs a local folder, not {root}")
    root.check_writable()
    began = time.monotonic()
    with cluster():
        photos, benchmark = _step(1, "photos and a benchmark from the wheels", lambda: _material(root.local))
        run = on_material(run, photos, benchmark)
        trees = _step(2, "merge trees", lambda: jobs.finish(pipeline.trees_stage(photos, run, resources), root))
        untrained = jobs.finish(pipeline.initial_stage(run), root)
        before = _step(
            3, "the untrained model", lambda: _score(benchmark, untrained, run, resources, root, "untrained")
        )
        trained = _step(4, "training", lambda: jobs.train(photos, run, resources, root, EXPERIMENT))
        after = _step(5, "the trained model", lambda: _score(benchmark, trained, run, resources, root, "trained"))
    curves = {
        name: _curve(benchmark, model, run, resources, root)
        for name, model in (("untrained", untrained), ("trained", trained))
    }
    pictures = _step(6, "pictures", lambda: _draw(root, photos, benchmark, trees, trained, curves, run, resources))
    print(f"\n{report.summary_table([before, after], intervals=False)}\n")  # with them, in MLflow: noc.md
    last = ", ".join(f"{name} {curve[-1]:.2f}" for name, curve in curves.items())
    print(f"mean IoU after {run.eval.max_clicks} clicks: {last}\n")  # NoC hardly tells such small models apart
    print(f"done in {duration(time.monotonic() - began)}; pictures:")
    print("\n".join(f"  {path}" for path in pictures))
    activate = Path(sys.executable).with_name("activate")
    first = f", after `. {activate}`" if shutil.which("mis") is None and activate.exists() else ""
    print(f"\nthree things to try next{first}:")
    print(f"  mis ui --root {root}")
    print(f"  mis quickstart --root {root} --set sampling.alpha=0.8      # only the second training is new")
    print("  mis precompute --dataset folder:YOUR_PHOTOS --set features.extractor=color_texture")


def on_material(run: Run, photos: Dataset, benchmark: Dataset) -> Run:
    """`run` with the names of what it is trained and scored on, as its parameters in MLflow say them."""
    scored = (f"{benchmark.name}:{benchmark.root}",)
    return run.model_copy(update={"dataset": f"folder:{photos.root}", "eval_datasets": scored})


def _step(number: int, what: str, work):  # type: ignore[no-untyped-def]
    print(f"[{number}/6] {what}", file=sys.stderr, flush=True)
    return work()


def _material(root: Path) -> tuple[Dataset, Dataset]:
    """Training photos and the benchmark, written on the first call."""
    photos, benchmark, _ = synthetic.write_material(root, PHOTOS, OBJECTS)
    return pipeline.open_dataset(f"folder:{photos}"), pipeline.benchmark(f"synthetic:{benchmark}", None)


def _score(
    benchmark: Dataset, model: Storage, run: Run, resources: Resources, root: Storage, name: str
) -> report.Score:
    return jobs.evaluate([benchmark], model, run, resources, root, EXPERIMENT, name, DRAWN)[0]


def _curve(benchmark: Dataset, model: Storage, run: Run, resources: Resources, root: Storage) -> np.ndarray:
    """Mean IoU after click 1, 2, ... of a model that was scored: float64 [max_clicks]."""
    clicks = jobs.finish(pipeline.clicks_stage(benchmark, run, resources, model), root)
    return report.mean_iou(report.read_table(clicks), run.eval.max_clicks)


def _draw(
    root: Storage,
    photos: Dataset,
    benchmark: Dataset,
    trees: Storage,
    model: Storage,
    curves: dict[str, np.ndarray],
    run: Run,
    resources: Resources,
) -> list[Path]:
    """The pictures of the story as files under root/pictures, and in the MLflow run of the trained model.

    Their folder has the name of the clicks that they show, so that those of other settings stay.
    """
    assert root.local is not None
    clicks = jobs.finish(pipeline.clicks_stage(benchmark, run, resources, model), root)
    folder = root.local / "pictures" / Path(clicks.uri).name
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"iou.png": figures.iou_curve(curves)}
    reader = TreeReader(trees)
    for k, image_id in enumerate(photos.image_ids[:3]):
        drawn[f"merge-levels-{k}.png"] = figures.merge_levels(
            read_image(photos.image_path(image_id)), reader.tree(image_id)
        )
    replay = jobs.replay_of(model, benchmark, run)
    for k, figure in enumerate(jobs.draw_objects(benchmark, replay, clicks, DRAWN)):
        drawn[f"clicks-{k}.png"] = figure
    answering, settings = jobs.model_fingerprint(model), jobs.settings_of(model, run)
    with jobs.record(root, EXPERIMENT, "trained", answering, run, resources, settings=settings) as tracker:
        for name, figure in drawn.items():
            (folder / name).write_bytes(figures.to_png(figure))
            tracker.log_figure(figure, f"figures/story/{name}")
    return [folder / name for name in drawn]
