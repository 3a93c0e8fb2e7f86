"""Prepared data sets, as `builders` wrote them, read by position."""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dsnet_jax.data.files import kind_of_path
from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError

VERSION = "1.0.0"  # Of the records' layout.
PUBLISHED = ("camvid", "voc2012", "ade20k", "pascal_context", "pascal_context_60")  # Prepared under their own names.


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
      left_out: what `dsnet prepare --skip-bad` left out of it, and why, one line each.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, name: str):
        metadata = builder.info.metadata
        parts = metadata.get("composed", {}).get(name, [name])
        stored = [metadata["splits"][part] for part in parts]
        self.name = name
        self.spec = DatasetSpec.from_json(metadata["spec"])
        self.sizes_hw = np.concatenate([np.array(part["sizes_hw"], np.int32).reshape(-1, 2) for part in stored])
        self.fingerprint = _join([part["fingerprint"] for part in stored])
        self.left_out = [line for part in stored for line in part["left_out"]]
        as_stored = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source("+".join(parts), decoders=as_stored)

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


def _join(parts: Sequence[str]) -> str:
    """The fingerprint of a split that is composed of others; that of one part is its own."""
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def open_split(root: str, name: str, split: str) -> Split:
    """Opens a split of a prepared data set.

    Args:
      root: the folder given to `dsnet prepare --root`.
      name: of the data set.
      split: of the data set, stored or composed of others that are.

    Raises:
      InputError: the data set is not prepared, or has no such split.
    """
    builder = open_builder(root, name)
    known = [*builder.info.splits, *builder.info.metadata.get("composed", {})]
    if split not in known:
        raise InputError(f"{root}: data set {name!r} has no split {split!r}: choose one of {', '.join(known)}")
    return Split(builder, split)


def spread_evenly(count: int, length: int) -> list[int]:
    """Positions of `count` records, from the first of `length` to the last; of all where there are not so many."""
    return np.linspace(0, length - 1, min(count, length), dtype=int).tolist()


def split_names(root: str, name: str) -> list[str]:
    """The splits of a prepared data set, as stored; arguments and errors are those of `open_split`."""
    return list(open_builder(root, name).info.metadata["splits"])


def composed_splits(root: str, name: str) -> dict[str, list[str]]:
    """Which stored splits make up another, by its name; arguments and errors are those of `open_split`."""
    return open_builder(root, name).info.metadata.get("composed", {})


def open_builder(root: str, name: str) -> tfds.core.DatasetBuilder:
    """A prepared data set as TFDS has it; its metadata are those that `builders` wrote.

    Args:
      root: the folder given to `dsnet prepare --root`.
      name: of the data set.

    Raises:
      InputError: the data set is not prepared, cannot be read, or is damaged.
    """
    folder = Path(root) / name / VERSION
    if kind_of_path(folder / "dataset_info.json") is None:
        arguments = f"{name if name in PUBLISHED else f'folder --name={name}'} --source=DIR"
        if name == "shapes":
            arguments = name
        raise InputError(f"{root}: data set {name!r} is not prepared: run `dsnet prepare {arguments} --root={root}`")
    try:
        builder = tfds.builder_from_directory(folder)
        DatasetSpec.from_json(builder.info.metadata["spec"])  # For TFDS it may be missing.
    except Exception as error:  # TFDS's readers raise what they like.
        raise InputError(f"{folder}: damaged ({error!r:.200}): prepare it anew with --overwrite") from error
    return builder
