"""Files of every kind that `dsnet` reads, and random faults for them: what `fuzz.py` feeds it."""

import contextlib
import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np

CLASSES = 12
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def sample_images(rng: np.random.Generator, source: Path | None) -> dict[str, tuple[bytes, ...]]:
    """Image files by kind: those of a CamVid folder, or small ones in every format."""
    if source:
        return {"CamVid image": tuple(path.read_bytes() for path in sorted((source / "train").glob("*.png"))[:4])}
    smooth = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (48, 40))
    alpha = np.dstack([smooth, smooth[..., 0]])
    encoded = {
        "JPEG": (smooth, ".jpg", []),
        "progressive JPEG": (smooth, ".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        "grey PNG": (smooth[..., 0], ".png", []),
        "RGB PNG": (smooth, ".png", []),
        "16-bit PNG": (smooth.astype(np.uint16) * 257, ".png", []),
        "RGBA PNG": (alpha, ".png", []),
        "WebP": (smooth, ".webp", [cv2.IMWRITE_WEBP_QUALITY, 80]),
        "lossless WebP": (alpha, ".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
        "BMP": (smooth, ".bmp", []),
    }
    images = {kind: (cv2.imencode(end, pixels, how)[1].tobytes(),) for kind, (pixels, end, how) in encoded.items()}
    return images | {"palette PNG": (palette_png(smooth[..., 0] // 32),)}


def palette_png(indices: np.ndarray) -> bytes:
    """A PNG of indices [H, W] below 12, with a palette."""
    rows = np.pad(indices, ((0, 0), (1, 0))).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", *indices.shape[::-1], 8, 3, 0, 0, 0)
    chunks = {b"IHDR": header, b"PLTE": bytes(range(3 * CLASSES)), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, content) for kind, content in chunks.items())


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def sample_masks(rng: np.random.Generator, size_hw: tuple[int, int]) -> dict[str, tuple[bytes, ...]]:
    """Mask files by kind."""
    labels = cv2.resize(rng.integers(0, CLASSES, (4, 5), np.uint8), size_hw[::-1], interpolation=cv2.INTER_NEAREST)
    return {"grey mask": (cv2.imencode(".png", labels)[1].tobytes(),), "palette mask": (palette_png(labels),)}


def sample_archives(image: bytes, mask: bytes) -> dict[str, tuple[bytes, ...]]:
    """Archives of a small `folder` data set by kind."""
    files = {"town/classes.txt": class_list()}
    for index in range(3):
        files |= {f"town/images/train/{index}.png": image, f"town/masks/train/{index}.png": mask}
    tars = []
    for tar_format in tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(content), 0.5  # Which takes a header of its own in PAX.
                tar.addfile(member, io.BytesIO(content))
        tars.append(file.getvalue())
    zips = []
    for method in zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content, method)
        zips.append(file.getvalue())
    return {"tar": tuple(tars), "tgz": tuple(gzip.compress(tar, mtime=0) for tar in tars), "zip": tuple(zips)}


def class_list() -> bytes:
    return b"".join(b"class%d\n" % number for number in range(CLASSES))


# How it is damaged.


def damage(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A file with one to three random faults; `other` lends parts of itself."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = FAULTS[rng.integers(len(FAULTS))](data, other, rng)
    return with_checksums(data) if rng.integers(2) else data


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks' checksums are right, so that its faults come to the decoders; other files as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    mended, place = bytearray(data), 8
    while place + 12 <= len(mended):
        end = place + 8 + struct.unpack_from(">I", mended, place)[0]
        if end + 4 > len(mended):
            break
        struct.pack_into(">I", mended, end, zlib.crc32(mended[place + 4 : end]))
        place = end + 4
    return bytes(mended)


def flip_bits(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for place in rng.integers(0, 8 * max(1, len(changed)), rng.integers(1, 9)) if changed else ():
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def set_extreme(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A number near the beginning or anywhere, of 1 to 4 bytes, is as large or as small as can be."""
    width = int(rng.choice([1, 2, 4]))
    place = int(rng.integers(0, max(1, min(len(data), int(rng.choice([64, 600, 10**9]))))))
    value = int(rng.choice(EXTREMES)) % 256**width
    return data[:place] + value.to_bytes(width, str(rng.choice(["big", "little"]))) + data[place + width :]


def truncate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing."""
    return data[: int(rng.integers(0, len(data) + 1))]


def insert(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Something is inserted: noise, zeros or a part of another file."""
    length = int(rng.integers(1, 2000))
    start = int(rng.integers(0, len(other) + 1))
    part = (rng.bytes(length), bytes(length), other[start : start + length])[rng.integers(3)]
    place = int(rng.integers(0, len(data) + 1))
    return data[:place] + part + data[place:]


def repeat_or_drop(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A part is there twice, or not at all."""
    start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return data[:end] + data[start:] if rng.integers(2) else data[:start] + data[end:]


def splice(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The beginning of one and the end of another."""
    return data[: int(rng.integers(0, len(data) + 1))] + other[int(rng.integers(0, len(other) + 1)) :]


def set_header(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A field of a PNG's or a tar's header is another, and its checksum right: also of a tar inside a gzip."""
    if data.startswith(b"\x1f\x8b"):
        with contextlib.suppress(Exception):  # It is damaged already.
            return gzip.compress(set_header(gzip.decompress(data), other, rng), 1, mtime=0)
    value = int(rng.choice(EXTREMES))
    if data.startswith(b"\x89PNG") and len(data) > 33:
        content = bytearray(data[16:29])
        place = int(rng.choice([0, 4, 8, 9, 12]))  # Width, height, bits, colours, interlacing.
        field = struct.pack(">I", value) if place < 8 else bytes([value % 17])
        content[place : place + len(field)] = field
        return data[:8] + _png_chunk(b"IHDR", bytes(content)) + data[33:]
    headers = [start for start in range(0, len(data) - 511, 512) if data[start + 257 : start + 262] == b"ustar"]
    if headers:
        start = int(rng.choice(headers))
        header = bytearray(data[start : start + 512])
        number = (b"%011o" % (value % 8**11), b"\x80" + value.to_bytes(11, "big"), b"\xff" * 12)[rng.integers(3)]
        member_type = bytes(rng.choice(list(b"0123456LKxgSVDA"), 1).tolist())
        fields = (
            (0, rng.bytes(8)),
            (0, b"../../x"),
            (0, b"/x"),
            (124, number),
            (156, member_type),
            (257, rng.bytes(8)),
        )
        place, text = fields[rng.integers(len(fields))]
        header[place : place + len(text)] = text
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:start] + bytes(header) + data[start + 512 :]
    return set_extreme(data, other, rng)


FAULTS = (flip_bits, set_extreme, truncate, insert, repeat_or_drop, splice, set_header, set_header)
