"""Labels as people look at them: colours over an image, and sheets of pictures with a legend."""

import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from dsnet_jax.data.specs import IGNORE_COLOUR, IGNORE_LABEL, Colour, DatasetSpec
from dsnet_jax.writing import write_bytes

GAP = 12  # Pixels between the parts of a sheet.
FONT_SIZE = 15
LINE = FONT_SIZE + 9
INK, FAINT, PAPER = (32, 32, 32), (176, 176, 176), (255, 255, 255)


def overlay(image: np.ndarray, labels: np.ndarray, spec: DatasetSpec, opacity: float = 0.5) -> np.ndarray:
    """The image with its labels' colours over it and white outlines between them; ignored pixels stay as they are.

    Args:
      image: RGB, uint8 [H, W, 3].
      labels: uint8 [H, W], classes of `spec` or 255.
      spec: gives the colours.
      opacity: of the colours, 0 .. 1.

    Returns:
      RGB, uint8 [H, W, 3].
    """
    picture = np.rint((1 - opacity) * image + opacity * spec.colourise(labels)).astype(np.uint8)
    ignored = labels == IGNORE_LABEL
    picture[ignored] = image[ignored]
    picture[outlines(labels)] = 255
    return picture


def outlines(labels: np.ndarray) -> np.ndarray:
    """Where the label below or to the right is another one, bool [H, W], of labels [H, W]."""
    changes = np.zeros(labels.shape, bool)
    changes[:-1] = labels[:-1] != labels[1:]
    changes[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return changes


def fitted_hw(size_hw: tuple[int, int], box_hw: tuple[int, int]) -> tuple[int, int]:
    """The largest height and width in the proportions of `size_hw` that fit into `box_hw`; at least 1."""
    scale = min(box_hw[0] / size_hw[0], box_hw[1] / size_hw[1])
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def resized(pixels: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """An image, uint8 [H, W, 3], smoothly at another size, or labels, uint8 [H, W], by nearest neighbour."""
    method = Image.Resampling.NEAREST if pixels.ndim == 2 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize(size_hw[::-1], method))


def sheet(
    rows: Sequence[Sequence[tuple[str, np.ndarray]]], labels: Iterable[int], spec: DatasetSpec, column: int
) -> np.ndarray:
    """Pictures with captions above them, in rows and columns, and below them the colours and names of labels.

    Args:
      rows: of pairs of caption and picture, RGB, uint8 [H, W, 3]. A row without any caption takes no room for them; one
        that is too long loses its beginning.
      labels: what the legend has, in its order; 255 is called ignored.
      spec: gives names and colours.
      column: the least width of a column, pixels.

    Returns:
      RGB, uint8 [H', W', 3].
    """
    font = _font()
    column = max(column, *(picture.shape[1] for row in rows for _, picture in row))
    width = GAP + (column + GAP) * max(map(len, rows))
    names = [(_name(label, spec), _colour(label, spec)) for label in labels]
    legend = _flow([LINE + font.getlength(name) for name, _ in names], width - 2 * GAP, spacing=1.5 * FONT_SIZE)

    tops, top = [], GAP
    for row in rows:
        tops.append(top + LINE * any(caption for caption, _ in row))
        top = tops[-1] + max(picture.shape[0] for _, picture in row) + GAP
    height = top + LINE * (1 + max((row for row, _ in legend), default=-1)) + GAP // 2
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, row_top in zip(rows, tops, strict=True):
        for index, (caption, picture) in enumerate(row):
            left = GAP + index * (column + GAP) + (column - picture.shape[1]) // 2
            caption = _shortened(caption, column, font)
            last = GAP + index * (column + GAP) + column - font.getlength(caption)
            draw.text((min(left, last), row_top - LINE), caption, INK, font)
            canvas.paste(Image.fromarray(picture), (left, row_top))
    for (name, colour), (row, x) in zip(names, legend, strict=True):
        left, row_top = GAP + x, top + row * LINE
        draw.rectangle((left, row_top + 1, left + FONT_SIZE, row_top + 1 + FONT_SIZE), colour, FAINT)
        draw.text((left + LINE, row_top), name, INK, font)
    return np.asarray(canvas)


def write_picture(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Writes an RGB picture, uint8 [H, W, 3], as PNG; the path may be gs://."""
    write_png(path, Image.fromarray(picture))


def write_png(path: str | os.PathLike, picture: Image.Image) -> None:
    """Writes a picture of Pillow's, whatever its mode; the path may be gs://."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    write_bytes(path, png.getvalue())


def _flow(widths: list[float], available: float, spacing: float) -> list[tuple[int, float]]:
    """Row and left end of each of several things that are set like words, left to right and top to bottom."""
    row, x, places = 0, 0.0, []
    for width in widths:
        if x and x + width > available:
            row, x = row + 1, 0.0
        places.append((row, x))
        x += width + spacing
    return places


def _shortened(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The end of a text that is too long: of a path, that is the part which tells it from others."""
    if font.getlength(text) <= width:
        return text
    return next("…" + text[cut:] for cut in range(1, len(text) + 1) if font.getlength("…" + text[cut:]) <= width)


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), FONT_SIZE)  # Comes with Matplotlib.


def _name(label: int, spec: DatasetSpec) -> str:
    return "ignored" if label == IGNORE_LABEL else spec.class_names[label]


def _colour(label: int, spec: DatasetSpec) -> Colour:
    return IGNORE_COLOUR if label == IGNORE_LABEL else spec.palette[label]
