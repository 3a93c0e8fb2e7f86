"""From the bytes of an image or mask file to pixels: the one decoder of training, evaluation and prediction.

What is done with what is not plain 8-bit RGB:

  grey, palette      images become RGB
  alpha              dropped: the stored colours count, also where they are transparent
  CMYK               converted by the plain formula; colour profiles are not applied
  16 bits a channel  images keep the upper 8 bits
  EXIF orientation   not applied, anywhere: masks are drawn on the pixels as they are stored
  animation          the first frame

Masks are stricter, see `decode_mask`.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Mapping
from io import BytesIO

import cv2
import numpy as np
from imagecodecs import SpngError, spng_decode
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from dsnet_jax.data.specs import IGNORE_LABEL, Colour, hex_colour
from dsnet_jax.errors import InputError

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MAX_PIXELS = 100_000_000  # Of one image: 300 MB when decoded.
MAX_SIDE = 65_536  # Pixels. JPEG knows no more; a thin image fills a canvas many times its size.

_PNG = b"\x89PNG\r\n\x1a\n"
# Pillow's own Image.open refuses large images by a limit that belongs to the whole process.
_HEADERS = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    _PNG: PngImagePlugin.PngImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # What its readers raise.
_ORIENTATION_TAG = 0x0112
_PNG_KINDS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
# What libspng decodes to the same pixels as OpenCV, in two thirds of its time: bits, kind and what is asked for.
_QUICK_PNG = {
    (8, "grey", cv2.IMREAD_GRAYSCALE),
    (8, "RGB", cv2.IMREAD_COLOR_RGB),
    (8, "palette", cv2.IMREAD_COLOR_RGB),
}


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or BMP file.

    Damage is told wherever the format allows it: PNG has checksums, and no format hides a missing end. Pixels damaged
    in the middle of a JPEG or WebP file may go unnoticed.

    Args:
      data: the file's content.
      name: what errors call it.
      max_pixels: larger images are refused before any pixel is decoded.

    Returns:
      RGB, uint8 [H, W, 3].

    Raises:
      InputError: not such a file, damaged, or too large.
    """
    _check_file(data, name, max_pixels)
    return _decode(data, cv2.IMREAD_COLOR_RGB, name)


def decode_mask(
    data: bytes,
    name: str,
    labels_of_colours: Mapping[Colour, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes a label mask: a PNG file whose values are labels.

    Palette and 8-bit grey masks are read as indices. A palette's colours do not matter, unless all that are used are in
    `labels_of_colours` and say something else: programs that make files smaller turn RGB masks into palette masks, each
    with an order of its own. An 8-bit RGB mask is read by `labels_of_colours`, and refused without. Everything else is
    refused, because a conversion would invent labels.

    Args:
      data: the file's content.
      name: what errors call it.
      labels_of_colours: label of every (red, green, blue) that an RGB mask may hold.
      max_pixels: larger masks are refused before any pixel is decoded.

    Returns:
      uint8 [H, W].

    Raises:
      InputError: another format or mode, damaged, too large, a colour without label, or a palette that contradicts
        `labels_of_colours`.
    """
    _check_file(data, name, max_pixels)
    if not data.startswith(_PNG):
        raise InputError(f"{name}: masks must be PNG files, and this is another format: convert it")
    bits, kind = data[24], _PNG_KINDS.get(data[25])
    if kind == "grey" and bits == 8:
        return _decode(data, cv2.IMREAD_GRAYSCALE, name)
    if kind == "RGB" and bits == 8 and labels_of_colours is not None:
        return _labels_by_colour(_decode(data, cv2.IMREAD_COLOR_RGB, name), labels_of_colours, name)
    if kind == "palette":
        _decode(data, cv2.IMREAD_COLOR_RGB, name)  # Notices missing rows; Pillow takes them for zeros.
        indices = read_indices(data, name)
        if labels_of_colours is not None:
            _check_palette(indices, read_palette(data, name), labels_of_colours, name)
        return indices
    remedy = "store class numbers as 8-bit grey or palette PNG"
    if kind == "RGB":
        remedy += ", or give every class its colour in the class list of a `folder` data set"
    raise InputError(f"{name}: a mask in mode {bits}-bit {kind}: {remedy}")


def read_size_hw(data: bytes | os.PathLike, name: str) -> tuple[int, int]:
    """Height and width in pixels from a file's header, no pixel being decoded.

    Args:
      data: the file's content or its path.
      name: what errors call it.

    Raises:
      InputError: not a JPEG, PNG, WebP or BMP file, or its header is damaged.
    """
    with _open_header(data, name) as header:
        return header.height, header.width


def read_palette(data: bytes, name: str) -> np.ndarray | None:
    """The colours of a palette PNG, uint8 [N, 3] in RGB; None of another file. Raises InputError as `read_size_hw`."""
    with _open_header(data, name) as header:
        if header.mode != "P":
            return None
        return np.frombuffer(header.palette.getdata()[1], np.uint8).reshape(-1, 3)


def read_indices(data: bytes, name: str) -> np.ndarray:
    """The values of a grey or palette file as they are stored, uint8 [H, W]; rows that are missing are zeros.

    Raises:
      InputError: as `read_size_hw`, or what stands behind the pixels is damaged.
    """
    with _open_header(data, name) as header:
        try:
            return np.array(header)
        except _PILLOW_ERRORS as error:
            raise InputError(f"{name}: damaged, it cannot be read ({error}): replace it") from error


def is_rotated(data: bytes, name: str) -> bool:
    """Whether EXIF asks for a rotation or reflection, which `decode_image` does not apply."""
    with _open_header(data, name) as header:
        try:
            return header.getexif().get(_ORIENTATION_TAG, 1) not in (0, 1)
        except Exception:  # Whatever Pillow trips over: what cannot be read asks for nothing.
            return False


def _open_header(data: bytes | os.PathLike, name: str) -> Image.Image:
    try:
        if isinstance(data, bytes):
            start, source = data[:8], BytesIO(data)
        else:
            with open(data, "rb") as file:
                start, source = file.read(8), os.fspath(data)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    reader = next((reader for signature, reader in _HEADERS.items() if start.startswith(signature)), None)
    if reader is None:
        found = "not a JPEG, PNG, WebP or BMP file" if start else "an empty file"
        raise InputError(f"{name}: {found}: replace or remove it")
    try:
        return reader(source)
    except _PILLOW_ERRORS as error:
        raise InputError(f"{name}: damaged, its header cannot be read ({error}): replace it") from error


def _check_file(data: bytes, name: str, max_pixels: int):
    height, width = read_size_hw(data, name)
    if max(height, width) > MAX_SIDE:
        raise InputError(f"{name}: {height} x {width} pixels (height x width), a side has at most {MAX_SIDE}: cut it")
    if height * width > max_pixels:
        raise InputError(
            f"{name}: {height} x {width} pixels (height x width) are more than the limit of {max_pixels}: "
            "make it smaller or raise the limit"
        )
    if data.startswith(_PNG):
        _check_png(data, name)


def _check_png(data: bytes, name: str):
    """Refuses a PNG file with a wrong checksum or without its end: neither decoder looks at both."""
    position = len(_PNG)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(memoryview(data)[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            break
        if kind == b"IEND":
            return
        position = end + 4
    raise InputError(f"{name}: damaged, it is cut short or a checksum is wrong: replace it")


def _decode(data: bytes, mode: int, name: str) -> np.ndarray:
    if data.startswith(_PNG) and (data[24], _PNG_KINDS.get(data[25]), mode) in _QUICK_PNG:
        with contextlib.suppress(SpngError):  # libspng refuses more of what stands beside the pixels.
            return spng_decode(data)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise InputError(f"{name}: damaged, it cannot be decoded: replace it")
    return pixels


def _check_palette(indices: np.ndarray, palette: np.ndarray, labels_of_colours: Mapping[Colour, int], name: str):
    """Refuses indices [H, W] where `palette` [N, 3] has declared colours alone, and not those of the indices."""
    used = np.flatnonzero(np.bincount(indices.reshape(-1))).tolist()
    if used[-1] >= len(palette):
        return
    labels = {index: labels_of_colours.get(tuple(palette[index].tolist())) for index in used}
    if None in labels.values():
        return
    for index, label in labels.items():
        # An index that is no class may have the colour of what is ignored: the class list may ignore it by value too.
        is_no_class = label == IGNORE_LABEL and index not in labels_of_colours.values()
        if index != label and not is_no_class:
            meaning = "to be ignored" if label == IGNORE_LABEL else f"label {label}"
            raise InputError(
                f"{name}: index {index} has the colour {hex_colour(palette[index])} in the palette, which is {meaning} "
                "in the class list: store the mask as RGB, or indices in the order of the class list"
            )


def _labels_by_colour(pixels: np.ndarray, labels_of_colours: Mapping[Colour, int], name: str) -> np.ndarray:
    def number(colours: np.ndarray) -> np.ndarray:
        return colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)

    numbers = number(np.array(list(labels_of_colours), np.uint8))
    order = np.argsort(numbers)
    numbers, labels = numbers[order], np.array(list(labels_of_colours.values()), np.uint8)[order]
    wanted = number(pixels)
    found = np.searchsorted(numbers, wanted).clip(max=len(numbers) - 1)
    if (unknown := numbers[found] != wanted).any():
        colours, counts = np.unique(pixels[unknown], axis=0, return_counts=True)
        most = np.argmax(counts)
        raise InputError(
            f"{name}: {len(colours)} colours are not in the class list, above all {hex_colour(colours[most])} "
            f"({counts[most]} pixels): add them, or mend the mask"
        )
    return labels[found]
