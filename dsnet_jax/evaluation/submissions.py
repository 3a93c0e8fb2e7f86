"""What a benchmark's server is sent for a split whose labels it keeps: an archive of label images.

It is written while the images are predicted, and has its name only when it is complete and `validate_submission` finds
nothing in it that a server would reject. That looks at archives which others have made, too.
"""

import contextlib
import errno
import gzip
import io
import os
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dsnet_jax.data.archives import open_source
from dsnet_jax.data.decoding import decode_image, read_indices, read_size_hw
from dsnet_jax.data.records import Split
from dsnet_jax.data.specs import IGNORE_LABEL, Colour, voc_palette
from dsnet_jax.data.validation import LISTED
from dsnet_jax.errors import InputError
from dsnet_jax.progress import track

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SIGNATURES = {b"PK": ".zip", b"\x1f\x8b": ".tgz"}


@dataclass(frozen=True)
class Format:
    """What a server wants: 8-bit PNG files of the images' exact sizes, `<folder>/<id>.png`, in one archive.

    Attributes:
      archive: ".tgz" (which .tar.gz is too) or ".zip".
      folder: in which the files lie; empty: at the archive's top.
      first_id: the value of class 0; that of class i is first_id + i.
      palette: of indexed PNG files, 256 colours; None: the files are grey.
    """

    archive: str
    folder: str
    first_id: int
    palette: tuple[Colour, ...] | None

    def member(self, image_id: str) -> str:
        """The path of an image's file in the archive."""
        return f"{self.folder}/{image_id}.png".removeprefix("/")

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the archive's name."""
        return (".tgz", ".tar.gz") if self.archive == ".tgz" else (self.archive,)


FORMATS = {  # By data set.
    # comp6: the competition in which other data than VOC's may be trained on, ImageNet and SBD among them.
    "voc2012": Format(".tgz", "results/VOC2012/Segmentation/comp6_test_cls", 0, voc_palette(256)),
    "ade20k": Format(".zip", "", 1, None),
}


def format_for(split: Split) -> Format:
    """The format in which predictions of the split are submitted.

    Raises:
      InputError: for its data set none is known.
    """
    if split.spec.name not in FORMATS:
        raise InputError(f"no form of submission is known for {split.spec.name}: there are {', '.join(FORMATS)}")
    return FORMATS[split.spec.name]


def write_submission(file: str | os.PathLike, split: Split, predictions: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes an archive of predictions as they come, and checks it.

    A .tgz is unpacked beside it for that. Where there is no room, it is kept under the name that it has until then.

    Args:
      file: the archive, which is replaced if it is there; its name ends as the format wants.
      split: whose images are predicted.
      predictions: id and labels, uint8 [H, W], of every image, in any order. Not started if the archive has no chance.

    Raises:
      InputError: the data set has no format, the name has another ending, or the file cannot be written or checked.
      RuntimeError: what was written is not valid.
    """
    file, form = Path(file), format_for(split)
    if not file.name.endswith(form.endings):
        raise InputError(f"{file}: a submission for {split.spec.name} ends in {' or '.join(form.endings)}: rename it")
    if os.path.isdir(file):
        raise InputError(f"{file}: cannot be written ({os.strerror(errno.EISDIR)}): choose another place")
    unfinished = file.with_name(f".unfinished.{file.name}")
    others, keep = [], False

    def predicted() -> Iterator[tuple[str, np.ndarray]]:
        try:
            yield from predictions
        except OSError as error:  # Not of this file: of stdout, for instance, which nobody reads any more.
            others.append(error)
            raise

    try:
        with _archive(unfinished, form) as add:
            for image_id, labels in predicted():
                add(form.member(image_id), _png(labels + np.uint8(form.first_id), form.palette))
        try:
            problems = validate_submission(unfinished, split, unfinished.parent)
        except InputError as error:
            keep = True
            raise InputError(
                f"{error}; all images are labelled in it: check it by `dsnet inspect submission`, then rename it"
            ) from error
        if problems:
            raise RuntimeError("\n".join([f"{file}: what was written is not valid:", *problems]))
        unfinished.replace(file)
    except OSError as error:
        if error in others:
            raise
        raise InputError(f"{file}: cannot be written ({error.strerror or error}): choose another place") from error
    finally:
        if not keep:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _archive(path: Path, form: Format) -> Iterator[Callable[[str, bytes], None]]:
    """An archive being written: what it gives is called with the name and the content of each member."""
    if form.archive == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            yield lambda name, data: archive.writestr(zipfile.ZipInfo(name), data)  # Of no date, like the other.
        return
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        yield add


def _png(ids: np.ndarray, palette: Sequence[Colour] | None) -> bytes:
    picture, file = Image.fromarray(ids), io.BytesIO()
    if palette:
        picture.putpalette(np.array(palette, np.uint8).tobytes())
    picture.save(file, "PNG")
    return file.getvalue()


def check_submission(file: str | os.PathLike, split: Split) -> None:
    """Prints that an archive is a valid submission for the split.

    Raises:
      InputError: it is not, a line for each kind of problem; or there is no room to unpack it.
    """
    if problems := validate_submission(file, split):
        raise InputError("\n".join([f"{file}: a server would reject it:", *(f"  {line}" for line in problems)]))
    print(f"{file}: a valid submission for {split.spec.name}, split {split.name}: {len(split)} files")


def validate_submission(
    file: str | os.PathLike, split: Split, spool_folder: str | os.PathLike | None = None
) -> list[str]:
    """What a server would reject about an archive of predictions, one line for each kind of problem.

    Args:
      file: the archive.
      split: whose images it should hold the labels of.
      spool_folder: on a disk with room for an unpacked .tgz; None: the system's for temporary files.

    Raises:
      InputError: the split's data set has no format, or there is no room to unpack the archive.
    """
    file, form, problems = Path(file), format_for(split), _Problems()
    if not file.name.endswith(form.endings):
        problems.add(f"the name does not end in {' or '.join(form.endings)}", file.name)
    sizes_hw = {form.member(record.id): record.size_hw for record in split}
    try:
        with file.open("rb") as opened:
            found = _SIGNATURES.get(opened.read(2), "neither a .zip nor a .tgz")
        spool = Path(spool_folder or tempfile.gettempdir())
    except OSError as error:
        return [f"{file}: cannot be read: {error.strerror or error}"]
    try:
        if found != form.archive:
            problems.add(f"the archive is not a {form.archive}", f"{file.name} is {found}")
        with open_source(file, spool) as source:
            paths = {path.removeprefix(f"{file}/"): path for path in source.files(str(file))}
            places = _places(list(paths), sizes_hw, form, problems)
            for passed_over in source.passed_over:
                problems.add("members that are no files", passed_over.removeprefix(f"{file}/"))
            for name, wanted in track(places.items(), "checking the submission", len(places)):
                try:
                    data = source.read(paths[name])
                    _check_file(name, data, sizes_hw[wanted], form, split.spec.num_classes, problems)
                except InputError as error:
                    problems.add("files that are damaged, or no images", str(error))
                except OSError as error:
                    return [f"{file}: cannot be read: {error.strerror or error}"]
    except InputError as error:
        if getattr(error.__cause__, "errno", None) in _NO_ROOM:
            elsewhere = "" if spool_folder else ", or set TMPDIR to another folder"
            raise InputError(
                f"{file}: cannot be checked, {spool} has no room to unpack it: make room{elsewhere}"
            ) from error
        problems.add("the archive", str(error))
    return problems.lines()


class _Problems(defaultdict[str, list[str]]):
    """Of each kind the places where it was found."""

    def __init__(self):
        super().__init__(list)

    def add(self, kind: str, where: str) -> None:
        """Notes one."""
        self[kind].append(where)

    def lines(self) -> list[str]:
        """Of each kind one line: how many there are, and where the first are."""
        return [
            f"{kind} ({len(places)}): {'; '.join(places[:LISTED])}{'; ...' if len(places) > LISTED else ''}"
            for kind, places in self.items()
        ]


def _places(
    names: list[str], sizes_hw: dict[str, tuple[int, int]], form: Format, problems: _Problems
) -> dict[str, str]:
    """The members that are label images, each with the name that it should have."""
    places = {name: name for name in names if name in sizes_hw}
    missing = sorted(sizes_hw.keys() - places.keys())
    of_file_name = {PurePosixPath(wanted).name: wanted for wanted in missing}
    for name in names:
        if name in places:
            continue
        if wanted := of_file_name.pop(PurePosixPath(name).name, None):
            problems.add(f"files that do not lie in {form.folder or 'no folder'}", name)
            places[name] = wanted
        else:
            problems.add("files that nobody asked for", name)
    for wanted in sorted(of_file_name.values()):
        problems.add("files missing", wanted)
    return places


def _check_file(
    name: str, data: bytes, size_hw: tuple[int, int], form: Format, num_classes: int, problems: _Problems
) -> None:
    if (found_hw := read_size_hw(data, name)) != size_hw:
        sizes = " x ".join(map(str, found_hw)), " x ".join(map(str, size_hw))
        problems.add("files not of their image's size", f"{name} is {sizes[0]}, not {sizes[1]} (height x width)")
        return
    decode_image(data, name)  # Pillow would take missing rows for zeros.
    with Image.open(io.BytesIO(data)) as picture:
        wanted_mode = "L" if form.palette is None else "P"
        if picture.format != "PNG" or picture.mode != wanted_mode or data[24] != 8:  # Bits a pixel.
            problems.add(
                f"files that are no 8-bit {'grey' if form.palette is None else 'indexed'} PNG",
                f"{name} is {picture.format} in mode {picture.mode}",
            )
            return
        if form.palette is not None:
            wanted = [channel for colour in form.palette[:num_classes] for channel in colour]
            if picture.getpalette()[: len(wanted)] != wanted:
                problems.add("files with another palette than VOC's", name)
        ids = np.flatnonzero(np.bincount(read_indices(data, name).ravel())).tolist()
    last_id = form.first_id + num_classes - 1
    if ids[-1] == IGNORE_LABEL:
        problems.add("files with pixels of 255 (ignored), where a class is wanted", name)
    if strange := [value for value in ids if not form.first_id <= value <= last_id and value != IGNORE_LABEL]:
        problems.add(
            f"files with ids outside {form.first_id} to {last_id}", f"{name} has {', '.join(map(str, strange[:5]))}"
        )
