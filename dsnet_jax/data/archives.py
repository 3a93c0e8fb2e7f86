"""Where the files of a data set lie: in a folder, or in an archive as it was downloaded, which is read as a folder is.

Nothing is ever extracted under the name that an archive gives it. A member of `/data/CamVid.zip` is called
`/data/CamVid.zip/train/0.png`, and its content is read when it is asked for, from its place in the archive. A .tar.gz
has no such places: it is unpacked once into a .tar without a name on the disk of the prepared data, which ends with the
process, however that ends. So memory holds the list of members and the files at work, whatever the archive's size.

An archive may come from anybody. What nobody packs on purpose is refused; members that are no files are passed over,
listed and told.
"""

import contextlib
import gzip
import io
import itertools
import os
import shutil
import struct
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dsnet_jax.data.files import MAX_FILE_BYTES, FolderSource, check_printable, kind_of_path
from dsnet_jax.errors import InputError

MAX_MEMBERS = 500_000
MAX_NAME_LENGTH = 1024
MAX_BYTES = 2**36  # Of all members, uncompressed: 64 GiB.
MAX_RATIO = 100  # Uncompressed to compressed bytes; images and masks, which are compressed already, have about 1 ...
RATIO_FREE_BYTES = 2**26  # ... and text may have any: archives that hold less than this are not measured.
MAX_TAR_HEADER_BYTES = 2**14  # Of one member: a long name and its like. Old versions of Python parse it slowly.
MAX_ZIP_LIST_BYTES = 2**25  # Of all members, which zipfile reads as a whole.

_CHUNK_BYTES = 2**20


class ArchiveSource:
    """A data set's files in a .tar, .tar.gz or .zip archive. Made by `open_source`.

    Attributes:
      path: of the archive.
      root: the archive's path, or that of the only folder at its top.
      passed_over: links and devices, `<path>: <what it is>`.
    """

    def __init__(self, archive: "_Tar | _Zip"):
        self._archive, self.path, self.passed_over = archive, archive.path, archive.passed_over
        visible = [path for path in archive.members if not _is_hidden(path)]
        tops = {path.split("/")[0] for path in visible}
        only_top = len(tops) == 1 and all("/" in path for path in visible)
        self.root = f"{archive.path}/{tops.pop()}" if only_top else str(archive.path)
        self._members = {f"{archive.path}/{path}": member for path, member in sorted(archive.members.items())}
        self._folders = [f"{archive.path}/{path}/" for path in archive.folders]

    def has(self, path: str) -> bool:
        """As `FolderSource.has`."""
        return path in self._members or any(True for _ in self._below(path))

    def folders(self, parent: str) -> list[str]:
        """As `FolderSource.folders`."""
        names = {inside.split("/")[0] for inside in self._below(parent) if "/" in inside}
        return sorted(name for name in names if not name.startswith("."))

    def files(self, folder: str) -> list[str]:
        """As `FolderSource.files`."""
        return [path for path in self._members if path.startswith(f"{folder}/")]

    def read(self, path: str) -> bytes:
        """A member's content, by several threads if need be; raises InputError if it is damaged or too large."""
        if path not in self._members:
            wrong = "not a file: remove it" if self.has(path) else "there is no such file in the archive"
            raise InputError(f"{path}: {wrong}")
        return self._archive.read(path, self._members[path])

    def _below(self, folder: str) -> Iterator[str]:
        """Paths from `folder` of what lies in it; "" for itself; those of folders end in a slash."""
        paths = itertools.chain(self._members, self._folders)
        return (path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/"))


Source = FolderSource | ArchiveSource


@contextlib.contextmanager
def open_source(path: Path, spool_folder: Path) -> Iterator[Source]:
    """Opens a folder, or a .tar, .tar.gz (.tgz) or .zip archive, which is told by its content.

    Args:
      path: of the folder or the archive. An archive may hold the data in one folder at its top.
      spool_folder: a folder on a disk with room for an unpacked .tar.gz.

    Raises:
      InputError: there is no such file, it is no such archive, or damaged; or it has members that are refused: an
        absolute path or one with `..`, a name that is not UTF-8 or has control characters, a name that occurs twice,
        encryption; or there is too much of it: more than `MAX_MEMBERS`, `MAX_BYTES`, `MAX_RATIO`.
    """
    if kind_of_path(path) == "folder":
        yield FolderSource(path)
        return
    with contextlib.ExitStack() as stack:
        try:
            source = ArchiveSource(_open_archive(path, spool_folder, stack))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        yield source


def _open_archive(path: Path, spool_folder: Path, stack: contextlib.ExitStack) -> "_Tar | _Zip":
    if (kind := kind_of_path(path)) != "file":
        raise InputError(f"{path}: {'neither a folder nor a file' if kind else 'no such folder or file'}")
    file = stack.enter_context(_LimitedFile(path))
    start = os.pread(file.fileno(), 4, 0)
    if start in (b"PK\x03\x04", b"PK\x05\x06"):  # The second is that of an empty one.
        return _Zip(path, file)
    if start.startswith(b"\x1f\x8b"):
        with tempfile.TemporaryFile(dir=spool_folder) as spool:
            _unpack(path, spool)
            spool.seek(0)
            file = stack.enter_context(_LimitedFile(os.dup(spool.fileno())))
    return _Tar(path, file)


class _LimitedFile(io.FileIO):
    """Refuses to read much at once: the parsers take a size out of the file and ask for so much memory."""

    limit = MAX_TAR_HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        size = left if size is None or size < 0 else min(size, left)
        if size > self.limit:
            raise ValueError(f"a header of {size} bytes")
        return super().read(size)


class _Members:
    """What an archive holds, by path inside it: `members` for its reader to find, `folders`, and `passed_over`."""

    def __init__(self, path: Path, compressed_bytes: int):
        self.path, self._compressed_bytes = path, compressed_bytes
        self.members: dict[str, object] = {}
        self.folders: set[str] = set()
        self.passed_over: list[str] = []
        self._bytes = self._count = 0

    def add(self, name: str, size: int, kind: str, member: object):
        """Adds one as its header describes it. `kind`: "file", "folder", or what it is that nobody reads."""
        check_printable(self.path, name)
        parts = PurePosixPath(name).parts  # Without "." and doubled slashes.
        inside = "/".join(parts)
        if name.startswith("/") or ".." in parts or (kind == "file" and not inside):
            raise InputError(f"{self.path}: member {name!r} is no path inside the archive: it is refused as a whole")
        if len(name) > MAX_NAME_LENGTH:
            raise InputError(f"{self.path}: a name of {len(name)} characters: at most {MAX_NAME_LENGTH} are read")
        self._count += 1
        self._bytes += size
        if self._count > MAX_MEMBERS:
            raise InputError(f"{self.path}: more than {MAX_MEMBERS} members, from {name!r} on: unpack what you need")
        if self._bytes > MAX_BYTES:
            raise InputError(f"{self.path}: more than {MAX_BYTES} bytes uncompressed, from member {name!r} on: refused")
        if _is_bomb(self._bytes, self._compressed_bytes):
            raise InputError(
                f"{self.path}: holds more than {MAX_RATIO} times its size, from member {name!r} on: refused"
            )
        if inside in self.members:
            raise InputError(f"{self.path}: two members are called {name!r}: pack it again with one of them")
        if kind == "file":
            self.members[inside] = member
        elif kind != "folder":
            self.passed_over.append(f"{self.path}/{inside}: {kind}")
        elif inside:  # Not that of the archive itself, "./".
            self.folders.add(inside)


class _Tar(_Members):
    """The members of a .tar: each is (position, size) of its content in the file."""

    def __init__(self, path: Path, file: _LimitedFile):
        length = os.fstat(file.fileno()).st_size
        super().__init__(path, compressed_bytes=length)
        self._file = file
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # It would keep them all.
                    if member.size < 0 or tar.offset > length:  # A negative size would send it back, for ever.
                        raise ValueError(f"cut short, or its next header is damaged: {member.name[:100]!a}")
                    kind = _kind(member)
                    size = member.size if kind == "file" else 0
                    self.add(member.name, size, kind, (member.offset_data, size))
                end = tar.offset
        except InputError:
            raise
        except Exception as error:  # tarfile trips over a damaged header in many ways.
            if not self._count:
                raise InputError(
                    f"{path}: neither a folder nor a .tar, .tar.gz (.tgz) or .zip archive ({error})"
                ) from error
            raise InputError(f"{path}: damaged after member {self._count} ({error}): download it again") from error
        # tarfile takes a header that it cannot read, and a missing one, for the end.
        if os.pread(file.fileno(), 512, end) != bytes(512):
            raise InputError(f"{path}: cut short or damaged after member {self._count}: download it again")

    def read(self, path: str, member: tuple[int, int]) -> bytes:
        position, size = member
        _check_size(path, size)
        data = os.pread(self._file.fileno(), size, position)
        if len(data) != size:
            raise InputError(f"{path}: cut short: download the archive again")
        return data


def _kind(member: tarfile.TarInfo) -> str:
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname[:100]!a}"
    return "file" if member.isreg() and not member.issparse() else "a device or another special file"


class _Zip(_Members):
    """The members of a .zip: each is its ZipInfo."""

    def __init__(self, path: Path, file: _LimitedFile):
        super().__init__(path, compressed_bytes=os.fstat(file.fileno()).st_size)
        self._lock = threading.Lock()  # ZipFile counts its open members without one.
        file.limit = MAX_ZIP_LIST_BYTES
        try:
            self._zip = zipfile.ZipFile(file, metadata_encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: names of members are not UTF-8: pack it again") from error
        except Exception as error:  # zipfile, likewise.
            raise InputError(f"{path}: damaged or cut short ({error}): download it again") from error
        for info in self._zip.infolist():
            if info.flag_bits & 1:
                raise InputError(f"{path}: member {info.filename!r} is encrypted: pack it again without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                method = f"method {info.compress_type}, not by deflate"
                raise InputError(f"{path}: member {info.filename!r} is compressed by {method}: pack it again")
            mode = info.external_attr >> 16 if info.create_system == 3 else 0  # Of Unix.
            link = "a link" if (mode & 0o170000) == 0o120000 else None
            self.add(info.filename, info.file_size, link or ("folder" if info.is_dir() else "file"), info)
        file.limit = MAX_FILE_BYTES + _CHUNK_BYTES

    def read(self, path: str, member: zipfile.ZipInfo) -> bytes:
        _check_size(path, member.file_size)
        try:
            with self._lock, self._zip.open(member) as file:
                data = file.read(member.file_size + 1)  # Without a number it would trust the compressed data.
        except Exception as error:
            raise InputError(f"{path}: damaged ({error}): download the archive again") from error
        if len(data) != member.file_size:
            raise InputError(f"{path}: damaged, {len(data)} bytes of {member.file_size}: download the archive again")
        return data


def _unpack(path: Path, spool: io.BufferedIOBase):
    """Writes what a .gz file holds to `spool`."""
    compressed_bytes, count = path.stat().st_size, 0
    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                count += len(chunk)
                if count > MAX_BYTES or _is_bomb(count, compressed_bytes):
                    limit = f"{MAX_BYTES} bytes" if count > MAX_BYTES else f"{MAX_RATIO} times its size"
                    raise InputError(f"{path}: unpacks to more than {limit}: refused")
                _write(spool, chunk, path)
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise InputError(f"{path}: damaged or cut short ({error}): download it again") from error


def _write(spool: io.BufferedIOBase, chunk: bytes, path: Path):
    try:
        spool.write(chunk)
        spool.flush()
    except OSError as error:
        free = shutil.disk_usage(spool.fileno()).free / 1e6
        raise InputError(
            f"{path}: no room to unpack it, with {free:.0f} MB free: choose a --root on a larger disk, or unpack it"
        ) from error


def _check_size(path: str, size: int):
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path}: {size} bytes are more than the limit of {MAX_FILE_BYTES}: make it smaller")


def _is_bomb(count: int, compressed_bytes: int) -> bool:
    return count > RATIO_FREE_BYTES and count > MAX_RATIO * compressed_bytes


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
