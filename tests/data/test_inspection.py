"""`dsnet inspect data` on small data sets whose figures are counted by hand."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from dsnet_jax import cli
from dsnet_jax.data import builders
from dsnet_jax.data.pipeline import Example
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.data.survey import _see, look_at


def noise(seed, size_hw):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)


def write(source, split, name, image, labels):
    for kind, pixels in (("images", image[..., ::-1]), ("masks", labels)):
        if pixels is not None:
            (source / kind / split).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(source / kind / split / f"{name}.png"), pixels)


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Three images to train on, two to score, of which one is a copy, and one of no labels; classes road, car, tree."""
    folder = tmp_path_factory.mktemp("streets")
    source = folder / "source"
    labels = np.zeros((10, 20), np.uint8)
    labels[:2] = 1  # 160 of road, 40 of car.
    write(source, "train", "a", noise(0, (10, 20)), labels)
    labels = np.full((10, 20), 255, np.uint8)
    labels[0, :15] = 1
    write(source, "train", "b", np.full((10, 20, 3), 77, np.uint8), labels)
    write(source, "train", "c", noise(1, (20, 30)), np.zeros((20, 30), np.uint8))
    write(source, "val", "k", noise(0, (10, 20)), np.ones((10, 20), np.uint8))
    write(source, "val", "l", noise(2, (8, 16)), np.arange(128, dtype=np.uint8).reshape(8, 16) % 3)
    write(source, "test", "x", noise(3, (5, 7)), None)
    (source / "classes.txt").write_text("road\ncar\ntree\n")
    prepare("folder", str(source), str(folder), name="streets")
    return folder


def report_of(streets, tmp_path, *flags):
    arguments = ["inspect", "data", "--name=streets", f"--root={streets}", f"--output={tmp_path / 'out'}", *flags]
    assert cli.main(arguments) == 0
    return json.loads((tmp_path / "out" / "inspection.json").read_text())


def test_the_report_counts_images_sizes_and_pixels_of_every_split(streets, tmp_path):
    report = report_of(streets, tmp_path)
    assert report["dataset"] == "streets" and list(report["splits"]) == ["test", "train", "val"]
    assert report["splits"]["train"] == {
        "images": 3,
        "labelled": 3,
        "left_out": [],
        "sizes": {
            "different": 2,
            "smallest_hw": [10, 20],
            "largest_hw": [20, 30],
            "commonest_hw": [10, 20],
            "commonest_images": 2,
        },
        "classes": [
            {"name": "road", "pixels": 760, "share": pytest.approx(760 / 815), "images": 2},
            {"name": "car", "pixels": 55, "share": pytest.approx(55 / 815), "images": 2},
            {"name": "tree", "pixels": 0, "share": 0, "images": 0},
        ],
        "ignored_pixels": 185,
        "ignored_share": 0.185,
    }
    assert (report["splits"]["test"]["images"], report["splits"]["test"]["labelled"]) == (1, 0)
    assert report["splits"]["test"]["classes"] is None


def test_what_is_suspicious_is_found_in_the_decoded_pixels(streets, tmp_path):
    found = {finding["what"]: finding["names"] for finding in report_of(streets, tmp_path)["suspicious"]}
    starts = {
        "train: 1 of 3 images hardly vary": ["train/b"],
        "train: 2 of 3 images have labels of one class only": ["train/b", "train/c"],
        "train: 1 of 3 classes never occur": ["tree"],
        "val: 1 of 2 images have labels of one class only": ["val/k"],
        "train and val share 1 images": ["train/a = val/k"],
        "road is 7.1 times as frequent in train (93.25%) as in val (13.11%)": [],
        "car is 11.0 times as frequent in val": [],
    }
    assert len(found) == len(starts)
    for (what, names), (start, expected) in zip(found.items(), starts.items(), strict=True):
        assert what.startswith(start) and names == expected
    assert "; 1 of them have other labels there" in list(found)[4]


def test_tables_and_findings_are_printed_in_80_columns(streets, capsys):
    assert cli.main(["inspect", "data", "--name=streets", f"--root={streets}"]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in printed.splitlines() if "│" in line]
    assert ["images", "1", "3", "2"] in rows and ["with labels", "0", "3", "2"] in rows
    assert ["ignored %", "–", "18.50", "0.00"] in rows
    assert ["largest size", "5 x 7", "20 x 30", "10 x 20"] in rows
    assert ["road", "760", "93.25", "2", "66.67"] in rows and ["ignored", "185", "18.50", "1", "33.33"] in rows
    assert "7 suspicious\n" in printed
    assert "    train/b, train/c\n" in printed
    assert "streets test\n" not in printed  # No table of classes where there are no labels.
    assert max(len(line) for line in printed.splitlines() if "│" in line) <= 80
    assert not list(streets.glob("*/*.png"))  # Nothing is written that was not asked for.


def test_one_split_can_be_looked_at_alone(streets, tmp_path):
    report = report_of(streets, tmp_path, "--split=val")
    assert list(report["splits"]) == ["val"]
    assert not any("share" in finding["what"] for finding in report["suspicious"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inspection.json", "val.png"]


def test_what_was_left_out_when_it_was_prepared_is_told(tmp_path, capsys):
    source = tmp_path / "source"
    write(source, "train", "a", noise(0, (10, 20)), np.zeros((10, 20), np.uint8))
    write(source, "train", "b", noise(1, (10, 20)), np.full((10, 20), 9, np.uint8))
    (source / "classes.txt").write_text("road\ncar\n")
    prepare("folder", str(source), str(tmp_path), name="streets", skip_bad=True)
    capsys.readouterr()
    report = report_of(tmp_path, tmp_path)["splits"]["train"]
    assert report["images"] == 1 and len(report["left_out"]) == 1
    assert "b.png: " in report["left_out"][0] and "9" in report["left_out"][0]
    assert "train: 1 left out by --skip-bad when it was prepared\n" in capsys.readouterr().out


def test_composed_splits_are_told_and_not_looked_at_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builders, "SHAPES_SPLITS", {"train": range(3), "val": range(3, 5)})
    monkeypatch.setattr(builders, "SHAPES_SIZE_HW", (16, 24))
    monkeypatch.setattr(builders.Shapes, "composed", {"trainval": ("train", "val")})
    prepare("shapes", None, str(tmp_path))
    command = ["inspect", "data", "--name=shapes", f"--root={tmp_path}"]
    for flags, told in ([], True), (["--split=trainval"], False):
        capsys.readouterr()
        assert cli.main([*command, *flags]) == 0
        assert ("\ntrainval: 5 images, those of train and val\n" in capsys.readouterr().out) == told


def test_the_sheet_shows_labels_over_images_and_the_classes_that_occur(streets, tmp_path):
    report_of(streets, tmp_path)
    with Image.open(tmp_path / "out" / "train.png") as picture:
        colours = {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3).tolist()}
    spec = open_split(str(streets), "streets", "train").spec
    assert colours >= {*spec.palette[:2]} and spec.palette[2] not in colours  # In the legend.
    assert (77, 77, 77) in colours  # Ignored: as it was.
    assert tuple(np.rint(0.5 * 77 + 0.5 * np.array(spec.palette[1])).astype(int).tolist()) in colours


def test_examples_are_spread_evenly_over_the_split(rooms):
    panels = look_at(open_split(str(rooms), "rooms", "train")).panels
    names = [name for name, _ in panels]
    assert len(names) == 24 and names[0] == "room00" and names[-1] == "room26" and len(set(names)) == 24
    assert max(max(picture.shape[0] / 180, picture.shape[1] / 240) for _, picture in panels) == 1


def test_a_sheet_of_images_without_labels_shows_the_images(streets):
    look = look_at(open_split(str(streets), "streets", "test"))
    ((name, picture),) = look.panels
    assert name == "x" and picture.shape == (171, 240, 3)
    assert np.abs(picture.mean(axis=(0, 1)) - noise(3, (5, 7)).mean(axis=(0, 1))).max() < 5


def test_the_same_bytes_in_another_shape_are_another_image():
    pixels = noise(0, (10, 20))
    digests = {_see(Example(0, "a", image, None, (1, 1))).image_digest for image in (pixels, pixels.reshape(20, 10, 3))}
    assert len(digests) == 2


def test_a_folder_that_cannot_be_made_is_told(streets, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["inspect", "data", "--name=streets", f"--root={streets}", f"--output={tmp_path / 'file' / 'x'}"]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert "cannot be written" in printed.err and "suspicious" not in printed.out  # Before anything is looked at.
