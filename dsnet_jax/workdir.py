"""The folder of a run: whose it is, and what it remembers of its config and classes; and how files are written."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from dsnet_jax.config import FREE_FIELDS, differences, from_json, to_json
from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError, reaching, writing_into

CONFIG, SPEC, LOCK = "config.json", "dataset.json", ".lock"
ANOTHER = "give another --workdir"


@contextlib.contextmanager
def locked_workdir(workdir: epath.PathLike) -> Iterator[None]:
    """Makes the folder if it is not there, and keeps other runs out of it until the end.

    The lock is the system's, on an empty file there, which stays: it ends with the process, however that ends. Where
    Linux mounts NFS the server keeps it, for all machines. Storage such as `gs://` has none.

    Raises:
      InputError: another run has it, or it cannot be reached or written.
    """
    workdir = epath.Path(workdir)
    with writing_into(workdir, ANOTHER):
        workdir.mkdir(parents=True, exist_ok=True)
    if is_remote(workdir):
        yield
        return
    with writing_into(workdir, ANOTHER):  # NFS hands on no lock of a folder, nor of a file that is open to be read.
        lock = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{workdir}: another run is writing to it: wait until that has ended, or give another --workdir"
            ) from error
        except OSError as error:
            logging.warning("%s cannot be locked (%s): nothing keeps two runs apart", workdir, error.strerror)
        yield
    finally:
        os.close(lock)


def claim_workdir(workdir: epath.PathLike, config: ConfigDict, spec: DatasetSpec) -> list[str]:
    """Writes config and classes into a new workdir, or checks that they are those of an old one.

    Fields that cannot change what is trained may differ (`config.FREE_FIELDS`); the folder then remembers the new ones.

    Returns:
      What differs, one line a field.

    Raises:
      InputError: the workdir holds a run of another config, and the message lists what differs; or of other classes; or
        what it holds cannot be read.
    """
    different = check_workdir(workdir, config, spec)
    workdir = epath.Path(workdir)
    with writing_into(workdir, ANOTHER):
        if different is None:
            write_text(workdir / SPEC, json.dumps(spec.to_json(), indent=2) + "\n")
        if different != []:
            write_text(workdir / CONFIG, to_json(config))  # After the other: it says that the folder is claimed.
    return different or []


def check_workdir(workdir: epath.PathLike, config: ConfigDict, spec: DatasetSpec) -> list[str] | None:
    """`claim_workdir`, without writing: gives None for a workdir that is new."""
    file = epath.Path(workdir) / CONFIG
    with reaching(workdir, ANOTHER):
        if not file.exists():
            return None
    different = differences(from_json(_read(file), str(file)), config)
    if fixed := [line for name, line in different.items() if name not in FREE_FIELDS]:
        raise InputError(
            f"{workdir} holds a run of another config: give another --workdir, or the old config again; "
            "what differs (old -> new):\n" + "\n".join(fixed)
        )
    if _read_spec(epath.Path(workdir)) != spec:
        raise InputError(
            f"{workdir} holds a run on other classes or colours than {spec.name} has now: give another --workdir, "
            "or prepare the old data set again"
        )
    return list(different.values())


def open_workdir(workdir: epath.PathLike) -> tuple[ConfigDict, DatasetSpec]:
    """The config and the classes of the run in a workdir.

    Raises:
      InputError: there is none, it is not complete, or it cannot be reached or read.
    """
    workdir = epath.Path(workdir)
    with reaching(workdir, ANOTHER):
        if not (workdir / CONFIG).exists():
            raise InputError(f"{workdir} holds no run ({CONFIG} is missing): give the --workdir of `dsnet train`")
    return from_json(_read(workdir / CONFIG), f"{workdir / CONFIG}"), _read_spec(workdir)


def _read_spec(workdir: epath.Path) -> DatasetSpec:
    file = workdir / SPEC
    if not file.exists():
        raise InputError(f"{file} is missing, which names the classes: copy it from where the run was made")
    try:
        return DatasetSpec.from_json(json.loads(_read(file)))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: damaged ({error!r:.100}): copy it from where the run was made") from error


def _read(file: epath.Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror or error}): give yourself the right to, or {ANOTHER}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: damaged ({error}): copy it from where the run was made") from error


def write_text(file: epath.Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    write_bytes(file, text.encode())


def write_bytes(file: epath.Path, data: bytes) -> None:
    """Writes a file that is there as a whole or not at all."""
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
