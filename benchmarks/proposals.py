"""Microseconds for one proposal with its patch mask, and for the clicks of one training sample.

python benchmarks/proposals.py
"""

import time
from collections.abc import Callable

import numpy as np
from ward import GRID, smooth_features

from mis_platform.config import ClickConfig
from mis_platform.simulation.clicks import sample_clicks
from mis_platform.simulation.proposals import best_overlap, mask_at_image_size
from mis_platform.simulation.sampling import draw_proposal
from mis_platform.simulation.ward import merge

SIZE = (375, 500)  # pixels


def microseconds(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - began)
    return float(np.median(times)) / 1e3


def main() -> None:
    rng = np.random.default_rng(0)
    tree = merge(smooth_features(GRID, 32))
    mask = mask_at_image_size(draw_proposal(tree, rng).mask, *SIZE)
    target = mask.astype(np.int8)
    config = ClickConfig()
    print(f"{GRID[0]}x{GRID[1]} patches, {SIZE[0]}x{SIZE[1]} pixels, medians")
    work: dict[str, tuple[Callable[[], object], int]] = {
        "one proposal with its patch mask": (lambda: draw_proposal(tree, rng), 5000),
        "mask at image size": (lambda: mask_at_image_size(tree.mask(tree.root), *SIZE), 500),
        "clicks of one training sample": (lambda: sample_clicks(mask, rng, config), 500),
        "best overlap of all nodes": (lambda: best_overlap(tree, target), 200),
    }
    for name, (function, repeats) in work.items():
        print(f"  {name:<34}{microseconds(function, repeats):8.1f} us")


if __name__ == "__main__":
    main()
