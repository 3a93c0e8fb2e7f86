"""Loss and gradients of a batch, at once or one micro-batch after another."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.ops.normalise import normalise
from dsnet_jax.training.losses import cross_entropy, labelled_pixels

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# What makes the batch's metric of those of its micro-batches. Each loss is its micro-batch's share of the batch's.
OVER_MICRO_BATCHES = {
    "loss": jnp.sum,
    "main_loss": jnp.sum,
    "auxiliary_loss": jnp.sum,
    "offset_mean": jnp.mean,
    "offset_max": jnp.max,
    "offset_outside": jnp.mean,
}


def compute_gradients(
    model: nn.Module,
    variables: dict[str, Any],
    batch: Batch,
    dropout_key: jax.Array,
    deep_supervision_weight: float,
    accumulation_steps: int = 1,
) -> tuple[Any, Any, Metrics]:
    """Gradients of the batch's loss, the batch statistics after it, and its metrics.

    With n = `accumulation_steps` above 1 the batch runs as n micro-batches, one after another, which needs the memory
    of one (and a second copy of the gradients). Micro-batch j has every n-th image from the j-th on, so that each
    device keeps its images if B is divisible by n times the number of devices.

    What is the same as for n = 1: the loss, the mean over the labelled pixels of the whole batch, and so its gradients
    as far as they do not depend on the following. What is not: batch normalisation takes its mean and variance over a
    micro-batch (on all devices), not over the batch, and dropout draws other masks.

    Args:
      model: a segmentation network.
      variables: its `params` and `batch_stats`.
      batch: `image`, uint8 [B, H, W, 3], and `label`, uint8 [B, H, W]; B is divisible by n.
      dropout_key: with n above 1, each micro-batch has a key split from it.
      deep_supervision_weight: of the auxiliary loss.
      accumulation_steps: n.

    Returns:
      Gradients, like `params`; the new `batch_stats`, moved once, by the mean of the micro-batches' statistics; and
      scalars: loss (the whole one), main_loss, auxiliary_loss and those of `offset_metrics`, where offset_mean and
      offset_outside are means over the micro-batches and offset_max is their largest.
    """
    pixels = labelled_pixels(batch["label"])

    def loss_function(params: Any, image: jax.Array, label: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        output, updated = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            normalise(image),
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        loss = cross_entropy(output.logits, label, pixels)
        metrics = {"main_loss": loss, **offset_metrics(output)}
        if output.auxiliary_logits is not None:
            metrics["auxiliary_loss"] = cross_entropy(output.auxiliary_logits, label, pixels)
            loss = loss + deep_supervision_weight * metrics["auxiliary_loss"]
        return loss, (updated["batch_stats"], metrics | {"loss": loss})

    gradient = jax.grad(loss_function, has_aux=True)
    params = variables["params"]
    if accumulation_steps == 1:
        gradients, (batch_stats, metrics) = gradient(params, batch["image"], batch["label"], dropout_key)
        return gradients, batch_stats, metrics

    def add_micro_batch(total: Any, micro_batch: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        gradients, outcome = gradient(params, *micro_batch)
        return jax.tree.map(jnp.add, total, gradients), outcome

    micro_batches = (
        _every_nth(batch["image"], accumulation_steps),
        _every_nth(batch["label"], accumulation_steps),
        jax.random.split(dropout_key, accumulation_steps),
    )
    gradients, (batch_stats, metrics) = jax.lax.scan(add_micro_batch, optax.tree.zeros_like(params), micro_batches)
    batch_stats = jax.tree.map(lambda values: jnp.mean(values, axis=0), batch_stats)
    return gradients, batch_stats, {name: OVER_MICRO_BATCHES[name](values) for name, values in metrics.items()}


def _every_nth(x: jax.Array, n: int) -> jax.Array:
    """[B, ...] -> [n, B / n, ...]; this way round, what lies on a device stays there."""
    return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)


def offset_metrics(output: SegmentationOutput) -> Metrics:
    """Where the points go: mean and largest offset in pixels of the sampled map, and the share outside of it.

    Offsets are known to run away in training; nothing bounds them, so they are watched.
    """
    if output.offsets is None:
        return {}
    offsets = jax.lax.stop_gradient(output.offsets)
    height, width, taps = offsets.shape[1:4]
    side = round(taps**0.5)
    tap = jnp.arange(taps)
    y = jnp.arange(height)[:, None, None] + tap // side - side // 2 + offsets[..., 0]
    x = jnp.arange(width)[None, :, None] + tap % side - side // 2 + offsets[..., 1]
    outside = (y < 0) | (y > height - 1) | (x < 0) | (x > width - 1)
    length = jnp.linalg.norm(offsets, axis=-1)
    return {
        "offset_mean": jnp.mean(length),
        "offset_max": jnp.max(length),
        "offset_outside": jnp.mean(outside, dtype=offsets.dtype),
    }
