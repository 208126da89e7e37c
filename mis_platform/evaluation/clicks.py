"""The simulated user of the click protocol: RITM's click robot, which SimpleClick and MIS share.

Masks with three values say 1 object, 0 background, -1 ignore. Ignored pixels are neither errors nor part of the IoU.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from mis_platform.simulation.clicks import Click


def next_click(target: np.ndarray, prediction: np.ndarray, clicked: Sequence[Click]) -> Click:
    """The click a user would make: the innermost pixel of the larger error.

    target: int8 [H, W] in {1, 0, -1}; prediction: bool [H, W]; clicked: the clicks made so far.

    "Innermost" is the largest distance to the border of the error region, the image frame being border too. A pixel
    that was clicked before is not clicked again, but its neighbours may be. The click is positive only if the missed
    region is strictly deeper than the wrongly added one, and among equals the first pixel in row-major order wins;
    so a perfect prediction gets the negative click (0, 0).
    """
    missed = _depth((target == 1) & ~prediction)
    added = _depth((target == 0) & prediction)
    for click in clicked:
        missed[int(click.y), int(click.x)] = added[int(click.y), int(click.x)] = 0
    positive = bool(missed.max() > added.max())
    y, x = divmod(int((missed if positive else added).argmax()), target.shape[1])
    return Click(y, x, positive)


def iou(target: np.ndarray, prediction: np.ndarray) -> np.float32:
    """Intersection over union outside the ignored pixels; 1 if neither mask has a pixel there.

    target: int8 [H, W] in {1, 0, -1}; prediction: bool [H, W]. float32, because published scores are compared so.
    """
    foreground, valid = target == 1, target != -1
    union = np.count_nonzero((foreground | prediction) & valid)
    if union == 0:
        return np.float32(1)
    return np.float32(np.count_nonzero(foreground & prediction) / union)


def _depth(error: np.ndarray) -> np.ndarray:
    """Distance of every error pixel to the nearest pixel that is none: float32 [H, W], in pixels.

    OpenCV's precise transform on the whole frame: the published clicks depend on its float32 rounding, so neither
    another library's transform nor a transform of a crop is a substitute. OpenCV hands small frames, and with one
    thread all of them, to Intel's IPP, whose last bits depend on where in memory the frame lies: which of several
    deepest pixels is clicked would be chance. Its own code rounds the square root of the exact squared distance.
    """
    if not error.any():
        return np.zeros(error.shape, np.float32)
    padded = np.pad(error, 1).view(np.uint8)  # the frame counts as border
    before = cv2.ipp.useIPP()  # of this thread
    cv2.ipp.setUseIPP(False)
    try:
        return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    finally:
        cv2.ipp.setUseIPP(before)
