"""From images as they are to labels of their size, in one program: what StableHLO and ONNX files hold.

Evaluation's own program (`evaluation.inference`) takes images that the host has scaled and laid out. This one does all
of that itself.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from dsnet_jax.data.transforms import scaled_size_hw
from dsnet_jax.ops.extent import CANVAS_MULTIPLE, Extent
from dsnet_jax.ops.normalise import normalise
from dsnet_jax.ops.resize import bilinear_weights, resize_bilinear

LEAST_SYMBOLIC_SIDE = ROWS_AT_ONCE = 32
MOST_SYMBOLIC_SIDE = 2**16 - 1  # As in JPEG.


def label_program(
    model: nn.Module, variables: dict[str, Any], image_scale: float, in_bands: bool = True
) -> Callable[[jax.Array], jax.Array]:
    """The program, its weights inside.

    Args:
      model: called as `model.apply(variables, images, extent, train=False)`, gives an object with `logits`.
      variables: params and batch_stats.
      image_scale: working resolution, as `config.data.image_scale`.
      in_bands: whether the logits are resized 32 rows at a time, which needs less memory.

    Returns:
      A function of images, uint8 [B, H, W, 3], RGB, that gives labels, uint8 [B, H, W]. H and W may be symbolic, each
      32 to 65535: images then lie on a canvas. Of other sizes the network sees the bare image, which is quicker.
    """
    variables = jax.device_get(variables)  # A program with arrays of eight devices would want eight.
    small = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    logits = jax.eval_shape(lambda images: model.apply(variables, images, train=False).logits, small)
    stride = small.shape[1] // logits.shape[1]

    def labels_of(images: jax.Array) -> jax.Array:
        size_hw = images.shape[1:3]
        symbolic = any(map(is_symbolic_dim, size_hw))
        scaled, scaled_hw, extent = (_on_canvas if symbolic else _bare)(images, image_scale)
        logits = model.apply(variables, normalise(scaled), extent, train=False).logits
        # Of cells per pixel of the image: exact, since canvases are multiples of every stride.
        ratio_hw = [jnp.asarray(s, jnp.float32) / side / stride for s, side in zip(scaled_hw, size_hw, strict=True)]
        valid_hw = [-(-s // stride) for s in scaled_hw]
        return _labels(logits.astype(jnp.float32), size_hw, ratio_hw, valid_hw, in_bands)

    return labels_of


def _bare(images, image_scale):
    """Images at their working resolution, its height and width."""
    size_hw = images.shape[1:3]
    scaled_hw = scaled_size_hw(size_hw, image_scale)
    if scaled_hw != size_hw:
        images = _rounded(resize_bilinear(images.astype(jnp.float32), scaled_hw))
    return images, scaled_hw, None


def _on_canvas(images, image_scale):
    """The same for a symbolic size, in the top-left corner of a canvas; height and width are computed as it runs."""
    batch, *size_hw, _ = images.shape
    numerator = math.ceil(image_scale * 1024)  # Rounded up: the canvas may be a little larger than needed.
    divisor = math.gcd(numerator, 1024)
    numerator, denominator = numerator // divisor, CANVAS_MULTIPLE * 1024 // divisor
    canvas_hw = tuple(CANVAS_MULTIPLE * ((side * numerator + denominator - 1) // denominator) for side in size_hw)
    sizes = [jnp.asarray(side, jnp.int32) for side in size_hw]
    scaled_hw = sizes
    if image_scale != 1:  # The host's rule is in float64, which the program need not have: 45 * 0.7 is less than 31.5.
        table = [scaled_size_hw((side, side), image_scale)[0] for side in range(MOST_SYMBOLIC_SIDE + 1)]
        scaled_hw = [jnp.array(table, jnp.int32)[side] for side in sizes]

    def for_each(values, dtype):
        return jnp.broadcast_to(jnp.stack(values).astype(dtype), (batch, 2))

    ratio_hw = for_each([side / scaled for side, scaled in zip(sizes, scaled_hw, strict=True)], jnp.float32)
    resized = resize_bilinear(images.astype(jnp.float32), canvas_hw, ratio_hw, for_each(sizes, jnp.int32))
    return _rounded(resized), scaled_hw, Extent(for_each(scaled_hw, jnp.int32), canvas_hw)


def _rounded(images: jax.Array) -> jax.Array:
    return jnp.floor(images + 0.5).astype(jnp.uint8)


def _labels(logits, size_hw, ratio_hw, valid_hw, in_bands):
    """The class with the largest logit at each pixel, uint8 [B, H, W]."""
    (height, width), (cells_y, cells_x) = size_hw, logits.shape[1:3]

    def weights(first, count, axis, cells):
        centre = (jnp.arange(count) + first + 0.5) * ratio_hw[axis] - 0.5
        return bilinear_weights(centre, cells, jnp.asarray(valid_hw[axis], jnp.float32))

    def multiply(pattern, matrix, x):
        return jnp.einsum(pattern, matrix, x, precision=jax.lax.Precision.HIGHEST)

    logits = multiply("ow,bhwk->bhok", weights(0, width, 1, cells_x), logits)

    def labels_of_rows(first, count):
        values = multiply("oh,bhwk->bowk", weights(first, count, 0, cells_y), logits)
        return jnp.argmax(values, axis=-1).astype(jnp.uint8)

    if not in_bands:
        return labels_of_rows(0, height)
    rows = ROWS_AT_ONCE if is_symbolic_dim(height) else min(height, ROWS_AT_ONCE)

    def add_band(band, labels):  # The last one ends with the image, and repeats some rows of the one before.
        first = jnp.minimum(band * rows, jnp.asarray(height, jnp.int32) - rows)
        return jax.lax.dynamic_update_slice_in_dim(labels, labels_of_rows(first, rows), first, 1)

    bands = jnp.asarray((height + rows - 1) // rows, jnp.int32)
    return jax.lax.fori_loop(0, bands, add_band, jnp.zeros((logits.shape[0], height, width), jnp.uint8))
