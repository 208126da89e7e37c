"""Images per second of the training stage beside a plain loop: one process, fp32, examples made in between the steps.

    python benchmarks/training.py                                        # xT on the synthetic photos, on the CPU
    python benchmarks/training.py --dataset folder:PHOTOS --size 448
    python benchmarks/training.py --variant vit_b --batch 32 --precision bf16 --images-at-once 16      # on a GPU

Both sides train the same model on the same examples with the same arithmetic, so in fp32 their losses agree; what
differs is who makes the examples, and the stage's --precision. Rounds alternate between the two, because other load
on the machine drifts. The rate leaves out the first steps; the time until the first one is reported by itself.

On a GPU the model's FLOP/s (of the forward passes for clicks, and of the forward and backward pass that trains) are
set beside those of a large matrix product in bf16. Targets there (ViT-B, 448 pixels, one H200): 200 images/s, four
times the plain loop.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from precompute import Load
from torch.utils.flop_counter import FlopCounterMode

from mis_platform.artifacts import Stage, ensure
from mis_platform.config import Resources, Run, plain
from mis_platform.data.benchmarks import Dataset, open_dataset
from mis_platform.data.examples import open_stream
from mis_platform.data.synthetic import write_photos
from mis_platform.stages.cluster import cluster, cpus
from mis_platform.stages.precompute import precompute
from mis_platform.stages.train import train
from mis_platform.stages.training_loop import Learner, Schedule, collate, initial_model, optimizer_of
from mis_platform.storage import Storage

WARM_UP = 3  # steps


class Measured(NamedTuple):
    start_up: float  # seconds until the first step was done
    rate: float  # images per second after the warm-up
    loss: float  # of the last step


def settings(options: argparse.Namespace, precision: str) -> Run:
    return Run.model_validate(
        {
            "features": {"extractor": "color_texture"},
            "model": {"variant": options.variant, "image_size": options.size, "init": "random"},
            "train": {
                "batch_size": options.batch,
                "epochs": 10**6,
                "max_steps": options.steps,
                "precision": precision,
            },
        }
    )


def measure(began: float, done: list[float], loss: float, batch: int) -> Measured:
    """done: when each step was done."""
    return Measured(done[0] - began, batch * (len(done) - WARM_UP) / (done[-1] - done[WARM_UP - 1]), loss)


def plain_loop(dataset: Dataset, trees: Storage, options: argparse.Namespace) -> Measured:
    torch.set_num_threads(cpus())
    run = settings(options, "fp32")
    began = time.perf_counter()
    stream = open_stream(dataset, trees, run)
    schedule = Schedule(len(stream.image_ids), run.train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = initial_model(run).to(device).train()
    learner = Learner(run, schedule, model, model, optimizer_of(model, run.train), device, options.images_at_once)
    done = []
    for step in range(schedule.total_steps):
        batch = collate(stream.columns({"number": np.array(schedule.numbers(step))}))
        loss = learner.step(step, learner.prepare(batch))["loss"]
        done.append(time.perf_counter())
    return measure(began, done, loss, options.batch)


def training_stage(dataset: Dataset, trees: Storage, options: argparse.Namespace) -> Measured:
    losses: list[float] = []
    done: list[float] = []

    def note(_: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        done.append(time.perf_counter())

    resources = Resources(
        num_workers=options.workers, log_every=1, checkpoint_every=10**6, batch_per_device=options.images_at_once
    )
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        train(dataset, settings(options, options.precision), trees, resources, Storage(out), note)
    return measure(began, done, losses[-1], options.batch)


def make_trees(dataset: Dataset, run: Run, folder: Path) -> Storage:
    stage = Stage(
        name="trees",
        version=1,
        config=plain(run.features),
        run=lambda _, out: precompute(dataset, run.features, run.data, Resources(), out),
    )
    return ensure(stage, Storage(str(folder)))


def flops_per_image(options: argparse.Namespace) -> float:
    """Of a step, on average: a backward pass counts as two forward ones."""
    run = settings(options, "fp32")
    model = initial_model(run).eval()
    image = torch.zeros(1, 3, options.size, options.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image, image[:, :1], torch.full((1, 2, 3), -1.0))
    return float(counter.get_total_flops() * (run.clicks.iterative_clicks / 2 + 3))


def fastest_product() -> float:
    """FLOP/s of a product of two large bf16 matrices, median of five."""
    matrices = [torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        matrices[0] @ matrices[1]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * 8192**3 / statistics.median(seconds[3:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="NAME:PATH; photos cut from scikit-image's and scikit-learn's by default")
    parser.add_argument("--variant", default="vit_xt")
    parser.add_argument("--size", type=int, default=224, help="pixels, a multiple of 224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images-at-once", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the stage")
    return parser.parse_args()


def main() -> None:
    options = parse()
    sides = {"plain loop": plain_loop, "mis train": training_stage}
    measured: dict[str, list[Measured]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder, cluster():
        if options.dataset is None:
            write_photos(Path(folder) / "photos")
        dataset = open_dataset(options.dataset or f"folder:{folder}/photos")
        trees = make_trees(dataset, settings(options, "fp32"), Path(folder) / "artifacts")
        print(
            f"{options.variant}, {options.size} px, batch {options.batch}, {options.steps} steps, "
            f"{cpus()} CPUs, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"
        )
        for _ in range(options.rounds):
            for name, side in sides.items():
                with Load() as load:
                    measured[name].append(side(dataset, trees, options))
                print(f"{name}: {measured[name][-1].rate:.2f} images/s; {load}", flush=True)
                torch.cuda.empty_cache()
    for name, rounds in measured.items():
        rates = [each.rate for each in rounds]
        print(
            f"{name:10}: {statistics.median(rates):7.2f} images/s ({min(rates):.2f} to {max(rates):.2f}), "
            f"first step after {statistics.median(each.start_up for each in rounds):.1f} s, loss {rounds[0].loss:.6f}"
        )
    medians = {name: statistics.median(each.rate for each in rounds) for name, rounds in measured.items()}
    print(f"mis train / plain loop: {medians['mis train'] / medians['plain loop']:.2f}")
    if torch.cuda.is_available():
        reached, limit = flops_per_image(options) * medians["mis train"], fastest_product()
        print(f"{reached / 1e12:.0f} TFLOP/s, {reached / limit:.0%} of a bf16 product's {limit / 1e12:.0f}")


if __name__ == "__main__":
    main()
