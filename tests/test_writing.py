"""Files that are there as a whole or not at all, and places that cannot be written."""

import errno
import os

import pytest
from etils import epath

from dsnet_jax.errors import InputError
from dsnet_jax.writing import check_writable, write_text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(epath.Path(tmp_path) / "config.json", "old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_text(epath.Path(tmp_path) / "config.json", "new")
    assert (tmp_path / "config.json").read_text() == "old"


def test_a_write_over_a_folder_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "figures").mkdir()
    with pytest.raises(OSError):
        write_text(epath.Path(tmp_path) / "figures", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
    check_writable(tmp_path / "new" / "deeper", "give another --output")
    check_writable(tmp_path, "give another --output")
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
