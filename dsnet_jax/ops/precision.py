"""The precision of what must not be rounded: coordinates, statistics, logits and loss."""

import jax
import jax.numpy as jnp


def float32_or_wider(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float32, or the type itself if it is wider: float64 runs, the references of tests, stay in float64 throughout."""
    return jnp.promote_types(dtype, jnp.float32)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in `float32_or_wider`."""
    return x.astype(float32_or_wider(x.dtype))
