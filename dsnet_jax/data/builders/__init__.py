"""The data sets as TFDS builders, without TensorFlow; those that others published have a file each.

A record holds the image file as it was found and the labels as an 8-bit grey PNG: 0 to K - 1, or 255. A builder for
another data set says where its pairs are and, if its masks are not such labels already, what makes labels of them.
"""

import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

from dsnet_jax.data.archives import Source
from dsnet_jax.data.decoding import MAX_PIXELS, decode_mask
from dsnet_jax.data.published import Piece, PublishedSource
from dsnet_jax.data.records import VERSION
from dsnet_jax.data.shapes import draw_scene
from dsnet_jax.data.specs import CAMVID, IGNORE_LABEL, SHAPES, DatasetSpec, parse_class_list
from dsnet_jax.data.validation import (
    ADVICE,
    CheckedSplit,
    FoundSplit,
    Pair,
    check_splits,
    content_digest,
    find_pairs,
)
from dsnet_jax.errors import InputError
from dsnet_jax.progress import track

RECORDS_PER_FILE = 256
UNLABELLED_SPLIT = "test"  # The only one that may lack masks.

SHAPES_SEED = 0
SHAPES_SIZE_HW = (192, 192)
SHAPES_SPLITS = {"train": range(400), "val": range(400, 500)}  # Numbers of scenes.


class SegmentationBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Checks the pairs of images and masks of a source and writes them as records.

    Records are written in the order of the pairs, and memory holds those of one file. (TFDS's GeneratorBasedBuilder
    would gather each split, and call TensorFlow when it is larger than 1000 MiB.)

    Args:
      source: what holds the data; None where they are drawn.
      data_dir: TFDS's folder: `<name>/<VERSION>` is made inside.
      problems_file: where a long list of problems is written.
      skip_bad: leave out what has a problem; otherwise any problem is an error.
      max_pixels: the largest image that is accepted.

    Attributes:
      spec: classes and colours.
      advice: what to do about files that have problems.
      composed: splits that are others one after the other, whose records are stored once; those with all their parts.
      notes: what is to be told about the source, once its splits have been found.
      label_of_value: label of every value that a mask file may hold, uint8 [256].
      labels_of_colours: label of every colour that an RGB mask may hold; None: there are no RGB masks.
    """

    VERSION = tfds.core.Version(VERSION)
    spec: DatasetSpec
    advice = ADVICE
    composed: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    label_of_value = np.arange(256, dtype=np.uint8)
    labels_of_colours = None

    def __init__(
        self,
        source: Source | None,
        data_dir: Path,
        problems_file: Path,
        skip_bad: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        self.source, self.problems_file = source, problems_file
        self.skip_bad, self.max_pixels = skip_bad, max_pixels
        self.notes: list[str] = []
        super().__init__(data_dir=data_dir, file_format="array_record")

    def find_splits(self) -> dict[str, FoundSplit]:
        """What the source holds, by split name; raises InputError if it is not laid out as it should be."""
        raise NotImplementedError

    def read_image(self, pair: Pair) -> bytes:
        """The content of the image file."""
        return self.source.read(pair.image)

    def read_labels(self, pair: Pair) -> np.ndarray | None:
        """Labels, uint8 [H, W], or None where the pair has no mask."""
        if pair.mask is None:
            return None
        data = self.source.read(pair.mask)
        return self.label_of_value[decode_mask(data, pair.mask, self.labels_of_colours, self.max_pixels)]

    @functools.cached_property
    def checked_splits(self) -> dict[str, CheckedSplit]:
        """The pairs that will be written, by split name; raises InputError as `validation.check_splits` does."""
        return check_splits(
            self.find_splits(),
            self.read_image,
            self.read_labels,
            self.spec.num_classes,
            self.problems_file,
            self.skip_bad,
            self.max_pixels,
            self.advice,
        )

    @property
    def composed_splits(self) -> dict[str, tuple[str, ...]]:
        """Those of `composed` whose parts there are."""
        return {name: parts for name, parts in self.composed.items() if set(parts) <= set(self.checked_splits)}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(),
            "label": tfds.features.Image(shape=(None, None, 1), doc="empty in a split without labels"),
            "height": np.int32,
            "width": np.int32,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(spec=self.spec.to_json(), splits={}, composed={}),
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable[[], Iterator]]]:
        self.info.metadata["composed"] = {name: list(parts) for name, parts in self.composed_splits.items()}
        shards = {}
        for split, checked in self.checked_splits.items():
            self.info.metadata["splits"][split] = {
                "fingerprint": checked.fingerprint,
                "sizes_hw": checked.sizes_hw.tolist(),
                "left_out": checked.left_out,
            }
            records = self._records(split, checked)  # The shards are written one after the other.
            next_shard = functools.partial(itertools.islice, records, RECORDS_PER_FILE)
            shards[split] = [next_shard] * math.ceil(len(checked.pairs) / RECORDS_PER_FILE)
        return shards

    def _records(self, split: str, checked: CheckedSplit) -> Iterator[tuple[int, dict]]:
        for index, pair in enumerate(track(checked.pairs, f"writing {split}")):
            image, labels = self.read_image(pair), self.read_labels(pair)
            if content_digest(pair.id, image, labels) != checked.digests[index]:
                raise InputError(f"{pair.image}: it or its mask changed while being prepared: prepare again")
            height, width = checked.sizes_hw[index]
            label = b"" if labels is None else _encode_labels(labels)
            yield index, {"id": pair.id, "image": image, "label": label, "height": height, "width": width}


class PublishedBuilder(SegmentationBuilder, skip_registration=True):
    """A data set of which the pieces, the classes and the number of images are known.

    Attributes:
      counts: how many images a split has, where that is known.
    """

    source: PublishedSource
    advice = "download what is named again"
    counts: ClassVar[Mapping[str, int]]

    def find_published(self) -> dict[str, FoundSplit]:
        """As `find_splits`, before images are counted; the first split is the one that nothing is done without."""
        raise NotImplementedError

    def find_splits(self) -> dict[str, FoundSplit]:
        """What the source holds, of which no image is missing or in two splits; raises InputError otherwise."""
        splits = self.find_published()
        split_of_id: dict[str, str] = {}
        for split, found in splits.items():
            count, wanted = len(found.pairs), self.counts.get(split)
            # A file without its partner is a problem that will be told by its name, which says more than the count.
            if wanted is not None and count != wanted and not found.problems:
                raise InputError(
                    f"{self.name}: {split} has {count} images here, and {wanted} as it was published: download it "
                    "again; images of your own choice are a `folder` data set"
                )
            for pair in found.pairs:
                if split_of_id.setdefault(pair.id, split) != split:
                    where = f"both in {split_of_id[pair.id]} and in {split}"
                    raise InputError(f"{self.name}: image {pair.id} is {where}: these are not the published lists")
        self.notes[:0] = self.source.notes
        return splits

    def require(self, piece: Piece) -> str:
        """Where a piece is; raises InputError if it is not there."""
        if (root := self.source.find(piece)) is None:
            raise InputError(f"{piece.name}: not found: {piece.advice}")
        return root

    def find_optional(self, piece: Piece, without: str) -> str | None:
        """Where a piece is; if it is not there None, and a note that says what there is not `without` it."""
        root = self.source.find(piece)
        if root is None:
            self.notes.append(f"{without}: {piece.advice}")
        return root


class Shapes(SegmentationBuilder, skip_registration=True):
    """Drawn indoor scenes: tables, chairs, plants and lamps."""

    spec = SHAPES

    def __init__(self, *args, **kwargs):
        self._draw = functools.cache(self._draw)  # Once for checking and for writing.
        super().__init__(*args, **kwargs)

    def find_splits(self) -> dict[str, FoundSplit]:
        """The scenes' numbers are the ids."""
        pairs = {
            split: [Pair(f"{number:05}", f"scene {number}", f"labels of scene {number}") for number in numbers]
            for split, numbers in SHAPES_SPLITS.items()
        }
        return {split: FoundSplit(split_pairs, [], []) for split, split_pairs in pairs.items()}

    def read_image(self, pair: Pair) -> bytes:
        """The scene as PNG."""
        return self._draw(int(pair.id))[0]

    def read_labels(self, pair: Pair) -> np.ndarray:
        """The scene's labels, uint8 [H, W]."""
        return self._draw(int(pair.id))[1]

    def _draw(self, number: int) -> tuple[bytes, np.ndarray]:
        image, labels = draw_scene(number, SHAPES_SEED, SHAPES_SIZE_HW)
        return _encode_png(image[..., ::-1]), labels


class Camvid(SegmentationBuilder, skip_registration=True):
    """CamVid as in the SegNet tutorial: train/ trainannot/ val/ valannot/ test/ testannot/, 11 classes, 11 = void."""

    spec = CAMVID
    counts: ClassVar[dict[str, int]] = {"train": 367, "val": 101, "test": 233}
    label_of_value = np.arange(256, dtype=np.uint8)
    label_of_value[11] = IGNORE_LABEL

    def find_splits(self) -> dict[str, FoundSplit]:
        """Those of train, val and test that are present; told is which have not as many images as SegNet's."""
        root, folders = self.source.root, self.source.folders(self.source.root)
        present = [split for split in self.counts if split in folders]
        if not present:
            raise InputError(f"{root}: there is no train/ or val/: give the folder of SegNet's CamVid that has them")
        splits = {split: _find(self.source, split, f"{root}/{split}", f"{root}/{split}annot") for split in present}
        for split, found in splits.items():
            if (count := len(found.pairs)) != (wanted := self.counts[split]):
                self.notes.append(f"{split} has {count} images here, {wanted} in SegNet's: scores do not compare")
        return splits


class Folder(SegmentationBuilder, skip_registration=True):
    """Anybody's data: images/<split>/ and masks/<split>/ with files of the same names, and a class list beside them.

    The class list is `classes.txt` or `classes.json`, see `specs.parse_class_list`.
    """

    def __init__(self, name: str, source: Source, *args, **kwargs):
        root = source.root
        lists = [path for path in (f"{root}/classes.txt", f"{root}/classes.json") if source.has(path)]
        if len(lists) != 1:
            raise InputError(f"{root}: wants one class list, classes.txt or classes.json, and has {len(lists)}")
        class_list = parse_class_list(source.read(lists[0]), lists[0], name)
        self.name, self.spec, self.labels_of_colours = name, class_list.spec, class_list.labels_of_colours
        self.label_of_value = np.arange(256, dtype=np.uint8)
        self.label_of_value[list(class_list.ignore_values)] = IGNORE_LABEL
        super().__init__(source, *args, **kwargs)

    def find_splits(self) -> dict[str, FoundSplit]:
        """A split for every folder in images/."""
        root = self.source.root
        splits = self.source.folders(f"{root}/images")
        if not splits:
            raise InputError(f"{root}: there is no images/<split>/: put the images into images/train/, images/val/")
        if extra := sorted(set(self.source.folders(f"{root}/masks")) - set(splits)):
            raise InputError(f"{root}: masks/{extra[0]}/ has no images/{extra[0]}/: name both alike")
        if strange := [name for name in splits if not re.fullmatch(r"[A-Za-z]\w*", name) or name == "all"]:
            raise InputError(
                f"{root}/images/{strange[0]}: not a name for a split: take letters, digits and _, and not `all`"
            )
        for folder in (f"{root}/images", f"{root}/masks"):
            if loose := [path for path in self.source.files(folder) if os.path.dirname(path) == folder]:
                first = os.path.basename(loose[0])
                self.notes.append(f"{folder}: {len(loose)} files beside the splits' folders were not read, as {first}")
        return {split: _find(self.source, split, f"{root}/images/{split}", f"{root}/masks/{split}") for split in splits}

    @functools.cached_property
    def checked_splits(self) -> dict[str, CheckedSplit]:
        """As `SegmentationBuilder` has them; black and white masks, whose white would be ignored, are an InputError."""
        splits = super().checked_splits
        for split, checked in splits.items():
            if self.spec.num_classes == 1 or np.flatnonzero(checked.label_pixels).tolist() != [0, IGNORE_LABEL]:
                continue
            if white := next(filter(self._holds_255, checked.pairs), None):
                raise InputError(
                    f"{white.mask}: the masks of {split} hold 0 and 255 alone, and 255 is always ignored, so no pixel "
                    f"is {self.spec.class_names[1]}: store class numbers, 1 for the second class"
                )
        return splits

    def _holds_255(self, pair: Pair) -> bool:
        """Whether a mask holds the very value, not another one or a colour that the class list ignores."""
        data = self.source.read(pair.mask)
        is_rgb = data[25:26] == b"\x02"
        return not is_rgb and bool((decode_mask(data, pair.mask, max_pixels=self.max_pixels) == IGNORE_LABEL).any())


def _find(source: Source, split: str, image_folder: str, mask_folder: str) -> FoundSplit:
    if source.has(mask_folder):
        return find_pairs(source, image_folder, mask_folder)
    if split == UNLABELLED_SPLIT:
        return find_pairs(source, image_folder, None)
    raise InputError(f"{mask_folder}: there is no such folder: only the split {UNLABELLED_SPLIT} may lack masks")


def _encode_png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def _encode_labels(labels: np.ndarray) -> bytes:
    """Labels repeat themselves as they are: PNG's filters would make them larger, and twice as slow to decode."""
    unfiltered = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    strategy = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
    return cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 9, *unfiltered, *strategy])[1].tobytes()
