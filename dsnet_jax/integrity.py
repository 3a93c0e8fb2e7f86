"""Damage in files: noticed by checksums, and put down to one file of a checkpoint as far as one can tell."""

import functools
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from tensorstore import ocdbt


def checksum(leaf: jax.Array) -> int:
    """CRC-32 of the bytes of a replicated array: of one device's copy of it."""
    assert leaf.is_fully_replicated, leaf.sharding
    # The whole array would keep what NumPy reads of it on the host; one device's part is a new array each time.
    return zlib.crc32(np.ascontiguousarray(leaf.addressable_data(0)).reshape(-1).view(np.uint8))


def sealed(content: dict[Any, Any]) -> dict[str, Any]:
    """JSON with the CRC-32 of its content."""
    content = json.loads(json.dumps(content))  # As it will be read: keys become strings, tuples lists.
    return {"crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode()), "content": content}


def unsealed(document: Any) -> dict[str, Any] | None:
    """The content of what `sealed` made; None if either was changed."""
    try:
        return document["content"] if document == sealed(document["content"]) else None
    except (TypeError, KeyError):
        return None


def first_line(error: BaseException) -> str:
    """A long error in short: TensorStore's begin with the kind, end with the cause, and append what was asked for."""
    line = f"{type(error).__name__}: {error}".splitlines()[0].split(" [tensorstore_spec")[0].split(" [os_error")[0]
    return line if len(line) <= 160 else f"{line[:60]} ... {line[-90:]}"


def damaged_file(step: epath.Path, trees: Sequence[str], error: BaseException) -> str | None:
    """Which file it is that keeps a checkpoint from being read, and what is wrong with it.

    Args:
      step: folder of the checkpoint, absolute.
      trees: the folders of arrays in it that were read.
      error: what reading raised.

    Returns:
      The file, as it is called in that folder, and a few words; None if nothing is found.
    """
    for file in [step / "manifest" / "metadata", *(step / tree / "_METADATA" for tree in trees)]:
        if not file.exists():
            return f"{file.relative_to(step)} is missing"
    for file in sorted(
        file for pattern in ("manifest/metadata", "*/_METADATA", "*/array_metadatas/*") for file in step.glob(pattern)
    ):
        try:
            json.loads(file.read_bytes())
        except ValueError:
            return f"{file.relative_to(step)} is {'no JSON' if file.stat().length else 'empty'}"
    for tree in trees:
        try:
            for name, size in _stored(step / tree):
                file = step / tree / name
                if not file.exists():
                    return f"{tree}/{name} is missing"
                if file.stat().length < size:
                    return f"{tree}/{name} has {file.stat().length} bytes instead of {size} or more"
        except ValueError:
            break  # The database itself is damaged: reading from it names the file, listing it does not.
    named = re.search(re.escape(f"{step}/") + r"([^\"\\]*[^\"\\/])\"", str(error))
    return f"{named[1]} is not what was saved" if named else None


def _stored(item: epath.Path) -> Iterator[tuple[str, int]]:
    """The files that TensorStore's database in a folder refers to, and the least that each must have in bytes.

    A location reads `kind:folder:file:offset:length`: https://google.github.io/tensorstore/kvstore/ocdbt
    """
    yield "manifest.ocdbt", 1
    store = ts.KvStore.open(f"{item}/" if "://" in str(item) else {"driver": "file", "path": f"{item}/"}).result()
    locations = [ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
    while locations:
        location = locations.pop()
        kind, folder, file, offset, length = location.split(":")
        yield folder + file, int(offset) + int(length)
        if kind == "btreenode":
            entries = ocdbt.dump(store, location).result()["entries"]
            locations += [entry.get("indirect_value") or entry.get("location") for entry in entries]
            locations = [location for location in locations if location]


@functools.cache
def report_errors_once() -> None:
    """What Orbax raises it also logs, with tracebacks; and after a restore that failed, its other reads raise as well.

    Those find that nobody asks any more, or the loop that asked for them closed: Python would log or print them.
    """
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.ERROR or "/orbax/" not in record.pathname
    )
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        coroutine = getattr(unraisable.object, "cr_code", None)
        late = coroutine is not None and "/orbax/" in coroutine.co_filename
        if not late and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook
