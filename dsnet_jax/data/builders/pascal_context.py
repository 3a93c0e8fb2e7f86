"""PASCAL Context: VOC 2010's images, labelled all over."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from dsnet_jax.data.builders import PublishedBuilder
from dsnet_jax.data.decoding import MAX_SIDE
from dsnet_jax.data.json_arrays import read_arrays
from dsnet_jax.data.published import Piece
from dsnet_jax.data.rle import decode_rle
from dsnet_jax.data.specs import IGNORE_LABEL, PASCAL_CONTEXT, PASCAL_CONTEXT_60, PASCAL_CONTEXT_IDS
from dsnet_jax.data.validation import FoundSplit, Pair
from dsnet_jax.errors import InputError

IMAGES = Piece(
    "PASCAL VOC 2010",
    ("VOC2010/JPEGImages",),
    {"VOCtrainval_03-May-2010.tar": "sha1:bf9985e9f2b064752bf6bd654d89f017c76c395a"},
)
ANNOTATIONS = Piece(
    "PASCAL Context's annotations",
    ("trainval_merged.json",),
    {"trainval_merged.json": "sha1:169325d9f7e9047537fedca7b04de4dddf10b881"},
    is_archive=False,
)
PAPER_COUNTS = {"train": 4998, "val": 5105}
KNOWN_IMAGE, KNOWN_CLASS = "2008_000002", "tvmonitor"  # What it shows.

_KNOWN_ID = PASCAL_CONTEXT_IDS[PASCAL_CONTEXT.class_names.index(KNOWN_CLASS)]
_FILE_NAME = re.compile(r"(\d{4}_\d{6})\.jpg")


def _labels_of_ids(background: int, first: int) -> dict[int, int]:
    return {0: background} | {id_: label for label, id_ in enumerate(PASCAL_CONTEXT_IDS, first)}


@dataclass(frozen=True)
class Annotated:
    """What is known of an image.

    Attributes:
      size_hw: height and width in pixels.
      segments: category, height and width, and run lengths, see `rle.decode_rle`; a later one covers an earlier one.
    """

    size_hw: tuple[int, int]
    segments: list[tuple[int, tuple[int, int], str | list[int]]]


class PascalContext(PublishedBuilder, skip_registration=True):
    """PASCAL Context, the 59 frequent classes; what is none of them is ignored.

    Attributes:
      background: label of what is none of the classes.
      label_of_id: label of each category of the annotations; category 0 is the background.
    """

    name = "pascal_context"
    spec = PASCAL_CONTEXT
    counts: ClassVar[dict[str, int]] = {"train": 4996, "val": 5104}
    background = IGNORE_LABEL
    label_of_id: ClassVar[dict[int, int]] = _labels_of_ids(background, first=0)

    def find_published(self) -> dict[str, FoundSplit]:
        """train and val."""
        annotations, images = self.require(ANNOTATIONS), self.require(IMAGES) + "/VOC2010/JPEGImages"
        splits = read_annotations(annotations)
        self._annotated = splits["train"] | splits["val"]
        for split, images_of_papers in PAPER_COUNTS.items():
            self.notes.append(f"{split}: {len(splits[split])} images are annotated; papers speak of {images_of_papers}")
        if bare := sum(not annotated.segments for annotated in self._annotated.values()):
            self.notes.append(f"{bare} images have no annotation, and are all background")
        return {
            split: FoundSplit(
                [Pair(id_, f"{images}/{id_}.jpg", f"{annotations}: image {id_}") for id_ in sorted(annotated)], [], []
            )
            for split, annotated in splits.items()
        }

    def read_labels(self, pair: Pair) -> np.ndarray:
        """Labels, uint8 [H, W]: the categories of the annotations, painted in their order."""
        annotated = self._annotated[pair.id]
        height, width = annotated.size_hw
        if height * width > self.max_pixels:
            raise InputError(f"{pair.mask}: {height} x {width} pixels are more than the limit of {self.max_pixels}")
        labels = np.full(annotated.size_hw, self.background, np.uint8)
        for category, size_hw, counts in annotated.segments:
            try:
                if size_hw != annotated.size_hw:
                    raise ValueError(f"it has {size_hw[0]} x {size_hw[1]} pixels, the image {height} x {width}")
                labels[decode_rle(counts, size_hw)] = self.label_of_id[category]
            except (ValueError, TypeError) as error:
                raise InputError(f"{pair.mask}: category {category}: {error}: download the file again") from error
        return labels


class PascalContext60(PascalContext, skip_registration=True):
    """PASCAL Context, the 59 frequent classes after the background, which is a class of its own."""

    name = "pascal_context_60"
    spec = PASCAL_CONTEXT_60
    background = 0
    label_of_id: ClassVar[dict[int, int]] = _labels_of_ids(background, first=1)


def read_annotations(path: str) -> dict[str, dict[str, Annotated]]:
    """What PASCAL in Detail's file says of segmentation, by split and image.

    Its arrays: `images` of image_id, file_name, height, width and phase, train or val; `annos_segmentation` of
    image_id, category_id and segmentation, an object of size and counts (github.com/zhanghang1989/detail-api).

    Raises:
      InputError: it is not such a file, or has another category than the 59, or its categories are numbered otherwise.
    """
    splits: dict[str, dict[str, Annotated]] = {"train": {}, "val": {}}
    segments, known_image = defaultdict(list), None
    try:
        for key, element in read_arrays(Path(path)):
            if key == "images" and element["phase"] in splits:
                name, image_id = element["file_name"], element["image_id"]
                if not (match := _FILE_NAME.fullmatch(name)) or any(match[1] in split for split in splits.values()):
                    raise ValueError(f"image {name!r:.50} is no image of VOC, or occurs twice")
                size_hw = element["height"], element["width"]
                if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in size_hw):
                    raise ValueError(f"image {name!r} has height and width {size_hw!r:.50}")
                splits[element["phase"]][match[1]] = Annotated(size_hw, segments[image_id])
                known_image = image_id if match[1] == KNOWN_IMAGE else known_image
            elif key == "annos_segmentation":
                category, rle = element["category_id"], element["segmentation"]
                if category != 0 and category not in PASCAL_CONTEXT_IDS:
                    raise ValueError(f"category {category!r:.50} is none of the 59")
                height, width = rle["size"]
                segments[element["image_id"]].append((category, (height, width), rle["counts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not PASCAL in Detail's annotations ({error}): {ANNOTATIONS.advice}") from error
    if known_image is not None and _KNOWN_ID not in {category for category, *_ in segments[known_image]}:
        raise InputError(
            f"{path}: image {KNOWN_IMAGE}, which shows a {KNOWN_CLASS}, has no category {_KNOWN_ID}: categories are "
            f"numbered otherwise: {ANNOTATIONS.advice}"
        )
    return splits
