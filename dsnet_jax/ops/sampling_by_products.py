"""Bilinear sampling without gather and scatter: products with the matrices of the bilinear weights.

A sample is the sum of all cells of the map, each times hat(y - row) * hat(x - column), hat(d) = max(0, 1 - |d|): a
matrix product, which adds up in a fixed order. It is exact for every offset, since all rows are covered: a band of them
at a time, as many as make the matrix of the weights no larger than a map. The hats are built from the floor of a point
rather than from a distance, whose derivative at whole numbers would not be PyTorch's.
"""

import jax
import jax.numpy as jnp

from dsnet_jax.ops.manual_axes import zeros
from dsnet_jax.ops.precision import float32_or_wider
from dsnet_jax.ops.taps import Taps

# Of products that stand for reading a cell or adding to it: by JAX's default a TPU rounds float32 to bfloat16, and an
# NVIDIA GPU may to TF32. Products with the kernel have the default, as a convolution's have.
HIGHEST = jax.lax.Precision.HIGHEST


def forward(features: jax.Array, taps: Taps) -> jax.Array:
    """As `sampling_by_gather.forward`."""
    batch, height, width, _ = features.shape
    bands, first_rows = _bands_of(features)

    def add_tap(total, tap):
        points, kernel, factors = taps[tap]

        def add_band(sample, band):
            cells, first_row = band
            (y, _), (x, _) = _hats(points, first_row, bands.shape[2] // width, width)
            return sample + _multiply("bnm,bmc->bnc", _outer(y, x), cells, HIGHEST), None

        zero = zeros((batch, height * width, features.shape[-1]), features)
        sample, _ = jax.lax.scan(add_band, zero, (bands, first_rows))
        sample = sample if factors is None else sample * factors[..., None]
        return total + _multiply("bnc,cd->bnd", sample.astype(features.dtype), kernel), None

    zero = zeros((batch, height * width, taps.kernel.shape[-1]), features)
    return jax.lax.scan(add_tap, zero, jnp.arange(taps.count))[0]


def backward(features: jax.Array, taps: Taps, cotangent: jax.Array) -> tuple[jax.Array, Taps]:
    """As `sampling_by_gather.backward`."""
    batch, height, width, channels = features.shape
    bands, first_rows = _bands_of(features)

    def add_tap(gradients, tap):
        by_bands, by_taps = gradients
        points, kernel, factors = taps[tap]
        by_sample = _multiply("bnd,cd->bnc", cotangent, kernel)
        by_read = by_sample if factors is None else by_sample * factors[..., None]

        def add_band(totals, band):
            sample, by_y, by_x, by_factor = totals
            cells, first_row, by_cells = band
            (y, y_slope), (x, x_slope) = _hats(points, first_row, bands.shape[2] // width, width)
            weights = _outer(y, x)
            sample += _multiply("bnm,bmc->bnc", weights, cells, HIGHEST)
            weights_of_cells, read = weights.astype(features.dtype), by_read.astype(features.dtype)
            by_cells += _multiply("bnm,bnc->bmc", weights_of_cells, read, HIGHEST)
            by_weights = _multiply("bnc,bmc->bnm", by_sample, cells, HIGHEST)
            by_y += jnp.sum(by_weights * _outer(y_slope, x), axis=-1)
            by_x += jnp.sum(by_weights * _outer(y, x_slope), axis=-1)
            by_factor += jnp.sum(by_weights * weights, axis=-1)
            return (sample, by_y, by_x, by_factor), by_cells

        zero = zeros(by_sample.shape[:2], by_sample)
        totals = zeros(by_sample.shape, by_sample), zero, zero, zero
        (sample, *by_point, by_factors), by_bands = jax.lax.scan(add_band, totals, (bands, first_rows, by_bands))
        by_points = jnp.stack(by_point, axis=-1)
        if factors is not None:
            sample, by_points = sample * factors[..., None], by_points * factors[..., None]
        by_kernel = _multiply("bnc,bnd->cd", sample.astype(features.dtype), cotangent)
        return (by_bands, by_taps.at_set(tap, by_points, by_kernel, by_factors)), None

    zero = zeros(bands.shape, bands), taps.zeros()
    (by_bands, by_taps), _ = jax.lax.scan(add_tap, zero, jnp.arange(taps.count))
    by_features = jnp.moveaxis(by_bands, 0, 1).reshape(batch, -1, channels)[:, : height * width]
    return by_features, by_taps


def _bands_of(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`features` cut into bands of rows, [bands, B, rows * W, C], the last one filled up with zeros; their first rows.

    A band has at most C cells, or one row.
    """
    batch, height, width, channels = features.shape
    rows = min(height, max(1, channels // width))
    count = -(-height // rows)
    features = jnp.pad(features, ((0, 0), (0, count * rows - height), (0, 0), (0, 0)))
    bands = jnp.moveaxis(features.reshape(batch, count, rows * width, channels), 1, 0)
    return bands, rows * jnp.arange(count)


def _hats(points: jax.Array, first_row: jax.Array, rows: int, columns: int):
    """Weights of rows [B, N, rows] and columns [B, N, columns] for `points` [B, N, 2], each with its derivative."""

    def hat(coordinate, cells):
        floor = jnp.floor(coordinate)[..., None]
        fraction = coordinate[..., None] - floor
        here, next_one = cells == floor, cells == floor + 1
        return jnp.where(here, 1 - fraction, jnp.where(next_one, fraction, 0)), 1.0 * next_one - 1.0 * here

    return hat(points[..., 0], first_row + jnp.arange(rows)), hat(points[..., 1], jnp.arange(columns))


def _outer(y: jax.Array, x: jax.Array) -> jax.Array:
    """[B, N, rows] and [B, N, columns] -> [B, N, rows * columns]."""
    return (y[..., :, None] * x[..., None, :]).reshape(*y.shape[:2], -1)


def _multiply(equation: str, a: jax.Array, b: jax.Array, of_float32: jax.lax.Precision | None = None) -> jax.Array:
    """`einsum` in the narrower type of the two, added up in float32 or wider; `of_float32` where it is not narrower."""
    dtype = a.dtype if jnp.finfo(a.dtype).bits < jnp.finfo(b.dtype).bits else b.dtype
    precise = float32_or_wider(dtype)
    precision = of_float32 if dtype == precise else None
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=precise)
