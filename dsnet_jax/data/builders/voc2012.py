"""PASCAL VOC 2012, and what SBD adds to it."""

import itertools
import re
from typing import ClassVar

import numpy as np

from dsnet_jax.data.builders import PublishedBuilder
from dsnet_jax.data.decoding import decode_mask, read_palette
from dsnet_jax.data.published import Piece
from dsnet_jax.data.sbd import decode_sbd
from dsnet_jax.data.specs import VOC2012, voc_palette
from dsnet_jax.data.validation import FoundSplit, Pair
from dsnet_jax.errors import InputError

TRAINVAL = Piece(
    "PASCAL VOC 2012, training and validation",
    ("VOC2012/ImageSets/Segmentation/train.txt",),
    {"VOCtrainval_11-May-2012.tar": "sha1:4e443f8a2eca6b1dac8a6c57641b67dd40621a49"},
)
# The server gives the test set after registration alone; TFDS has its checksum (url_checksums/voc.txt).
TEST = Piece(
    "PASCAL VOC 2012, test",
    ("VOC2012/ImageSets/Segmentation/test.txt",),
    {"VOC2012test.tar": "sha256:f08582b1935816c5eab3bbb1eb6d06201a789eaa173cdf1cf400c26f0cac2fb3"},
)
SBD = Piece(
    "SBD",
    ("cls", "train.txt", "val.txt"),  # Of benchmark_RELEASE/dataset.
    {"benchmark.tgz": "sha1:7129e0a480c2d6afb02b517bb18ac54283bfaa35"},
)
SEGMENTATION_CLASS_AUG = Piece("SBD as PNG", ("SegmentationClassAug",), {"SegmentationClassAug.zip": None})
SBD_COUNTS = {"train": 8498, "val": 2857}

_PALETTE = np.array(voc_palette(256), np.uint8)
_ID = re.compile(r"\d{4}_\d{6}")


class Voc2012(PublishedBuilder, skip_registration=True):
    """PASCAL VOC 2012: 20 classes and the background; the border of objects, 255, is ignored.

    `train_aug` is VOC's training set and all of SBD that is in neither VOC's training nor its validation set. The
    masks of VOC's training set are VOC's own, with borders; those of the rest, split `sbd`, are SBD's and have none.
    """

    spec = VOC2012
    counts: ClassVar[dict[str, int]] = {"train": 1464, "val": 1449, "sbd": 10_582 - 1464, "test": 1456}
    composed: ClassVar[dict[str, tuple[str, ...]]] = {"trainval": ("train", "val"), "train_aug": ("train", "sbd")}

    def find_published(self) -> dict[str, FoundSplit]:
        """train and val; sbd and test if there is something that they can be made from."""
        root = self.require(TRAINVAL) + "/VOC2012"
        lists = f"{root}/ImageSets/Segmentation"
        train, val = (self._read_list(f"{lists}/{split}.txt") for split in ("train", "val"))
        if self.source.has(f"{lists}/trainval.txt") and self._read_list(f"{lists}/trainval.txt") != sorted(train + val):
            raise InputError(f"{lists}/trainval.txt: not the images of train.txt and val.txt: download the data again")

        masks = {id_: f"{root}/SegmentationClass/{id_}.png" for id_ in train + val}
        ids = {"train": train, "val": val}
        if sbd := self._sbd_masks():
            ids["sbd"] = sorted(sbd.keys() - masks.keys())
        else:
            self.notes.append(f"no SBD, so there is no train_aug: {SBD.advice}")
        masks = sbd | masks
        splits = {
            split: [Pair(id_, f"{root}/JPEGImages/{id_}.jpg", masks[id_]) for id_ in split_ids]
            for split, split_ids in ids.items()
        }
        if test := self.find_optional(TEST, "no test images, so there is no test"):
            test_ids = self._read_list(f"{test}/VOC2012/ImageSets/Segmentation/test.txt")
            splits["test"] = [Pair(id_, f"{test}/VOC2012/JPEGImages/{id_}.jpg", None) for id_ in test_ids]
        return {split: FoundSplit(pairs, [], []) for split, pairs in splits.items()}

    def read_labels(self, pair: Pair) -> np.ndarray | None:
        """Labels, uint8 [H, W], of VOC's palette PNG, of SBD's .mat or of a PNG made from that; None without mask."""
        if pair.mask is None:
            return None
        data = self.source.read(pair.mask)
        if pair.mask.endswith(".mat"):
            return decode_sbd(data, pair.mask)
        labels = decode_mask(data, pair.mask, max_pixels=self.max_pixels)
        palette, used = read_palette(data, pair.mask), np.unique(labels)
        if palette is not None and (used[-1] >= len(palette) or (palette[used] != _PALETTE[used]).any()):
            raise InputError(
                f"{pair.mask}: its palette is not VOC's, so its indices are no classes: take the mask as published"
            )
        return labels

    def _read_list(self, path: str) -> list[str]:
        """The ids of a list, sorted."""
        lines = self.source.read(path).decode("ascii", "replace").split("\n")
        ids = sorted(filter(None, map(str.strip, lines)))
        if strange := [id_ for id_ in ids if not _ID.fullmatch(id_)]:
            raise InputError(f"{path}: {strange[0][:50]!r} is no image of VOC, such as 2007_000032: download it again")
        if twice := [id_ for id_, following in itertools.pairwise(ids) if id_ == following]:
            raise InputError(f"{path}: image {twice[0]} occurs twice: download it again")
        return ids

    def _sbd_masks(self) -> dict[str, str]:
        """Paths of SBD's masks by image, also of those in VOC's own splits; none if there is no SBD."""
        if root := self.source.find(SBD):
            ids = {split: self._read_list(f"{root}/{split}.txt") for split in SBD_COUNTS}
            if (found := {split: len(ids[split]) for split in ids}) != SBD_COUNTS:
                raise InputError(f"{root}: SBD's lists have {found} images, and {SBD_COUNTS} as they were published")
            return {id_: f"{root}/cls/{id_}.mat" for id_ in ids["train"] + ids["val"]}
        if root := self.source.find(SEGMENTATION_CLASS_AUG):
            paths = self.source.files(f"{root}/SegmentationClassAug")
            masks = {path.rsplit("/", 1)[1].removesuffix(".png"): path for path in paths if path.endswith(".png")}
            return {id_: path for id_, path in masks.items() if _ID.fullmatch(id_)}
        return {}
