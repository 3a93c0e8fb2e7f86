"""The folder of a run: whose it is, and what it remembers of its config and classes."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from dsnet_jax.config import FREE_FIELDS, differences, from_json, to_json
from dsnet_jax.data.files import kind_of_path
from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError, reaching, writing_into
from dsnet_jax.writing import is_remote, write_text

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
    workdir = epath.Path(workdir)
    if not _is_claimed(workdir):
        return None
    different = differences(from_json(_read(workdir / CONFIG), str(workdir / CONFIG)), config)
    if fixed := [line for name, line in different.items() if name not in FREE_FIELDS]:
        raise InputError(
            f"{workdir} holds a run of another config: give another --workdir, or the old config again; "
            "what differs (old -> new):\n" + "\n".join(fixed)
        )
    if _read_spec(workdir) != spec:
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
    if not _is_claimed(workdir):
        raise InputError(f"{workdir} holds no run ({CONFIG} is missing): give the --workdir of `dsnet train`")
    return from_json(_read(workdir / CONFIG), f"{workdir / CONFIG}"), _read_spec(workdir)


def _is_claimed(workdir: epath.Path) -> bool:
    with reaching(workdir, ANOTHER):
        if is_remote(workdir):
            return (workdir / CONFIG).exists()
        return kind_of_path(workdir / CONFIG) is not None  # `exists` says no where a folder may not be entered.


def _read_spec(workdir: epath.Path) -> DatasetSpec:
    file = workdir / SPEC
    if not file.exists():
        raise InputError(f"{file} is missing, which names the classes: copy it from where the run was made")
    try:
        return DatasetSpec.from_json(json.loads(_read(file)))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
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
