"""What a network sees of images on a canvas, and one map of classes from all that it says. Runs on the device.

Every pass sees what it would see of the bare image: scaled images are resized by their own ratio and lie on canvases of
their own, mirror images are mirrored within their valid width, windows end with their image. The logits of all passes
are kept at the network's stride. They are resized straight to the label's size, once, band by band: the resized logits
as a whole, 150 classes at 4000x3000 pixels for instance, would need gigabytes.
"""

import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.evaluation.canvases import up_to_multiple
from dsnet_jax.evaluation.protocols import Protocol
from dsnet_jax.ops.extent import CANVAS_MULTIPLE, Extent
from dsnet_jax.ops.resize import bilinear_weights, resize_bilinear

WINDOWS = 4  # Of an image, that the network sees at a time: this many, or a number near to it.
Network = Callable[[jax.Array, Extent], jax.Array]  # Normalised images [B, H, W, 3] -> logits [B, h, w, K], float32.


@flax.struct.dataclass
class Passes:
    """The logits of n passes of one size, and where the label's pixels lie in what the passes saw.

    Attributes:
      logits: [n, B, h, w, K].
      rows: of every row of the label its place in what was seen, in pixels, 0.5 is the centre of the first: [n, B, Ho].
      columns: the same of every column, [n, B, Wo].
      extent: of what was seen.
      in_part: whether it is a part of the image, so that other passes saw the pixels that lie outside; static.
    """

    logits: jax.Array
    rows: jax.Array
    columns: jax.Array
    extent: Extent
    in_part: bool = flax.struct.field(pytree_node=False)


def passes_over(
    network: Network,
    images: jax.Array,
    extent: Extent,
    scaled_hw: jax.Array,
    label_hw: jax.Array,
    label_canvas_hw: tuple[int, int],
    protocol: Protocol,
) -> list[Passes]:
    """All passes of a protocol.

    Args:
      network: what is asked.
      images: normalised, zero outside their valid parts, [B, Hc, Wc, 3].
      extent: of the images.
      scaled_hw: their sizes at each of the protocol's scales, int32 [B, S, 2].
      label_hw: sizes of the labels, int32 [B, 2].
      label_canvas_hw: (Ho, Wo).
      protocol: see above.
    """
    if protocol.crop_hw:
        return [_windows(network, images, extent, label_hw, label_canvas_hw, protocol)]
    passes, canvases = [], scaled_canvases(protocol, extent.canvas_hw)
    for index, (scale, canvas) in enumerate(zip(protocol.scales, canvases, strict=True)):
        scaled = Extent(scaled_hw[:, index], canvas)
        seen = images
        if scale != 1:
            seen = resize_bilinear(images, canvas, extent.size_hw / scaled.size_hw, extent.size_hw)
            seen = scaled.zero_outside(seen)
        passes.append(_whole(network, seen, scaled, label_hw, label_canvas_hw, protocol.flip))
    return passes


def scaled_canvases(protocol: Protocol, canvas_hw: tuple[int, int]) -> list[tuple[int, int]]:
    """The canvases of the scaled images of a canvas: large enough for whatever fits on it."""
    return [tuple(map(up_to_multiple, scaled)) for scaled in protocol.scaled_hw(np.array(canvas_hw)).tolist()]


def _whole(network, images, extent, label_hw, label_canvas_hw, flip) -> Passes:
    """Over whole images, and over their mirror images."""
    rows, columns = _places(extent.size_hw, label_hw, label_canvas_hw)
    if not flip:
        return Passes(network(images, extent)[None], rows[None], columns[None], extent, in_part=False)
    widths = extent.size_hw[:, 1:]
    # Each image beside its mirror image: of a batch that is split over devices every device keeps its own part.
    pairs = jnp.stack([images, mirror(images, widths[:, 0])], axis=1).reshape(-1, *images.shape[1:])
    logits = network(pairs, Extent(jnp.repeat(extent.size_hw, 2, axis=0), extent.canvas_hw))
    logits = logits.reshape(-1, 2, *logits.shape[1:]).swapaxes(0, 1)
    return Passes(logits, jnp.stack([rows, rows]), jnp.stack([columns, widths - columns]), extent, in_part=False)


def _windows(network, images, extent, label_hw, label_canvas_hw, protocol) -> Passes:
    """Over all windows that an image on this canvas can have; an image that has fewer sees its last ones again."""
    crop_hw, stride_hw = jnp.array(protocol.crop_hw), jnp.array(protocol.stride_hw)
    canvas_hw = tuple(
        min(up_to_multiple(side), canvas) for side, canvas in zip(protocol.crop_hw, extent.canvas_hw, strict=True)
    )
    window = Extent(jnp.minimum(extent.size_hw, crop_hw), canvas_hw)
    # A window begins at most so that the crop ends with the image: its canvas may end a little later.
    images = jnp.pad(images, ((0, 0), (0, CANVAS_MULTIPLE), (0, CANVAS_MULTIPLE), (0, 0)))
    last = jnp.maximum(0, extent.size_hw - crop_hw)
    rows, columns = _places(extent.size_hw, label_hw, label_canvas_hw)
    batch, windows = len(images), np.array(list(np.ndindex(*protocol.windows_hw(np.array(extent.canvas_hw)))))
    together = _windows_at_once(len(windows), canvas_hw, extent.canvas_hw)
    several = Extent(jnp.repeat(window.size_hw, together, axis=0), canvas_hw)

    def look(indices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = indices * stride_hw  # [n, 2]; of every image [B, n, 2].
        new = jnp.all(start < last[:, None] + stride_hw, axis=-1)  # Not one that was seen before.
        start = jnp.minimum(start, last[:, None])
        cut = jax.vmap(jax.vmap(lambda image, yx: jax.lax.dynamic_slice(image, (*yx, 0), (*canvas_hw, 3)), (None, 0)))
        seen = cut(images, start).reshape(-1, *canvas_hw, 3)  # Of a batch split over devices each keeps its own part.
        logits = network(several.zero_outside(seen), several)
        # Rows of a window that was seen before lie in none.
        places = jnp.where(new[..., None], rows[:, None] - start[..., :1], -1), columns[:, None] - start[..., 1:]
        return jax.tree.map(lambda x: x.swapaxes(0, 1), (logits.reshape(batch, together, *logits.shape[1:]), *places))

    found = jax.lax.map(look, jnp.array(windows.reshape(-1, together, 2)))
    return Passes(*(array.reshape(-1, *array.shape[2:]) for array in found), window, in_part=True)


def _windows_at_once(count: int, window_hw: tuple[int, int], canvas_hw: tuple[int, int]) -> int:
    """How many of an image's windows the network sees at a time: a divisor of their number, so that none is in vain.

    One would leave a CPU's cores, or an accelerator, half idle. Together they have less than twice the canvas's pixels;
    and they are not more than 7, so that what the network needs does not grow with the image.
    """
    most = min(count, -(-2 * math.prod(canvas_hw) // math.prod(window_hw)) - 1, 2 * WINDOWS - 1)
    divisors = [number for number in range(1, most + 1) if count % number == 0]
    return min(reversed(divisors), key=lambda number: abs(number - WINDOWS))


def mirror(images: jax.Array, widths: jax.Array) -> jax.Array:
    """Images [B, H, W, C] with the first `widths` [B] columns in reverse, and zero beyond."""
    width = images.shape[2]
    reverse = jnp.pad(images[:, :, ::-1], ((0, 0), (0, 0), (0, width), (0, 0)))
    return jax.vmap(lambda image, own: jax.lax.dynamic_slice_in_dim(image, width - own, width, 1))(reverse, widths)


def _places(size_hw: jax.Array, label_hw: jax.Array, label_canvas_hw: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Of rows and columns of a label in pixels of the image of `size_hw`: float32 [B, Ho] and [B, Wo]."""
    ratio_hw = size_hw / label_hw
    rows, columns = ((jnp.arange(side) + 0.5) * ratio_hw[:, axis, None] for axis, side in enumerate(label_canvas_hw))
    return rows, columns


def merged_labels(passes: Sequence[Passes], label_hw: jax.Array, label_canvas_hw: tuple[int, int]) -> jax.Array:
    """The class with the largest probability for every pixel of the label.

    Args:
      passes: with at most 255 classes.
      label_hw: sizes of the labels, int32 [B, 2].
      label_canvas_hw: (Ho, Wo), Ho a multiple of 32.

    Returns:
      uint8 [B, Ho, Wo]; 255 outside each `label_hw`.
    """
    (one, *others), (rows, columns) = passes, label_canvas_hw
    single = not others and not one.in_part and len(one.logits) == 1

    def label_band(first_row: jax.Array) -> jax.Array:
        if single:  # The softmax does not change which one is the largest.
            values = _resized(one.logits[0], _band(one.rows, first_row)[0], one.columns[0], one.extent)
        else:
            values = mean_probabilities(passes, first_row)
        return jnp.argmax(values, axis=-1).astype(jnp.uint8)

    labels = jax.lax.map(label_band, jnp.arange(0, rows, CANVAS_MULTIPLE))
    labels = labels.swapaxes(0, 1).reshape(-1, rows, columns)
    valid = Extent(label_hw, label_canvas_hw).mask(label_canvas_hw)[..., 0]
    return jnp.where(valid, labels, jnp.uint8(IGNORE_LABEL))


def mean_probabilities(passes: Sequence[Passes], first_row: jax.Array) -> jax.Array:
    """The softmax of 32 rows of the label, its mean over the passes that see a pixel: float32 [B, 32, Wo, K]."""
    _, batch, _, _, classes = passes[0].logits.shape
    band = batch, CANVAS_MULTIPLE, passes[0].columns.shape[-1]
    sums = jnp.zeros(band), jnp.zeros((*band, classes))
    for group in passes:

        def add(sums: tuple, one: tuple, group: Passes = group) -> tuple:
            logits, rows, columns = one
            probabilities = jax.nn.softmax(_resized(logits, rows, columns, group.extent), axis=-1)
            seen = jnp.ones(band)
            if group.in_part:
                inside_y, inside_x = (
                    (places >= 0) & (places < group.extent.size_hw[:, axis, None])
                    for axis, places in enumerate((rows, columns))
                )
                seen = (inside_y[:, :, None] & inside_x[:, None, :]).astype(jnp.float32)
                probabilities *= seen[..., None]
            return (sums[0] + seen, sums[1] + probabilities), None

        sums, _ = jax.lax.scan(add, sums, (group.logits, _band(group.rows, first_row), group.columns))
    times, total = sums
    return total / jnp.maximum(1.0, times)[..., None]  # No pass sees what lies outside the image.


def _band(rows: jax.Array, first_row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, first_row, CANVAS_MULTIPLE, axis=-1)


def _resized(logits: jax.Array, rows: jax.Array, columns: jax.Array, extent: Extent) -> jax.Array:
    """Logits [B, h, w, K] read at rows [B, Ho] and columns [B, Wo], in pixels of `extent`: float32 [B, Ho, Wo, K]."""
    cells_hw = logits.shape[1:3]
    valid_hw = extent.valid_hw(cells_hw)
    for axis, places in enumerate((rows, columns)):
        # Of cells to pixels: exact, because canvases are multiples of every stride.
        centre = places * (cells_hw[axis] / extent.canvas_hw[axis]) - 0.5
        weights = bilinear_weights(centre, cells_hw[axis], valid_hw[:, axis])
        pattern = ("boh,bhwk->bowk", "bow,bhwk->bhok")[axis]
        logits = jnp.einsum(pattern, weights, logits.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return logits
