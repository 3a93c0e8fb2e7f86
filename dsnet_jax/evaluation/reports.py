"""An evaluation's results as files and as a table: one dictionary, written and rendered.

`results.json` holds everything, `confusion_matrix.csv` what most of it was computed from, `table.md` what people look
at.
"""

import csv
import dataclasses
import io
import json
import os

import numpy as np
from etils import epath
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.evaluation.boundary import boundary_iou
from dsnet_jax.evaluation.metrics import benchmark_figures, mean_of_present, score
from dsnet_jax.evaluation.protocols import SINGLE_SCALE, Protocol
from dsnet_jax.writing import write_text

SUMMARY = {
    "miou": "mIoU",
    "boundary_miou": "mean boundary IoU",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
}
HEADINGS = ("IoU %", "boundary IoU %", "accuracy %", "true pixels %")  # Of the columns beside the classes.


def summarise(
    matrix: np.ndarray,
    boundary: np.ndarray,
    spec: DatasetSpec,
    *,
    split: str,
    images: int,
    padding: int,
    checkpoint_step: int,
    config: dict,
    protocol: Protocol = SINGLE_SCALE,
) -> dict:
    """Everything that an evaluation says, ready for JSON. Scores are fractions, 0 .. 1, and None where there is none.

    Args:
      matrix: int64 [K, K], pixels; rows are the truth, columns the predictions.
      boundary: int64 [3, K], pixels near outlines, of `boundary_counts`.
      spec: names the K classes; its own name tells which benchmark's figures are added.
      split: that was scored.
      images: how many were scored.
      padding: how many images were computed to fill batches, and not counted.
      checkpoint_step: of the weights.
      config: tells this experiment from others; kept as it is. Of it, data.image_scale says how large images are seen.
      protocol: what the network was given of an image.

    Raises:
      InputError: no valid pixel was scored.
    """
    scores, near_outlines = score(matrix), boundary_iou(boundary)
    truth, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    means = dataclasses.asdict(scores) | {"boundary_miou": mean_of_present(near_outlines)}
    return {
        "dataset": spec.name,
        "split": split,
        "protocol": protocol.name,
        "seen": _seen(protocol, config["data"]["image_scale"]),
        "checkpoint_step": checkpoint_step,
        "images": images,
        "padding_images": padding,
        "pixels": scores.pixels,
        **{key: means[key] for key in SUMMARY},
        "benchmark_figures": [dataclasses.asdict(figure) for figure in benchmark_figures(matrix, spec)],
        "classes_averaged": spec.num_classes - len(scores.absent),
        "absent_classes": [spec.class_names[index] for index in scores.absent],
        "boundary_classes_averaged": spec.num_classes - near_outlines.count(None),
        "classes": [
            {
                "name": name,
                "iou": scores.iou[index],
                "boundary_iou": near_outlines[index],
                "accuracy": scores.accuracy[index],
                "true_pixels": int(truth[index]),
                "predicted_pixels": int(predicted[index]),
            }
            for index, name in enumerate(spec.class_names)
        ],
        "config": config,
    }


def _seen(protocol: Protocol, image_scale: float) -> str:
    """What the network was given of each image, in words."""
    size = "its own size" if image_scale == 1 else f"{image_scale:g} of its own size"
    if protocol.crop_hw:
        crop, stride = ("{} x {}".format(*sides_hw) for sides_hw in (protocol.crop_hw, protocol.stride_hw))
        return f"each image at {size}, through windows of {crop} pixels (height x width) every {stride} pixels"
    if protocol.scales != SINGLE_SCALE.scales:
        size = f"{', '.join(f'{scale:g}' for scale in protocol.scales)} times {size}"
    return f"each image{' and its mirror image' if protocol.flip else ''}, whole, at {size}"


def write_results(folder: str | os.PathLike, results: dict, matrix: np.ndarray) -> None:
    """Writes results.json, confusion_matrix.csv and table.md; a reader sees each of them whole, old or new.

    Args:
      folder: made if it is not there; may be gs://.
      results: from `summarise`.
      matrix: that they come from.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [row["name"] for row in results["classes"]]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["true class", *names])
    writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    write_text(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    write_text(folder / "confusion_matrix.csv", table.getvalue())
    write_text(folder / "table.md", markdown_table(results))


def markdown_table(results: dict) -> str:
    """What `summarise` gave, as a page of Markdown with a table of classes."""
    lines = [f"# {_title(results)}", "", _origin(results), "", "| | % |", "|---|---:|"]
    lines += [f"| {label} | {_percent(results[key])} |" for key, label in SUMMARY.items()]
    if figures := results["benchmark_figures"]:
        lines += ["", f"| {results['dataset']} | % | |", "|---|---:|---|"]
        lines += [f"| {figure['name']} | {_percent(figure['value'])} | {figure['meaning']} |" for figure in figures]
    lines += ["", "| class | " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(field.replace("|", "\\|") for field in row) + " |" for row in _rows(results)]
    return "\n".join([*lines, "", _absent(results)]) + "\n"


def console_table(results: dict) -> Group:
    """The same for the terminal: print it with a `rich.console.Console`."""
    table = Table(title=Text(_title(results)))  # Text: names in square brackets are not markup.
    table.add_column("class")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in _rows(results):
        table.add_row(*map(Text, row))
    table.add_section()
    means = map(_percent, (results["miou"], results["boundary_miou"], results["mean_accuracy"]))
    table.add_row("mean", *means, style="bold")
    # Class accuracies weighted by frequency are the pixel accuracy.
    by_frequency = map(_percent, (results["frequency_weighted_iou"], None, results["pixel_accuracy"]))
    table.add_row("by frequency", *by_frequency)
    figures = [
        Text(f"{figure['name']}: {_percent(figure['value'])} % ({figure['meaning']})")
        for figure in results["benchmark_figures"]
    ]
    return Group(table, *figures, Text(_origin(results)), Text(_absent(results)))


def _title(results: dict) -> str:
    return f"{results['dataset']} {results['split']}: {_percent(results['miou'])} % mIoU ({results['protocol']})"


def _origin(results: dict) -> str:
    return (
        f"{results['images']:,} images, {results['pixels']:,} valid pixels, weights of step "
        f"{results['checkpoint_step']:,}. Images that only filled batches, not counted: {results['padding_images']:,}. "
        f"Protocol {results['protocol']}: {results['seen']}."
    )


def _absent(results: dict) -> str:
    counted, absent = results["classes_averaged"], results["absent_classes"]
    text = f"The mIoU is the mean of all {counted} classes."
    if absent:
        text = f"The mIoU is the mean of {counted} of {counted + len(absent)} classes: neither true nor predicted "
        text += f"anywhere are {', '.join(absent)}."
    if results["boundary_classes_averaged"] != counted:
        text += f" That of the boundary IoU is of {results['boundary_classes_averaged']}, which have outlines."
    return text


def _rows(results: dict) -> list[tuple[str, ...]]:
    pixels = results["pixels"]
    return [
        (row["name"], *map(_percent, (row["iou"], row["boundary_iou"], row["accuracy"], row["true_pixels"] / pixels)))
        for row in results["classes"]
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
