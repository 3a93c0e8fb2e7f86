"""What pictures are called in the folders that results are written into."""

import os
from collections.abc import Container, Sequence

from dsnet_jax.data.pipeline import Example

LONGEST = 200  # Bytes of an id in the name of a file, of 255 that Linux has: room for an ending and for telling apart.


def picture_names(examples: Sequence[Example], taken: Container[str] = ()) -> list[str]:
    """Names of files for the examples, without ending: their ids, and no two the same, not even for a/b and a_b.

    Of an id that is too long it is the end: of a path, that is the part which tells it from others. None is in `taken`.
    """
    names = []
    for example in examples:
        name = os.fsencode(example.id.replace("/", "_"))[-LONGEST:].decode(errors="ignore")
        while name in names or name in taken:
            name += "_"
        names.append(name)
    return names
