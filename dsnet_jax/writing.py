"""How results are written: a file is there as a whole or not at all, in a folder or in an object store."""

import contextlib
import errno
import os

from etils import epath

from dsnet_jax.errors import writing_into

LONGEST_NAME = 250  # Bytes of a file's name: Linux has 255, and a file is called otherwise while it is written.


def write_text(file: epath.PathLike, text: str) -> None:
    """`write_bytes`, of UTF-8."""
    write_bytes(file, text.encode())


def write_bytes(file: epath.PathLike, data: bytes) -> None:
    """Writes a file, or leaves what was there as it was. A link is replaced, not followed."""
    file = epath.Path(file)
    if is_remote(file):  # Object stores do so by themselves, and have no renaming.
        file.write_bytes(data)
        return
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_bytes(data)
        new.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):  # The first error is the one to tell.
            new.unlink(missing_ok=True)
        raise


def check_writable(folder: epath.PathLike, otherwise: str) -> None:
    """Tells before the work what would only be found after it. Makes nothing.

    An object store is not asked whether it may be written, only whether it can be reached.

    Args:
      folder: need not be there.
      otherwise: what the user can do, as "give another --output".

    Raises:
      InputError: the folder cannot be made or reached, or nothing be written into it.
    """
    folder = epath.Path(folder)
    with writing_into(folder, otherwise):
        if is_remote(folder):
            folder.exists()
            return
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store such as `gs://`, which knows neither locks nor appending."""
    return "://" in os.fspath(path)
