"""Inference protocols: which views of an image the network is given, and by which name a score tells it.

`ss` sees the image once, `flip` its mirror image too, `ms_flip` both at several scales, `slide` looks through windows.
A pixel's class is the one with the largest probability, the mean of the softmax over all views that see the pixel.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dsnet_jax.errors import InputError

FIELDS = {"ss": (), "flip": (), "ms_flip": ("scales",), "slide": ("slide_crop_hw", "slide_stride_hw")}  # Read by each.
NAMES = tuple(FIELDS)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What the network is given of an image. Hashable: a compiled program belongs to one.

    Attributes:
      name: one of `NAMES`.
      scales: factors on both sides of the image, one pass each.
      flip: whether each pass is repeated on the mirror image.
      crop_hw: height and width of windows, pixels; None: the whole image is seen at once. An image that is smaller
        than a window is its only window. Windows go with the one scale 1 and without flip.
      stride_hw: from one window to the next; the last one of a row or column ends with the image.
    """

    name: str = "ss"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crop_hw: tuple[int, int] | None = None
    stride_hw: tuple[int, int] | None = None

    @property
    def enlargement(self) -> float:
        """Pixels of the largest pass, mirror images with it, over those of the image: what it needs of memory."""
        return max(self.scales) ** 2 * (2 if self.flip else 1)

    def scaled_hw(self, size_hw: np.ndarray) -> np.ndarray:
        """Sizes of the scaled images, [..., 2] -> int32 [..., S, 2]: rounded as `transforms.scaled_size_hw` does.

        Halves go to the even number; no side is less than 1.
        """
        scaled = np.rint(np.asarray(size_hw)[..., None, :] * np.array(self.scales)[:, None])
        return np.maximum(1, scaled).astype(np.int32)

    def windows_hw(self, size_hw: np.ndarray) -> np.ndarray:
        """Rows and columns of windows on images, [..., 2] -> int64 [..., 2]."""
        beyond = np.maximum(0, np.asarray(size_hw, np.int64) - self.crop_hw)
        return -(-beyond // np.array(self.stride_hw)) + 1

    def pixels(self, size_hw: np.ndarray, multiple: int = 1) -> np.ndarray:
        """Pixels that all passes over images see, mirror images aside, int64 [...].

        Args:
          size_hw: heights and widths, [..., 2].
          multiple: that the sides of what a pass sees are rounded up to.
        """
        if self.crop_hw:
            seen = np.minimum(np.asarray(size_hw, np.int64), self.crop_hw)[..., None, :]
            times = self.windows_hw(size_hw).prod(axis=-1)
        else:
            seen, times = self.scaled_hw(size_hw).astype(np.int64), 1
        return (-(-seen // multiple) * multiple).prod(axis=-1).sum(axis=-1) * times


SINGLE_SCALE = Protocol()


def protocol_named(name: str, config: ConfigDict) -> Protocol:
    """The protocol of that name with the scales and windows of an experiment.

    Args:
      name: one of `NAMES`.
      config: evaluation.scales, evaluation.slide_crop_hw, evaluation.slide_stride_hw, data.crop_size_hw.

    Raises:
      InputError: there is no such protocol, or a field does not fit.
    """
    if name not in NAMES:
        raise InputError(f"--protocol is {name!r}: one of {', '.join(NAMES)} is needed", exit_code=2)
    if name == "ms_flip":
        return Protocol(name, tuple(map(float, config.evaluation.scales)), flip=True)
    if name == "slide":
        crop_hw = tuple(config.evaluation.slide_crop_hw or config.data.crop_size_hw)
        stride_hw = tuple(config.evaluation.slide_stride_hw) or tuple(-(-2 * side // 3) for side in crop_hw)
        if any(stride > side for stride, side in zip(stride_hw, crop_hw, strict=True)):
            raise InputError(
                f"config.evaluation.slide_stride_hw is {stride_hw}, windows of {crop_hw} would leave pixels out: "
                "choose a smaller stride",
                exit_code=2,
            )
        return Protocol(name, crop_hw=crop_hw, stride_hw=stride_hw)
    return Protocol(name, flip=name == "flip")
