"""Run-length encoded masks as in COCO's annotations, without its library."""

from collections.abc import Sequence

import numpy as np


def decode_rle(counts: str | Sequence[int], size_hw: tuple[int, int]) -> np.ndarray:
    """Decodes a mask.

    Runs go down the columns, and are of 0 and 1 in turn, beginning with 0. As a string, every run is a number of
    characters that hold five bits each, the lowest first, and a sixth that says that another follows; from the fourth
    run on it is the difference to the run before the last (github.com/cocodataset/cocoapi, common/maskApi.c).

    Args:
      counts: the lengths of the runs in pixels, or the string that COCO makes of them.
      size_hw: height and width.

    Returns:
      bool [H, W].

    Raises:
      ValueError: the string is damaged, or the runs are not whole numbers that make a mask of that size.
    """
    height, width = size_hw
    runs = _parse(counts) if isinstance(counts, str) else np.asarray(counts)
    is_whole = runs.ndim == 1 and runs.dtype.kind == "i"
    # A run longer than the mask is looked for by itself: the sum of several could overflow to the right number.
    if not is_whole or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(f"its runs do not make {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _parse(text: str) -> np.ndarray:
    """The lengths of the runs, int64 [N]."""
    characters = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    if not len(characters):
        return np.zeros(0, np.int64)
    last = characters & 0x20 == 0
    if (characters < 0).any() or (characters > 63).any() or not last[-1]:
        raise ValueError("its runs are not a string of COCO's")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(np.append(starts, len(characters)))
    if lengths.max() > 8:  # Forty bits: no image has so many pixels, and the shifts below have room.
        raise ValueError("a run is too long for any image")
    shifts = 5 * (np.arange(len(characters)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((characters & 0x1F) << shifts, starts)
    negative = characters[last] & 0x10 != 0
    runs -= negative.astype(np.int64) << (5 * lengths)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
