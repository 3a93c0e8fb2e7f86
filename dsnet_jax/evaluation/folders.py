"""What pictures are called in the folders that results are written into."""

import os
from collections.abc import Container, Sequence

from dsnet_jax.data.pipeline import Example
from dsnet_jax.writing import LONGEST_NAME

LONGEST_ID = LONGEST_NAME - 50  # Bytes in the name of a file: room for an ending, and for telling names apart.


def picture_names(examples: Sequence[Example], taken: Container[str] = ()) -> list[str]:
    """Names of files for the examples, without ending: their ids, and no two the same, not even for a/b and a_b.

    Of an id that is too long it is the end: of a path, that is the part which tells it from others. None is in `taken`.
    """
    names = []
    for example in examples:
        name = os.fsencode(example.id.replace("/", "_"))[-LONGEST_ID:].decode(errors="ignore")
        while name in names or name in taken:
            name += "_"
        names.append(name)
    return names
