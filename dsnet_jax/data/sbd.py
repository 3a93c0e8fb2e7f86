"""The .mat files of SBD.

SciPy reads such files too, but a damaged one, even by a single bit, can end the process with a segmentation fault.
"""

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from dsnet_jax.errors import InputError

MAX_BYTES = 2**26  # Of a file when it is inflated: the largest of SBD has less than a hundredth.
NUM_CLASSES = 21

# Types of elements and classes of arrays: MathWorks, "MAT-File Format", level 5.
_INT8, _UINT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 2, 5, 6, 14, 15
_STRUCT, _NUMERIC = 2, range(6, 14)


def decode_sbd(data: bytes, name: str) -> np.ndarray:
    """Labels of a file of SBD's folder `cls`: those of the pixels of each object, without borders.

    Args:
      data: the file's content: MATLAB 5, a struct `GTcls` with the fields Boundaries, Segmentation, CategoriesPresent.
      name: what errors call it.

    Returns:
      uint8 [H, W], 0 to 20.

    Raises:
      InputError: it is damaged, is not such a file, or has another label.
    """
    try:
        labels = _read_field(data, b"GTcls", b"Segmentation")
    except (ValueError, struct.error, zlib.error) as error:
        raise InputError(f"{name}: damaged, or no .mat file of SBD's cls/ ({error}): replace it") from error
    if (largest := labels.max(initial=0)) >= NUM_CLASSES:
        raise InputError(f"{name}: label {largest}, and SBD's are 0 to {NUM_CLASSES - 1}: replace it")
    return labels


def _read_field(data: bytes, variable: bytes, field: bytes) -> np.ndarray:
    """The field of a struct, stored as uint8 [H, W]."""
    if data[126:128] != b"IM":
        raise ValueError("it is not of MATLAB 5, little-endian")
    for kind, content in _elements(memoryview(data)[128:]):
        if kind == _COMPRESSED:
            ((kind, content),) = _elements(_inflate(content))
        if kind == _MATRIX:
            array_class, size, name, parts = _open_array(content)
            if name == variable and array_class == _STRUCT and math.prod(size) == 1:
                break
    else:
        raise ValueError(f"it has no struct {variable.decode()}")
    (name_length,) = struct.unpack("<i", _next(parts, _INT32))
    names = bytes(_next(parts, _INT8))
    if name_length < 1:
        raise ValueError("its struct has no names")
    names = [names[start : start + name_length].split(b"\0")[0] for start in range(0, len(names), name_length)]
    arrays = dict(zip(names, (content for _, content in parts), strict=False))
    if field not in arrays:
        raise ValueError(f"its struct has no field {field.decode()}")
    array_class, size, _, parts = _open_array(arrays[field])
    kind, content = next(parts, (None, b""))
    if array_class not in _NUMERIC or kind != _UINT8 or len(size) != 2:
        raise ValueError(f"its {field.decode()} is not an array of uint8 with two dimensions")
    return np.ascontiguousarray(np.frombuffer(content, np.uint8).reshape(size[::-1]).T)  # Down the columns.


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the elements that lie one after the other."""
    position = 0
    while position < len(data):
        kind, length = struct.unpack_from("<II", data, position)
        if kind >> 16:  # Of four bytes or less, in the tag itself.
            kind, length, start, end = kind & 0xFFFF, kind >> 16, position + 4, position + 8
        else:
            start = position + 8
            end = start + length + (-length % 8 if kind != _COMPRESSED else 0)
        if start + length > min(end, len(data)):
            raise ValueError("it is cut short")
        yield kind, data[start : start + length]
        position = end


def _open_array(content: memoryview) -> tuple[int, tuple[int, ...], bytes, Iterator[tuple[int, memoryview]]]:
    """Class, size and name of an array, and the elements that follow."""
    parts = _elements(content)
    flags, size, name = _next(parts, _UINT32), _next(parts, _INT32), _next(parts, _INT8)
    return flags[0] if len(flags) else 0, struct.unpack(f"<{len(size) // 4}i", size), bytes(name), parts


def _next(parts: Iterator[tuple[int, memoryview]], wanted: int) -> memoryview:
    kind, content = next(parts, (None, b""))
    if kind != wanted:
        raise ValueError(f"an element of type {kind} where {wanted} should be")
    return content


def _inflate(content: memoryview) -> memoryview:
    unpacker = zlib.decompressobj()
    inflated = unpacker.decompress(content, MAX_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it is cut short, or inflates to more than {MAX_BYTES} bytes")
    return memoryview(inflated)
