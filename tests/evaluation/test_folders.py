"""Where results are written: what a storage says is told in one line, and no two pictures share a name."""

import numpy as np
import pytest

from dsnet_jax.data.pipeline import Example
from dsnet_jax.errors import InputError, writing_into
from dsnet_jax.evaluation.folders import picture_names
from dsnet_jax.writing import write_text


def test_what_storage_says_without_a_number_is_told_too():
    with (
        pytest.raises(InputError, match=r"gs://b cannot be written \(quota exceeded\): pay"),
        writing_into("gs://b", "pay"),
    ):
        raise OSError("quota exceeded")


def test_ids_that_differ_only_in_a_slash_have_pictures_of_their_own():
    ids = ["a/b", "a_b", "a_b_", "c"]
    examples = [Example(index, id_, np.zeros((1, 1, 3), np.uint8), None, (1, 1)) for index, id_ in enumerate(ids)]
    assert picture_names(examples) == ["a_b", "a_b_", "a_b__", "c"]
    assert picture_names(examples, taken=["c"]) == ["a_b", "a_b_", "a_b__", "c_"]


def test_of_an_id_that_is_too_long_the_end_names_the_picture(tmp_path):
    ids = [f"{'é' * 120}/{'n' * 150}/{end}" for end in ("a", "b")]
    examples = [Example(index, id_, np.zeros((1, 1, 3), np.uint8), None, (1, 1)) for index, id_ in enumerate(ids)]
    names = picture_names(examples)
    assert [name[-152:] for name in names] == [f"{'n' * 150}_{end}" for end in ("a", "b")]
    for name in names:
        write_text(tmp_path / f"{name}.png", "a picture")
