"""ADE20K as it is scored everywhere: SceneParse150, the scene parsing challenge of 2016."""

import functools
import re
from typing import ClassVar

import numpy as np

from dsnet_jax.data.builders import PublishedBuilder
from dsnet_jax.data.decoding import decode_mask
from dsnet_jax.data.published import Piece
from dsnet_jax.data.specs import ADE20K, IGNORE_LABEL
from dsnet_jax.data.validation import CheckedSplit, FoundSplit, Pair, find_pairs
from dsnet_jax.errors import InputError

TRAINVAL = Piece(
    "SceneParse150, training and validation",
    ("annotations/training", "images/training"),
    {"ADEChallengeData2016.zip": "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"},
)
TEST = Piece(
    "SceneParse150, test",
    ("testing",),
    {"release_test.zip": "sha1:e05747892219d10e9243933371a497e905a4860c"},
)
INSTANCES = Piece("instances of the Places challenge", ("annotations_instance",), {"annotations_instance.tar": None})

_FOLDERS = {"train": "training", "val": "validation"}
_LARGEST_VALUE = ADE20K.num_classes  # Of a mask as it was published: 0 is unlabelled.


class Ade20k(PublishedBuilder, skip_registration=True):
    """SceneParse150: 150 classes of ADE20K; unlabelled pixels, 0 in its masks, are ignored.

    The test set has no labels, and as many images as its archive holds: sources differ on their number.
    """

    spec = ADE20K
    counts: ClassVar[dict[str, int]] = {"train": 20_210, "val": 2000}
    label_of_value = np.concatenate([[IGNORE_LABEL], np.arange(ADE20K.num_classes)]).astype(np.uint8)

    def find_published(self) -> dict[str, FoundSplit]:
        """train and val; test if it is there."""
        if not (root := self.source.find(TRAINVAL)):
            wrong = f"{TRAINVAL.name}: not found"
            if instances := self.source.find(INSTANCES):
                wrong += f" (the masks in {instances}/annotations_instance belong to another challenge)"
            raise InputError(f"{wrong}: {TRAINVAL.advice}")
        self._check_classes(f"{root}/objectInfo150.txt")
        splits = {
            split: find_pairs(self.source, f"{root}/images/{folder}", f"{root}/annotations/{folder}")
            for split, folder in _FOLDERS.items()
        }
        if test := self.find_optional(TEST, "no test images, so there is no test"):
            splits["test"] = find_pairs(self.source, f"{test}/testing", None)
        for split, found in splits.items():  # Other data sets have a folder `testing` too.
            name = re.compile(rf"ADE_{split}_\d{{8}}")
            if strange := [pair.image for pair in found.pairs if not name.fullmatch(pair.id)]:
                known = f"no image of SceneParse150's {split}, such as ADE_{split}_00000001"
                raise InputError(f"{strange[0]}: {known}: give a --source without it")
        return splits

    @functools.cached_property
    def checked_splits(self) -> dict[str, CheckedSplit]:
        """As `SegmentationBuilder` has them; masks that look right one by one, and not together, are an InputError."""
        splits = super().checked_splits
        for split in _FOLDERS:
            if not splits[split].label_pixels[self.label_of_value[_LARGEST_VALUE]]:
                wrong = f"no mask of {split} has the value {_LARGEST_VALUE}, and as they were published some have"
                raise InputError(f"{self.name}: {wrong}: somebody has converted them: take them as published")
        return splits

    def read_labels(self, pair: Pair) -> np.ndarray | None:
        """Labels, uint8 [H, W]: the mask's value less one, and 255 for its 0."""
        if pair.mask is None:
            return None
        data = self.source.read(pair.mask)
        if data[25:26] == b"\x02":
            wrong = "an RGB mask, so of instances or of all of ADE20K"
            raise InputError(f"{pair.mask}: {wrong}, not of SceneParse150: {TRAINVAL.advice}")
        values = decode_mask(data, pair.mask, max_pixels=self.max_pixels)
        if (largest := values.max()) >= len(self.label_of_value):
            raise InputError(
                f"{pair.mask}: value {largest}, and SceneParse150's are 0, unlabelled, to 150: somebody has converted "
                "this mask, or it is of another release: take it as published"
            )
        return self.label_of_value[values]

    def _check_classes(self, path: str):
        """Compares the list of classes that lies beside the masks: lines of index, ratio, train, val and names."""
        if not self.source.has(path):
            return
        lines = self.source.read(path).decode("utf-8", "replace").splitlines()[1:]
        names = [{name.strip() for name in re.split("[,;]", line.split("\t")[-1])} for line in lines if line.strip()]
        for index, (name, known) in enumerate(zip(names, self.spec.class_names, strict=False), 1):
            if known not in name:
                raise InputError(f"{path}: class {index} is {'/'.join(sorted(name))}, not {known}: download it again")
        if len(names) != self.spec.num_classes:
            raise InputError(f"{path}: {len(names)} classes, not {self.spec.num_classes}: download it again")
