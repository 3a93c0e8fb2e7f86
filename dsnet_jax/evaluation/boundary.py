"""Boundary IoU: how well the outlines are found, where mIoU mostly tells how well the insides are.

From Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021): intersection over
union of those pixels of a class's true and predicted masks that lie near the mask's own outline. As in the authors'
code distance is counted in squares, and the image's edge is an outline too.

Ignored pixels, where the truth is no class, take no side: they are not counted, they are no outline, and nothing that
is predicted there matters. So a flawless prediction scores 1, and the border of ignored pixels round PASCAL VOC's
objects hides no outline, as long as it is narrower than the distance.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from dsnet_jax.data.specs import IGNORE_LABEL

DILATION_RATIO = 0.02  # The distance from an outline that counts as near, over the image's diagonal.


def boundary_counts(pairs: Iterable[tuple[np.ndarray, np.ndarray]], num_classes: int, threads: int = 1) -> np.ndarray:
    """Counts images' pixels near outlines: those of each class in both maps, in the truth, and in the prediction.

    A pixel is near an outline if another class, or the image's edge, lies within d = max(1, round(0.02 * diagonal))
    pixels of it: in the square of side 2 d + 1 round it. For all classes at once that is where the square's smallest
    label is not its largest.

    Args:
      pairs: truth and prediction of each image, uint8 [H, W]. In the truth, values from num_classes on are ignored; the
        prediction is 0 .. num_classes - 1 wherever the truth is not ignored.
      num_classes: K, 1 .. 255.
      threads: that count, each an image.

    Returns:
      int64 [3, K]: pixels in both, in the truth, in the prediction.
    """
    with ThreadPoolExecutor(threads) as pool:
        counts = pool.map(lambda pair: _image_counts(*pair, num_classes), pairs)
        return sum(counts, np.zeros((3, num_classes), np.int64))


def _image_counts(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    distance = max(1, round(DILATION_RATIO * np.hypot(*truth.shape)))
    ignored = truth >= num_classes
    truth, prediction = (np.where(ignored, np.uint8(IGNORE_LABEL), labels) for labels in (truth, prediction))
    near_true, near_predicted = (_near_outline(labels, ignored, distance) for labels in (truth, prediction))
    both = near_true & near_predicted & (truth == prediction)
    near = truth[both], truth[near_true], prediction[near_predicted]
    return np.stack([np.bincount(labels, minlength=num_classes) for labels in near])


def _near_outline(labels: np.ndarray, ignored: np.ndarray, distance: int) -> np.ndarray:
    square = np.ones((2 * distance + 1,) * 2, np.uint8)
    lowest = cv2.erode(labels, square)  # Ignored pixels have the largest value there is here, ...
    highest = cv2.dilate(np.where(ignored, np.uint8(0), labels), square)  # ... and here the smallest.
    near = lowest != highest
    near[:distance] = near[-distance:] = near[:, :distance] = near[:, -distance:] = True
    return near & ~ignored


def boundary_iou(counts: np.ndarray) -> tuple[float | None, ...]:
    """By class, 0 .. 1; None where a class has no pixel near an outline, neither true nor predicted.

    Args:
      counts: of `boundary_counts`, added up, int64 [3, K].
    """
    both, true, predicted = counts.tolist()
    unions = [t + p - b for b, t, p in zip(both, true, predicted, strict=True)]
    return tuple(b / union if union else None for b, union in zip(both, unions, strict=True))
