"""Ward merging against scikit-learn and higra, side by side in one run, and how its time grows with the grid.

    OMP_NUM_THREADS=1 python benchmarks/ward.py [--repeats 5] [--channels 384]

Features are smooth random fields, so that neighbours are alike as in a photo. All three get the same array and use one
core. Medians of two ways to take turns are printed: in blocks of calls, each peer with its own data in the caches, as
when many photos are merged one after the other; and call by call, each peer after the others have emptied the caches.
Needs higra (`pip install -e '.[bench]'`).
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
BLOCK = 5  # calls; the first of them is not counted
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


def take_turns(peers: dict[str, Callable[[], object]], turns: int, block: int) -> dict[str, float]:
    """Median seconds of a call of each peer. Of a block the first call is left out, unless it is all there is."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(turns):
        for name, run in peers.items():
            times[name] += [seconds(run) for _ in range(block)][min(1, block - 1) :]
    return {name: float(np.median(each)) for name, each in times.items()}


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
    print(f"{GRID[0]}x{GRID[1]} patches, {arguments.channels} channels, medians of {arguments.repeats} turns")
    for title, block in (("in blocks", BLOCK), ("call by call", 1)):
        print(f" {title}")
        times = take_turns(peers, arguments.repeats, block)
        for name, median in times.items():
            print(f"  {name:<24} {1e3 * median:9.2f} ms   {median / times['mis_platform']:7.1f}x ours")

    print("growth (ours)")
    for grid in GROWTH:
        features = smooth_features(grid, arguments.channels)
        median = take_turns({"ours": functools.partial(merge, features)}, arguments.repeats, BLOCK)["ours"]
        count = grid[0] * grid[1]
        each = 1e9 * median / (count * np.log2(count))
        print(f"  {grid[0]:>3}x{grid[1]:<3} n = {count:>5}: {1e3 * median:8.2f} ms, {each:6.1f} ns for each n log2 n")


if __name__ == "__main__":
    main()
