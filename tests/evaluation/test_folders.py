"""Where results are written: told before the work where they cannot be, and under names that no two share."""

import os

import numpy as np
import pytest

from dsnet_jax.data.pipeline import Example
from dsnet_jax.errors import InputError, writing_into
from dsnet_jax.evaluation.folders import check_writable, picture_names


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
    check_writable(tmp_path / "new" / "deeper", "give another --output")
    check_writable(tmp_path, "give another --output")
    check_writable("gs://bucket/run", "give another --output")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match=r"cannot be written \(Not a directory\): give another --output"):
            check_writable(folder, "give another --output")


def test_a_folder_that_may_only_be_read_is_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode & os.W_OK)))  # Root always may.
    with pytest.raises(InputError, match=r"new cannot be written \(Permission denied\): give another --output"):
        check_writable(tmp_path / "new", "give another --output")
    assert asked == [(tmp_path, os.W_OK)]


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
