"""Batch normalisation and ReLU with gradients of their own, which keep what is kept anyway.

Automatic differentiation keeps the differences from the mean, in float32, and where a ReLU was active; and XLA computes
early, in the forward pass, what a gradient could compute from its arguments. Together that was a sixth to a quarter of
what a training step of DSNet-R101 in bfloat16 needs (docs/planning.md).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsnet_jax.ops.precision import at_least_float32

STATISTICS = "batch_statistics"  # The name by which rematerialisation can keep them: they are sums over all devices.


@partial(jax.jit, static_argnums=(3, 4))  # So that a network's many equal ones are traced and lowered once.
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises by the batch's own statistics, channel by channel: [B, H, W, C] over B, H and W.

    Of a batch that is sharded under `jax.jit` the statistics are those of the global one. For the gradient nothing of
    the size of `x` is kept but `x` itself.

    Source: Ioffe and Szegedy 2015. The variance is the mean of squared differences: the difference of two means cancels
    in float32 where the mean is large.

    Args:
      x: [B, H, W, C], any float type; computed in float32 or wider.
      scale, bias: [C], float32.
      epsilon: added to the variance.
      relu: whether negative results are set to zero.

    Returns:
      The normalised map, [B, H, W, C] in the type of `x`; mean and (biased) variance, [C], through which no gradient
      goes.
    """
    return _by_own_statistics(x, scale, bias, epsilon, relu)


@partial(jax.jit, static_argnums=(5, 6))
def batch_norm_inference(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float,
    relu: bool = False,
) -> jax.Array:
    """Normalises by statistics that are given, channel by channel; otherwise as `batch_norm`."""
    y = (at_least_float32(x) - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + bias
    return (jnp.maximum(y, 0) if relu else y).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _by_own_statistics(x, scale, bias, epsilon, relu):
    return _normalise(x, scale, bias, epsilon, relu)[0]


def _normalise(x, scale, bias, epsilon, relu):
    precise = at_least_float32(x)
    mean = jnp.mean(precise, axis=(0, 1, 2))
    mean = checkpoint_name(mean, STATISTICS)
    variance = checkpoint_name(jnp.mean(jnp.square(precise - mean), axis=(0, 1, 2)), STATISTICS)
    rate = jax.lax.rsqrt(variance + epsilon)
    y = (precise - mean) * (rate * scale) + bias
    y = jnp.maximum(y, 0) if relu else y
    return (y.astype(x.dtype), mean, variance), (x, scale, bias, mean, rate)


def _gradients(epsilon, relu, kept, cotangents):
    x, scale, bias, mean, rate = kept
    # Only when the gradient has come: XLA would compute what depends on x alone in the forward pass, and keep it.
    x, by_y = jax.lax.optimization_barrier((x, cotangents[0]))
    centred, by_y = at_least_float32(x) - mean, at_least_float32(by_y)
    if relu:
        by_y = jnp.where(centred * (rate * scale) + bias > 0, by_y, 0)
    normal = centred * rate
    by_bias = jnp.sum(by_y, axis=(0, 1, 2))
    by_scale = jnp.sum(by_y * normal, axis=(0, 1, 2))
    count = x.size // x.shape[-1]
    by_x = (by_y - by_bias / count - normal * (by_scale / count)) * (rate * scale)
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype), by_bias.astype(bias.dtype)


_by_own_statistics.defvjp(_normalise, _gradients)


@jax.jit
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), whose gradient reads the result: whoever comes next keeps that anyway."""
    return _relu(x)


@jax.custom_vjp
def _relu(x):
    return jnp.maximum(x, 0)


def _relu_keeping_the_result(x):
    y = jnp.maximum(x, 0)
    return y, y


def _gradient_of_relu(y, by_y):
    y, by_y = jax.lax.optimization_barrier((y, by_y))  # As above: no mask is computed in the forward pass.
    return (jnp.where(y > 0, by_y, 0),)


_relu.defvjp(_relu_keeping_the_result, _gradient_of_relu)
