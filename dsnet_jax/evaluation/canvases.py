"""Images of any size on few canvases, in batches.

An image lies in the top-left corner of a canvas. Images whose canvases are the same make a batch, and a batch is one
call of a compiled program. There are as many programs as there are different pairs of canvases, one for the image and
one for the labels. How much is padding, and that nothing is lost, can be counted from the batches.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.data.transforms import scaled_size_hw
from dsnet_jax.evaluation.protocols import Protocol
from dsnet_jax.ops.extent import CANVAS_MULTIPLE

if TYPE_CHECKING:
    from dsnet_jax.data.pipeline import Example

WAITING_PIXELS = 2**28  # Of images and labels that wait for others of their canvas: at 3 bytes a pixel 0.8 GB.
PADDED_SHARE = 1.2  # Of `choose_canvases` where no other is given: the default of `config.evaluation.padded_share` too.
LARGEST = 1.5  # Pixels of a canvas over those of the largest that an image has of its own, likewise.

CanvasPair = tuple[tuple[int, int], tuple[int, int]]  # Height and width of the image's and of the label's.


def up_to_multiple(side: int) -> int:
    """The next multiple of `CANVAS_MULTIPLE`."""
    return -(-side // CANVAS_MULTIPLE) * CANVAS_MULTIPLE


def canvas_hw(size_hw: tuple[int, int]) -> tuple[int, int]:
    """The canvas for an image: each side rounded up to the next of a list of sides.

    The list is the multiples of 32 up to 512, and eight steps to each doubling from there on: 576, 640, ..., 1024, 1152
    ... A side below 2048 has one of 32 values. From 256 pixels on a side grows by less than 1/8. For sides drawn evenly
    between 100 and 2000 the canvases have 1.09 times the images' pixels in total.

    Args:
      size_hw: height and width in pixels, at least 1.
    """
    height, width = (_canvas_side(side) for side in size_hw)
    return height, width


def _canvas_side(side: int) -> int:
    power = 1 << (side.bit_length() - 1)
    step = max(CANVAS_MULTIPLE, power // 8)
    return -(-side // step) * step


def own_canvases(example: "Example") -> CanvasPair:
    """`canvas_hw` of an example's image and of its label: for images whose sizes are not known beforehand."""
    return canvas_hw(example.image.shape[:2]), canvas_hw(example.label_hw)


def choose_canvases(
    sizes_hw: np.ndarray,
    image_scale: float,
    protocol: Protocol,
    batch_size: int,
    padded_share: float = PADDED_SHARE,
) -> dict[tuple[int, int], CanvasPair]:
    """As few canvases for images of known sizes as `padded_share` allows, by size of the label.

    Begins with each size's own canvas, and makes one of the two that add the fewest pixels, again and again, as long as
    all passes over all batches, the last of a canvas padded to its size, do not compute more than `padded_share` times
    the images' pixels; and beyond, where fewer batches make up for larger canvases. But no canvas becomes larger than
    `LARGEST` allows: a few images, some high and some wide, would else make a batch that does not fit into memory.

    Args:
      sizes_hw: heights and widths of the labels, [N, 2].
      image_scale: working resolution: of the images over the labels.
      protocol: whose passes count.
      batch_size: B.
      padded_share: pixels computed over pixels of the images, at least 1.
    """
    if not len(sizes_hw):
        return {}
    sizes, images = np.unique(np.asarray(sizes_hw), axis=0, return_counts=True)
    image_sizes = np.array([scaled_size_hw(size, image_scale) for size in sizes.tolist()])
    canvases, group_of = np.unique(up_to_multiple(image_sizes), axis=0, return_inverse=True)
    group_of = group_of.reshape(-1)  # Of each size; NumPy 2.0 gives it another axis.
    counts = np.bincount(group_of, images).astype(np.int64)

    def cost(canvas: np.ndarray, count: np.ndarray) -> np.ndarray:
        return protocol.pixels(canvas, CANVAS_MULTIPLE) * (-(-count // batch_size) * batch_size)

    def added(group: int) -> np.ndarray:
        """By making one canvas of this group's and of each other's, float64 [groups]; infinite where there is none."""
        common = np.maximum(canvases, canvases[group])
        none = (counts == 0) | (np.arange(len(counts)) == group) | (common.prod(axis=1) > most)
        return np.where(none, np.inf, cost(common, counts + counts[group]) - costs - costs[group])

    most = LARGEST * canvases.prod(axis=1).max()
    costs = cost(canvases, counts)
    limit = padded_share * (protocol.pixels(image_sizes) * images).sum()
    pairs = np.stack([added(group) for group in range(len(canvases))])
    while True:
        group, other = np.unravel_index(pairs.argmin(), pairs.shape)
        if not pairs[group, other] <= max(0, limit - costs.sum()):  # Infinite, when none are left.
            break
        canvases[group] = np.maximum(canvases[group], canvases[other])
        counts[group], counts[other] = counts[group] + counts[other], 0
        costs[group], costs[other] = cost(canvases[group], counts[group]), 0
        group_of[group_of == other] = group
        pairs[group], pairs[:, group] = (added(group),) * 2
        pairs[other], pairs[:, other] = np.inf, np.inf
    chosen = {}
    for size, group in zip(sizes.tolist(), group_of, strict=True):
        label_canvas = up_to_multiple(sizes[group_of == group].max(axis=0))
        chosen[tuple(size)] = tuple(canvases[group].tolist()), tuple(label_canvas.tolist())
    return chosen


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images of one canvas, and what pads their number. Padding is a black image of 1x1 whose label is ignored.

    Attributes:
      examples: the real ones, at most B; they are the first rows of the arrays.
      images: uint8 [B, Hc, Wc, 3], each image in its top-left corner.
      size_hw: height and width of each image, int32 [B, 2].
      labels: uint8 [B, Ho, Wo], each in its top-left corner, 255 beyond it; None if the examples have none.
      label_hw: height and width of each label, int32 [B, 2]; predictions are made in this size.
      label_canvas_hw: (Ho, Wo).
    """

    examples: tuple["Example", ...]
    images: np.ndarray
    size_hw: np.ndarray
    labels: np.ndarray | None
    label_hw: np.ndarray
    label_canvas_hw: tuple[int, int]

    @property
    def padding(self) -> int:
        """How many rows are not examples."""
        return len(self.images) - len(self.examples)

    def cropped(self, labels: np.ndarray | jax.Array) -> Iterator[tuple["Example", np.ndarray]]:
        """Each example with its own part of `labels` [B, Ho, Wo]: uint8 [H, W]."""
        for example, row, (height, width) in zip(self.examples, np.asarray(labels), self.label_hw, strict=False):
            yield example, row[:height, :width]


def batches(
    examples: Iterable["Example"],
    batch_size: int,
    waiting_pixels: int = WAITING_PIXELS,
    canvases_of: Callable[["Example"], CanvasPair] = own_canvases,
) -> Iterator[Batch]:
    """Groups examples by their canvases into batches of one size. Every example comes out exactly once.

    A batch comes as soon as it is full. At the end the groups that remain come padded; and when too much waits, so does
    the fullest group.

    Args:
      examples: images and labels of any size.
      batch_size: B.
      waiting_pixels: how many pixels of image and label may wait.
      canvases_of: an example's canvases.

    Raises:
      ValueError: a label is not as large as its example says.
    """
    groups: dict[tuple, list[Example]] = defaultdict(list)
    waiting = 0
    for example in examples:
        if example.label is not None and example.label.shape != tuple(example.label_hw):
            raise ValueError(f"{example.id}: the label is {example.label.shape}, label_hw says {example.label_hw}")
        key = *canvases_of(example), example.label is not None
        groups[key].append(example)
        waiting += _pixels(example)
        if len(groups[key]) == batch_size:
            waiting -= sum(map(_pixels, groups[key]))
            yield _lay_out(groups.pop(key), key, batch_size)
        while waiting > waiting_pixels:
            fullest = max(groups, key=lambda key: len(groups[key]))
            waiting -= sum(map(_pixels, groups[fullest]))
            yield _lay_out(groups.pop(fullest), fullest, batch_size)
    for key, group in groups.items():
        yield _lay_out(group, key, batch_size)


def _pixels(example: "Example") -> int:
    return example.image.shape[0] * example.image.shape[1] + (0 if example.label is None else example.label.size)


def _lay_out(group: list["Example"], key: tuple, batch_size: int) -> Batch:
    image_canvas_hw, label_canvas_hw, labelled = key
    images = np.zeros((batch_size, *image_canvas_hw, 3), np.uint8)
    labels = np.full((batch_size, *label_canvas_hw), IGNORE_LABEL, np.uint8) if labelled else None
    size_hw, label_hw = np.ones((2, batch_size, 2), np.int32)
    for row, example in enumerate(group):
        size_hw[row], label_hw[row] = example.image.shape[:2], example.label_hw
        images[row, : size_hw[row, 0], : size_hw[row, 1]] = example.image
        if labelled:
            labels[row, : label_hw[row, 0], : label_hw[row, 1]] = example.label
    return Batch(tuple(group), images, size_hw, labels, label_hw, label_canvas_hw)
