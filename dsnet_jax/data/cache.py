"""Decoded pictures: from a record, and, for small data sets, from a file that holds all of a split's.

The file is flat: image (RGB, uint8 [H, W, 3]) and label (uint8 [H, W], if there is one) of each record in the split's
order; then an index as JSON; then `_FOOTER`, the index's length and checksum. Every process maps it into its memory,
where the system shares it between them and keeps as much of it as there is room for.
"""

import contextlib
import fcntl
import json
import operator
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.records import Split
from dsnet_jax.data.threads import threads_for
from dsnet_jax.errors import InputError
from dsnet_jax.progress import track

_FOOTER = struct.Struct("<QI8s")
_MAGIC = b"decoded1"  # The number is the layout's.
_AT_ONCE = 64  # Pictures that are decoded ahead of being written.


@dataclass(frozen=True)
class Picture:
    """A record, decoded.

    Attributes:
      id: names it within its split.
      image: uint8 RGB [H, W, 3]; read-only where it lies in a file.
      label: uint8 [H, W]; None in a split without labels.
    """

    id: str
    image: np.ndarray
    label: np.ndarray | None


class DecodedSplit:
    """The pictures of a split, by position, in any order and from any thread; a copy can be sent to another process.

    Args:
      split: what was decoded.
      file: what `decoded_once` wrote.

    Attributes:
      name, spec, sizes_hw, fingerprint: those of the split.
      file: where the pictures are.

    Raises:
      InputError: the file is not complete, or not of this split.
    """

    def __init__(self, split: Split, file: Path):
        self.name, self.spec, self.sizes_hw, self.fingerprint = (
            split.name,
            split.spec,
            split.sizes_hw,
            split.fingerprint,
        )
        self.file, self._split = file, split
        self._ids, self._starts, self._checksums = _read_index(file, split)
        self._bytes = np.asarray(np.memmap(file, np.uint8, mode="r"))
        self._checked = np.zeros(len(self), bool)

    def __reduce__(self):
        return DecodedSplit, (self._split, self.file)  # Mapped anew: a memory map is pickled with all that it shows.

    def __len__(self) -> int:
        return len(self.sizes_hw)

    def __getitem__(self, index: int) -> Picture:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        stored = self._bytes[self._starts[index] : self._starts[index + 1]]
        if not self._checked[index]:  # Once in every process: it costs a tenth of what decoding does.
            if zlib.crc32(stored) != self._checksums[index]:
                name = name_of(self, index, self._ids[index])
                raise InputError(f"{self.file}: {name} is not as it was written: remove the file, it is made anew")
            self._checked[index] = True
        height, width = (int(side) for side in self.sizes_hw[index])
        pixels = height * width
        image, label = stored[: 3 * pixels].reshape(height, width, 3), stored[3 * pixels :]
        return Picture(self._ids[index], image, label.reshape(height, width) if label.size else None)


def decoded_once(split: Split, folder: Path, max_bytes: int) -> DecodedSplit:
    """A split whose pictures need no decoding any more: opens its file, and writes it first if it is not there.

    The file bears the split's fingerprint and OpenCV's version in its name: another content, or another decoder of
    lossy files, makes another file. It appears when it is complete; of several processes one writes it and the others
    wait. A file that is damaged is written anew. Where it is and how large is printed.

    Args:
      split: with or without labels.
      folder: where the file is, or is made; on a disk, not in an object store.
      max_bytes: a split that needs more is refused.

    Raises:
      InputError: the split is too large, the disk is full, the folder cannot be written, or a record not decoded.
    """
    needed = 4 * int(np.prod(split.sizes_hw.astype(np.int64), axis=1).sum())
    if needed > max_bytes:
        raise InputError(
            f"{split.spec.name}, split {split.name}: {needed} bytes when decoded are more than the limit of "
            f"{max_bytes}: raise config.data.cache_decoded_gb if they fit into memory, or decode each time"
        )
    file = Path(folder) / f"{split.name}-{split.fingerprint}-opencv{cv2.__version__}.decoded"
    with _locked(file.parent):
        try:
            decoded = DecodedSplit(split, file)
            done = "decoded before"
        except (FileNotFoundError, InputError) as error:
            if not isinstance(error, FileNotFoundError):
                print(f"{error}: made anew")
            _write(split, file, needed)
            decoded = DecodedSplit(split, file)
            done = "decoded once"
    print(f"{split.spec.name}, split {split.name}: {len(split)} pictures {done}, {file.stat().st_size} bytes in {file}")
    return decoded


def decode_picture(split: Split, index: int) -> Picture:
    """Reads and decodes a record.

    Raises:
      InputError: it cannot be decoded; the message names it.
    """
    record = split[index]
    name = name_of(split, index, record.id)
    pixels = record.size_hw[0] * record.size_hw[1]  # What was checked when it was prepared.
    image = decode_image(record.image, f"image of {name}", pixels)
    label = None if record.label is None else decode_mask(record.label, f"label of {name}", max_pixels=pixels)
    return Picture(record.id, image, label)


def name_of(split: Split | DecodedSplit, index: int, id_: str) -> str:
    """What errors call a record."""
    return f"record {index} ({id_}) of {split.spec.name}, split {split.name}"


def _write(split: Split, file: Path, needed: int):
    partial = file.with_name(f".{file.name}.partial")
    free = shutil.disk_usage(file.parent).free
    try:
        # One that a killed process left is overwritten.
        with open(partial, "wb") as out:
            ids, starts, checksums = [], [0], []
            if free < needed:
                raise OSError(None, "no space left")
            for picture in track(_pictures(split), f"decoding {split.name}", len(split)):
                label = b"" if picture.label is None else picture.label
                out.write(picture.image)
                out.write(label)
                ids.append(picture.id)
                starts.append(out.tell())
                checksums.append(zlib.crc32(label, zlib.crc32(picture.image)))
            index = json.dumps({"ids": ids, "starts": starts, "checksums": checksums}).encode()
            out.write(index + _FOOTER.pack(len(index), zlib.crc32(index), _MAGIC))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}): {needed} bytes are needed and {free} were free: make room, "
            "or decode each time"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _pictures(split: Split) -> Iterator[Picture]:
    with ThreadPoolExecutor(threads_for()) as threads:
        for start in range(0, len(split), _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, len(split)))
            yield from threads.map(lambda index: decode_picture(split, index), indices)


def _read_index(file: Path, split: Split) -> tuple[list[str], list[int], list[int]]:
    """Ids [N], where each record begins and the last one ends [N + 1], and checksums [N]."""
    size = os.stat(file).st_size
    with open(file, "rb") as stream:
        try:
            stream.seek(size - _FOOTER.size)
            length, checksum, magic = _FOOTER.unpack(stream.read())
            stream.seek(size - _FOOTER.size - length)
            text = stream.read(length)
            index = json.loads(text) if (zlib.crc32(text), magic) == (checksum, _MAGIC) else None
        except (OSError, ValueError, struct.error):
            index = None
    if index is None or size != index["starts"][-1] + length + _FOOTER.size or len(index["ids"]) != len(split):
        raise InputError(f"{file}: not complete")
    return index["ids"], index["starts"], index["checksums"]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made. The system's lock: it ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): make it writable, or decode each time"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another process that decodes")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
