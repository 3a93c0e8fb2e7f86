import contextlib
import hashlib
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from dsnet_jax.data import published as published_module
from dsnet_jax.data.archives import MAX_NAME_LENGTH
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.published import Piece, PublishedSource
from dsnet_jax.errors import InputError

PHOTOS = Piece("photos", ("Kit/list.txt", "Kit/photos"), {"photos.tar": None})
FILES = {"Kit/list.txt": b"a", "Kit/photos/a": b"b"}


def write(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_tar(file, files=FILES):
    write(file.parent / f"{file.name} content", files)
    with tarfile.open(file, "w") as tar:
        tar.add(file.parent / f"{file.name} content", arcname="")
    for path in sorted((file.parent / f"{file.name} content").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (file.parent / f"{file.name} content").rmdir()


def published(piece=PHOTOS, kind="sha1", digest="0" * 40):
    return Piece(piece.name, piece.inside, dict.fromkeys(piece.files, f"{kind}:{digest}"), piece.is_archive)


@pytest.fixture
def open_paths(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda *paths, **options: PublishedSource([str(path) for path in paths], tmp_path, stack, **options)


@pytest.mark.parametrize("depth", ["", "x", "x/y", "x/y/z"])
def test_a_piece_is_found_in_a_folder_as_it_is_and_a_few_folders_deeper(tmp_path, open_paths, depth):
    write(tmp_path / "data" / depth)
    source = open_paths(tmp_path / "data")
    root = source.find(PHOTOS)
    assert root == str(tmp_path / "data" / depth)
    assert source.read(f"{root}/Kit/photos/a") == b"b" and source.has(f"{root}/Kit") and not source.has(f"{root}/x.txt")
    assert source.files(f"{root}/Kit/photos") == [f"{root}/Kit/photos/a"]
    assert source.notes == [f"photos: from {root}"]


def test_its_innermost_folder_may_be_given(tmp_path, open_paths):
    write(tmp_path)
    assert open_paths(tmp_path / "Kit").find(PHOTOS) == str(tmp_path)


def test_it_may_be_the_folder_where_one_is(tmp_path, open_paths, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path / "Kit")
    assert open_paths(Path(".")).find(PHOTOS) == str(tmp_path)


def test_a_piece_is_found_in_an_archive_given_by_any_name(tmp_path, open_paths):
    write_tar(tmp_path / "mine.tar")
    source = open_paths(tmp_path / "mine.tar")
    root = source.find(PHOTOS)
    assert root == f"{tmp_path}/mine.tar"
    assert source.read(f"{root}/Kit/photos/a") == b"b" and source.has(f"{root}/Kit")
    assert source.files(f"{root}/Kit/photos") == [f"{root}/Kit/photos/a"]
    with pytest.raises(InputError, match=r"mine.tar/Kit/photos/z: there is no such file in the archive"):
        source.read(f"{root}/Kit/photos/z")


def test_an_archive_in_a_given_folder_is_opened_under_its_published_name_alone_and_only_if_it_is_needed(
    tmp_path, open_paths
):
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "mine.tar")
    assert open_paths(tmp_path / "data").find(PHOTOS) is None
    (tmp_path / "data" / "mine.tar").rename(tmp_path / "data" / "photos.tar")
    source = open_paths(tmp_path / "data")
    assert source.find(PHOTOS) == f"{tmp_path}/data/photos.tar"
    assert source.notes == [f"photos: from {tmp_path}/data/photos.tar (no checksum of it is published)"]
    write(tmp_path / "data")
    (tmp_path / "data" / "photos.tar").write_bytes(b"damaged")
    assert open_paths(tmp_path / "data").find(PHOTOS) == f"{tmp_path}/data"


def test_pieces_may_lie_in_several_places_of_which_the_first_counts(tmp_path, open_paths):
    other = Piece("lists", ("lists",), {"lists.zip": None})
    with zipfile.ZipFile(tmp_path / "lists.zip", "w") as archive:
        archive.writestr("lists/a", "1")
    for name in "first", "second":
        write(tmp_path / name)
    source = open_paths(tmp_path / "lists.zip", tmp_path / "second", tmp_path / "first")
    assert source.find(other) == f"{tmp_path}/lists.zip"
    assert source.find(PHOTOS) == f"{tmp_path}/second"


def test_two_in_one_place_are_an_error(tmp_path, open_paths):
    write(tmp_path / "data" / "a")
    write(tmp_path / "data" / "b")
    with pytest.raises(InputError, match=r"photos: found in .*/data/a and in .*/data/b: give one of them as --source"):
        open_paths(tmp_path / "data").find(PHOTOS)


def test_a_path_that_is_not_there_is_an_error(tmp_path, open_paths):
    with pytest.raises(InputError, match="nowhere: no such folder or file"):
        open_paths(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["sha1", "sha256"])
def test_the_checksum_of_an_archive_is_compared_and_told(tmp_path, open_paths, kind):
    write_tar(tmp_path / "photos.tar")
    digest = hashlib.new(kind, (tmp_path / "photos.tar").read_bytes()).hexdigest()
    source = open_paths(tmp_path)
    source.find(published(kind=kind, digest=digest))
    assert source.notes[0].endswith(f"photos.tar (its {kind} is the published one)")


def test_another_checksum_is_an_error_with_advice_and_can_be_accepted(tmp_path, open_paths):
    write_tar(tmp_path / "photos.tar")
    digest = hashlib.sha1((tmp_path / "photos.tar").read_bytes()).hexdigest()
    with pytest.raises(InputError) as error:
        open_paths(tmp_path).find(published())
    assert str(error.value) == (
        f"{tmp_path}/photos.tar: its sha1 is {digest}, and that of photos.tar is {'0' * 40}: download it again; if it "
        "was packed anew by somebody you trust, add --accept-repacked, which leaves all other checks in force"
    )
    source = open_paths(tmp_path, accept_repacked=True)
    assert source.find(published()) == f"{tmp_path}/photos.tar"
    assert source.notes[0].endswith(f"photos.tar (packed anew: its sha1 is {digest})")


def test_an_unpacked_folder_has_no_checksum(tmp_path, open_paths):
    write(tmp_path)
    assert open_paths(tmp_path).find(published()) == str(tmp_path)


def test_what_archives_hold_beside_files_is_passed_over_and_told(tmp_path, open_paths):
    write_tar(tmp_path / "photos.tar")
    with tarfile.open(tmp_path / "photos.tar", "a") as tar:
        link = tarfile.TarInfo("Kit/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_paths(tmp_path / "photos.tar")
    source.find(PHOTOS)
    assert source.passed_over == [f"{tmp_path}/photos.tar/Kit/link: a link to '/etc/passwd'"]


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, open_paths, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "notes.json").write_text("{}")
    monkeypatch.setattr(published_module, "open", refuse, raising=False)
    with pytest.raises(InputError, match=r"notes\.json: cannot be read: Permission denied"):
        open_paths(tmp_path).find(Piece("notes", ("notes.json",), {"notes.json": "sha1:0"}, is_archive=False))


@pytest.fixture
def closed(monkeypatch):
    """Called with a folder, makes the system refuse to tell of what is in it, as it does anybody but root."""
    stat = os.stat

    def close(folder):
        def refuse(path, *args, **options):
            if str(path).startswith(f"{folder}/"):
                raise PermissionError(13, "Permission denied")
            return stat(path, *args, **options)

        monkeypatch.setattr(os, "stat", refuse)

    return close


def test_a_path_that_may_not_be_looked_at_is_an_error_that_names_it(tmp_path, open_paths, closed):
    write(tmp_path / "private" / "data")
    closed(tmp_path / "private")
    with pytest.raises(InputError, match="private/data: cannot be read: Permission denied"):
        open_paths(tmp_path / "private" / "data")
    with pytest.raises(InputError, match=r"private/\S+: cannot be read: Permission denied"):
        open_paths(tmp_path / "private").find(PHOTOS)


def test_a_folder_that_may_not_be_entered_does_not_hide_the_data_beside_it_and_is_told(tmp_path, open_paths, closed):
    write(tmp_path / "data" / "mine")
    (tmp_path / "data" / "lost+found").mkdir()
    closed(tmp_path / "data" / "lost+found")
    source = open_paths(tmp_path / "data")
    assert source.find(PHOTOS) == f"{tmp_path}/data/mine"
    assert source.unread == [f"{tmp_path}/data/lost+found/Kit/list.txt: cannot be read: Permission denied"]
    with pytest.raises(InputError, match=r"not found: .*\n1 folders could not be searched: .*/lost\+found/"):
        prepare("voc2012", str(tmp_path / "data"), str(tmp_path / "root"))


def test_an_archive_that_is_refused_is_refused_here_too(tmp_path, open_paths):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("x" * (MAX_NAME_LENGTH + 1), "")
    with pytest.raises(InputError, match="a name of 1025 characters"):
        open_paths(tmp_path / "photos.zip").find(PHOTOS)


def test_what_is_published_in_one_piece_takes_one_source(tmp_path):
    with pytest.raises(InputError, match="camvid takes one --source, not 2"):
        prepare("camvid", [str(tmp_path), str(tmp_path)], str(tmp_path / "root"))
    with pytest.raises(InputError, match="camvid takes no --accept-repacked: no checksum of it is known"):
        prepare("camvid", str(tmp_path), str(tmp_path / "root"), accept_repacked=True)


@pytest.mark.parametrize("name", ["voc2012", "ade20k", "pascal_context", "pascal_context_60"])
def test_no_image_of_published_data_can_be_left_out(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} takes no --skip-bad: .*: download it again") as error:
        prepare(name, str(tmp_path), str(tmp_path / "root"), skip_bad=True)
    assert error.value.exit_code == 2 and not (tmp_path / "root").exists()
