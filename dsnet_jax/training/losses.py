"""The loss: cross-entropy over the pixels that have a label."""

import jax
import jax.numpy as jnp
import optax

from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.precision import at_least_float32


def cross_entropy(logits: jax.Array, labels: jax.Array, ignore_label: int = 255) -> jax.Array:
    """Mean cross-entropy over all labelled pixels of the batch, at the labels' resolution.

    The batch is the global one when the arrays are sharded over devices: a device with few labelled pixels weighs less.

    Args:
      logits: [B, h, w, K], resized bilinearly to the labels' grid, in float32.
      labels: [B, H, W], integers in [0, K), or `ignore_label`.

    Returns:
      A scalar; 0 where no pixel has a label.
    """
    logits = resize_bilinear(at_least_float32(logits), labels.shape[1:])
    labelled = labels != ignore_label
    # Replaced before the loss is taken: the loss of class 255 is NaN, and NaN times a mask stays NaN.
    classes = jnp.where(labelled, labels, 0).astype(jnp.int32)
    per_pixel = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return jnp.sum(jnp.where(labelled, per_pixel, 0)) / jnp.maximum(1, jnp.sum(labelled))
