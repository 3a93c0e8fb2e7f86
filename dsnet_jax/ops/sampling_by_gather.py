"""Bilinear sampling that reads four cells a point, and adds to four cells a point in its gradient."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsnet_jax.ops.manual_axes import zeros
from dsnet_jax.ops.precision import at_least_float32
from dsnet_jax.ops.taps import Taps


class Corner(NamedTuple):
    """One of the four cells round each point, [B, N].

    Attributes:
      index: of the cell in the flat map; of some cell where the corner lies outside.
      inside: whether it lies on the map.
      weight_y, weight_x: what the point's bilinear weights are made of.
    """

    index: jax.Array
    inside: jax.Array
    weight_y: jax.Array
    weight_x: jax.Array

    @property
    def weight(self) -> jax.Array:
        """Zero outside the map."""
        return jnp.where(self.inside, self.weight_y * self.weight_x, 0)


def corners_of(points_yx: jax.Array, height: int, width: int) -> list[Corner]:
    """The cells at (floor y, floor x), (., + 1), (+ 1, .) and (+ 1, + 1) of `points_yx` [B, N, 2]."""
    # The cell that a point belongs to is its floor, which is constant: so PyTorch's gradients at whole numbers.
    floor = jax.lax.stop_gradient(jnp.floor(points_yx))
    fraction = points_yx - floor
    corners = []
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = floor[..., 0] + dy, floor[..., 1] + dx
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            # Clamped in floating point, where huge values do not wrap; only for addressing: `inside` keeps them out.
            index = jnp.clip(y, 0, height - 1).astype(jnp.int32) * width + jnp.clip(x, 0, width - 1).astype(jnp.int32)
            weight_y = fraction[..., 0] if dy else 1 - fraction[..., 0]
            weight_x = fraction[..., 1] if dx else 1 - fraction[..., 1]
            corners.append(Corner(index, inside, weight_y, weight_x))
    return corners


def bilinear_sample(features: jax.Array, points_yx: jax.Array) -> jax.Array:
    """Reads a map between its cells.

    A point is the weighted mean of the four cells round it; a cell outside the map reads zero, corner by corner. At an
    integer point the gradient by the point is the forward difference, as PyTorch's is.

    Args:
      features: [B, H, W, C], any float type.
      points_yx: [B, ..., 2], any finite value; coordinates and weights are computed in float32 (or float64 when given).

    Returns:
      [B, ..., C] in the type of `features`.
    """
    batch, height, width, channels = features.shape
    points_yx = at_least_float32(points_yx)
    # Read in float32: the gradient adds up all that was read of a cell, and sums in bfloat16 stop growing at 256.
    cells = at_least_float32(features).reshape(batch, height * width, channels)
    corners = corners_of(points_yx.reshape(batch, -1, 2), height, width)
    read = _weighted_sum(cells, corners, [corner.weight for corner in corners])
    return read.reshape(*points_yx.shape[:-1], channels).astype(features.dtype)


def forward(features: jax.Array, taps: Taps) -> jax.Array:
    """Samples of `features` [B, H, W, C] times the kernel, summed over the taps: [B, H*W, D], float32 or wider."""
    batch, height, width, channels = features.shape
    cells = features.reshape(batch, height * width, channels)

    def add_tap(total, tap):
        points, kernel, factors = taps[tap]
        corners = corners_of(points, height, width)
        sample = _weighted_sum(cells, corners, _weights(corners, factors)).astype(features.dtype)
        kernel = kernel.astype(features.dtype)
        return total + jnp.einsum("bnc,cd->bnd", sample, kernel, preferred_element_type=total.dtype), None

    zero = zeros((batch, height * width, taps.kernel.shape[-1]), features)
    return jax.lax.scan(add_tap, zero, jnp.arange(taps.count))[0]


def backward(features: jax.Array, taps: Taps, cotangent: jax.Array) -> tuple[jax.Array, Taps]:
    """Gradients by `features`, [B, H*W, C], and by `taps`, for `cotangent` [B, H*W, D] of what `forward` returns."""
    batch, height, width, channels = features.shape
    cells = features.reshape(batch, height * width, channels)
    total = zeros(cells.shape, features)
    # Once, outside the loop: a CPU multiplies matrices that are both contracted over their rows at two thirds the rate.
    turned = jnp.transpose(cotangent.reshape(-1, cotangent.shape[-1]))

    def add_tap(gradients, tap):
        by_cells, by_taps = gradients
        points, kernel, factors = taps[tap]
        corners = corners_of(points, height, width)
        weights = _weights(corners, factors)
        sample = _weighted_sum(cells, corners, weights).astype(features.dtype)
        by_kernel = jnp.matmul(turned, sample.reshape(-1, channels), preferred_element_type=total.dtype)
        by_kernel = jax.lax.optimization_barrier(by_kernel).T  # XLA would turn the factors instead.
        by_sample = jnp.einsum(
            "bnd,cd->bnc", cotangent, kernel.astype(features.dtype), preferred_element_type=total.dtype
        )
        for corner, weight in zip(corners, weights, strict=True):
            by_cells = _add(by_cells, corner.index, weight[..., None] * by_sample)
        # Read again, by points that XLA takes for other ones: it would keep the 4 cells of every point otherwise.
        corners = corners_of(jax.lax.optimization_barrier(points), height, width)
        dots = _dot_products(cells, corners, by_sample)
        by_points, by_factors = gradients_of_weights(dots, corners, factors)
        return (by_cells, by_taps.at_set(tap, by_points, by_kernel, by_factors)), None

    return jax.lax.scan(add_tap, (total, taps.zeros()), jnp.arange(taps.count))[0]


def gradients_of_weights(
    dots: list[jax.Array], corners: list[Corner], factors: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients by points [B, N, 2] and factors [B, N] or None, from the sample's gradient times each corner's cell."""
    top_left, top_right, bottom_left, bottom_right = dots
    _, (_, _, top, right), (_, _, bottom, left), _ = corners
    by_y = left * (bottom_left - top_left) + right * (bottom_right - top_right)
    by_x = top * (top_right - top_left) + bottom * (bottom_right - bottom_left)
    by_points = jnp.stack([by_y, by_x], axis=-1)
    if factors is None:
        return by_points, None
    by_factors = sum(corner.weight_y * corner.weight_x * dot for corner, dot in zip(corners, dots, strict=True))
    return by_points * factors[..., None], by_factors


def _weights(corners: list[Corner], factors: jax.Array | None) -> list[jax.Array]:
    return [corner.weight if factors is None else corner.weight * factors for corner in corners]


def _read(cells: jax.Array, index: jax.Array) -> jax.Array:
    """Cells [B, H*W, C] at `index` [B, N], in float32 or wider: [B, N, C]."""
    # One gather an image: an index over the batch would make XLA gather the whole map on every device.
    read = jax.vmap(lambda cells, at: cells.at[at].get(mode="promise_in_bounds", wrap_negative_indices=False))
    return at_least_float32(read(cells, index))


def _add(cells: jax.Array, index: jax.Array, added: jax.Array) -> jax.Array:
    """Cells [B, H*W, C], with `added` [B, N, C] added to those at `index` [B, N]."""
    add = jax.vmap(lambda cells, at, x: cells.at[at].add(x, mode="promise_in_bounds", wrap_negative_indices=False))
    return add(cells, index, added)


def _weighted_sum(cells: jax.Array, corners: list[Corner], weights: list[jax.Array]) -> jax.Array:
    """[B, N, C]. One loop over the points reads all four corners; nothing is written but the sum."""
    terms = [weight[..., None] * _read(cells, corner.index) for corner, weight in zip(corners, weights, strict=True)]
    return terms[0] + terms[1] + terms[2] + terms[3]


def _dot_products(cells: jax.Array, corners: list[Corner], vectors: jax.Array) -> list[jax.Array]:
    """`vectors` [B, N, C] times the cell at each corner, summed over the channels; zero outside: four of [B, N].

    One reduction of four arrays, because XLA writes what enters a reduction of one array to memory on CPU; over rows
    of sixteen sums side by side, because the sum of a row is taken one by one.
    """
    lanes = math.gcd(vectors.shape[-1], 16)
    products = [_read(cells, corner.index) * vectors for corner in corners]
    products = [product.reshape(*product.shape[:-1], -1, lanes) for product in products]
    starts = [zeros((), product) for product in products]
    sums = jax.lax.reduce(products, starts, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (2,))
    return [jnp.where(corner.inside, x.sum(axis=-1), 0) for corner, x in zip(corners, sums, strict=True)]
