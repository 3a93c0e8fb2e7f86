"""Archives for benchmarks' servers: those that are written, and all that can be wrong with one."""

import errno
import io
import itertools
import os
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsnet_jax import cli
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.data.specs import ADE20K, VOC2012, voc_palette
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.predict import predict_files
from dsnet_jax.evaluation.submissions import FORMATS, check_submission, validate_submission, write_submission

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
SIZES_HW = {"2008_000006": (30, 41), "2008_000011": (25, 25)}
VOC_COLOURS = [channel for colour in voc_palette(256) for channel in colour]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two images without labels, prepared."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "source" / "images" / "test").mkdir(parents=True)
    for image_id, (height, width) in SIZES_HW.items():
        Image.new("RGB", (width, height)).save(folder / "source" / "images" / "test" / f"{image_id}.jpg")
    (folder / "source" / "classes.txt").write_text("\n".join(VOC2012.class_names))
    prepare("folder", str(folder / "source"), str(folder / "datasets"), name="two")
    return folder / "datasets"


@pytest.fixture
def voc_test(prepared):
    split = open_split(str(prepared), "two", "test")
    split.spec = VOC2012
    return split


@pytest.fixture
def ade20k_test(prepared):
    split = open_split(str(prepared), "two", "test")
    split.spec = ADE20K
    return split


def labels_of(image_id, num_classes=21):
    height, width = SIZES_HW[image_id]
    return (np.arange(height * width).reshape(height, width) % num_classes).astype(np.uint8)


def png(ids, palette=VOC_COLOURS, kind="PNG", mode=None):
    picture = Image.fromarray(ids)
    if palette:
        picture.putpalette(palette)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, kind)
    return file.getvalue()


def good_files():
    return {f"{FOLDER}/{image_id}.png": png(labels_of(image_id)) for image_id in SIZES_HW}


FIRST = f"{FOLDER}/2008_000006.png"


def write_tgz(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files if isinstance(files, list) else files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def members(path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(path, "r:gz") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_two_images_with_the_right_names_sizes_and_palette_pass(voc_test, tmp_path, capsys):
    file = write_tgz(tmp_path / "good.tgz", good_files())
    assert validate_submission(file, voc_test) == []
    check_submission(file, voc_test)
    assert capsys.readouterr().out == f"{file}: a valid submission for voc2012, split test: 2 files\n"
    assert validate_submission(write_tgz(tmp_path / "good.tar.gz", good_files()), voc_test) == []


def with_first(data):
    return good_files() | {FIRST: data}


def changed(value):
    ids = labels_of("2008_000006")
    ids[3, 4] = value
    return ids


def adaptive(image_id):
    """As a drawing program saves it: the colours are right, the indices are not."""
    picture = Image.fromarray(np.array(voc_palette(21), np.uint8)[labels_of(image_id)])
    file = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=21).save(file, "PNG")
    return file.getvalue()


def damaged():
    data = bytearray(good_files()[FIRST])
    data[-30] ^= 1
    return bytes(data)


PIXELS = labels_of("2008_000006")
BROKEN = {
    "missing": ({FIRST: good_files()[FIRST]}, rf"files missing \(1\): {FOLDER}/2008_000011.png"),
    "extra": (
        good_files() | {f"{FOLDER}/2008_000007.png": b"", "results/.DS_Store": b""},
        rf"files that nobody asked for \(2\): results/.DS_Store; {FOLDER}/2008_000007.png",
    ),
    "wrong size": (
        with_first(png(PIXELS.T.copy())),
        rf"files not of their image's size \(1\): {FIRST} is 41 x 30, not 30 x 41 \(height x width\)",
    ),
    "grey": (with_first(png(PIXELS, None)), r"no 8-bit indexed PNG \(1\): .* is PNG in mode L"),
    "RGB": (with_first(png(PIXELS, mode="RGB")), r"no 8-bit indexed PNG \(1\): .* is PNG in mode RGB"),
    "four bits a pixel": (
        with_first(png(labels_of("2008_000006", 5), VOC_COLOURS[:48])),
        r"no 8-bit indexed PNG \(1\): .* is PNG in mode P",
    ),
    "JPEG": (with_first(png(PIXELS, None, "JPEG")), r"no 8-bit indexed PNG \(1\): .* is JPEG in mode L"),
    "adaptive palette": (
        {f"{FOLDER}/{image_id}.png": adaptive(image_id) for image_id in SIZES_HW},
        rf"files with another palette than VOC's \(2\): {FIRST}",
    ),
    "id out of range": (with_first(png(changed(21))), rf"files with ids outside 0 to 20 \(1\): {FIRST} has 21$"),
    "255": (with_first(png(changed(255))), rf"pixels of 255 \(ignored\), where a class is wanted \(1\): {FIRST}"),
    "wrong folder": (
        {name.replace("comp6", "comp5"): data for name, data in good_files().items()},
        rf"files that do not lie in {FOLDER} \(2\): results/VOC2012/Segmentation/comp5_test_cls/2008_000006.png; ",
    ),
    "damaged PNG": (with_first(damaged()), r"damaged, or no images \(1\): .*: damaged, it is cut short or a checksum"),
    "empty PNG": (with_first(b""), r"damaged, or no images \(1\): .*: an empty file"),
    "duplicate": ([*good_files().items(), *good_files().items()], rf"two members are called '{FIRST}'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_faulty_archive_is_refused_for_its_fault_alone(fault, voc_test, tmp_path):
    files, reason = BROKEN[fault]
    (problem,) = validate_submission(write_tgz(tmp_path / "bad.tgz", files), voc_test)
    assert re.search(reason, problem), problem


def test_an_archive_of_another_kind_or_name_is_refused(voc_test, ade20k_test, tmp_path):
    zipped = write_zip(tmp_path / "results.zip", good_files())
    assert validate_submission(zipped, voc_test) == [
        "the name does not end in .tgz or .tar.gz (1): results.zip",
        "the archive is not a .tgz (1): results.zip is .zip",
    ]
    zipped.rename(tmp_path / "results.tgz")
    (problem,) = validate_submission(tmp_path / "results.tgz", voc_test)
    assert problem == "the archive is not a .tgz (1): results.tgz is .zip"
    with tarfile.open(tmp_path / "plain.tgz", "w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    assert validate_submission(tmp_path / "plain.tgz", voc_test)[0].endswith("plain.tgz is neither a .zip nor a .tgz")


def test_an_archive_that_is_cut_short_or_not_there_is_refused(voc_test, tmp_path):
    file = write_tgz(tmp_path / "short.tgz", good_files())
    file.write_bytes(file.read_bytes()[:-40])
    assert "damaged or cut short" in validate_submission(file, voc_test)[0]
    assert "cannot be read" in validate_submission(tmp_path / "none.tgz", voc_test)[0]


def test_a_link_is_no_file(voc_test, tmp_path):
    with tarfile.open(tmp_path / "link.tgz", "w:gz") as archive:
        for name, data in good_files().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("elsewhere")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (problem,) = validate_submission(tmp_path / "link.tgz", voc_test)
    assert problem == "members that are no files (1): elsewhere: a link to '/etc/passwd'"


def test_all_faults_are_told_together_each_with_its_first_places(voc_test, tmp_path):
    files = {f"extra{number:02}.png": b"" for number in range(12)} | {FIRST: png(changed(255), None)}
    with pytest.raises(InputError) as refused:
        check_submission(write_tgz(tmp_path / "bad.tgz", files), voc_test)
    heading, *problems = str(refused.value).splitlines()
    assert heading == f"{tmp_path / 'bad.tgz'}: a server would reject it:"
    assert [problem.split(" (")[0].strip() for problem in problems] == [
        "files that nobody asked for",
        "files missing",
        "files that are no 8-bit indexed PNG",
    ]
    assert "extra09.png; ..." in problems[0] and "extra10" not in problems[0]


def test_what_is_written_for_voc_is_indexed_in_its_colours_at_the_images_size(voc_test, tmp_path):
    file = tmp_path / "voc.tgz"
    write_submission(file, voc_test, ((image_id, labels_of(image_id)) for image_id in reversed(SIZES_HW)))
    written = members(file)
    assert sorted(written) == sorted(good_files())
    for image_id in SIZES_HW:
        picture = Image.open(io.BytesIO(written[f"{FOLDER}/{image_id}.png"]))
        assert (picture.format, picture.mode, picture.getpalette()) == ("PNG", "P", VOC_COLOURS)
        np.testing.assert_array_equal(np.array(picture), labels_of(image_id))
    assert validate_submission(file, voc_test) == []
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_written_for_ade20k_has_raw_ids_from_1_in_grey(ade20k_test, tmp_path):
    file = tmp_path / "ade.zip"
    write_submission(file, ade20k_test, ((image_id, labels_of(image_id, 150)) for image_id in SIZES_HW))
    written = members(file)
    assert sorted(written) == ["2008_000006.png", "2008_000011.png"]
    picture = Image.open(io.BytesIO(written["2008_000006.png"]))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.array(picture), labels_of("2008_000006", 150) + 1)
    unshifted = {name: png(np.array(Image.open(io.BytesIO(data))) - 1, None) for name, data in written.items()}
    problems = validate_submission(write_zip(tmp_path / "zero.zip", unshifted), ade20k_test)
    assert problems == ["files with ids outside 1 to 150 (2): 2008_000006.png has 0; 2008_000011.png has 0"]
    indexed = write_zip(tmp_path / "indexed.zip", {f"out/{name}": png(labels_of(name[:-4]) + 1) for name in written})
    folder, mode = validate_submission(indexed, ade20k_test)
    assert folder.startswith("files that do not lie in no folder (2)") and "no 8-bit grey PNG (2)" in mode


def test_the_same_predictions_give_the_same_bytes_at_any_time(voc_test, ade20k_test, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", itertools.count(1e9, 1e5).__next__)
    for split, name in ((voc_test, "a.tgz"), (ade20k_test, "a.zip")):
        contents = set()
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_submission(tmp_path / folder / name, split, ((each, labels_of(each)) for each in SIZES_HW))
            contents.add((tmp_path / folder / name).read_bytes())
        assert len(contents) == 1


def test_an_archive_that_is_not_valid_never_has_its_name(voc_test, tmp_path):
    (tmp_path / "voc.tgz").write_bytes(b"that of yesterday")
    with pytest.raises(RuntimeError, match=r"not valid:\nfiles missing \(1\)"):
        write_submission(tmp_path / "voc.tgz", voc_test, [("2008_000006", labels_of("2008_000006"))])

    def breaking():
        yield "2008_000006", labels_of("2008_000006")
        raise InputError("a record that cannot be decoded")

    with pytest.raises(InputError, match="a record that"):
        write_submission(tmp_path / "voc.tgz", voc_test, breaking())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"that of yesterday"]


@pytest.fixture
def full_for_spools(monkeypatch):
    """No room for files without a name; gives the folders in which they were asked for."""
    asked = []

    def full(dir):
        asked.append(dir)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dsnet_jax.data.archives.tempfile.TemporaryFile", full)
    return asked


def test_an_archive_that_there_is_no_room_to_check_is_kept_and_its_name_told(voc_test, tmp_path, full_for_spools):
    with pytest.raises(InputError) as error:
        write_submission(tmp_path / "voc.tgz", voc_test, ((each, labels_of(each)) for each in SIZES_HW))
    kept = tmp_path / ".unfinished.voc.tgz"
    assert str(error.value) == (
        f"{kept}: cannot be checked, {tmp_path} has no room to unpack it: make room; all images are labelled in it: "
        "check it by `dsnet inspect submission`, then rename it"
    )
    assert full_for_spools == [tmp_path] and list(tmp_path.iterdir()) == [kept]
    assert sorted(members(kept)) == sorted(good_files())


def test_no_room_to_check_an_archive_is_not_its_own_fault(voc_test, tmp_path, full_for_spools):
    file = write_tgz(tmp_path / "good.tgz", good_files())
    with pytest.raises(
        InputError, match=r"good\.tgz: cannot be checked, \S+ has no room to unpack it: make room, or set TMPDIR"
    ):
        check_submission(file, voc_test)
    assert full_for_spools == [Path(tempfile.gettempdir())]


def test_an_output_that_nobody_reads_is_not_the_fault_of_the_archive(voc_test, tmp_path):
    def told_to_nobody():
        yield "2008_000006", labels_of("2008_000006")
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with pytest.raises(BrokenPipeError):
        write_submission(tmp_path / "voc.tgz", voc_test, told_to_nobody())
    assert list(tmp_path.iterdir()) == []


def test_checking_for_somebody_who_does_not_listen_is_not_the_fault_of_the_archive(voc_test, tmp_path, monkeypatch):
    def told_to_nobody(*arguments):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("dsnet_jax.evaluation.submissions.track", told_to_nobody)
    with pytest.raises(BrokenPipeError):
        validate_submission(write_tgz(tmp_path / "good.tgz", good_files()), voc_test)


def test_what_cannot_become_a_submission_is_told_before_anything_is_predicted(voc_test, prepared, tmp_path):
    def unwanted():
        raise AssertionError("predicted")
        yield

    (tmp_path / "folder.tgz").mkdir()
    for file, message in (
        (tmp_path / "folder.tgz", r"folder\.tgz: cannot be written \(Is a directory\): choose another place"),
        (tmp_path / "voc.zip", "ends in .tgz or .tar.gz: rename it"),
        (tmp_path / "none" / "voc.tgz", r"cannot be written \(No such file or directory\)"),
    ):
        with pytest.raises(InputError, match=message):
            write_submission(file, voc_test, unwanted())
    with pytest.raises(InputError, match="no form of submission is known for two: there are voc2012, ade20k"):
        write_submission(tmp_path / "two.tgz", open_split(str(prepared), "two", "test"), unwanted())


@pytest.mark.parametrize("protocol", ["ss", "flip"])
def test_a_split_is_predicted_into_an_archive_with_the_labels_that_its_images_get_alone(
    protocol, random_run, rooms, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(FORMATS, "rooms", FORMATS["voc2012"])
    file = tmp_path / "rooms.tgz"
    flags = ["--split=test", f"--submission={file}", f"--protocol={protocol}"]
    assert cli.main(["predict", f"--workdir={random_run}", *flags]) == 0
    assert f"2 images of rooms test labelled into {file} ({protocol}, step 7): a valid submission" in (
        capsys.readouterr().out
    )
    images = rooms.parent / "source" / "images" / "test"
    predict_files(random_run, None, [str(images)], tmp_path / "alone", protocol=protocol)
    written = members(file)
    assert len(written) == 2
    for name, data in written.items():
        with Image.open(tmp_path / "alone" / Path(name).name) as alone:
            different = np.array(Image.open(io.BytesIO(data))) != np.array(alone)
        assert different.sum() <= 1  # Rounding may decide between two equal logits.


def test_a_split_whose_data_set_has_no_server_is_refused(random_run, tmp_path, capsys):
    flags = ["--split=test", f"--submission={tmp_path / 'rooms.tgz'}"]
    assert cli.main(["predict", f"--workdir={random_run}", *flags]) == 1
    assert "no form of submission is known for rooms" in capsys.readouterr().err
