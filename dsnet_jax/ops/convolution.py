"""Convolution with explicit symmetric padding, in the formulation that is fastest on the platform."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.export import is_symbolic_dim

from dsnet_jax.ops.precision import float32_or_wider

Formulation = Callable[[jax.Array, jax.Array], jax.Array]

CONVOLVED = "convolved"  # The name by which rematerialisation can keep results.

# Of a dilated kernel's products, those that read inside the map. Below this share a product for each tap, of what lies
# inside alone, is faster on CPU than a convolution, which multiplies the padding too: 1.2 times at a share of 0.77
# (rate 6 on 32 x 32 cells), 3.4 times at 0.39 (rate 18). See docs/performance.md.
LARGEST_SHARE_OF_TAPS = 0.8

FEW_CHANNELS = 8  # Those of images, and not those of feature maps, are fewer.

# Of a matrix that holds what several taps read, for a kernel's gradient: wider ones are multiplied no faster.
MOST_COLUMNS = 128


@partial(jax.jit, static_argnums=(2, 3))  # So that a network's many equal ones are traced and lowered once.
def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Convolves with zeros around the map: the output has ceil(size / stride) cells a side.

    XLA's SAME would pad strided convolutions by other amounts on even and odd sizes, and so misalign them.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C, D], k odd; of the type of `x`.
      stride: cells of `x` per cell of the result.
      dilation: cells of `x` between taps.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), D], of the type of `x`.
    """
    return _conv2d(x, kernel, stride, dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    on_cpu, elsewhere = _formulations(x.shape, kernel.shape[0], stride, dilation)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def _forward(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> tuple[jax.Array, tuple]:
    return checkpoint_name(_conv2d(x, kernel, stride, dilation), CONVOLVED), (x, kernel)


def _backward(stride: int, dilation: int, residuals: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    if kernel.shape[0] == 1:
        return _product_gradients(x, kernel, stride, gradient)

    def gradients(formulation: Formulation) -> Callable:
        return lambda x, kernel, gradient: jax.vjp(formulation, x, kernel)[1](gradient)

    def gradients_elsewhere(x, kernel, gradient):
        # For the kernel's gradient the compiler of TPUs lays images out with the batch across its 128 lanes, however
        # few they are. Without this it does so in the forward pass already, and keeps what at 12 is 14 times as large.
        if x.shape[-1] < FEW_CHANNELS:
            x = _once_there(x, gradient)
        return gradients(elsewhere)(x, kernel, gradient)

    def gradients_on_cpu(x, kernel, gradient):
        (by_x,) = jax.vjp(lambda x: on_cpu(x, kernel), x)[1](gradient)
        return by_x, _kernel_gradient(x, kernel, stride, dilation, gradient)

    on_cpu, elsewhere = _formulations(x.shape, kernel.shape[0], stride, dilation)
    tap_by_tap = on_cpu is not elsewhere  # Whose own gradients are products already.
    cpu = gradients(on_cpu) if tap_by_tap else gradients_on_cpu
    return jax.lax.platform_dependent(x, kernel, gradient, cpu=cpu, default=gradients_elsewhere)


_conv2d.defvjp(_forward, _backward)


def _formulations(shape: tuple[int, ...], size: int, stride: int, dilation: int) -> tuple[Formulation, Formulation]:
    """For CPU and for others. Others were not measured."""
    if size == 1:  # Several times faster on CPU than a convolution, the same elsewhere.
        return (partial(_product, stride=stride),) * 2
    convolution = partial(_convolution, stride=stride, dilation=dilation)
    symbolic = any(map(is_symbolic_dim, shape[1:3]))  # An exported program's size may not be known.
    if stride > 1 or dilation == 1 or symbolic:
        return convolution, convolution
    if _share_inside(shape[1], size, dilation) * _share_inside(shape[2], size, dilation) < LARGEST_SHARE_OF_TAPS:
        return partial(_tap_by_tap, dilation=dilation), convolution
    return convolution, convolution


def _share_inside(side: int, size: int, dilation: int) -> float:
    """Of the cells that the taps of a row read, those inside the map."""
    offsets = (dilation * abs(tap - size // 2) for tap in range(size))
    return sum(max(0, side - offset) for offset in offsets) / (size * side)


def _product(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jnp.einsum("bhwc,cd->bhwd", _strided(x, stride), kernel[0, 0])


def _strided(x: jax.Array, stride: int) -> jax.Array:
    return jax.lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))  # Indexing a symbolic size would gather.


def _product_gradients(
    x: jax.Array, kernel: jax.Array, stride: int, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Those of `_product`.

    That by the kernel is one product of two matrices of rows, both contracted over the rows as they lie. Written over
    three axes, or left to automatic differentiation, XLA turns one of them on CPU, together with the ReLU or batch
    normalisation that it comes from: arrays read across their rows took an eighth of a training step of ResNet-50.
    """
    rows = (map_.reshape(-1, map_.shape[-1]) for map_ in (_strided(x, stride), gradient))
    by_kernel = jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))[None, None]
    by_x = jnp.einsum("bhwd,cd->bhwc", gradient, kernel[0, 0])
    if stride > 1:
        sides = zip(x.shape[1:3], by_x.shape[1:3], strict=True)
        between = [(0, side - 1 - (cells - 1) * stride, stride - 1) for side, cells in sides]
        by_x = jax.lax.pad(by_x, jnp.zeros((), by_x.dtype), [(0, 0, 0), *between, (0, 0, 0)])
    return by_x, by_kernel


def _convolution(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    padding = (kernel.shape[0] // 2 * dilation,) * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=(padding, padding),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _kernel_gradient(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, gradient: jax.Array) -> jax.Array:
    """That of `_convolution` by its kernel, as products of the gradient with what the taps read.

    On CPU XLA's own takes 1.4 to 9 times as long (docs/performance.md). Taps of few channels share a product.
    """
    size, channels = kernel.shape[0], x.shape[-1]
    rows, columns = gradient.shape[1:3]
    around = (size // 2 * dilation,) * 2
    # XLA would read for every kernel in the forward pass, and keep it.
    padded = _once_there(jnp.pad(x, ((0, 0), around, around, (0, 0))), gradient)

    def read(tap: int) -> jax.Array:
        down, right = (dilation * place for place in divmod(tap, size))
        end = len(x), down + stride * (rows - 1) + 1, right + stride * (columns - 1) + 1, channels
        return jax.lax.slice(padded, (0, down, right, 0), end, (1, stride, stride, 1)).reshape(-1, channels)

    taps, together = range(size**2), max(1, MOST_COLUMNS // channels)
    by_rows, wide = (((0,), (0,)), ((), ())), float32_or_wider(x.dtype)
    gradient = gradient.reshape(-1, gradient.shape[-1])
    products = []
    for first in taps[::together]:
        patches = jnp.concatenate([read(tap) for tap in taps[first : first + together]], axis=1)
        products.append(jax.lax.dot_general(patches, gradient, by_rows, preferred_element_type=wide))
    return jnp.concatenate(products).reshape(kernel.shape).astype(kernel.dtype)


def _once_there(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """`x`, which nothing can be computed of before the gradient is there; NaN for an image of which that starts so."""
    corner = gradient[:, :1, :1, :1]
    return jnp.where(corner == corner, x, jnp.nan)


def _tap_by_tap(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """The sum over taps of a matrix product of the cells that the tap reads inside the map."""
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    result = jnp.zeros((*x.shape[:3], kernel.shape[3]), float32_or_wider(x.dtype))
    for row in range(size):
        for column in range(size):
            down, right = dilation * (row - size // 2), dilation * (column - size // 2)
            if abs(down) >= height or abs(right) >= width:
                continue
            inside = x[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
            product = jnp.einsum("bhwc,cd->bhwd", inside, kernel[row, column], preferred_element_type=result.dtype)
            around = (max(0, -down), max(0, down)), (max(0, -right), max(0, right))
            result += jnp.pad(product, ((0, 0), *around, (0, 0)))
    return result.astype(x.dtype)
