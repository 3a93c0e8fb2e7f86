"""Goes once through the images of a split and keeps what can be said of them."""

import functools
import hashlib
from dataclasses import dataclass

import cv2
import numpy as np

from dsnet_jax.data.drawing import fitted_hw, overlay, resized
from dsnet_jax.data.pipeline import Example, evaluation_examples
from dsnet_jax.data.records import Split, spread_evenly
from dsnet_jax.data.specs import IGNORE_LABEL, DatasetSpec
from dsnet_jax.progress import track

EXAMPLES = 24  # That are kept as pictures.
PANEL_HW = (180, 240)  # Pixels: they fit into this.


@dataclass(frozen=True)
class Seen:
    """What is kept of an image.

    Attributes:
      id: names it within its split.
      size_hw: height and width in pixels.
      label_hw: those of its labels; None where there are none, as in the following two.
      label_pixels: how often each label occurs, int64 [256].
      label_digest: of the decoded labels.
      image_digest: of the decoded pixels.
      deviation: standard deviation of the channel that varies most, grey levels.
    """

    id: str
    size_hw: tuple[int, int]
    label_hw: tuple[int, int] | None
    label_pixels: np.ndarray | None
    label_digest: bytes | None
    image_digest: bytes
    deviation: float


@dataclass(frozen=True)
class Look:
    """What is kept of a split.

    Attributes:
      name: of the split.
      spec: its classes, K of them.
      seen: its images, in order.
      panels: examples spread evenly, pairs of id and picture.
      left_out: what it does not hold for its problems, one line each.
    """

    name: str
    spec: DatasetSpec
    seen: list[Seen]
    panels: list[tuple[str, np.ndarray]]
    left_out: list[str]

    @functools.cached_property
    def labelled(self) -> list[Seen]:
        """The images that have labels."""
        return [one for one in self.seen if one.label_hw]

    @functools.cached_property
    def label_pixels(self) -> np.ndarray:
        """How often each label occurs, int64 [256]."""
        return sum((one.label_pixels for one in self.labelled), np.zeros(256, np.int64))

    @functools.cached_property
    def label_images(self) -> np.ndarray:
        """In how many images each label occurs, int64 [256]."""
        return sum((one.label_pixels > 0 for one in self.labelled), np.zeros(256, np.int64))

    @functools.cached_property
    def class_shares(self) -> np.ndarray:
        """Pixels of each class over those of all classes, float64 [K]; zeros where there are none."""
        pixels = self.label_pixels[: self.spec.num_classes]
        return pixels / max(1, pixels.sum())

    @property
    def ignored_share(self) -> float:
        """Ignored pixels over all pixels of labels; 0 where there are none."""
        return float(self.label_pixels[IGNORE_LABEL] / max(1, self.label_pixels.sum()))


def look_at(split: Split) -> Look:
    """Decodes every image of a split and keeps what is told of it.

    Raises:
      InputError: a record cannot be decoded.
    """
    shown = set(spread_evenly(EXAMPLES, len(split)))
    seen, panels = [], []
    examples = evaluation_examples(split, image_scale=1.0)
    for example in track(examples, f"looking at {split.spec.name} {split.name}", len(split)):
        seen.append(_see(example))
        if example.index in shown:
            panels.append((example.id, _panel(example, split.spec)))
    return Look(split.name, split.spec, seen, panels, split.left_out)


def _see(example: Example) -> Seen:
    image, label = example.image, example.label
    return Seen(
        id=example.id,
        size_hw=image.shape[:2],
        label_hw=None if label is None else label.shape,
        label_pixels=None if label is None else np.bincount(label.reshape(-1), minlength=256),
        label_digest=None if label is None else _digest(label),
        image_digest=_digest(image),
        deviation=float(cv2.meanStdDev(image)[1].max()),
    )


def _digest(pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def _panel(example: Example, spec: DatasetSpec) -> np.ndarray:
    size_hw = fitted_hw(example.image.shape[:2], PANEL_HW)
    image = resized(example.image, size_hw)
    return image if example.label is None else overlay(image, resized(example.label, size_hw), spec)
