"""The loss: cross-entropy over the pixels that have a label."""

import jax
import jax.numpy as jnp

from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.precision import at_least_float32
from dsnet_jax.ops.resize import bilinear_weights

BAND_ROWS = 16  # Of labels at a time, at most. Fewer take less memory; a CPU is quickest with 16 to 32.


def labelled_pixels(labels: jax.Array) -> jax.Array:
    """How many pixels of labels [B, H, W] are not the ignore label, int32; of the global batch if it is sharded."""
    return jnp.sum(labels != IGNORE_LABEL)


def cross_entropy(logits: jax.Array, labels: jax.Array, pixels: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy over all labelled pixels of the batch, at the labels' resolution.

    The batch is the global one when the arrays are sharded over devices: a device with few labelled pixels weighs less.

    Goes from band to band of rows, forward and backward, so that the resized logits as a whole never exist: of 150
    classes at 576x576 they and what is computed of them are 0.2 GB an image each, more than the network itself needs.

    Args:
      logits: [B, h, w, K], resized bilinearly to the labels' grid, in float32.
      labels: [B, H, W], integers in [0, K), or 255, the ignore label.
      pixels: what the sum is divided by; None: the labelled pixels of `labels`. Where `labels` is a part of a batch,
        the number of the whole batch makes the result its share of the mean: the parts add up to it exactly.

    Returns:
      A scalar; 0 where no pixel has a label, NaN where a label is no class.
    """
    if pixels is None:
        pixels = labelled_pixels(labels)
    logits = at_least_float32(logits)
    (batch, rows_in), (rows, columns) = logits.shape[:2], labels.shape[1:]
    bands = -(-rows // BAND_ROWS)
    band_rows = -(-rows // bands)
    missing = bands * band_rows - rows  # In the last band; of no weight and without labels.
    centre = (jnp.arange(rows, dtype=logits.dtype) + 0.5) * (rows_in / rows) - 0.5
    weights = bilinear_weights(centre, rows_in, jnp.asarray(rows_in))
    weights = jnp.pad(weights, ((0, missing), (0, 0))).reshape(bands, band_rows, rows_in)
    labels = jnp.pad(labels, ((0, 0), (0, missing), (0, 0)), constant_values=IGNORE_LABEL)
    labels = labels.reshape(batch, bands, band_rows, columns).swapaxes(0, 1)

    def add_band(total, band):
        band_weights, band_labels = band
        values = jnp.einsum("oh,bhwk->bowk", band_weights, logits, precision=jax.lax.Precision.HIGHEST)
        values = resize_bilinear(values, (band_rows, columns))
        labelled = band_labels != IGNORE_LABEL
        values -= jax.lax.stop_gradient(jnp.max(values, axis=-1, keepdims=True))  # No exponential overflows.
        # Picked by comparison, not by index: that would gather in the loss and scatter in its gradient, slow on a TPU.
        is_class = band_labels[..., None] == jnp.arange(values.shape[-1])
        of_class = jnp.sum(jnp.where(is_class, values, 0), axis=-1)
        per_pixel = jnp.log(jnp.sum(jnp.exp(values), axis=-1)) - of_class
        per_pixel = jnp.where(band_labels < values.shape[-1], per_pixel, jnp.nan)  # A label that is no class is told.
        return total + jnp.sum(jnp.where(labelled, per_pixel, 0), axis=(1, 2)), None

    # A sum an image, so that devices which share the batch need not add up theirs at every band.
    zero = jnp.zeros(batch, logits.dtype)
    sums, _ = jax.lax.scan(jax.checkpoint(add_band, prevent_cse=False), zero, (weights, labels))
    return jnp.sum(sums) / jnp.maximum(1, pixels)
