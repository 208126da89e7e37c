"""Colour augmentation in training, before the network sees the photo.

The official MIS code has it, the paper does not mention it. Only the network's input changes: targets, clicks and the
image that the smoothness loss reads stay as they are.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

JITTER_PROBABILITY = 0.3
BRIGHTNESS = CONTRAST = SATURATION = 0.8  # factors are uniform in [1 - x, 1 + x]
HUE = 0.2  # turns, uniform in [-x, x]
GRAY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.2
BLUR_KERNEL = 3  # pixels
BLUR_SIGMA = (1.0, 2.0)  # pixels, uniform


def augment_colors(images_B3HW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
    """Jitter, then grey, then blur, each at its own probability and for each image alone; float RGB in [0, 1].

    The four parts of the jitter come in random order, as in torchvision's ColorJitter. rngs: one generator per image,
    so the result depends neither on the batch nor on who made it.
    """
    assert len(rngs) == len(images_B3HW), f"{len(images_B3HW)} images need as many generators, got {len(rngs)}"
    if len(rngs) == 0:
        return images_B3HW
    with torch.autocast(images_B3HW.device.type, enabled=False):  # or the blur, a convolution, rounds to half precision
        return torch.stack([_augment(image, rng) for image, rng in zip(images_B3HW, rngs, strict=True)])


def _augment(image_3HW: Tensor, rng: np.random.Generator) -> Tensor:
    # Here, because it takes a second to import, and processes that only describe or start a training do so at the top.
    from torchvision.transforms.v2 import functional as transforms

    jitter, gray, blur = rng.random(3) < (JITTER_PROBABILITY, GRAY_PROBABILITY, BLUR_PROBABILITY)
    if jitter:
        image_3HW = _jitter(image_3HW, rng)
    if gray:
        image_3HW = transforms.rgb_to_grayscale(image_3HW, num_output_channels=3)
    if blur:
        sigma = float(rng.uniform(*BLUR_SIGMA))
        image_3HW = transforms.gaussian_blur(image_3HW, [BLUR_KERNEL, BLUR_KERNEL], [sigma, sigma])
    return image_3HW


def _jitter(image_3HW: Tensor, rng: np.random.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional as transforms

    adjustments = (
        (transforms.adjust_brightness, rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)),
        (transforms.adjust_contrast, rng.uniform(1 - CONTRAST, 1 + CONTRAST)),
        (transforms.adjust_saturation, rng.uniform(1 - SATURATION, 1 + SATURATION)),
        (transforms.adjust_hue, rng.uniform(-HUE, HUE)),
    )
    for which in rng.permutation(len(adjustments)):
        adjust, amount = adjustments[which]
        image_3HW = adjust(image_3HW, float(amount))
    return image_3HW
