"""`dsnet prepare`: a checked data set in one place, complete or not there at all."""

import contextlib
import fcntl
import functools
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dsnet_jax.data.archives import Source, open_source
from dsnet_jax.data.builders import Camvid, Folder, PublishedBuilder, SegmentationBuilder, Shapes
from dsnet_jax.data.builders.ade20k import Ade20k
from dsnet_jax.data.builders.pascal_context import PascalContext, PascalContext60
from dsnet_jax.data.builders.voc2012 import Voc2012
from dsnet_jax.data.decoding import MAX_PIXELS
from dsnet_jax.data.files import kind_of_path
from dsnet_jax.data.published import PublishedSource
from dsnet_jax.data.records import VERSION, open_builder
from dsnet_jax.data.specs import IGNORE_LABEL, DatasetSpec
from dsnet_jax.data.validation import LISTED, CheckedSplit, list_problems
from dsnet_jax.errors import InputError

_BUILDERS = {
    "shapes": Shapes,
    "camvid": Camvid,
    "voc2012": Voc2012,
    "ade20k": Ade20k,
    "pascal_context": PascalContext,
    "pascal_context_60": PascalContext60,
}
DATASETS = (*_BUILDERS, "folder")
_REPLACED = ".replaced"  # An overwritten data set, until the new one is in its place; no data set has such a name.


def prepare(
    dataset: str,
    source: str | Sequence[str] | None,
    root: str,
    *,
    name: str | None = None,
    accept_repacked: bool = False,
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
):
    """Checks a data set, writes it to `<root>/<name>`, and prints what it holds.

    It appears under its name when it is complete, and not before. If it is there already and holds just what the
    source gives, nothing is written.

    Args:
      dataset: one of `DATASETS`.
      source: the folder or the archive with the data set's files, see `archives.open_source`; None for shapes. A data
        set that is published in several pieces takes several, see `published.PublishedSource`.
      root: where data sets are kept.
      name: of a `folder` data set; the others bear their own.
      accept_repacked: take archives whose checksum is not the published one.
      skip_bad: leave out images that have a problem, and list them; otherwise any problem is an error. Refused for
        what is published with a known number of images: with fewer it would not be that data set.
      max_pixels: the largest image that is accepted.
      overwrite: write anew what is there under that name.

    Raises:
      InputError: the source is not as it should be, or `root` holds something else under that name.
    """
    sources = [source] if isinstance(source, str) else list(source or ())
    name = _checked_name(dataset, sources, name)
    target = Path(root) / name
    problems_file = target.with_name(f"{name}-problems.txt")
    if kind_of_path(target) and not kind_of_path(target / VERSION / "dataset_info.json"):
        raise InputError(f"{target}: exists, and is not a data set of this version: move it away, or change --root")
    new_builder = functools.partial(Folder, name) if dataset == "folder" else _BUILDERS[dataset]
    is_published = dataset != "folder" and issubclass(new_builder, PublishedBuilder)
    if len(sources) > 1 and not is_published:
        raise InputError(f"{dataset} takes one --source, not {len(sources)}", exit_code=2)
    if accept_repacked and not is_published:
        raise InputError(f"{dataset} takes no --accept-repacked: no checksum of it is known", exit_code=2)
    if skip_bad and is_published:
        wrong = "without some of its images it would not be the published data set"
        raise InputError(f"{dataset} takes no --skip-bad: {wrong}: download it again", exit_code=2)
    with _workspace(target) as workspace, contextlib.ExitStack() as stack:
        files: Source | PublishedSource | None = None
        if is_published:
            files = PublishedSource(sources, workspace, stack, accept_repacked)
        elif sources:
            files = stack.enter_context(open_source(Path(sources[0]), workspace))
        stack.enter_context(_adding_what_was_passed_over(files))
        builder = new_builder(files, workspace, problems_file, skip_bad, max_pixels)
        problems_file.unlink(missing_ok=True)  # Of an earlier run.
        splits = builder.checked_splits
        if left_out := {split: checked.left_out for split, checked in splits.items() if checked.left_out}:
            print(f"left out for their problems: {sum(map(len, left_out.values()))}")
            print("\n".join(list_problems(left_out, problems_file)))
        if target.exists() and not overwrite:
            if difference := _difference(open_builder(root, name), builder):
                raise InputError(f"{target}: exists and differs: {difference}: add --overwrite to write it anew")
            print(f"{target} holds just this already: nothing was written")
        else:
            _write(builder, target, workspace)
            print(f"{name} is prepared in {target}")
        if passed_over := _describe_passed_over(files):
            print("\n".join(passed_over))
    print("\n".join([*builder.notes, describe(builder.spec, splits, builder.composed_splits)]))


@contextlib.contextmanager
def _adding_what_was_passed_over(files: Source | PublishedSource | None) -> Iterator[None]:
    """Within, what was not read is added to an InputError: a linked file is a missing one to all that comes after."""
    try:
        yield
    except InputError as error:
        raise InputError("\n".join([str(error), *_describe_passed_over(files)]), error.exit_code) from error


def _describe_passed_over(files: Source | PublishedSource | None) -> list[str]:
    lines = []
    if files and files.passed_over:
        lines.append(f"{len(files.passed_over)} members that are no files were not read: {_first(files.passed_over)}")
    if isinstance(files, PublishedSource) and files.unread:
        lines.append(f"{len(files.unread)} folders could not be searched: {_first(files.unread)}")
    return lines


def _checked_name(dataset: str, sources: list[str], name: str | None) -> str:
    if dataset not in DATASETS:
        raise InputError(f"data set {dataset!r} is not known: choose one of {', '.join(DATASETS)}", exit_code=2)
    if (not sources) != (dataset == "shapes"):
        wanted = "is drawn and takes no --source" if sources else "wants --source, the folder or archive with its files"
        raise InputError(f"{dataset} {wanted}", exit_code=2)
    if (name is None) == (dataset == "folder"):
        wanted = "bears its own name and takes no --name" if name else "wants --name, which configs will call it by"
        raise InputError(f"{dataset} {wanted}", exit_code=2)
    if name is not None and (name in DATASETS or not re.fullmatch(r"[a-z][a-z0-9_]*", name)):
        raise InputError(f"--name={name}: take lower-case letters, digits and _, and no name of ours", exit_code=2)
    return name or dataset


@contextlib.contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what is not complete yet. One process at a time has it; it is removed at the end.

    What was to be replaced, and by an interruption was not, is put back: at the end, or by the next run.
    """
    folder = target.with_name(f".{target.name}.incomplete")
    replaced = folder / _REPLACED

    def put_back():
        if replaced.exists() and not target.exists():
            replaced.rename(target)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}): choose another --root") from error
    lock = os.open(folder, os.O_RDONLY)  # The system drops the lock of a process that is killed.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            put_back()
            for left in folder.iterdir():
                print(f"removing what an interrupted run left in {folder}")
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
        finally:
            put_back()
            shutil.rmtree(folder)
    except BlockingIOError as error:
        raise InputError(f"{target}: another process is preparing it: wait until it has ended") from error
    finally:
        os.close(lock)


def _difference(existing: tfds.core.DatasetBuilder, builder: SegmentationBuilder) -> str | None:
    """The first thing in which a prepared data set differs from what `builder` would write, or None."""
    metadata = existing.info.metadata
    if DatasetSpec.from_json(metadata["spec"]) != builder.spec:
        return "other classes or colours"
    there, here = metadata["splits"], builder.checked_splits
    if list(there) != list(here):
        return f"it has the splits {', '.join(there)}, the source {', '.join(here)}"
    for split, checked in here.items():
        if len(there[split]["sizes_hw"]) != len(checked.pairs):
            return f"{split} has {len(there[split]['sizes_hw'])} images, the source {len(checked.pairs)}"
        if there[split]["fingerprint"] != checked.fingerprint:
            return f"images or masks of {split} have changed"
    return None


def _write(builder: SegmentationBuilder, target: Path, workspace: Path):
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces sizes that it does not know.
            builder.download_and_prepare()
        if target.exists():
            target.rename(workspace / _REPLACED)
        (workspace / builder.name).rename(target)
    except (OSError, RuntimeError) as error:  # The writer is C++, and raises RuntimeError when the disk is full.
        free = shutil.disk_usage(workspace).free / 1e6
        raise InputError(f"{workspace}: cannot be written, with {free:.0f} MB free: {error}") from error


def describe(
    spec: DatasetSpec, splits: dict[str, CheckedSplit], composed: Mapping[str, Sequence[str]] | None = None
) -> str:
    """What the splits hold, for people: counts, sizes, and the share of each class in the labelled pixels.

    Args:
      spec: classes and colours.
      splits: by name.
      composed: which of them make up another split, by its name.
    """
    lines = []
    for split, checked in splits.items():
        heights, widths = map(_range, checked.sizes_hw.T)
        lines.append(f"{split}: {len(checked.pairs)} images, {heights} high, {widths} wide")
        if checked.rotated_count:
            lines.append(f"  {checked.rotated_count} ask for a rotation by EXIF: pixels are taken as they are stored")
        if checked.other_files:
            lines.append(f"  {len(checked.other_files)} other files were not read: {_first(checked.other_files)}")
    for split, parts in (composed or {}).items():
        count = sum(len(splits[part].pairs) for part in parts)
        lines.append(f"{split}: {count} images, those of {' and '.join(parts)}")
    rows = [("share of pixels", list(splits))]
    for label, class_name in [*enumerate(spec.class_names), (IGNORE_LABEL, "ignored")]:
        rows.append((class_name, [_share(checked.label_pixels, label) for checked in splits.values()]))
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:{width}}" + "".join(f" {cell:>9}" for cell in cells) for name, cells in rows]
    return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def _range(sides: np.ndarray) -> str:
    low, high = sides.min(), sides.max()
    return str(low) if low == high else f"{low} to {high}"


def _share(label_pixels: np.ndarray, label: int) -> str:
    return f"{label_pixels[label] / label_pixels.sum():.2%}" if label_pixels[label] else "none"
