"""Files and folders on the user's disk: what is wrong with them is told in one line, with their path."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from dsnet_jax.errors import InputError

MAX_FILE_BYTES = 2**29  # As many bytes as the largest image has as BMP, and more.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Control characters, and what stands for bytes of no UTF-8.


def read_file(path: str | os.PathLike) -> bytes:
    """The content of an image, a mask or a class list.

    Raises:
      InputError: it cannot be read, is a folder or a device, or has more than `MAX_FILE_BYTES`.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # Reading a pipe would wait for ever, a device find no end.
            raise InputError(f"{path}: not a file: remove it")
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {status.st_size} bytes are more than the limit of {MAX_FILE_BYTES}: remove it")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def kind_of_path(path: str | os.PathLike) -> str | None:
    """What lies at a path: "file", "folder", or "other" for a pipe or a device; None if nothing does.

    Raises:
      InputError: the system does not say: a folder above it may not be entered, for instance.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # A link that leads nowhere, or to itself, too.
            return None
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def names_in(folder: str) -> list[str]:
    """Names of what lies in a folder, in any order; none if there is no such folder.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return os.listdir(folder) if kind_of_path(folder) == "folder" else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error


def check_printable(source: Path | str, name: str) -> None:
    """Raises InputError for a `name` in `source` that a terminal would not only print."""
    if _UNSAFE.search(name):
        raise InputError(f"{source}: {name!a} is not UTF-8, or has control characters: rename it")


class FolderSource:
    """A data set's files in a folder.

    Attributes:
      root: path of the folder.
      passed_over: members that are neither files nor folders: in a folder nothing is.
    """

    passed_over: tuple[str, ...] = ()

    def __init__(self, path: Path):
        self.root = str(path)

    def has(self, path: str) -> bool:
        """Whether there is a file or a folder of that path; raises InputError if the system does not say."""
        return kind_of_path(path) is not None

    def folders(self, parent: str) -> list[str]:
        """Names of the folders in `parent`, hidden ones aside, sorted; none if there is no such folder.

        Raises InputError if it cannot be read, or a name cannot be printed.
        """
        names = [name for name in names_in(parent) if not name.startswith(".")]
        folders = sorted(name for name in names if kind_of_path(f"{parent}/{name}") == "folder")
        for name in folders:
            check_printable(parent, name)
        return folders

    def files(self, folder: str) -> list[str]:
        """Paths of all files below `folder`, in linked folders too, sorted; none if there is no such folder.

        Raises:
          InputError: a folder cannot be read, links go in a circle, or a name cannot be printed.
        """
        return sorted(self._files(folder, ()))

    def _files(self, folder: str, above: tuple[str, ...]) -> Iterator[str]:
        """`above`: where the folders in which this one lies are, all links followed."""
        if (place := os.path.realpath(folder)) in above:
            raise InputError(f"{folder}: a link leads here again and again: remove it")
        for path in (f"{folder}/{name}" for name in names_in(folder)):
            check_printable(self.root, path)
            yield from self._files(path, (*above, place)) if kind_of_path(path) == "folder" else [path]

    def read(self, path: str) -> bytes:
        """A file's content; raises InputError as `read_file` does."""
        return read_file(path)
