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

TILE_WIDTH = 128  # Of a label whose pixels few windows see, in pixels.
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


def merged_labels(passes: Sequence[Passes], label_hw: jax.Array) -> jax.Array:
    """The class with the largest probability for every pixel of the label.

    Args:
      passes: with at most 255 classes, and a multiple of 32 of the label's rows.
      label_hw: sizes of the labels, int32 [B, 2].

    Returns:
      uint8 [B, Ho, Wo]; 255 outside each `label_hw`.
    """
    single = len(passes) == 1 and not passes[0].in_part and len(passes[0].logits) == 1

    def labels(tile: Sequence[Passes]) -> jax.Array:
        if single:  # The softmax does not change which one is the largest.
            [one] = tile
            values = _resized(one.logits[0], one.rows[0], one.columns[0], one.extent)
        else:
            values = mean_probabilities(tile)
        return jnp.argmax(values, axis=-1).astype(jnp.uint8)

    found = tile_by_tile(labels, passes)
    label_canvas_hw = found.shape[1:3]
    valid = Extent(label_hw, label_canvas_hw).mask(label_canvas_hw)[..., 0]
    return jnp.where(valid, found, jnp.uint8(IGNORE_LABEL))


def tile_by_tile(function: Callable[[list[Passes]], jax.Array], passes: Sequence[Passes]) -> jax.Array:
    """What a function makes of the passes over each tile of the label, put together.

    A tile is 32 rows of the label as a whole. Where passes see parts of the image, it is as wide as `TILE_WIDTH`, so
    that few passes see any of it.

    Args:
      function: of passes whose label is a tile [B, 32, w], gives [B, 32, w, ...].
      passes: over the whole label.

    Returns:
      [B, Ho, Wo, ...].
    """
    height, width = passes[0].rows.shape[-1], passes[0].columns.shape[-1]
    tile_width = min(width, TILE_WIDTH) if passes[0].in_part else width
    beyond = ((0, 0), (0, 0), (0, -width % tile_width))  # Columns that no pass sees.
    passes = [group.replace(columns=jnp.pad(group.columns, beyond, constant_values=-1)) for group in passes]

    def of_tile(corner: jax.Array) -> jax.Array:
        def cut(group: Passes) -> Passes:
            rows = jax.lax.dynamic_slice_in_dim(group.rows, corner[0], CANVAS_MULTIPLE, axis=-1)
            columns = jax.lax.dynamic_slice_in_dim(group.columns, corner[1], tile_width, axis=-1)
            return group.replace(rows=rows, columns=columns)

        return function([cut(group) for group in passes])

    tops, lefts = range(0, height, CANVAS_MULTIPLE), range(0, width, tile_width)
    found = jax.lax.map(of_tile, jnp.array([(top, left) for top in tops for left in lefts]))
    found = found.reshape(len(tops), len(lefts), *found.shape[1:])  # [tops, lefts, B, 32, w, ...].
    found = found.transpose(2, 0, 3, 1, 4, *range(5, found.ndim))
    return found.reshape(len(found), height, -1, *found.shape[5:])[:, :, :width]


def mean_probabilities(passes: Sequence[Passes]) -> jax.Array:
    """The mean of the softmax over the passes that see a pixel of the label: float32 [B, Ho, Wo, K].

    Meant for tiles of a label: takes 4 K bytes a pixel.
    """
    _, batch, _, _, classes = passes[0].logits.shape
    shape = batch, passes[0].rows.shape[-1], passes[0].columns.shape[-1]
    sums = jnp.zeros(shape), jnp.zeros((*shape, classes))
    for group in passes:
        views = group.logits, group.rows, group.columns
        order, needed = jnp.arange(len(group.logits)), len(group.logits)
        if group.in_part:
            # Most windows of a large image see nothing of a tile: those that see some of it come first, and no others.
            inside_y, inside_x = _inside(group.rows, group.columns, group.extent)
            sees_some = jnp.any(inside_y.any(axis=-1) & inside_x.any(axis=-1), axis=-1)
            order, needed = jnp.argsort(~sees_some), sees_some.sum()

        def add(number: int, sums: tuple, views: tuple = views, group: Passes = group, order=order) -> tuple:
            logits, rows, columns = (array[order[number]] for array in views)
            probabilities = jax.nn.softmax(_resized(logits, rows, columns, group.extent), axis=-1)
            seen = jnp.ones(shape)
            if group.in_part:
                inside_y, inside_x = _inside(rows, columns, group.extent)
                seen = (inside_y[:, :, None] & inside_x[:, None, :]).astype(jnp.float32)
                probabilities *= seen[..., None]
            return sums[0] + seen, sums[1] + probabilities

        sums = jax.lax.fori_loop(0, needed, add, sums)
    times, total = sums
    return total / jnp.maximum(1.0, times)[..., None]  # No pass sees what lies outside the image.


def _inside(rows: jax.Array, columns: jax.Array, extent: Extent) -> tuple[jax.Array, jax.Array]:
    """Which rows [..., B, Ho] and columns [..., B, Wo] lie within what was seen."""
    height, width = extent.size_hw[:, 0, None], extent.size_hw[:, 1, None]
    return (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)


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
