"""Where a network samples: the points that it predicts for an image, in pixels of the image, and figures of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np

from dsnet_jax import parallel
from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.canvases import CanvasPair, batches, own_canvases
from dsnet_jax.ops.extent import Extent
from dsnet_jax.ops.normalise import normalise

if TYPE_CHECKING:
    from dsnet_jax.data.pipeline import Example


@dataclass(frozen=True)
class SampledPoints:
    """The points of an image: k*k for each of the cells of the map that is sampled, padding left out.

    Cells and pixels are told as (y, x), with the centre of the first at (0, 0). Cell c lies at the pixel
    (c + 1/2) * stride - 1/2, where `ops.resize` puts its logits.

    Attributes:
      offsets: predicted, (dy, dx) in cells, float32 [h, w, k*k, 2].
      pixels_per_cell: along y and x, in pixels of the label: the map's stride over the working resolution.
    """

    offsets: np.ndarray
    pixels_per_cell: tuple[float, float]

    @property
    def regular(self) -> np.ndarray:
        """The points without offsets, the k x k grid round each cell, in cells: float64 [h, w, k*k, 2]."""
        height, width, taps, _ = self.offsets.shape
        side = math.isqrt(taps)
        cells = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
        grid = np.stack(np.divmod(np.arange(taps), side), axis=-1) - side // 2
        return cells[:, :, None] + grid.astype(np.float64)

    @property
    def predicted(self) -> np.ndarray:
        """The points that are sampled, in cells: float64 [h, w, k*k, 2]."""
        return self.regular + self.offsets

    def to_pixels(self, cells: np.ndarray) -> np.ndarray:
        """Where points in cells, [..., 2], lie in the image: float64 [..., 2]."""
        return (cells + 0.5) * self.pixels_per_cell - 0.5

    def cell_at(self, position_yx: tuple[float, float]) -> tuple[int, int]:
        """The cell in which a pixel lies."""
        cell = np.floor((np.array(position_yx) + 0.5) / self.pixels_per_cell).astype(int)
        row, column = np.clip(cell, 0, np.array(self.offsets.shape[:2]) - 1).tolist()
        return row, column

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of the offsets in pixels, float64 [h, w, k*k]."""
        return np.linalg.norm(self.offsets * self.pixels_per_cell, axis=-1)

    def outside(self, points: np.ndarray) -> np.ndarray:
        """Which points, in cells, [h, w, k*k, 2], lie beyond the centres of the outermost cells: bool [h, w, k*k].

        What is read there is zero, or blends into it.
        """
        last = np.array(self.offsets.shape[:2]) - 1
        return ((points < 0) | (points > last)).any(axis=-1)


@dataclass(frozen=True)
class PointFigures:
    """Figures of the points of several images.

    Attributes:
      images: how many.
      points: how many.
      mean_cells: mean length of an offset, in cells of the sampled map; training logs it as `offset_mean`.
      largest_cells: its largest; `offset_max`.
      mean_pixels: mean length in pixels of the images.
      largest_pixels: its largest.
      outside: share of the points outside the map; `offset_outside`.
      regular_outside: the same share if all offsets were zero: the grids of cells at the edge reach out of the map.
    """

    images: int
    points: int
    mean_cells: float
    largest_cells: float
    mean_pixels: float
    largest_pixels: float
    outside: float
    regular_outside: float


def figures(images: Iterable[SampledPoints]) -> PointFigures:
    """Every point counts the same; there must be one image or more."""
    count, totals, largest = 0, np.zeros(5), np.zeros(2)
    for sampled in images:
        cells, pixels = np.linalg.norm(sampled.offsets, axis=-1), sampled.lengths
        outside, before = sampled.outside(sampled.predicted).sum(), sampled.outside(sampled.regular).sum()
        totals += [cells.size, cells.sum(dtype=np.float64), pixels.sum(), outside, before]
        largest = np.maximum(largest, [cells.max(), pixels.max()])
        count += 1
    points = totals[0]
    mean_cells, mean_pixels, outside, regular_outside = (totals[1:] / points).tolist()
    largest_cells, largest_pixels = largest.tolist()
    return PointFigures(
        count,
        int(points),
        mean_cells=mean_cells,
        largest_cells=largest_cells,
        mean_pixels=mean_pixels,
        largest_pixels=largest_pixels,
        outside=outside,
        regular_outside=regular_outside,
    )


def sampled_points(
    model: nn.Module,
    variables: Any,
    examples: Iterable["Example"],
    batch_size: int,
    canvases_of: Callable[["Example"], CanvasPair] = own_canvases,
) -> Iterator[tuple["Example", SampledPoints]]:
    """Each example with its points, in the order in which batches of one canvas are full. Computed by this process.

    Args:
      model: a segmentation network that samples.
      variables: its params and batch_stats.
      examples: at working resolution, of any size.
      batch_size: images computed at once; its devices share them where their number divides it.
      canvases_of: an example's canvases.

    Raises:
      InputError: the network predicts no points.
    """
    mesh = parallel.local_mesh()
    variables = jax.device_put(variables, parallel.replicated(mesh))
    sharding = parallel.replicated(mesh) if batch_size % mesh.size else parallel.split_by_batch(mesh)
    for batch in batches(examples, batch_size, canvases_of=canvases_of):
        offsets = _offsets(model, variables, *jax.device_put((batch.images, batch.size_hw), sharding))
        if offsets is None:
            raise InputError(f"{type(model).__name__} predicts no sampling points: give the --workdir of one that does")
        cells_hw, canvas_hw = np.array(offsets.shape[1:3]), np.array(batch.images.shape[1:3])
        for example, row in zip(batch.examples, np.asarray(offsets), strict=False):
            size_hw = np.array(example.image.shape[:2])
            height, width = -(-size_hw * cells_hw // canvas_hw)  # Valid cells, as `Extent.valid_hw` counts them.
            pixels_per_cell = canvas_hw / cells_hw * example.label_hw / size_hw
            yield example, SampledPoints(row[:height, :width], tuple(pixels_per_cell.tolist()))


@partial(jax.jit, static_argnames="model")
def _offsets(model: nn.Module, variables: Any, images: jax.Array, size_hw: jax.Array) -> jax.Array | None:
    extent = Extent(size_hw, images.shape[1:3])
    return model.apply(variables, extent.zero_outside(normalise(images)), extent, train=False).offsets


def border_positions(labels: np.ndarray, count: int, margin: float = 0.0) -> list[tuple[int, int]]:
    """Pixels (y, x) on borders between classes, as far from each other as they can be chosen one by one.

    The first is the one nearest to the middle. Where there are no borders, positions are spread evenly instead.

    Args:
      labels: uint8 [H, W]; borders to ignored pixels do not count.
      count: how many, at most.
      margin: pixels from the edge of the image in which none are chosen, if there are others.
    """
    on_border = np.zeros(labels.shape, bool)
    valid = labels != IGNORE_LABEL
    on_border[:-1] |= (labels[:-1] != labels[1:]) & valid[:-1] & valid[1:]
    on_border[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & valid[:, :-1] & valid[:, 1:]
    places = np.argwhere(on_border)
    size_hw = np.array(labels.shape)
    inner = places[((places >= margin) & (places <= size_hw - 1 - margin)).all(axis=1)]
    places = inner if len(inner) else places
    if not len(places):
        rows = max(1, round(math.sqrt(count * size_hw[0] / size_hw[1])))
        columns = -(-count // rows)
        grid = [((y + 0.5) / rows, (x + 0.5) / columns) for y in range(rows) for x in range(columns)][:count]
        return [(int(y * size_hw[0]), int(x * size_hw[1])) for y, x in grid]
    distance = np.full(len(places), np.inf)
    chosen = [int(np.linalg.norm(places - (size_hw - 1) / 2, axis=1).argmin())]
    while True:
        distance = np.minimum(distance, np.linalg.norm(places - places[chosen[-1]], axis=1))
        if len(chosen) == count or not distance.max():
            return [tuple(place) for place in places[chosen].tolist()]
        chosen.append(int(distance.argmax()))
