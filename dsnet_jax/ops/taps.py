"""The k*k taps of a dynamic sampling convolution, one at a time, in the layouts of its arguments."""

import math

import flax.struct
import jax
import jax.numpy as jnp

from dsnet_jax.ops.manual_axes import zeros
from dsnet_jax.ops.precision import at_least_float32


@flax.struct.dataclass
class Taps:
    """What is sampled where, and multiplied by what. Nothing is copied: buffers of all taps' points would grow with k.

    Attributes:
      offsets: [B, H, W, k*k, 2], (dy, dx) in pixels.
      kernel: [k*k, C, D].
      factors: [B, H, W, k*k] or None.
    """

    offsets: jax.Array
    kernel: jax.Array
    factors: jax.Array | None

    @property
    def count(self) -> int:
        return self.offsets.shape[3]

    def __getitem__(self, tap: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Points [B, H*W, 2] in pixels of the map, float32 or wider; kernel [C, D]; factors [B, H*W] or None."""
        batch, height, width = self.offsets.shape[:3]
        size = math.isqrt(self.count)
        positions = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
        regular = positions + jnp.stack([tap // size, tap % size]) - size // 2
        offsets = jax.lax.dynamic_index_in_dim(self.offsets, tap, 3, keepdims=False)
        points = (regular + at_least_float32(offsets)).reshape(batch, height * width, 2)
        kernel = jax.lax.dynamic_index_in_dim(self.kernel, tap, 0, keepdims=False)
        if self.factors is None:
            return points, kernel, None
        factors = jax.lax.dynamic_index_in_dim(self.factors, tap, 3, keepdims=False)
        return points, kernel, at_least_float32(factors).reshape(batch, height * width)

    def zeros(self) -> "Taps":
        """Gradients of nothing yet, in float32 or wider."""
        return jax.tree.map(lambda x: zeros(x.shape, x), self)

    def at_set(
        self, tap: jax.Array, by_points: jax.Array, by_kernel: jax.Array, by_factors: jax.Array | None
    ) -> "Taps":
        """With the gradients of one tap, in the shapes of `self[tap]`, put in their places."""

        def put(whole, part, axis):
            part = part.reshape(whole.shape[:axis] + whole.shape[axis + 1 :]).astype(whole.dtype)
            return jax.lax.dynamic_update_index_in_dim(whole, part, tap, axis)

        factors = None if self.factors is None else put(self.factors, by_factors, 3)
        return Taps(put(self.offsets, by_points, 3), put(self.kernel, by_kernel, 0), factors)
