"""Compiled inference on images of any size.

An image lies in the top-left corner of a canvas. Images whose canvases are the same make a batch, and a batch is one
call of a compiled program. There are as many programs as there are different pairs of canvases, one for the image and
one for the labels. How much is padding, and that nothing is lost, can be counted from the batches.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dsnet_jax import parallel
from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.evaluation.metrics import confusion_counts
from dsnet_jax.ops.extent import CANVAS_MULTIPLE, Extent
from dsnet_jax.ops.normalise import normalise
from dsnet_jax.ops.resize import resize_bilinear

if TYPE_CHECKING:
    from dsnet_jax.data.pipeline import Example

WAITING_PIXELS = 2**28  # Of images and labels that wait for others of their canvas: at 3 bytes a pixel 0.8 GB.


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


def batches(examples: Iterable["Example"], batch_size: int, waiting_pixels: int = WAITING_PIXELS) -> Iterator[Batch]:
    """Groups examples by their canvases into batches of one size. Every example comes out exactly once.

    A batch comes as soon as it is full. At the end the groups that remain come padded; and when too much waits, so does
    the fullest group.

    Args:
      examples: images and labels of any size.
      batch_size: B.
      waiting_pixels: how many pixels of image and label may wait.

    Raises:
      ValueError: a label is not as large as its example says.
    """
    groups: dict[tuple, list[Example]] = defaultdict(list)
    waiting = 0
    for example in examples:
        if example.label is not None and example.label.shape != tuple(example.label_hw):
            raise ValueError(f"{example.id}: the label is {example.label.shape}, label_hw says {example.label_hw}")
        key = canvas_hw(example.image.shape[:2]), canvas_hw(example.label_hw), example.label is not None
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


class Segmenter:
    """A network with its weights, ready to label images on the devices of one process.

    Attributes:
      model: called as `model.apply(variables, images, extent, train=False)`, gives an object with `logits`.
      mesh: devices of this process, one axis "data": batches are split over it, weights are copied to each.
    """

    def __init__(self, model: nn.Module, variables: dict, mesh: Mesh):
        """Copies the variables to the devices of the mesh.

        Args:
          model: see above; hashable, because programs are shared by all segmenters with an equal model.
          variables: params, batch_stats; on any devices, but each array whole on every one of them.
          mesh: see above.
        """
        self.model, self.mesh = model, mesh
        self._variables = jax.device_put(jax.device_get(variables), parallel.replicated(mesh))

    def __call__(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Labels a batch, whose size must be a multiple of the device count. Does not wait for the devices.

        Returns:
          labels: uint8 [B, Ho, Wo], predicted; 255 outside each `label_hw`.
          counts: the confusion matrix of the batch, int32 [K, K] as in `metrics`; None without true labels.
        """
        arrays = batch.images, batch.size_hw, batch.labels, batch.label_hw
        arrays = jax.device_put(arrays, parallel.split_by_batch(self.mesh))
        return segment(self.model, self._variables, *arrays, label_canvas_hw=batch.label_canvas_hw)

    def run(
        self, examples: Iterable["Example"], batch_size: int
    ) -> Iterator[tuple[Batch, jax.Array, jax.Array | None]]:
        """Labels all examples: yields each batch with what `__call__` returns for it.

        One batch is always under way, so that the devices compute while the host lays out the next.

        Args:
          examples: see `batches`.
          batch_size: images a batch, rounded up (and said) to a multiple of the device count.
        """
        devices = self.mesh.size
        whole = -(-batch_size // devices) * devices
        if whole != batch_size:
            logging.warning("evaluating %d images at a time, not %d: there are %d devices", whole, batch_size, devices)
        under_way = None
        for batch in batches(examples, whole):
            started = batch, *self(batch)
            if under_way is not None:
                yield under_way
            under_way = started
        if under_way is not None:
            yield under_way


@partial(jax.jit, static_argnames=("model", "label_canvas_hw"))
def segment(
    model: nn.Module,
    variables: dict,
    images: jax.Array,
    size_hw: jax.Array,
    labels: jax.Array | None,
    label_hw: jax.Array,
    *,
    label_canvas_hw: tuple[int, int],
) -> tuple[jax.Array, jax.Array | None]:
    """The compiled program: from images to predicted labels and, given true ones, their confusion counts.

    Arguments and results are those of `Segmenter`.
    """
    extent = Extent(size_hw, images.shape[1:3])
    logits = model.apply(variables, extent.zero_outside(normalise(images)), extent, train=False).logits
    cells_per_pixel = jnp.array(logits.shape[1:3]) / jnp.array(images.shape[1:3])  # Exact: canvases are multiples.
    ratio_hw = size_hw / label_hw * cells_per_pixel
    predictions = resized_argmax(logits, ratio_hw, extent.valid_hw(logits.shape[1:3]), label_hw, label_canvas_hw)
    counts = None if labels is None else confusion_counts(labels, predictions, logits.shape[-1])
    return predictions, counts


def resized_argmax(
    logits: jax.Array, ratio_hw: jax.Array, valid_in_hw: jax.Array, valid_out_hw: jax.Array, shape_hw: tuple[int, int]
) -> jax.Array:
    """The class with the largest logit after `resize_bilinear(logits, shape_hw, ratio_hw, valid_in_hw)`.

    Goes from band to band of 32 output rows: the resized logits as a whole, 150 classes at 4000x3000 pixels for
    instance, would need gigabytes.

    Args:
      logits: [B, h, w, K], K at most 255.
      ratio_hw: cells of the logits per pixel of the result, float32 [B, 2].
      valid_in_hw: valid rows and columns of the logits, int32 [B, 2].
      valid_out_hw: the same of the result, int32 [B, 2].
      shape_hw: height and width of the result; the height a multiple of 32.

    Returns:
      uint8 [B, *shape_hw]; 255 where it is not valid.
    """
    batch, rows_in = logits.shape[:2]
    rows, columns = shape_hw
    # The resized identity matrix holds the weight of every row of the logits in every row of the result.
    identity = jnp.broadcast_to(jnp.eye(rows_in)[:, None], (batch, rows_in, 1, rows_in))
    weights = resize_bilinear(identity, (rows, 1), ratio_hw.at[:, 1].set(1), valid_in_hw.at[:, 1].set(1))
    bands = weights.reshape(batch, rows // CANVAS_MULTIPLE, CANVAS_MULTIPLE, rows_in).swapaxes(0, 1)

    def label_band(band):
        values = jnp.einsum("boh,bhwk->bowk", band, logits.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        whole_band = ratio_hw.at[:, 0].set(1), valid_in_hw.at[:, 0].set(CANVAS_MULTIPLE)
        values = resize_bilinear(values, (CANVAS_MULTIPLE, columns), *whole_band)
        return jnp.argmax(values, axis=-1).astype(jnp.uint8)

    labels = jax.lax.map(label_band, bands).swapaxes(0, 1).reshape(batch, rows, columns)
    valid = Extent(valid_out_hw, shape_hw).mask(shape_hw)[..., 0]
    return jnp.where(valid, labels, jnp.uint8(IGNORE_LABEL))
