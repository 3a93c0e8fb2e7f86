"""Pictures of labels and of confusions, to look at, and label files that other programs read."""

import io
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dsnet_jax.data.drawing import fitted_hw, resized, sheet, write_png
from dsnet_jax.data.specs import IGNORE_COLOUR, IGNORE_LABEL, DatasetSpec
from dsnet_jax.writing import write_bytes

PANEL_HW = (360, 480)  # A comparison's panels are scaled, up or down, to fit into this.
MOST_CLASSES_WITH_FIGURES = 32  # In a picture of a confusion matrix; with more, colours alone tell.


def comparison(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Image, truth and prediction in a row: `comparisons` of one image."""
    return comparisons([(image, {"truth": truth, "prediction": prediction})], spec)


def comparisons(rows: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]], spec: DatasetSpec) -> np.ndarray:
    """A row for each image, with several labellings of it beside it, and below them the classes that occur.

    Panels all have the labels' proportions and are scaled to fit 480 x 360 pixels, labels by nearest neighbour. The
    captions stand above the first row.

    Args:
      rows: pairs of an image, RGB, uint8 [h, w, 3], at any resolution, and its labels by caption, uint8 [H, W], classes
        of `spec` or 255. The captions are those of the first row.
      spec: gives names and colours.

    Returns:
      RGB, uint8 [H', W', 3].
    """
    occurring = set()
    panels = []
    for image, labellings in rows:
        size_hw = fitted_hw(next(iter(labellings.values())).shape, PANEL_HW)
        row = [("image", resized(image, size_hw))]
        for caption, labels in labellings.items():
            occurring.update(np.unique(labels).tolist())
            row.append((caption, spec.colourise(resized(labels, size_hw))))
        panels.append([("" if panels else caption, panel) for caption, panel in row])
    # A narrow picture still leaves its caption and the legend some room.
    return sheet(panels, sorted(occurring), spec, column=PANEL_HW[1] // 2)


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
    write_png(path, picture)


def write_confusion_matrix(path: str | os.PathLike, matrix: np.ndarray, spec: DatasetSpec) -> None:
    """Writes a picture of how the true pixels of each class were labelled, in percent of the class, as PNG.

    Up to 32 classes the figures stand in the cells (nothing below 0.5 %). Classes without true pixels have a grey row.

    Args:
      path: of the file; may be gs://.
      matrix: integers [K, K]; rows are the truth, columns the predictions.
      spec: names the K classes.
    """
    write_figure(path, _draw_confusion_matrix(matrix, spec))


def write_figure(path: str | os.PathLike, figure: Figure) -> None:
    """Writes a figure as PNG, cut to what it holds; the path may be gs://."""
    png = io.BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight", pad_inches=0.15)
    write_bytes(path, png.getvalue())


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
