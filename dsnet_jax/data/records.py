"""Prepared data sets, as `builders` wrote them, read by position."""

import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError

VERSION = "1.0.0"  # Of the records' layout.


@dataclass(frozen=True)
class Record:
    """One image as it is stored.

    Attributes:
      id: names it within its split.
      image: the image file, for `decoding.decode_image`.
      label: a PNG file of labels, for `decoding.decode_mask`; None in a split without labels.
      size_hw: height and width in pixels, of image and label.
    """

    id: str
    image: bytes
    label: bytes | None
    size_hw: tuple[int, int]


class Split:
    """The records of a split, by position, in any order and from any thread; a copy can be sent to another process.

    Args:
      builder: of the prepared data set.
      name: of the split, which must exist.

    Attributes:
      name: of the split.
      spec: classes and colours.
      sizes_hw: heights and widths of all N records, int32 [N, 2].
      fingerprint: changes with the records' content and order.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, name: str):
        stored = builder.info.metadata["splits"][name]
        self.name = name
        self.spec = DatasetSpec.from_json(builder.info.metadata["spec"])
        self.sizes_hw = np.array(stored["sizes_hw"], np.int32)
        self.fingerprint: str = stored["fingerprint"]
        as_stored = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(name, decoders=as_stored)

    def __len__(self) -> int:
        return len(self.sizes_hw)

    def __getitem__(self, index: int) -> Record:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = self._records[index]
        except Exception as error:  # The reader is C++, and raises what it likes.
            where = f"record {index} of {self.spec.name}, split {self.name}"
            raise InputError(f"{where}: cannot be read ({error}): prepare it anew with --overwrite") from error
        size_hw = record["height"], record["width"]
        return Record(record["id"].decode(), record["image"], record["label"] or None, size_hw)


def open_split(root: str, name: str, split: str) -> Split:
    """Opens a split of a prepared data set.

    Args:
      root: the folder given to `dsnet prepare --root`.
      name: of the data set.
      split: of the data set.

    Raises:
      InputError: the data set is not prepared, or has no such split.
    """
    folder = Path(root) / name / VERSION
    if not (folder / "dataset_info.json").exists():
        arguments = {"shapes": "shapes", "camvid": "camvid --source=DIR"}.get(
            name, f"folder --name={name} --source=DIR"
        )
        raise InputError(f"{root}: data set {name!r} is not prepared: run `dsnet prepare {arguments} --root={root}`")
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise InputError(f"{root}: data set {name!r} has no split {split!r}: choose one of {known}")
    return Split(builder, split)
