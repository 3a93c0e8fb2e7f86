"""The loss: cross-entropy over the pixels that have a label."""

import jax
import jax.numpy as jnp
import optax

from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.precision import at_least_float32


def labelled_pixels(labels: jax.Array, ignore_label: int = 255) -> jax.Array:
    """How many pixels of labels [B, H, W] are not `ignore_label`, int32; of the global batch if it is sharded."""
    return jnp.sum(labels != ignore_label)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, pixels: jax.Array | None = None, ignore_label: int = 255
) -> jax.Array:
    """Mean cross-entropy over all labelled pixels of the batch, at the labels' resolution.

    The batch is the global one when the arrays are sharded over devices: a device with few labelled pixels weighs less.

    Args:
      logits: [B, h, w, K], resized bilinearly to the labels' grid, in float32.
      labels: [B, H, W], integers in [0, K), or `ignore_label`.
      pixels: what the sum is divided by; None: the labelled pixels of `labels`. Where `labels` is a part of a batch,
        the number of the whole batch makes the result its share of the mean: the parts add up to it exactly.

    Returns:
      A scalar; 0 where no pixel has a label.
    """
    if pixels is None:
        pixels = labelled_pixels(labels, ignore_label)
    logits = resize_bilinear(at_least_float32(logits), labels.shape[1:])
    labelled = labels != ignore_label
    # Replaced before the loss is taken: the loss of class 255 is NaN, and NaN times a mask stays NaN.
    classes = jnp.where(labelled, labels, 0).astype(jnp.int32)
    per_pixel = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return jnp.sum(jnp.where(labelled, per_pixel, 0)) / jnp.maximum(1, pixels)
