"""The precision of what must not be rounded: coordinates, statistics, logits and loss."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or as it is if it is wider: float64 runs, the references of tests, stay in float64 throughout."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
