"""Bilinear resizing with half-pixel centres and no antialiasing, for maps whose valid parts differ in size."""

import jax
import jax.numpy as jnp

from dsnet_jax.ops.precision import at_least_float32


def resize_bilinear(
    x: jax.Array,
    shape_hw: tuple[int, int],
    valid_in_hw: jax.Array | None = None,
    valid_out_hw: jax.Array | None = None,
) -> jax.Array:
    """Resizes maps as `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` does.

    With valid sizes, the valid part of each input is resized to the valid part of its output, and what lies outside
    repeats the last valid row and column. Computed and returned in float32: two matrix products, whose gradients are
    matrix products too.

    Args:
      x: [B, H, W, C].
      shape_hw: height and width of the output.
      valid_in_hw: int32 [B, 2], valid rows and columns of `x`; None: all.
      valid_out_hw: int32 [B, 2], valid rows and columns of the output; None: all.

    Returns:
      float32 [B, shape_hw[0], shape_hw[1], C].
    """
    x = at_least_float32(x)
    for axis in (0, 1):
        size_in, size_out = x.shape[1 + axis], shape_hw[axis]
        if valid_in_hw is None and valid_out_hw is None and size_in == size_out:
            continue
        valid_in = size_in if valid_in_hw is None else valid_in_hw[:, axis]
        valid_out = size_out if valid_out_hw is None else valid_out_hw[:, axis]
        weights = _weights(size_in, size_out, valid_in, valid_out, x.dtype)
        batch = "b" if weights.ndim == 3 else ""
        pattern = (f"{batch}oh,bhwc->bowc", f"{batch}ow,bhwc->bhoc")[axis]
        x = jnp.einsum(pattern, weights, x, precision=jax.lax.Precision.HIGHEST)
    return x


def _weights(size_in: int, size_out: int, valid_in, valid_out, dtype) -> jax.Array:
    """Share of each input cell in each output cell, [(B,) size_out, size_in]; valid sizes are ints or [B]."""
    valid_in, valid_out = (jnp.asarray(v, dtype)[..., None] for v in (valid_in, valid_out))
    centre = (jnp.arange(size_out, dtype=dtype) + 0.5) * (valid_in / valid_out) - 0.5
    centre = jnp.clip(centre, 0.0, valid_in - 1.0)[..., None]
    return jnp.maximum(0.0, 1.0 - jnp.abs(jnp.arange(size_in, dtype=dtype) - centre))
