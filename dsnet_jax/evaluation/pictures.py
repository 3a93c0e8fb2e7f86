"""Pictures of labels and of confusions, to look at, and label files that other programs read."""

import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from dsnet_jax.data.specs import IGNORE_COLOUR, IGNORE_LABEL, DatasetSpec

PANEL_HW = (360, 480)  # A comparison's panels are scaled, up or down, to fit into this.
GAP = 12  # Pixels between the parts of a comparison.
FONT_SIZE = 15
INK, FAINT, PAPER = (32, 32, 32), (176, 176, 176), (255, 255, 255)
MOST_CLASSES_WITH_FIGURES = 32  # In a picture of a confusion matrix; with more, colours alone tell.


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
    picture[:-1][labels[:-1] != labels[1:]] = 255
    picture[:, :-1][labels[:, :-1] != labels[:, 1:]] = 255
    return picture


def comparison(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Image, truth and prediction in a row, and below them the colours of the classes that occur.

    The panels all have the truth's proportions and are scaled to fit 480 x 360 pixels, labels by nearest neighbour.

    Args:
      image: RGB, uint8 [h, w, 3], at any resolution.
      truth: uint8 [H, W], classes of `spec` or 255.
      prediction: uint8 [H, W], likewise.
      spec: gives names and colours.

    Returns:
      RGB, uint8 [H', W', 3].
    """
    height, width = truth.shape
    scale = min(PANEL_HW[0] / height, PANEL_HW[1] / width)
    panel_wh = max(1, round(width * scale)), max(1, round(height * scale))
    panels = {"image": Image.fromarray(image).resize(panel_wh, Image.Resampling.LANCZOS)}
    for heading, labels in (("truth", truth), ("prediction", prediction)):
        panels[heading] = Image.fromarray(spec.colourise(labels)).resize(panel_wh, Image.Resampling.NEAREST)

    font = _font()
    line = FONT_SIZE + 9
    column = max(panel_wh[0], PANEL_HW[1] // 2)  # A narrow picture still leaves its heading and the legend some room.
    row_width = 3 * column + 4 * GAP
    occurring = np.union1d(truth, prediction).tolist()
    names = [(_name(label, spec), _colour(label, spec)) for label in occurring]
    legend = _flow([line + font.getlength(name) for name, _ in names], row_width - 2 * GAP, spacing=1.5 * FONT_SIZE)
    legend_top = GAP + line + panel_wh[1] + GAP
    rows = 1 + max(row for row, _ in legend)
    canvas = Image.new("RGB", (row_width, legend_top + rows * line + GAP // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, (heading, panel) in enumerate(panels.items()):
        left = GAP + index * (column + GAP) + (column - panel_wh[0]) // 2
        draw.text((left, GAP), heading, INK, font)
        canvas.paste(panel, (left, GAP + line))
    for (name, colour), (row, x) in zip(names, legend, strict=True):
        left, top = GAP + x, legend_top + row * line
        draw.rectangle((left, top + 1, left + FONT_SIZE, top + 1 + FONT_SIZE), colour, FAINT)
        draw.text((left + line, top), name, INK, font)
    return np.asarray(canvas)


def _flow(widths: list[float], available: float, spacing: float) -> list[tuple[int, float]]:
    """Row and left end of each of several things that are set like words, left to right and top to bottom."""
    row, x, places = 0, 0.0, []
    for width in widths:
        if x and x + width > available:
            row, x = row + 1, 0.0
        places.append((row, x))
        x += width + spacing
    return places


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), FONT_SIZE)  # Comes with Matplotlib.


def _name(label: int, spec: DatasetSpec) -> str:
    return "ignored" if label == IGNORE_LABEL else spec.class_names[label]


def _colour(label: int, spec: DatasetSpec) -> tuple[int, int, int]:
    return IGNORE_COLOUR if label == IGNORE_LABEL else spec.palette[label]


def write_picture(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Writes an RGB picture, uint8 [H, W, 3], as PNG; the path may be gs://."""
    with epath.Path(path).open("wb") as file:
        Image.fromarray(picture).save(file, "PNG")


def write_labels(path: str | os.PathLike, labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> None:
    """Writes labels as a palette PNG of their exact size, 8 bits a pixel: the index is the label.

    Args:
      path: of the file; may be gs://.
      labels: uint8 [H, W].
      palette: colours of the first labels; 255 has PASCAL VOC's colour for ignored pixels, what lies between is black.
    """
    if labels.dtype != np.uint8:
        raise ValueError(f"labels are {labels.dtype}: a palette's indices are uint8")
    colours = np.zeros((256, 3), np.uint8)
    colours[IGNORE_LABEL] = IGNORE_COLOUR
    colours[: len(palette)] = palette
    picture = Image.fromarray(labels)
    picture.putpalette(colours.tobytes())
    with epath.Path(path).open("wb") as file:
        picture.save(file, "PNG")


def write_confusion_matrix(path: str | os.PathLike, matrix: np.ndarray, spec: DatasetSpec) -> None:
    """Writes a picture of how the true pixels of each class were labelled, in percent of the class, as PNG.

    Up to 32 classes the figures stand in the cells (nothing below 0.5 %). Classes without true pixels have a grey row.

    Args:
      path: of the file; may be gs://.
      matrix: integers [K, K]; rows are the truth, columns the predictions.
      spec: names the K classes.
    """
    with epath.Path(path).open("wb") as file:
        _draw_confusion_matrix(matrix, spec).savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)


def _draw_confusion_matrix(matrix: np.ndarray, spec: DatasetSpec) -> Figure:
    count = spec.num_classes
    truth = matrix.sum(axis=1, keepdims=True)
    percent = np.ma.masked_array(100 * matrix / np.maximum(truth, 1), np.broadcast_to(truth == 0, matrix.shape))
    cell = min(0.7, max(0.17, 9 / count))  # Inches.
    points = min(11.0, 72 * cell * 0.6)  # Size of the class names: they fit their cell's height.
    figure = Figure(figsize=(cell * count, cell * count), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_facecolor("0.88")
    drawn = axes.pcolormesh(percent, cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=0.4)
    axes.invert_yaxis()
    centres = np.arange(count) + 0.5
    axes.set_xticks(centres, spec.class_names, rotation=90, fontsize=points, parse_math=False)
    axes.set_yticks(centres, spec.class_names, fontsize=points, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    with_figures = count <= MOST_CLASSES_WITH_FIGURES
    heading_points = 11.0 if with_figures else 18.0
    axes.set_xlabel("predicted class", fontsize=heading_points, labelpad=8)
    axes.set_ylabel("true class", fontsize=heading_points, labelpad=8)
    axes.set_title(f"{spec.name}: where each class's pixels went, %", fontsize=heading_points, pad=10)
    if with_figures:
        for row, column in np.argwhere(percent.filled(0) >= 0.5).tolist():
            value = percent[row, column]
            ink = "white" if value > 55 else "0.15"
            axes.text(column + 0.5, row + 0.5, f"{value:.0f}", color=ink, fontsize=points, ha="center", va="center")
    bar = figure.add_axes((1 + 0.25 / count, 0.2, min(0.2, 0.2 / (cell * count)), 0.6))
    figure.colorbar(drawn, cax=bar).outline.set_visible(False)
    bar.tick_params(labelsize=heading_points, length=0)
    return figure
