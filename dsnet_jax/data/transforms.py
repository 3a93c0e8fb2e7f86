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


def augment(
    image: np.ndarray,
    label: np.ndarray,
    rng: np.random.Generator,
    crop_size_hw: tuple[int, int],
    image_scale: float,
    scale_range: tuple[float, float],
    flip_probability: float,
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

    Returns:
      image uint8 [*crop_size_hw, 3] and label uint8 [*crop_size_hw].
    """
    height, width = image.shape[:2]
    scaled_height, scaled_width = scaled_size_hw((height, width), image_scale * rng.uniform(*scale_range))
    crop_height, crop_width = crop_size_hw
    window_height, window_width = min(crop_height, scaled_height), min(crop_width, scaled_width)
    top = int(rng.integers(scaled_height - window_height + 1))
    left = int(rng.integers(scaled_width - window_width + 1))
    flip = rng.random() < flip_probability

    # The window's cells in the scaled picture: a mirrored window counts its columns backwards.
    first_column, direction = (left + window_width - 1, -1) if flip else (left, 1)
    rows = top + np.arange(window_height)
    columns = first_column + direction * np.arange(window_width)
    ratio_y, ratio_x = height / scaled_height, width / scaled_width
    window_to_image = np.array(
        [
            [direction * ratio_x, 0.0, (first_column + 0.5) * ratio_x - 0.5],
            [0.0, ratio_y, (top + 0.5) * ratio_y - 0.5],
        ]
    )
    image = cv2.warpAffine(
        image,
        window_to_image,
        (window_width, window_height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    label = label[_nearest(rows, height, scaled_height)][:, _nearest(columns, width, scaled_width)]

    pad_y, pad_x = crop_height - window_height, crop_width - window_width
    border = {"top": 0, "bottom": pad_y, "left": pad_x if flip else 0, "right": 0 if flip else pad_x}
    image = cv2.copyMakeBorder(image, **border, borderType=cv2.BORDER_CONSTANT, value=MEAN_COLOUR)
    label = cv2.copyMakeBorder(label, **border, borderType=cv2.BORDER_CONSTANT, value=IGNORE_LABEL)
    return image, label


def _nearest(cells: np.ndarray, side: int, scaled_side: int) -> np.ndarray:
    """Pixel, of a side of `side` pixels, in which the centre of each cell of the scaled side lies: int64 [n].

    In whole numbers, (cell + 0.5) * side / scaled_side rounded down: in floating or fixed point, as OpenCV does it, a
    centre on the border of two pixels goes to either, and at a scale of 0.5 all of them lie there.
    """
    return (2 * cells + 1) * side // (2 * scaled_side)
