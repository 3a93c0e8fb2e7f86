"""Pictures of where a network samples: `dsnet inspect points`."""

import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsnet_jax import parallel
from dsnet_jax.data.drawing import outlines, write_picture
from dsnet_jax.data.pipeline import Example, evaluation_examples, load_example
from dsnet_jax.data.records import Split, spread_evenly
from dsnet_jax.errors import InputError, writing_into
from dsnet_jax.evaluation.canvases import choose_canvases
from dsnet_jax.evaluation.folders import picture_names
from dsnet_jax.evaluation.inference import Segmenter
from dsnet_jax.evaluation.pictures import comparisons, write_figure
from dsnet_jax.evaluation.protocols import SINGLE_SCALE
from dsnet_jax.evaluation.sampling_points import PointFigures, SampledPoints, border_positions, figures, sampled_points
from dsnet_jax.evaluation.trained import Trained, check_classes, load_trained, open_split_of
from dsnet_jax.progress import track
from dsnet_jax.writing import check_writable, write_text

COMPARISON = "comparison"  # Of networks: the name of its picture.
POSITIONS = 6  # Of an image, where none are given.
# Bright, and apart from each other for most colour-blind people: Okabe and Ito's, lightened.
COLOURS = ("#ffb000", "#4cc9ff", "#ff5c8a", "#2ee6a6", "#fff04d", "#c89bff", "#ff8243", "#ffffff")
PANEL_INCHES, DPI = 4.6, 110  # Height of a panel.
_OUTLINE = [withStroke(linewidth=3.0, foreground="black")]


def draw_sampling_points(
    workdir: epath.PathLike,
    step: int | str | None = None,
    split: str | None = None,
    root: str | None = None,
    ids: Sequence[str] = (),
    images: int = 4,
    positions: Sequence[tuple[float, float]] = (),
    baseline: epath.PathLike | None = None,
    output: epath.PathLike | None = None,
) -> None:
    """Draws where the network of a run samples, and prints figures of its points over a split.

    Written are `<id>.png` for some images: the regular grids and the predicted points of some positions, and a map of
    the offsets' lengths; figures.json; and with a baseline comparison.png, in the layout of the paper's Figure 4:
    image, truth, baseline and this network.

    Args:
      workdir: of the run.
      step: of the checkpoint; "best"; None: the last. Of a baseline it is always the last.
      split: of the data set; None: `config.data.eval_split`.
      root: where prepared data sets lie; None: `config.data.root`.
      ids: of the images to draw; none: `images` of them, spread evenly over the split.
      images: how many.
      positions: pixels (y, x) whose points are drawn; none: a few on the borders between classes.
      baseline: workdir of another run on the same classes.
      output: folder; None: `sampling_points/<split>/` in the workdir.

    Raises:
      InputError: a run, the split, an id or a position cannot be used, the network predicts no points, or the folder
        cannot be written.
    """
    trained = load_trained(workdir, step)
    config = trained.config
    data = open_split_of(trained, workdir, split, root)
    folder = epath.Path(workdir) / "sampling_points" / data.name if output is None else epath.Path(output)
    otherwise = "give another --output"
    check_writable(folder, otherwise)
    other = None if baseline is None else load_trained(baseline)
    if other is not None:
        check_classes(other, baseline, data.spec)
    shown = _examples(data, _indices(data, ids, images), config.data.image_scale)
    _check_positions(positions, shown)
    pairs = sampled_points(trained.model, trained.variables, shown, batch_size=1)
    points = {example.index: points for example, points in pairs}
    labels = _labels(trained, shown)

    with writing_into(folder, otherwise):
        folder.mkdir(parents=True, exist_ok=True)
        for name, example in zip(picture_names(shown, taken=[COMPARISON]), shown, strict=True):
            shown_labels = labels[example.index] if example.label is None else example.label
            margin = 2 * max(points[example.index].pixels_per_cell)
            places = positions or border_positions(shown_labels, POSITIONS, margin)
            write_points_picture(folder / f"{name}.png", example, points[example.index], places, shown_labels)
    if other is not None and shown:
        theirs = _labels(other, _examples(data, [one.index for one in shown], other.config.data.image_scale))
        rows = []
        for example in shown:
            row = {} if example.label is None else {"truth": example.label}
            row[f"baseline: {other.config.model.name}"] = theirs[example.index]
            rows.append((example.image, row | {config.model.name: labels[example.index]}))
        with writing_into(folder, otherwise):
            write_picture(folder / f"{COMPARISON}.png", comparisons(rows, data.spec))
    print(f"drawn into {folder}: {', '.join(example.id for example in shown) or 'nothing'}", flush=True)

    examples = evaluation_examples(data, config.data.image_scale, read_threads=config.data.read_threads)
    examples = track(examples, f"sampling points of {data.spec.name} {data.name}", len(data))
    asked = config.evaluation.batch_size, config.evaluation.padded_share
    canvases = choose_canvases(data.sizes_hw, config.data.image_scale, SINGLE_SCALE, *asked)
    all_points = sampled_points(
        trained.model,
        trained.variables,
        examples,
        config.evaluation.batch_size,
        lambda example: canvases[example.label_hw],
    )
    found = figures(points for _, points in all_points)
    Console().print(_table(f"{data.spec.name} {data.name}, step {trained.step}", found))
    with writing_into(folder, otherwise):
        write_text(folder / "figures.json", json.dumps(dataclasses.asdict(found), indent=2) + "\n")


def _indices(split: Split, ids: Sequence[str], count: int) -> list[int]:
    if count < 0:
        raise InputError(f"--images is {count}: 0 or more are needed", exit_code=2)
    if not ids:
        return spread_evenly(count, len(split))
    known = {split[index].id: index for index in range(len(split))}
    if unknown := [id_ for id_ in ids if id_ not in known]:
        raise InputError(
            f"split {split.name!r} of {split.spec.name} has no image {unknown[0]!r}: the first is {next(iter(known))!r}"
        )
    return [known[id_] for id_ in ids]


def _examples(split: Split, indices: Sequence[int], image_scale: float) -> list[Example]:
    return [load_example(index, split=split, image_scale=image_scale) for index in indices]


def _check_positions(positions: Sequence[tuple[float, float]], examples: Sequence[Example]) -> None:
    for example in examples:
        height, width = example.label_hw
        for y, x in positions:
            if not (0 <= y <= height - 1 and 0 <= x <= width - 1):
                size = f"{height} x {width} pixels (height x width)"
                raise InputError(f"the position {y:g},{x:g} is not in {example.id}, which has {size}: choose another")


def _labels(trained: Trained, examples: Sequence[Example]) -> dict[int, np.ndarray]:
    """What a network predicts, uint8 [H, W], by the examples' indices."""
    segmenter = Segmenter(trained.model, trained.variables, parallel.local_mesh())
    return {
        example.index: prediction
        for batch, labels, *_ in segmenter.run(examples, batch_size=1)
        for example, prediction in batch.cropped(labels)
    }


def _table(title: str, found: PointFigures) -> Table:
    table = Table("", title=Text(f"{title}: {found.points:,} points of {found.images:,} images"))
    for heading in ("pixels of the image", "of the sampled map"):
        table.add_column(heading, justify="right")
    table.add_row("mean offset", f"{found.mean_pixels:.2f}", f"{found.mean_cells:.3f}")
    table.add_row("largest offset", f"{found.largest_pixels:.2f}", f"{found.largest_cells:.3f}")
    table.add_row("outside the map", "", f"{found.outside:.2%}")
    table.add_row("so without offsets", "", f"{found.regular_outside:.2%}")
    return table


def write_points_picture(
    path: epath.PathLike,
    example: Example,
    points: SampledPoints,
    positions: Sequence[tuple[float, float]],
    labels: np.ndarray,
) -> None:
    """Writes a PNG: regular grids and predicted points of some positions, and the offsets' lengths everywhere.

    Args:
      path: of the file; may be gs://.
      example: the image.
      points: of the image.
      positions: pixels (y, x).
      labels: whose borders are drawn over the lengths, uint8 [H, W].
    """
    write_figure(path, _draw_points(example, points, positions, labels))


def _draw_points(
    example: Example, points: SampledPoints, positions: Sequence[tuple[float, float]], labels: np.ndarray
) -> Figure:
    height, width = example.label_hw
    panel = PANEL_INCHES * min(2.0, max(0.6, width / height))  # Inches.
    figure = Figure(figsize=(3 * panel + 1.2, PANEL_INCHES + 0.4), dpi=DPI, layout="constrained")
    figure.suptitle(
        f"{example.id}: offsets of {points.lengths.mean():.2f} pixels in the mean, {points.lengths.max():.2f} at most",
        fontsize=11,
        parse_math=False,  # An id may have dollar signs.
    )
    panels = figure.subplots(1, 3)
    cells = [points.cell_at(position) for position in positions]
    start = points.to_pixels(points.regular)
    for axes, title, end in (
        (panels[0], "regular grid", start),
        (panels[1], "predicted points", points.to_pixels(points.predicted)),
    ):
        axes.imshow(example.image, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear")
        for index, cell in enumerate(cells):
            colour = COLOURS[index % len(COLOURS)]
            moves = np.stack([start[cell], end[cell]])[..., ::-1].transpose(2, 0, 1)
            axes.plot(*moves, color=colour, linewidth=1.6, path_effects=_OUTLINE)
            axes.scatter(*start[cell][:, ::-1].T, s=7, c="white", edgecolors="black", linewidths=0.6, zorder=3)
            axes.scatter(*end[cell][:, ::-1].T, s=30, c=colour, edgecolors="black", linewidths=0.9, zorder=4)
            y, x = points.to_pixels(np.array(cell))
            axes.scatter(x, y, s=130, facecolors="none", edgecolors="white", linewidths=1.6, path_effects=_OUTLINE)
        drawn = np.array([end[cell] for cell in cells])
        beyond = ((drawn < -0.5) | (drawn > np.array([height, width]) - 0.5)).any(axis=-1).sum()
        axes.set_title(f"{title}, {beyond} outside the image" if beyond else title, fontsize=11)

    lengths = points.lengths.mean(axis=-1)
    rows, columns = np.array(lengths.shape) * points.pixels_per_cell
    drawn = panels[2].imshow(lengths, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), cmap="magma", vmin=0)
    panels[2].imshow(_outlines(labels), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    panels[2].set_title("length of the offsets", fontsize=11)
    figure.colorbar(drawn, ax=panels[2], label="mean of a position's points, pixels", fraction=0.05, pad=0.02)
    for axes in panels:
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
    mark = functools.partial(Line2D, [], [], linestyle="", marker="o", markeredgecolor="black", path_effects=[])
    ring = mark(markersize=11, markerfacecolor="none", markeredgewidth=1.6, label="a position")
    ring.set(markeredgecolor="white", path_effects=_OUTLINE)
    marks = [
        ring,
        mark(markersize=3.5, markerfacecolor="white", label="its regular grid"),
        mark(markersize=6, markerfacecolor=COLOURS[0], label="the points that are sampled for it"),
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=3, frameon=False, fontsize=10)
    return figure


def _outlines(labels: np.ndarray) -> np.ndarray:
    """White where the label changes and clear elsewhere: RGBA, uint8 [H, W, 4]."""
    picture = np.zeros((*labels.shape, 4), np.uint8)
    picture[outlines(labels)] = (255, 255, 255, 180)
    return picture
