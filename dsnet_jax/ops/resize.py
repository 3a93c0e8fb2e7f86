"""Bilinear resizing with half-pixel centres and no antialiasing, for maps whose valid parts differ in size."""

import jax
import jax.numpy as jnp

from dsnet_jax.ops.precision import at_least_float32


def resize_bilinear(
    x: jax.Array,
    shape_hw: tuple[int, int],
    ratio_hw: jax.Array | tuple[float, float] | None = None,
    valid_in_hw: jax.Array | None = None,
) -> jax.Array:
    """Resizes maps as `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` does.

    There the ratio is that of the sizes. But a map of stride 8 has 23 cells on 180 pixels, the last of which lies half
    outside: stretched over the 180 pixels, cells would come to lie up to half a stride beside the pixels that they were
    computed from. Who knows the strides gives their ratio.

    Computed and returned in float32: two matrix products, whose gradients are matrix products too.

    Args:
      x: [B, H, W, C].
      shape_hw: height and width of the output.
      ratio_hw: cells of `x` per cell of the output, two numbers or float32 [B, 2]; None: by the sizes.
      valid_in_hw: int32 [B, 2], valid rows and columns of `x`, the last of which stand for those beyond; None: all.

    Returns:
      float32 [B, shape_hw[0], shape_hw[1], C].
    """
    x = at_least_float32(x)
    for axis in (0, 1):
        size_in, size_out = x.shape[1 + axis], shape_hw[axis]
        if ratio_hw is None and valid_in_hw is None and size_in == size_out:
            continue
        ratio = size_in / size_out if ratio_hw is None else jnp.asarray(ratio_hw)[..., axis]
        valid_in = size_in if valid_in_hw is None else valid_in_hw[:, axis]
        weights = _weights(size_in, size_out, ratio, valid_in, x.dtype)
        batch = "b" if weights.ndim == 3 else ""
        pattern = (f"{batch}oh,bhwc->bowc", f"{batch}ow,bhwc->bhoc")[axis]
        x = jnp.einsum(pattern, weights, x, precision=jax.lax.Precision.HIGHEST)
    return x


def _weights(size_in: int, size_out: int, ratio, valid_in, dtype) -> jax.Array:
    """Share of each input cell in each output cell, [(B,) size_out, size_in]; ratio and valid_in are numbers or [B]."""
    centre = (jnp.arange(size_out, dtype=dtype) + 0.5) * jnp.asarray(ratio, dtype)[..., None] - 0.5
    return bilinear_weights(centre, size_in, jnp.asarray(valid_in, dtype))


def bilinear_weights(centre: jax.Array, size: int, valid: jax.Array) -> jax.Array:
    """Share of each cell of a row in what is read from it between its cells, [..., n] -> [..., n, size].

    Args:
      centre: where it is read, in cells; 0 is the centre of the first one.
      size: cells of the row.
      valid: the number of those that are valid, the last of which stands for those beyond, [...].
    """
    centre = jnp.clip(centre, 0.0, valid[..., None] - 1.0)[..., None]
    return jnp.maximum(0.0, 1.0 - jnp.abs(jnp.arange(size, dtype=centre.dtype) - centre))
