"""What pictures are called in the folders that results are written into."""

from collections.abc import Sequence

from dsnet_jax.data.pipeline import Example


def picture_names(examples: Sequence[Example]) -> list[str]:
    """Names of files for the examples, without ending: their ids, and no two the same, not even for a/b and a_b."""
    names = []
    for example in examples:
        name = example.id.replace("/", "_")
        while name in names:
            name += "_"
        names.append(name)
    return names
