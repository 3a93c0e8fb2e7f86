"""Convolution over sampled points: equation 2 of the paper.

Points and offsets are (y, x) in pixels of the map that is sampled; the centre of its top-left cell is (0, 0).
"""

import jax
import jax.numpy as jnp

from dsnet_jax.ops.precision import at_least_float32


def bilinear_sample(features: jax.Array, points_yx: jax.Array) -> jax.Array:
    """Reads a map between its cells.

    A point is the weighted mean of the four cells round it; a cell outside the map reads zero, corner by corner. At an
    integer point the gradient by the point is the forward difference, as PyTorch's is: the cell that a point belongs to
    is its floor, and the floor is constant.

    Args:
      features: [B, H, W, C], any float type.
      points_yx: [B, ..., 2], any finite value; coordinates and weights are computed in float32 (or float64 when given).

    Returns:
      [B, ..., C] in the type of `features`.
    """
    height, width = features.shape[1:3]
    points_yx = at_least_float32(points_yx)
    corner_yx = jax.lax.stop_gradient(jnp.floor(points_yx))
    fraction = points_yx - corner_yx
    # Read in float32: the gradient adds up all that was read of a cell, and sums in bfloat16 stop growing at 256.
    flat = at_least_float32(features).reshape(features.shape[0], height * width, -1)
    total = None
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = corner_yx[..., 0] + dy, corner_yx[..., 1] + dx
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            # Clamped in floating point, where huge values do not wrap; only for addressing: `inside` keeps them out.
            index = jnp.clip(y, 0, height - 1).astype(jnp.int32) * width + jnp.clip(x, 0, width - 1).astype(jnp.int32)
            weight_y = fraction[..., 0] if dy else 1 - fraction[..., 0]
            weight_x = fraction[..., 1] if dx else 1 - fraction[..., 1]
            weight = jnp.where(inside, weight_y * weight_x, 0)
            # One gather an image: an index over the batch would make XLA gather the whole map on every device.
            cell = jax.vmap(lambda cells, at: cells.at[at].get(mode="promise_in_bounds"))(flat, index)
            term = weight[..., None] * cell
            total = term if total is None else total + term
    return total.astype(features.dtype)


def dynamic_sampling_conv(
    features: jax.Array, offsets: jax.Array, kernel: jax.Array, modulation: jax.Array | None = None
) -> jax.Array:
    """Dynamic sampling convolution: a k x k convolution whose k*k points are moved by offsets.

    At every position (i, j) tap (m, n) reads the map at (i + m - (k-1)/2 + dy, j + n - (k-1)/2 + dx), bilinearly and
    zero outside, and multiplies what it reads by the kernel's own matrix [m, n]. Zero offsets make it an ordinary
    convolution with zero padding. One tap is computed at a time, forward and backward, so that no buffer of k*k samples
    exists.

    Source: DSNet, equation 2; with `modulation`, Deformable ConvNets v2, equation 1.

    Args:
      features: [B, H, W, C], any float type; sums are accumulated in float32.
      offsets: [B, H, W, k*k, 2], (dy, dx) in pixels, row by row over the k x k grid; kept in float32.
      kernel: [k, k, C, D], k odd.
      modulation: [B, H, W, k*k], factors on the samples; None: all one.

    Returns:
      [B, H, W, D] in the type of `features`.

    Raises:
      ValueError: k is even, or shapes do not fit each other.
    """
    batch, height, width, channels = features.shape
    size = kernel.shape[0]
    if size % 2 == 0 or kernel.ndim != 4 or kernel.shape[:3] != (size, size, channels):
        raise ValueError(f"kernel is {kernel.shape}: [k, k, {channels}, D] with k odd is needed")
    if offsets.shape != (batch, height, width, size * size, 2):
        raise ValueError(f"offsets are {offsets.shape}: {(batch, height, width, size * size, 2)} is needed")
    if modulation is not None and modulation.shape != offsets.shape[:-1]:
        raise ValueError(f"modulation is {modulation.shape}: {offsets.shape[:-1]} is needed")

    source = at_least_float32(features)  # Once, outside the loop, so that the taps' gradients add up in float32 too.
    positions = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), axis=-1) - size // 2

    def add_tap(total, tap):
        tap_yx, tap_offsets, tap_kernel, tap_modulation = tap
        sample = bilinear_sample(source, positions + tap_yx + at_least_float32(tap_offsets))
        if tap_modulation is not None:
            sample = sample * tap_modulation[..., None]
        sample = sample.astype(features.dtype)
        tap_kernel = tap_kernel.astype(features.dtype)
        product = jnp.einsum("bhwc,cd->bhwd", sample, tap_kernel, preferred_element_type=total.dtype)
        return total + product, None

    taps = (
        grid.reshape(-1, 2),
        jnp.moveaxis(offsets, 3, 0),
        kernel.reshape(size * size, channels, -1),
        None if modulation is None else jnp.moveaxis(modulation, 3, 0),
    )
    zero = at_least_float32(jnp.zeros((batch, height, width, kernel.shape[-1]), features.dtype))
    total, _ = jax.lax.scan(jax.checkpoint(add_tap, prevent_cse=False), zero, taps)
    return total.astype(features.dtype)
