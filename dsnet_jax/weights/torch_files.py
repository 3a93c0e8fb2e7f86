"""Arrays from files of others: .safetensors, and what `torch.save` writes, of which nothing is ever run."""

import hashlib
import importlib.metadata
import json
import math
import os
import pickletools
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dsnet_jax.errors import InputError
from dsnet_jax.weights.torchvision import RELEASES

MAX_PICKLE_BYTES = 2**26  # Of the names and shapes; ResNet-152 has 0.2 MB of them. Arrays lie beside.
READER = Path(__file__).with_name("torch_reader.py")

# What the pickle of a state dict may name. PyTorch's own list is longer, and its reader, weights_only, comes after.
HARMLESS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor(_v2)?|parameter)|torch\.storage UntypedStorage"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|torch Size"
)
# Other ways than GLOBAL to name something, none of which `torch.save` takes.
UNUSUAL = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}


def sha256_of(file: Path) -> str:
    """The file's checksum; hexadecimal.

    Names that end with digits, as `resnet50-0676ba61.pth`, are compared with it, and with the sha1, by which others
    name theirs. Digits that are neither may mean anything, a date for instance, and are told.

    Raises:
      InputError: the file cannot be read; or it has the name of one of `RELEASES`, and is another one.
    """
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", file.name)
    try:
        with file.open("rb") as opened:
            checksum = hashlib.file_digest(opened, "sha256").hexdigest()
            unknown = named and not checksum.startswith(named[1])
            if unknown:
                opened.seek(0)
                unknown = not hashlib.file_digest(opened, "sha1").hexdigest().startswith(named[1])
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give a .safetensors or .pth file") from error
    if unknown:
        if named[1][:8] in RELEASES:
            raise InputError(
                f"{file}: its sha256 begins with {checksum[:8]}, by its name it should be {named[1]}: it was damaged "
                f"or changed ({file.stat().st_size} bytes): download it again, or rename it if it is meant to be "
                "another one"
            )
        print(f"{file}: the digits in its name begin neither its sha256 nor its sha1: not checked by them")
    return checksum


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, in the types they are stored in, mapped from the file where that is possible.

    Raises:
      InputError: it is neither format, or is damaged; or it holds what is no array, or names what could be run.
    """
    with file.open("rb") as opened:
        start = opened.read(9)
    by_content = ".safetensors" if start[8:] == b"{" else ".pth" if start[:2] in (b"PK", b"\x80\x02") else None
    if by_content is None and file.suffix != ".safetensors":
        raise InputError(
            f"{file}: {os.path.getsize(file)} bytes that are neither safetensors nor written by torch.save: give a "
            ".safetensors or .pth file, and download it again if it is meant to be one"
        )
    if by_content is not None and (by_content == ".safetensors") != (file.suffix == ".safetensors"):
        raise InputError(f"{file}: by its content it is {by_content}, not {file.suffix or 'without ending'}: rename it")
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, "np") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{file}: holds arrays of a type that NumPy has not ({error}): save it as float32") from error
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    _refuse_what_could_run(file)
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{file}: PyTorch is needed to read it: pip install -e '.[port]', or give a .safetensors file"
        ) from error
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 10):
        raise InputError(f"{file}: PyTorch 2.10 or later is needed to read it safely, {version} is here")
    with _folder_for(file) as folder:
        command = [sys.executable, "-P", str(READER), str(file.absolute()), folder]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        said = (ended.stderr.strip().splitlines() or [f"PyTorch ended with exit code {ended.returncode}"])[-1]
        if ended.returncode == 1:
            raise InputError(f"{file}: {said}")
        if ended.returncode == 4:
            raise InputError(f"{file}: PyTorch cannot be imported ({said:.150}): mend it, or give a .safetensors file")
        if ended.returncode == 5:
            raise InputError(_no_room(file, said))
        if ended.returncode == -signal.SIGKILL:
            raise InputError(f"{file}: PyTorch was killed while it read it, for want of memory it may be: free some")
        if ended.returncode:
            raise _damaged(file, said)
        data = np.fromfile(Path(folder, "arrays"), np.uint8)
        index = json.loads(Path(folder, "index.json").read_text())

    def array(dtype: str, shape: list[int], start: int) -> np.ndarray:
        dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        return data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    return {name: array(*where) for name, *where in index}


def _folder_for(file: Path) -> tempfile.TemporaryDirectory:
    """For the file's arrays."""
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise InputError(_no_room(file, error)) from error


def _no_room(file: Path, error: OSError | str) -> str:
    return f"{file}: its arrays cannot be written for a while ({error}): free space, or set TMPDIR to another folder"


def _refuse_what_could_run(file: Path) -> None:
    """Looks through the pickles without unpickling them, before PyTorch is as much as started.

    Raises:
      InputError: they name anything but arrays and dicts, or are damaged.
    """
    with file.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
        opened.seek(0)
        try:
            for pickle in _pickles(opened, zipped):
                if strange := sorted({name for name in _globals(pickle) if not HARMLESS.fullmatch(name)}):
                    raise InputError(
                        f"{file}: refused, nothing of it was run: it names "
                        f"{', '.join(strange[:10]).replace(' ', '.')}, which a dict of arrays does not need and which "
                        "could do anything: give a .safetensors file, or a .pth of the state dict alone"
                    )
        except InputError:
            raise
        except Exception as error:  # Whatever damage makes its readers raise.
            raise _damaged(file, error) from error


def _pickles(opened: BinaryIO, zipped: bool) -> Iterator[BinaryIO]:
    if not zipped:  # Magic number, version, system, object, names of the arrays, one after another.
        for _ in range(5):
            yield opened
        return
    with zipfile.ZipFile(opened) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".pkl")]
        if [member.filename.split("/")[1:] for member in members] != [["data.pkl"]]:
            raise ValueError(f"{len(members)} pickles where torch.save writes one, or TorchScript")
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed, which torch.save does not do")
        if members[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"a pickle of {members[0].file_size} bytes")
        with archive.open(members[0]) as pickle:
            yield pickle


def _globals(pickle: BinaryIO) -> Iterator[str]:
    """What a pickle names, as `module name`, until its end."""
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            yield argument
        elif opcode.name in UNUSUAL:
            yield f"pickle {opcode.name}"


def _damaged(file: Path, error: Exception | str) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(
        f"{file}: damaged or no such file, {os.path.getsize(file)} bytes ({reason[:150]}): download it again"
    )
