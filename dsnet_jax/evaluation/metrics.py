"""Scores of a segmentation, all of them from one confusion matrix; `boundary` has the one that is not.

The matrix is counted exactly: in int32 on the device, a batch at a time, and added up in int64 on the host.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError

MOST_PIXELS = 2**31 - 1  # Of a batch: int32 counts so many.


def confusion_counts(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Counts the pixels of each pair of true and predicted class.

    On TPU as a product of integer one-hot vectors, elsewhere by scattering: each is the slow way on the other. Images
    are counted one by one and then added, so that a batch sharded over devices needs one sum between them.

    Args:
      labels: truth, integer [B, H, W]; values outside 0 .. num_classes - 1 (255: ignored) are not counted.
      predictions: integer [B, H, W], 0 .. num_classes - 1 wherever the label counts.
      num_classes: K, 1 .. 255.

    Returns:
      int32 [K, K], rows are the truth, columns the predictions.

    Raises:
      ValueError: the batch has so many pixels that int32 could overflow.
    """
    if labels.size > MOST_PIXELS:
        raise ValueError(f"a batch of {labels.shape} labels can overflow int32: count it in parts")
    labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
    per_image = jax.lax.platform_dependent(
        labels,
        predictions,
        tpu=lambda *pair: _counts_by_product(*pair, num_classes),
        default=lambda *pair: _counts_by_scatter(*pair, num_classes),
    )
    return per_image.sum(axis=0)


def _counts_by_scatter(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Per image, int32 [B, K, K]."""

    def count(labels, predictions):
        valid = (labels >= 0) & (labels < num_classes)
        cells = jnp.where(valid, labels * num_classes + predictions, 0)
        return jnp.zeros(num_classes**2, jnp.int32).at[cells.ravel()].add(valid.ravel().astype(jnp.int32))

    return jax.vmap(count)(labels, predictions).reshape(-1, num_classes, num_classes)


def _counts_by_product(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Per image, int32 [B, K, K]; a row of pixels at a time, because one-hot vectors are large."""

    def add_row(counts, row):
        # The one-hot vector of a label that is out of range is zero.
        truth, predicted = (jax.nn.one_hot(values, num_classes, dtype=jnp.int8) for values in row)
        return counts + jnp.einsum("bwt,bwp->btp", truth, predicted, preferred_element_type=jnp.int32), None

    rows = labels.swapaxes(0, 1), predictions.swapaxes(0, 1)
    start = jnp.zeros((labels.shape[0], num_classes, num_classes), jnp.int32)
    return jax.lax.scan(add_row, start, rows)[0]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a confusion matrix says; all figures are fractions, 0 .. 1.

    Attributes:
      iou: intersection over union by class; None where the class occurs neither in the truth nor in a prediction.
      accuracy: share of a class's true pixels that are found; None where the truth has none.
      miou: mean of the IoUs that are not None. (Some benchmarks count such classes as 0.)
      mean_accuracy: mean of the accuracies that are not None.
      pixel_accuracy: share of all valid pixels whose class is right.
      frequency_weighted_iou: IoUs weighted with their class's share of the true pixels.
      absent: the classes whose IoU is None.
      pixels: how many valid pixels were scored.
    """

    iou: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    frequency_weighted_iou: float
    absent: tuple[int, ...]
    pixels: int


def score(matrix: np.ndarray) -> Scores:
    """The scores of a confusion matrix.

    Args:
      matrix: int64 [K, K], pixels; rows are the truth, columns the predictions.

    Raises:
      InputError: the matrix is empty.
      ValueError: the matrix is not int64, so that it may have overflowed or been rounded.
    """
    if matrix.dtype != np.int64:
        raise ValueError(f"the confusion matrix is {matrix.dtype}: add it up in int64")
    pixels = int(matrix.sum())
    if not pixels:
        raise InputError("no valid pixel was scored: every label is 255 (ignored); check the split's masks")
    right, truth, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    union = truth + predicted - right
    iou, accuracy = _ratios(right, union), _ratios(right, truth)
    return Scores(
        iou=iou,
        accuracy=accuracy,
        miou=mean_of_present(iou),
        mean_accuracy=mean_of_present(accuracy),
        pixel_accuracy=int(right.sum()) / pixels,
        frequency_weighted_iou=sum(
            value * int(count) / pixels for value, count in zip(iou, truth, strict=True) if value is not None
        ),
        absent=tuple(index for index, value in enumerate(iou) if value is None),
        pixels=pixels,
    )


def _ratios(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float | None, ...]:
    return tuple(int(n) / int(d) if d else None for n, d in zip(numerators, denominators, strict=True))


def mean_of_present(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if all are."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure by which results on a benchmark are compared.

    Attributes:
      name: what it is called in tables.
      value: a fraction, 0 .. 1; None where it cannot be told.
      meaning: how it comes about, or why there is none.
    """

    name: str
    value: float | None
    meaning: str


def benchmark_figures(matrix: np.ndarray, spec: DatasetSpec) -> tuple[Figure, ...]:
    """The figures by which results on this data set are compared, beside its mIoU; none for most.

    Args:
      matrix: int64 [K, K], pixels; rows are the truth, columns the predictions.
      spec: whose name tells the benchmark: ade20k, pascal_context (59 classes) or pascal_context_60 (with background).

    Raises:
      InputError: the matrix is empty.
    """
    if spec.name == "ade20k":
        scores = score(matrix)
        meaning = "mean of pixel accuracy and mIoU, over labelled pixels"
        return (Figure("ADE20K score", (scores.pixel_accuracy + scores.miou) / 2, meaning),)
    if spec.name in ("pascal_context", "pascal_context_60"):
        return _context_figures(matrix, spec)
    return ()


def _context_figures(matrix: np.ndarray, spec: DatasetSpec) -> tuple[Figure, ...]:
    """The three that papers mix: a network without a background class cannot have the second."""
    miou, meaning = score(matrix).miou, "pixels of the 59 classes alone are scored"
    if "background" in spec.class_names:
        background = spec.class_names.index("background")
        of_classes = matrix.copy()
        of_classes[background] = 0
        iou = score(of_classes).iou if of_classes.any() else ()
        miou_59 = mean_of_present(iou[:background] + iou[background + 1 :])
        miou_60, meaning_60 = miou, "all pixels are scored, background is a class like the others"
        meaning += "; background predicted there is a miss"
    else:
        miou_59, miou_60 = miou, None
        meaning_60 = "none: it needs a network trained with background, on pascal_context_60"
    return (
        Figure("mIoU, 59 classes", miou_59, meaning),
        Figure("mIoU, 60 classes", miou_60, meaning_60),
        Figure(
            "mIoU, 59 classes, x 59/60",
            None if miou_59 is None else miou_59 * 59 / 60,
            "as if background were a class that is never found, and never takes from the others",
        ),
    )
