"""The one exception that a user may cause, and what its messages have in common."""

import contextlib
import os
from collections.abc import Iterator, Sequence


class InputError(Exception):
    """What the user gave cannot be used: a file, a config, a flag, a checkpoint.

    The message is one line (a list of file names may follow, one to a line): what was found, where, and what to do.
    The command line prints it without a traceback and exits with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def listed(lines: Sequence[str], most: int = 10) -> list[str]:
    """The first lines or names of many, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


@contextlib.contextmanager
def writing_into(folder: str | os.PathLike, otherwise: str) -> Iterator[None]:
    """Within, what the system says about a file becomes an InputError of one line.

    Args:
      folder: what is written into.
      otherwise: what the user can do, as "give another --output".
    """
    with reaching(folder, otherwise):
        try:
            yield
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror or error}): {otherwise}") from error


@contextlib.contextmanager
def reaching(path: str | os.PathLike, otherwise: str) -> Iterator[None]:
    """Within, that the package which reaches an object store such as `gs://` is missing becomes an InputError.

    Args:
      path: what is reached; an ImportError where it is on this machine is somebody else's.
      otherwise: what the user can do, as "give another --output".
    """
    try:
        yield
    except ImportError as error:  # It is imported when a path there is first touched.
        if "://" not in os.fspath(path):
            raise
        raise InputError(
            f"{path} cannot be reached ({error}): pip install -e '.[gcs]' for gs://, or {otherwise}"
        ) from error
