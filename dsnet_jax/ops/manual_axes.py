"""Arrays inside of `jax.shard_map`, which tells those that are the same on all devices from those that vary."""

import jax
import jax.numpy as jnp

from dsnet_jax.ops.precision import at_least_float32


def varying_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """The same arrays, each taken to vary over the axes that any of them varies over; outside of `shard_map` as is.

    For a function with a gradient of its own, which would give the part of one device for an argument that is the same
    on all: of what this gives, JAX adds the parts up.
    """
    return [None if array is None else _vary(array, *arrays) for array in arrays]


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Where sums of what is made of `like` start: they vary as it does, and are float32 or wider."""
    return _vary(at_least_float32(jnp.zeros(shape, like.dtype)), like)


def _vary(array: jax.Array, *others: jax.Array | None) -> jax.Array:
    axes = frozenset().union(*(_axes(other) for other in others if other is not None)) - _axes(array)
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def _axes(array: jax.Array) -> frozenset[str]:
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying  # As JAX has called it, and as it does from 0.10.2.
