"""Clicks per second of the click protocol: many objects together against one at a time, in one run.

python benchmarks/evaluation.py                # xT at 448 pixels on the CPU; ViT-B too if there is a CUDA device
python benchmarks/evaluation.py --repeats 5    # repeats take turns; the median and the range are printed
python benchmarks/evaluation.py --precision tf32    # eval.precision
"""

import argparse
import statistics
import time

import numpy as np
import torch

from mis_platform.config import EvalConfig
from mis_platform.evaluation.clicks import iou, next_click
from mis_platform.evaluation.protocol import Sample, evaluate
from mis_platform.model.simpleclick import SimpleClick

IMAGE_SIZE = 448  # pixels of the network input


def photos(count: int, rng: np.random.Generator) -> list[Sample]:
    """Photo-sized noise with two elliptic objects each; the time does not depend on what is to be seen."""
    rows, cols = np.mgrid[:375, :500]
    samples = []
    for number in range(count):
        objects = []
        for object_id in "01":
            y, x = rng.uniform(100, 275), rng.uniform(100, 400)
            radius_y, radius_x = rng.uniform(30, 90, 2)
            mask = ((rows - y) / radius_y) ** 2 + ((cols - x) / radius_x) ** 2 <= 1
            objects.append((object_id, mask.astype(np.int8)))
        image = rng.integers(0, 256, (375, 500, 3), np.uint8)
        samples.append(Sample("noise", f"{number:03}", image, objects))
    return samples


def compare(variant: str, device: str, batches: list[int], objects: int, repeats: int, precision: str) -> None:
    """Print clicks per second for every batch size; a repeat runs each of them once."""
    torch.manual_seed(0)
    network = SimpleClick(variant, IMAGE_SIZE).to(device).eval()
    samples = photos(objects // 2, np.random.default_rng(0))
    config = EvalConfig.model_validate({"max_clicks": 4, "fixed_clicks": True, "precision": precision})
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    rows: dict[int, list[dict]] = {}
    for repeat in range(repeats + 1):
        for batch in batches:
            started = time.perf_counter()
            rows[batch] = list(evaluate(network, samples, config, zoom_size=IMAGE_SIZE, batch=batch, device=device))
            if repeat:  # the first is warm-up
                seconds[batch].append(time.perf_counter() - started)
    for batch in batches:
        clicks = len(rows[batch])
        rates = [clicks / each for each in seconds[batch]]
        same = np.mean([a["y"] == b["y"] and a["x"] == b["x"] for a, b in zip(rows[batch], rows[batches[0]])])
        print(
            f"{variant} {IMAGE_SIZE} px, {device}, {precision}, batch {batch:3}: "
            f"{statistics.median(rates):7.2f} clicks/s "
            f"({min(rates):.2f} to {max(rates):.2f}), {same:.1%} of the clicks as with batch {batches[0]}"
        )


def simulated_user(shape: tuple[int, int], repeats: int) -> None:
    """Print what the click robot and the IoU cost per click, on one thread."""
    rows, cols = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    target = ((rows - 0.5) ** 2 + (cols - 0.5) ** 2 < 0.1).astype(np.int8)
    prediction = (rows - 0.55) ** 2 + (cols - 0.45) ** 2 < 0.1
    times = []
    for _ in range(3 * repeats):
        started = time.perf_counter()
        next_click(target, prediction, [])
        iou(target, prediction)
        times.append(1000 * (time.perf_counter() - started))
    print(f"simulated user on {shape[0]} x {shape[1]} pixels: {statistics.median(times):.1f} ms per click")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, {arguments.objects} objects, 4 clicks each")
    simulated_user((375, 500), arguments.repeats)
    simulated_user((1200, 1600), arguments.repeats)
    compare("vit_xt", "cpu", [1, 2, 4, 8], arguments.objects, arguments.repeats, arguments.precision)
    if torch.cuda.is_available():
        compare("vit_b", "cuda", [1, 8, 32], 4 * arguments.objects, arguments.repeats, arguments.precision)


if __name__ == "__main__":
    main()
