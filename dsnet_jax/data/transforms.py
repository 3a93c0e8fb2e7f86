"""What is done to pictures on the host: scaling, cropping, padding and flipping, image and label as one.

Everything here is uint8 and RGB; the mean and deviation are taken off on the device.
"""

import cv2
import numpy as np

from dsnet_jax.data.specs import IGNORE_LABEL

MEAN_COLOUR = (124, 116, 104)  # RGB: ImageNet's mean. Padding is made of it: it is nearly zero once normalised.


def scaled_size_hw(size_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width, in pixels, of a picture of `size_hw` scaled by `scale`: rounded, at least 1."""
    height, width = size_hw
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_image(image: np.ndarray, scale: float) -> np.ndarray:
    """An image at its working resolution: bilinear, half-pixel centres, no antialiasing, as `augment` samples.

    Args:
      image: uint8 [H, W, 3].
      scale: factor on both sides, positive.

    Returns:
      uint8 [h, w, 3], `scaled_size_hw` large; `image` itself where the size stays the same.
    """
    scaled_hw = scaled_size_hw(image.shape[:2], scale)
    if scaled_hw == image.shape[:2]:
        return image
    return cv2.resize(image, scaled_hw[::-1], interpolation=cv2.INTER_LINEAR)


def scale_into_box(size_hw: tuple[int, int], box: tuple[int, int]) -> float:
    """The factor by which a picture of `size_hw` becomes as large as fits into `box`: long and short edge, pixels.

    The picture keeps its ratio, and its long edge is laid along the long edge of the box. In a square box the long edge
    alone decides.
    """
    return min(box[0] / max(size_hw), box[1] / min(size_hw))


def augment(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    crop_size_hw: tuple[int, int],
    image_scale: float,
    scale_range: tuple[float, float],
    flip_probability: float,
    scale_box: tuple[int, int] | tuple[()] = (),
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scales, crops and flips an image and its label at random, and pads what is smaller than the crop.

    The result is that of scaling the whole picture (image bilinear, label nearest, both by half-pixel centres and by
    the exact ratio of the rounded sizes), cropping it, padding it at the right and the bottom with `MEAN_COLOUR` and
    `IGNORE_LABEL`, and mirroring it; but only the crop's own pixels are computed, in one affine warp. OpenCV 5 warps
    in float32 and rounds to the nearest grey level. (OpenCV 4 rounded positions to 1/32 pixel: up to 7 levels off.)

    Args:
      image: uint8 [H, W, 3].
      label: uint8 [H, W].
      rng: where the draws come from: scale, offset and flip.
      crop_size_hw: height and width of the result, pixels.
      image_scale: working resolution, a factor on both sides.
      scale_range: least and greatest random scale, drawn uniformly, on top of `image_scale`.
      flip_probability: of a horizontal flip, 0 to 1.
      scale_box: long and short edge, pixels, that a picture is scaled into in place of `image_scale`; empty: it is not.
      out: image and label of the result, for instance places in a batch, to be overwritten; by default they are new.

    Returns:
      `out`: image uint8 [*crop_size_hw, 3] and label uint8 [*crop_size_hw].
    """
    height, width = image.shape[:2]
    fixed_scale = scale_into_box((height, width), scale_box) if scale_box else image_scale
    scaled_height, scaled_width = scaled_size_hw((height, width), fixed_scale * rng.uniform(*scale_range))
    crop_height, crop_width = crop_size_hw
    window_height, window_width = min(crop_height, scaled_height), min(crop_width, scaled_width)
    top = int(rng.integers(scaled_height - window_height + 1))
    left = int(rng.integers(scaled_width - window_width + 1))
    flip = rng.random() < flip_probability

    if out is None:
        out = np.empty((crop_height, crop_width, 3), np.uint8), np.empty((crop_height, crop_width), np.uint8)
    # The window's cells in the scaled picture: a mirrored window counts its columns backwards, and lies at the right.
    first_column, direction = (left + window_width - 1, -1) if flip else (left, 1)
    rows = top + np.arange(window_height)
    columns = first_column + direction * np.arange(window_width)
    pad_x = crop_width - window_width
    inside, beside = (np.s_[pad_x:], np.s_[:pad_x]) if flip else (np.s_[:window_width], np.s_[window_width:])

    _warp(image, rows, columns, (scaled_height, scaled_width), out[0][:window_height, inside])
    nearest = label[_nearest(rows, height, scaled_height)][:, _nearest(columns, width, scaled_width)]
    out[1][:window_height, inside] = nearest
    if pad_x or window_height < crop_height:
        padding = np.full((crop_width, 3), MEAN_COLOUR, np.uint8)  # Whole rows are copied faster than a colour.
        out[0][:window_height, beside], out[0][window_height:] = padding[:pad_x], padding
        out[1][:window_height, beside] = out[1][window_height:] = IGNORE_LABEL
    return out


def _warp(image: np.ndarray, rows: np.ndarray, columns: np.ndarray, scaled_hw: tuple[int, int], out: np.ndarray):
    """Writes those rows [h] and columns [w], which may run backwards, of the scaled image to `out`, uint8 [h, w, 3]."""
    (low_y, high_y), (low_x, high_x) = (
        _reach(cells, side, scaled)
        for cells, side, scaled in zip((rows, columns), image.shape[:2], scaled_hw, strict=True)
    )
    ratio_y, ratio_x = image.shape[0] / scaled_hw[0], image.shape[1] / scaled_hw[1]
    direction = 1 if columns[0] <= columns[-1] else -1
    window_to_source = np.array(
        [
            [direction * ratio_x, 0.0, (columns[0] + 0.5) * ratio_x - 0.5 - low_x],
            [0.0, ratio_y, (rows[0] + 0.5) * ratio_y - 0.5 - low_y],
        ]
    )
    # OpenCV warps four channels in half the time that it takes for three, to the same values.
    source = cv2.cvtColor(image[low_y:high_y, low_x:high_x], cv2.COLOR_RGB2RGBA)
    window = cv2.warpAffine(
        source,
        window_to_source,
        (len(columns), len(rows)),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    cv2.cvtColor(window, cv2.COLOR_RGBA2RGB, dst=out)


def _reach(cells: np.ndarray, side: int, scaled_side: int) -> tuple[int, int]:
    """First pixel, and the one after the last, that are read for cells of the scaled side; with one to spare."""
    pixels = _nearest(np.array([cells.min(), cells.max()]), side, scaled_side)
    return max(0, int(pixels[0]) - 2), min(side, int(pixels[1]) + 3)


def _nearest(cells: np.ndarray, side: int, scaled_side: int) -> np.ndarray:
    """Pixel, of a side of `side` pixels, in which the centre of each cell of the scaled side lies: int64 [n].

    In whole numbers, (cell + 0.5) * side / scaled_side rounded down: in floating or fixed point, as OpenCV does it, a
    centre on the border of two pixels goes to either, and at a scale of 0.5 all of them lie there.
    """
    return (2 * cells + 1) * side // (2 * scaled_side)
