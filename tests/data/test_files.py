"""A data set's files in a folder: what is found there, and what is told of what cannot be read."""

import os

import pytest

from dsnet_jax.data import files
from dsnet_jax.data.files import FolderSource
from dsnet_jax.data.prepare import prepare
from dsnet_jax.errors import InputError


def test_linked_folders_are_searched_as_others_are(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    for path in "elsewhere/deep/a.png", "images/b.png":
        (tmp_path / path).touch()
    for name in "berlin", "paris":  # The same folder twice is no loop.
        (tmp_path / "images" / name).symlink_to(tmp_path / "elsewhere")
    paths = FolderSource(tmp_path).files(f"{tmp_path}/images")
    assert paths == [f"{tmp_path}/images/{path}" for path in ("b.png", "berlin/deep/a.png", "paris/deep/a.png")]


@pytest.mark.parametrize("target", ["images/train", "images", "other"])
def test_links_in_a_circle_are_refused(tmp_path, target):
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(tmp_path / "images" / "train")
    (tmp_path / "images" / "train" / "link").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=r"images/train/link\S*: a link leads here again and again: remove it"):
        FolderSource(tmp_path).files(f"{tmp_path}/images/train")


def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "images" / "berlin").mkdir(parents=True)
    listdir = os.listdir

    def refuse(path):
        if path.endswith("berlin"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(InputError, match="images/berlin: cannot be read: Permission denied"):
        FolderSource(tmp_path).files(f"{tmp_path}/images")


@pytest.fixture
def closed(monkeypatch):
    """Called with a folder, makes the system refuse to tell of what is in it, as it does anybody but root."""
    stat, listdir = os.stat, os.listdir

    def close(folder):
        def refuse(path, *args, **options):
            if str(path).startswith(f"{folder}/"):
                raise PermissionError(13, "Permission denied")
            return stat(path, *args, **options)

        def refuse_to_list(path):
            if str(path).startswith(str(folder)):
                raise PermissionError(13, "Permission denied")
            return listdir(path)

        monkeypatch.setattr(os, "stat", refuse)
        monkeypatch.setattr(os, "listdir", refuse_to_list)

    return close


def test_what_is_in_a_folder_that_may_not_be_entered_is_not_taken_for_missing(tmp_path, closed):
    (tmp_path / "data" / "images").mkdir(parents=True)
    source = FolderSource(tmp_path / "data")
    closed(tmp_path / "data" / "images")
    with pytest.raises(InputError, match="data/images/train: cannot be read: Permission denied"):
        source.has(f"{source.root}/images/train")
    for look in source.folders, source.files:
        with pytest.raises(InputError, match="data/images: cannot be read: Permission denied"):
            look(f"{source.root}/images")
    assert source.folders(source.root) == ["images"] and not source.has(f"{source.root}/masks")


def test_links_that_lead_nowhere_or_to_themselves_are_missing_files(tmp_path):
    for name, target in ("nowhere", "gone"), ("itself", "itself"):
        (tmp_path / name).symlink_to(tmp_path / target)
    source = FolderSource(tmp_path)
    assert not source.has(f"{tmp_path}/nowhere") and not source.has(f"{tmp_path}/itself")
    assert source.folders(source.root) == []
    for path in source.files(source.root):
        with pytest.raises(InputError, match=r"(nowhere|itself): cannot be read: "):
            source.read(path)


@pytest.mark.parametrize("name", ["data", "data.zip"])
def test_a_source_behind_a_folder_that_may_not_be_entered_is_an_error_that_names_it(tmp_path, closed, name):
    closed(tmp_path / "private")
    with pytest.raises(InputError, match=f"private/{name}: cannot be read: Permission denied"):
        prepare("camvid", str(tmp_path / "private" / name), str(tmp_path / "root"))


def test_names_that_are_not_utf_8_or_have_control_characters_are_refused(tmp_path):
    for name in b"caf\xe9.png", b"two\nlines.png":
        path = os.fsencode(tmp_path) + b"/" + name
        with open(path, "wb"):
            pass
        with pytest.raises(InputError, match="is not UTF-8, or has control characters: rename it"):
            FolderSource(tmp_path).files(str(tmp_path))
        os.unlink(path)
        os.mkdir(path)
        with pytest.raises(InputError, match="is not UTF-8, or has control characters: rename it"):
            FolderSource(tmp_path).folders(str(tmp_path))
        os.rmdir(path)


def test_a_file_that_is_too_large_or_no_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 100)
    (tmp_path / "large").write_bytes(bytes(101))
    (tmp_path / "device").symlink_to(os.devnull)
    source = FolderSource(tmp_path)
    with pytest.raises(InputError, match="large: 101 bytes are more than the limit of 100"):
        source.read(f"{source.root}/large")
    with pytest.raises(InputError, match="device: not a file"):
        source.read(f"{source.root}/device")
    with pytest.raises(InputError, match="nothing: cannot be read: No such file"):
        source.read(f"{source.root}/nothing")
