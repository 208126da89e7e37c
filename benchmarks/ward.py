"""Ward merging against scikit-learn and higra, side by side in one run, and how its time grows with the grid.

    OMP_NUM_THREADS=1 python benchmarks/ward.py [--repeats 5] [--channels 384]

Features are smooth random fields, so that neighbours are alike as in a photo. All three get the same array, use one
core, and take turns; medians are printed. Needs higra (`pip install -e '.[bench]'`).
"""

import argparse
import functools
import time
from collections.abc import Callable

import cv2
import higra
import numpy as np
from sklearn.cluster import ward_tree
from sklearn.feature_extraction.image import grid_to_graph

from mis_platform.simulation.ward import merge, warm_up

GRID = (47, 63)  # patches of a 375x500 photo
GROWTH = [(12, 16), (25, 32), (47, 63), (75, 96), (100, 128)]


def smooth_features(grid: tuple[int, int], channels: int, seed: int = 0) -> np.ndarray:
    """float32 [gh, gw, channels]: blurred noise plus a little of it, like features of neighbouring patches."""
    noise = np.random.default_rng(seed).normal(size=(*grid, channels)).astype(np.float32)
    planes = [cv2.GaussianBlur(noise[..., k], (0, 0), 3) for k in range(channels)]
    return np.ascontiguousarray(np.stack(planes, axis=-1) * 10 + 0.1 * noise)


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--channels", type=int, default=384)
    arguments = parser.parse_args()
    warm_up()

    features = smooth_features(GRID, arguments.channels)
    flat = features.reshape(-1, arguments.channels)
    connectivity = grid_to_graph(*GRID)
    graph = higra.get_4_adjacency_graph(GRID)
    peers = {
        "mis_platform": lambda: merge(features),
        "scikit-learn ward_tree": lambda: ward_tree(flat, connectivity=connectivity),
        "higra": lambda: higra.binary_partition_tree_ward_linkage(graph, flat),
    }
    times = {name: [] for name in peers}
    for _ in range(arguments.repeats):
        for name, run in peers.items():
            times[name].append(seconds(run))
    ours = np.median(times["mis_platform"])
    print(f"{GRID[0]}x{GRID[1]} patches, {arguments.channels} channels, medians of {arguments.repeats}")
    for name, measured in times.items():
        median = np.median(measured)
        print(f"  {name:<24} {1e3 * median:9.2f} ms   {median / ours:7.1f}x ours")

    print("growth (ours)")
    for grid in GROWTH:
        features = smooth_features(grid, arguments.channels)
        median = np.median([seconds(functools.partial(merge, features)) for _ in range(arguments.repeats)])
        count = grid[0] * grid[1]
        each = 1e9 * median / (count * np.log2(count))
        print(f"  {grid[0]:>3}x{grid[1]:<3} n = {count:>5}: {1e3 * median:8.2f} ms, {each:6.1f} ns for each n log2 n")


if __name__ == "__main__":
    main()
