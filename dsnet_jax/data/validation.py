"""Every image of a data set is checked once, before it is prepared, and all problems are told together."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dsnet_jax.data.archives import Source
from dsnet_jax.data.decoding import IMAGE_EXTENSIONS, MAX_PIXELS, decode_image, is_rotated
from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.data.threads import threads_for
from dsnet_jax.errors import InputError
from dsnet_jax.progress import track

ADVICE = "mend them, or leave them out with --skip-bad"
LISTED = 10  # Problems shown in a message; if there are more, all of them go to a file.


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
      id: names it within its split.
      image: its path, or what stands for one where images are not files.
      mask: likewise; None where the split has no masks.
    """

    id: str
    image: str
    mask: str | None


@dataclass(frozen=True)
class FoundSplit:
    """What a split's folders hold, before any file is opened.

    Attributes:
      pairs: in the order in which they will be stored.
      problems: images and masks that are in no pair, one line each.
      other_files: names of files that are no images, which nobody will read.
    """

    pairs: list[Pair]
    problems: list[str]
    other_files: list[str]


@dataclass(frozen=True)
class CheckedSplit:
    """A split of which every pair can be used.

    Attributes:
      pairs: N of them.
      sizes_hw: heights and widths, int32 [N, 2].
      digests: a hash of each pair's content, see `content_digest`.
      label_pixels: how often each label occurs, int64 [256].
      rotated_count: images whose EXIF orientation is not applied.
      left_out: problems for whose sake pairs were left out, one line each.
      other_files: names of files that are no images.
    """

    pairs: list[Pair]
    sizes_hw: np.ndarray
    digests: list[bytes]
    label_pixels: np.ndarray
    rotated_count: int
    left_out: list[str]
    other_files: list[str]

    @property
    def fingerprint(self) -> str:
        """Of the records' content and order, 32 hexadecimal digits."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()[:32]


@dataclass(frozen=True)
class _CheckedPair:
    pair: Pair
    problems: list[str]
    size_hw: tuple[int, int] | None
    digest: bytes | None
    label_pixels: np.ndarray | None
    rotated: bool


def find_pairs(source: Source, image_folder: str, mask_folder: str | None) -> FoundSplit:
    """Pairs the images under a folder with the masks under another by path, extensions aside.

    Args:
      source: where the folders are.
      image_folder: it and its subfolders are searched for `IMAGE_EXTENSIONS`; hidden files are passed over.
      mask_folder: likewise; None makes pairs without masks.
    """
    images, others = _files_by_id(source, image_folder)
    masks, other_masks = _files_by_id(source, mask_folder) if mask_folder else ({}, [])
    pairs, problems = [], []
    unread_images, unread_masks = _by_id(others, image_folder), _by_id(other_masks, mask_folder)
    for id_ in sorted(images | masks):
        image, mask = images.get(id_, []), masks.get(id_, [])
        if len(image) > 1 or len(mask) > 1:
            files = ", ".join(image if len(image) > 1 else mask)
            problems.append(f"{id_}: {max(len(image), len(mask))} files of one name, keep one: {files}")
        elif not image:
            missing = _describe_missing(f"{image_folder}/{id_}.*", unread_images.get(id_))
            problems.append(f"{mask[0]}: a mask without an image: {missing}")
        elif mask_folder and not mask:
            missing = _describe_missing(f"{mask_folder}/{id_}.png", unread_masks.get(id_))
            problems.append(f"{image[0]}: an image without a mask: {missing}")
        else:
            pairs.append(Pair(id_, image[0], mask[0] if mask else None))
    return FoundSplit(pairs, problems, others + other_masks)


def _by_id(others: list[str], folder: str | None) -> dict[str, str]:
    paths = {path: PurePosixPath(path).relative_to(folder) for path in others}
    return {str(inside.with_suffix("")): path for path, inside in paths.items() if inside.suffix}


def _describe_missing(wanted: str, unread: str | None) -> str:
    """`unread`: a file of that name, and of an ending that is not read."""
    if unread is None:
        return f"there is no {wanted}"
    return f"{unread} is there, and {PurePosixPath(unread).suffix} is not read: convert it"


def _files_by_id(source: Source, folder: str) -> tuple[dict[str, list[str]], list[str]]:
    found, others = defaultdict(list), []
    for path in source.files(folder):
        inside = PurePosixPath(path).relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if inside.suffix.lower() in IMAGE_EXTENSIONS:
            found[str(inside.with_suffix(""))].append(path)
        else:
            others.append(path)
    return dict(found), others


def check_splits(
    found: dict[str, FoundSplit],
    read_image: Callable[[Pair], bytes],
    read_labels: Callable[[Pair], np.ndarray | None],
    num_classes: int,
    problems_file: Path,
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
    advice: str = ADVICE,
) -> dict[str, CheckedSplit]:
    """Reads and decodes every pair, in threads, and tells all that is wrong at once.

    Args:
      found: by split name.
      read_image: gives the content of an image file; an InputError it raises is one of the problems.
      read_labels: gives labels, uint8 [H, W], or None where the pair has no mask; errors likewise.
      num_classes: labels are 0 to num_classes - 1, or 255.
      problems_file: is written when there are more than `LISTED` problems, one on a line.
      skip_bad: leave out what has a problem instead of refusing all.
      max_pixels: larger images are refused before any pixel is decoded.
      advice: what to do about problems.

    Returns:
      By split name. What was left out for `skip_bad` is in there.

    Raises:
      InputError: there are problems, and not `skip_bad`; or a split has nothing left.
    """

    def check(pair: Pair) -> _CheckedPair:
        return _check_pair(pair, read_image, read_labels, num_classes, max_pixels)

    results = {}
    pool = ThreadPoolExecutor(threads_for())
    try:
        for split, files in found.items():
            results[split] = list(track(pool.map(check, files.pairs), f"checking {split}", len(files.pairs)))
    finally:
        pool.shutdown(cancel_futures=True)  # When it is interrupted, thousands may be left.

    splits = {split: _summarise(found[split], results[split]) for split in found}
    problems = {split: checked.left_out for split, checked in splits.items()}
    if any(problems.values()) and not skip_bad:
        count, checked_count = sum(map(len, problems.values())), sum(map(len, results.values()))
        message = f"problems: {count}, with {checked_count} images checked: {advice}"
        strange = _describe_strange_labels(itertools.chain(*results.values()), num_classes)
        raise InputError("\n".join([message, *list_problems(problems, problems_file, strange)]))
    if empty := [split for split, checked in splits.items() if not checked.pairs]:
        message = f"split {empty[0]} is empty: of {len(results[empty[0]])} images that were found none can be used"
        if others := splits[empty[0]].other_files:
            read = " ".join(IMAGE_EXTENSIONS)
            message += (
                f"; {len(others)} other files were not read, such as {others[0]}: convert images to one of {read}"
            )
        raise InputError("\n".join([message, *list_problems(problems, problems_file)]))
    return splits


def content_digest(id_: str, image: bytes, labels: np.ndarray | None) -> bytes:
    """A hash of what a record holds: id, image file, labels [H, W] or None."""
    parts = id_.encode(), image, b"" if labels is None else repr(labels.shape).encode() + labels.tobytes()
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def list_problems(problems: dict[str, list[str]], file: Path, summary: Iterable[str] = ()) -> list[str]:
    """The first `LISTED` problems, one a line, after the lines of `summary`; if there are more, `file` gets all."""
    lines = [f"{split}: {problem}" for split, split_problems in problems.items() for problem in split_problems]
    shown = [*summary, *lines[:LISTED]]
    if len(lines) > LISTED:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([*summary, *lines, ""]))
        shown.append(f"and {len(lines) - LISTED} more, all listed in {file}")
    return shown


def _check_pair(pair, read_image, read_labels, num_classes: int, max_pixels: int) -> _CheckedPair:
    problems = []
    image = image_hw = labels = label_pixels = digest = None
    rotated = False
    try:
        image = read_image(pair)
        image_hw = decode_image(image, pair.image, max_pixels).shape[:2]
        rotated = is_rotated(image, pair.image)
    except InputError as error:
        problems.append(str(error))
    try:
        labels = read_labels(pair)
    except InputError as error:
        problems.append(str(error))
    if labels is not None:
        label_pixels = np.bincount(labels.reshape(-1), minlength=256)
        if strange := _strange_labels(label_pixels, num_classes):
            values = ", ".join(f"{value} ({label_pixels[value]} pixels)" for value in strange[:LISTED])
            problems.append(f"{pair.mask}: labels that are neither 0 to {num_classes - 1} nor 255: {values}")
        if image_hw and labels.shape != image_hw:
            sizes = "the mask has {} x {} pixels (height x width), the image {} x {}".format(*labels.shape, *image_hw)
            problems.append(f"{pair.mask}: {sizes}: {pair.image}")
    if not problems:
        digest = content_digest(pair.id, image, labels)
    return _CheckedPair(pair, problems, image_hw, digest, label_pixels, rotated)


def _strange_labels(label_pixels: np.ndarray, num_classes: int) -> list[int]:
    return [value for value in range(num_classes, IGNORE_LABEL) if label_pixels[value]]


def _describe_strange_labels(results: Iterable[_CheckedPair], num_classes: int) -> list[str]:
    """The histogram of labels out of range over all files, most frequent first, as at most one line."""
    counts = [result.label_pixels for result in results if result.label_pixels is not None]
    pixels = np.sum(counts, axis=0, dtype=np.int64) if counts else np.zeros(256, np.int64)
    strange = sorted(_strange_labels(pixels, num_classes), key=lambda value: -pixels[value])
    parts = [f"{v} ({pixels[v]} pixels in {sum(bool(c[v]) for c in counts)} files)" for v in strange[:LISTED]]
    if len(strange) > LISTED:
        parts.append(f"and {len(strange) - LISTED} other values")
    return [f"labels out of range, in all: {', '.join(parts)}"] if parts else []


def _summarise(found: FoundSplit, results: list[_CheckedPair]) -> CheckedSplit:
    good = [result for result in results if not result.problems]
    labelled = [result.label_pixels for result in good if result.label_pixels is not None]
    return CheckedSplit(
        pairs=[result.pair for result in good],
        sizes_hw=np.array([result.size_hw for result in good], np.int32).reshape(-1, 2),
        digests=[result.digest for result in good],
        label_pixels=np.sum(labelled, axis=0, dtype=np.int64) if labelled else np.zeros(256, np.int64),
        rotated_count=sum(result.rotated for result in good),
        left_out=found.problems + [problem for result in results for problem in result.problems],
        other_files=found.other_files,
    )
