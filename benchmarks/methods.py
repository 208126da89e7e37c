"""Seconds a click of the classical methods, and seconds a photo of the proposal sources, on one core.

    OMP_NUM_THREADS=1 python benchmarks/methods.py [--clicks 10] [--photos 4]

Photos that scikit-image carries, at 480x320 pixels, with the 60x40 patches of `color_texture` at patch 8. The clicks
are the robot's, on an ellipse as the object, which no method can reach: so every method gets all its clicks. Times are
of the processor, so other work on the machine counts little; medians and maxima over clicks and photos.
"""

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np
import skimage.data

from mis_platform.baselines.methods import build_method
from mis_platform.baselines.sources import VERSIONS, propose
from mis_platform.config import CLASSICAL_METHODS, ClassicalConfig, EvalConfig, FeaturesConfig, SourcesConfig
from mis_platform.evaluation.click_model import ClickModel
from mis_platform.evaluation.clicks import next_click
from mis_platform.model.features import build_extractor
from mis_platform.simulation.clicks import Click
from mis_platform.stages.precompute import Decoded, Photo, describe

WIDTH, HEIGHT = 480, 320
PHOTOS = ("astronaut", "cat", "coffee", "rocket")
CLICK_TARGET, PHOTO_TARGET = 1.0, 2.0  # seconds


def photos(count: int) -> list[np.ndarray]:
    """uint8 [320, 480, 3]."""
    chosen = [getattr(skimage.data, name)() for name in PHOTOS[:count]]
    return [cv2.resize(photo[..., :3], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for photo in chosen]


def ellipse() -> np.ndarray:
    """int8 [320, 480]: an object that ignores every colour."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (((y - 170) / 90) ** 2 + ((x - 250) / 120) ** 2 <= 1).astype(np.int8)


def processor_seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def click_times(model: ClickModel, photo: np.ndarray, clicks: int) -> list[float]:
    """Seconds of each click; what the method does once for a photo counts for the first."""
    target, threshold = ellipse(), EvalConfig().threshold
    once = processor_seconds(lambda: model.set_image(photo))
    answer, made, times = np.zeros(target.shape, np.float32), list[Click](), list[float]()
    for _ in range(clicks):
        made.append(next_click(target, answer > threshold, made))
        began = time.process_time()
        answer = model.predict(tuple(made), answer)
        times.append(time.process_time() - began)
    times[0] += once
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clicks", type=int, default=10)
    parser.add_argument("--photos", type=int, default=len(PHOTOS))
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    pictures = photos(arguments.photos)

    print(f"{WIDTH}x{HEIGHT} pixels, {len(pictures)} photos, {arguments.clicks} clicks on each: seconds a click")
    for name in CLASSICAL_METHODS:
        model = build_method(name, ClassicalConfig())
        report(name, [each for photo in pictures for each in click_times(model, photo, arguments.clicks)], CLICK_TARGET)

    extractor = build_extractor(FeaturesConfig(extractor="color_texture"))
    described = [describe([Decoded(Photo("", b""), photo)], extractor)[0] for photo in pictures]
    rows, columns = described[0].shape[:2]
    print(f"{columns}x{rows} patches, without the features: seconds a photo")
    for name in VERSIONS:
        report(name, [source_time(name, *pair) for pair in zip(pictures, described, strict=True)], PHOTO_TARGET)


def source_time(name: str, photo: np.ndarray, features: np.ndarray) -> float:
    return processor_seconds(lambda: propose(name, photo, features, SourcesConfig(), np.random.default_rng(0)))


def report(name: str, times: list[float], target: float) -> None:
    print(f"  {name:<12} median {np.median(times):6.3f}   largest {max(times):6.3f}   (target {target:g})")


if __name__ == "__main__":
    main()
