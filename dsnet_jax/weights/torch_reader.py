"""Reads what `torch.save` wrote, as a program of its own: PyTorch's half gigabyte of code is gone when it has ended.

    python -P torch_reader.py FILE FOLDER

Called by `torch_files.read_arrays`, which has looked through the file's pickle before. Writes FOLDER/arrays, their
bytes one after another, and FOLDER/index.json, a list of [name, type, shape, place of the first byte]. The last line
on stderr says what is wrong: exit code 1 where the file holds something else, 3 where it cannot be read, 4 where
PyTorch cannot be imported, 5 where FOLDER cannot be written.
"""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def end(code: int, error: Exception) -> NoReturn:
    """With the error's first line."""
    print((str(error).splitlines() or [type(error).__name__])[0], file=sys.stderr)
    sys.exit(code)


try:
    import torch
except Exception as error:  # Of whatever library is missing.
    end(4, error)

CONTAINERS = ("state_dict", "model_state_dict", "model")  # Where the arrays are, among other things.


class Unusable(Exception):
    """What the file holds is no dict of arrays."""


def read(file: str) -> dict[str, Any]:
    """What the file holds by name. Raises Unusable, or whatever damage makes PyTorch's reader raise."""
    with open(file, "rb") as opened:
        zipped = opened.read(2) == b"PK"  # Only this format can be mapped.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    for container in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise Unusable(f"holds a {type(content).__name__}, not arrays by name: give a state dict")
    return content


def write(content: dict[str, Any], folder: str) -> None:
    """Raises Unusable, or OSError."""
    index = []
    with Path(folder, "arrays").open("wb") as out:
        for name, tensor in content.items():
            array, dtype = _as_numpy(name, tensor)
            index.append([name, dtype, array.shape, out.tell()])
            out.write(np.ascontiguousarray(array).data)
    Path(folder, "index.json").write_text(json.dumps(index))


def _as_numpy(name: str, tensor: Any) -> tuple[np.ndarray, str]:
    """An array, and the name of its type; NumPy by itself has no bfloat16, its bits come as whole numbers."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise Unusable(f"{name} is no plain array: give a state dict")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy(), "bfloat16"
    array = tensor.numpy()
    return array, array.dtype.name


if __name__ == "__main__":
    try:
        content = read(sys.argv[1])
        try:
            write(content, sys.argv[2])
        except OSError as error:
            end(5, error)
    except Unusable as error:
        end(1, error)
    except Exception as error:
        end(3, error)
