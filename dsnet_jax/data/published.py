"""The pieces that a data set is published in, found among the folders and archives that somebody has on the disk."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsnet_jax.data.archives import ArchiveSource, Source, open_source
from dsnet_jax.data.files import FolderSource, kind_of_path
from dsnet_jax.errors import InputError

SEARCH_DEPTH = 3  # Folders below the one that was given, as in voc/VOCtrainval_11-May-2012/VOCdevkit/VOC2012.


@dataclass(frozen=True)
class Piece:
    """A part of a data set as its authors publish it: an archive, the folder unpacked from it, or a single file.

    Attributes:
      name: what messages call it.
      inside: paths by which the folder that holds it is known: all of them are there.
      files: the names that it is published under, and its checksum, as "sha1:..."; None where none is published.
      is_archive: or a folder; otherwise it is one .json file, `inside`.
    """

    name: str
    inside: tuple[str, ...]
    files: Mapping[str, str | None]
    is_archive: bool = True

    @property
    def advice(self) -> str:
        """What to give with --source."""
        unpacked = f" (or the folder with {', '.join(self.inside)})" if self.is_archive else ""
        return f"give the folder with {' or '.join(self.files)}{unpacked} as --source"


class PublishedSource:
    """Folders and archives, read as one source in which the pieces of a data set are looked for.

    An archive is opened when its turn comes, and its checksum is compared then.

    Args:
      paths: folders and archives, each once; single files, where a data set has any.
      spool_folder: as for `archives.open_source`.
      stack: closes the archives.
      accept_repacked: take an archive whose checksum is not the published one.

    Attributes:
      notes: what was taken from where, one line each.
    """

    def __init__(
        self,
        paths: Sequence[str],
        spool_folder: Path,
        stack: contextlib.ExitStack,
        accept_repacked: bool = False,
    ):
        self.notes: list[str] = []
        self._paths = [Path(path) for path in paths]
        self._spool_folder, self._stack, self._accept_repacked = spool_folder, stack, accept_repacked
        self._opened: dict[Path, Source] = {}
        self._unread: dict[str, str] = {}
        if missing := [path for path in self._paths if kind_of_path(path) is None]:
            raise InputError(f"{missing[0]}: no such folder or file")

    @property
    def passed_over(self) -> list[str]:
        """Members of the archives that are neither files nor folders."""
        return [member for source in self._opened.values() for member in source.passed_over]

    @property
    def unread(self) -> list[str]:
        """Why folders could not be searched, one line each."""
        return list(self._unread.values())

    def find(self, piece: Piece) -> str | None:
        """Path of the folder that holds a piece, or of the single file that is one; None if it is not there.

        The paths are searched in the order in which they were given; in the folders among them, archives under their
        published names are what is tried last.

        Raises:
          InputError: it is in a folder twice, it cannot be read, or its checksum is not the published one.
        """
        folders = [path for path in self._paths if kind_of_path(path) == "folder"]
        archives = [folder / name for folder in folders for name in piece.files]
        published = [path for path in archives if kind_of_path(path) == "file"]
        for path in dict.fromkeys(self._paths + published):
            found = self._find_in(path, piece)
            if len(found) > 1:
                raise InputError(f"{piece.name}: found in {' and in '.join(found)}: give one of them as --source")
            if found:
                checksum = self._compare(path if piece.is_archive else Path(found[0]), piece)
                self.notes.append(f"{piece.name}: from {found[0]}{checksum}")
                return found[0]
        return None

    def _find_in(self, path: Path, piece: Piece) -> list[str]:
        """As `find`, for one path; of several places those that are nearest to it."""
        if kind_of_path(path) == "folder":
            folders = self._search(FolderSource(path), path, piece)
            return folders if piece.is_archive else [f"{folder}/{piece.inside[0]}" for folder in folders]
        is_archive = path.suffix.lower() != ".json"
        if is_archive != piece.is_archive:
            return []
        return self._search(self._open(path), path, piece) if is_archive else [str(path)]

    def _search(self, source: Source, path: Path, piece: Piece) -> list[str]:
        """Paths of the folders that hold `piece`, of those that are nearest to `path`."""

        def holding(folder: str) -> list[str]:
            return [folder] if all(source.has(f"{folder}/{inside}") for inside in piece.inside) else []

        def below(folder: str) -> list[str]:
            return [f"{folder}/{name}" for name in source.folders(folder)]

        def try_all(look: Callable[[str], list[str]], folders: list[str]) -> list[str]:
            found = []
            for folder in folders:
                try:
                    found += look(folder)
                except InputError as error:
                    if folder == str(path):
                        raise
                    self._unread.setdefault(folder, str(error))  # A disk's lost+found, say: the data may lie beside it.
            return found

        given = Path(os.path.abspath(path))  # Of `.` the name is none.
        is_innermost = given.name == piece.inside[0].split("/")[0] and kind_of_path(path) == "folder"
        if is_innermost and holding(str(given.parent)):
            return [str(given.parent)]  # VOC2012/ itself was given.
        level = [str(path)]
        for _ in range(SEARCH_DEPTH + 1):
            if found := try_all(holding, level):
                return found
            level = try_all(below, level)
        return []

    def _open(self, path: Path) -> Source:
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(open_source(path, self._spool_folder))
        return self._opened[path]

    def _compare(self, path: Path, piece: Piece) -> str:
        """What to say of a file's checksum; nothing for a folder."""
        if kind_of_path(path) == "folder":
            return ""
        known = [checksum.split(":") for checksum in piece.files.values() if checksum]
        if not known:
            return " (no checksum of it is published)"
        for kind, digest in known:
            try:
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, kind).hexdigest()
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            if found == digest:
                return f" (its {kind} is the published one)"
        told = f"{path}: its {kind} is {found}, and that of {' or '.join(piece.files)} is {digest}"
        if not self._accept_repacked:
            raise InputError(
                f"{told}: download it again; if it was packed anew by somebody you trust, add --accept-repacked, "
                "which leaves all other checks in force"
            )
        return f" (packed anew: its {kind} is {found})"

    def _of(self, path: str) -> Source:
        archives = (archive for archive in self._opened.values() if isinstance(archive, ArchiveSource))
        return next((archive for archive in archives if path.startswith(f"{archive.path}/")), FolderSource(Path(path)))

    def has(self, path: str) -> bool:
        """As `FolderSource.has`."""
        return self._of(path).has(path)

    def files(self, folder: str) -> list[str]:
        """As `FolderSource.files`."""
        return self._of(folder).files(folder)

    def read(self, path: str) -> bytes:
        """As `FolderSource.read`."""
        return self._of(path).read(path)
