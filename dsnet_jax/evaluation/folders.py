"""The folders that results are written into, and what pictures are called there."""

import errno
import os
from collections.abc import Sequence

from etils import epath

from dsnet_jax.data.pipeline import Example
from dsnet_jax.errors import writing_into
from dsnet_jax.workdir import is_remote


def check_writable(folder: epath.PathLike, otherwise: str) -> None:
    """Tells before the work what would only be found after it. Makes nothing; nobody asks an object store.

    Args:
      folder: need not be there.
      otherwise: what the user can do, as "give another --output".

    Raises:
      InputError: the folder cannot be made, or nothing be written into it.
    """
    folder = epath.Path(folder)
    if is_remote(folder):
        return
    with writing_into(folder, otherwise):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def picture_names(examples: Sequence[Example]) -> list[str]:
    """Names of files for the examples, without ending: their ids, and no two the same, not even for a/b and a_b."""
    names = []
    for example in examples:
        name = example.id.replace("/", "_")
        while name in names:
            name += "_"
        names.append(name)
    return names
