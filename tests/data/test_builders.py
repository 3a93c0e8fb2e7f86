import json
import pickle
import re
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dsnet_jax.data import builders
from dsnet_jax.data.builders import Camvid, Folder, Shapes
from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.files import FolderSource
from dsnet_jax.data.records import open_split
from dsnet_jax.data.specs import CAMVID, SHAPES, DatasetSpec
from dsnet_jax.errors import InputError

SIZES_HW = [(6, 8), (10, 5), (7, 7)]


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def image_of(index):
    return np.random.default_rng(index).integers(0, 256, (*SIZES_HW[index], 3), np.uint8)


def labels_of(index):
    return np.random.default_rng(index).integers(0, 3, SIZES_HW[index], np.uint8)


@pytest.fixture
def source(tmp_path):
    """A `folder` data set of three images, the first a JPEG, in one split."""
    source = tmp_path / "source"
    for index in range(3):
        options = {"format": "JPEG"} if index == 0 else {}
        save(source / "images" / "train" / f"{index}.{'jpg' if index == 0 else 'png'}", image_of(index), **options)
        save(source / "masks" / "train" / f"{index}.png", labels_of(index))
    (source / "classes.txt").write_text("road #804080\ncar #0000ff\ntree #00ff00\nignore 9\nignore #ffffff\n")
    return source


def build(builder_class, root, source):
    builder = builder_class(source and FolderSource(source), root, root / "problems.txt")
    builder.download_and_prepare()
    return builder


def prepared(source, root, split="train"):
    build(lambda *args: Folder("town", *args), root, source)
    return open_split(str(root), "town", split)


def test_records_hold_the_image_file_as_it_was_and_labels_as_8_bit_grey_png(source, tmp_path):
    split = prepared(source, tmp_path / "root")
    assert len(split) == 3
    assert [record.id for record in split] == ["0", "1", "2"]
    for index, record in enumerate(split):
        (path,) = (source / "images" / "train").glob(f"{index}.*")
        assert record.image == path.read_bytes()
        assert record.size_hw == SIZES_HW[index] == tuple(split.sizes_hw[index])
        assert decode_image(record.image, "a").shape[:2] == record.size_hw
        assert record.label[24:26] == b"\x08\x00", "8 bits, grey"
        np.testing.assert_array_equal(decode_mask(record.label, "a"), labels_of(index))
    assert split.sizes_hw.dtype == np.int32


def test_the_classes_come_with_the_split(source, tmp_path):
    split = prepared(source, tmp_path / "root")
    assert split.spec == DatasetSpec("town", ("road", "car", "tree"), ((128, 64, 128), (0, 0, 255), (0, 255, 0)))
    assert split.name == "train"


def test_ignored_values_and_colours_become_255(source, tmp_path):
    save(source / "masks" / "train" / "1.png", np.where(labels_of(1) == 2, 9, labels_of(1)).astype(np.uint8))
    colours = np.array([(128, 64, 128), (0, 0, 255), (255, 255, 255)], np.uint8)
    save(source / "masks" / "train" / "2.png", colours[labels_of(2)])
    split = prepared(source, tmp_path / "root")
    for index in (1, 2):
        wanted = np.where(labels_of(index) == 2, 255, labels_of(index))
        np.testing.assert_array_equal(decode_mask(split[index].label, "a"), wanted)


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_black_and_white_masks_whose_white_would_be_ignored_are_refused(source, tmp_path, split, mode):
    save(source / "images" / "val" / "a.png", image_of(1))
    save(source / "masks" / "val" / "a.png", labels_of(1))
    for path in (source / "masks" / split).iterdir():
        values = np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8)
        Image.fromarray(values).convert(mode).save(path)
    assert np.unique(Image.open(path)).tolist() == [0, 255]
    with pytest.raises(InputError) as error:
        prepared(source, tmp_path / "root")
    assert re.fullmatch(
        rf"{source}/masks/{split}/\w\.png: the masks of {split} hold 0 and 255 alone, and 255 is always ignored, so no "
        "pixel is car: store class numbers, 1 for the second class",
        str(error.value),
    )


WHITE = np.array([(128, 64, 128), (255, 255, 255)], np.uint8)  # road, and what is ignored by its colour.


@pytest.mark.parametrize(
    ("classes", "change"),
    [
        ("road\ncar\ntree", lambda labels: np.where(labels == 2, 255, 0) + (labels == 1)),  # No tree.
        ("road\ncar\ntree", lambda labels: np.where(labels == 2, 255, 2)),
        ("road\ncar", lambda labels: 0 * labels),
        ("road", lambda labels: np.where(labels == 2, 255, 0)),
        ("road\ncar\nignore 9", lambda labels: np.where(labels == 2, 9, 0)),
        ("road #804080\ncar #0000ff\nignore #ffffff", lambda labels: WHITE[(labels == 2).astype(int)]),
    ],
    ids=["a third class is absent", "one class and ignored", "one class", "a single class", "a value", "a colour"],
)
def test_a_class_that_does_not_occur_is_no_fault_of_masks_that_are_not_black_and_white(
    source, tmp_path, classes, change
):
    (source / "classes.txt").write_text(classes)
    for index in range(3):
        save(source / "masks" / "train" / f"{index}.png", change(labels_of(index)).astype(np.uint8))
    assert len(prepared(source, tmp_path / "root")) == 3


def test_the_split_called_test_may_lack_masks_and_no_other_may(source, tmp_path):
    save(source / "images" / "test" / "a.png", image_of(1))
    split = prepared(source, tmp_path / "root", "test")
    assert [record.label for record in split] == [None]
    (source / "images" / "test").rename(source / "images" / "val")
    with pytest.raises(InputError, match=r"masks/val: there is no such folder: only the split test may lack masks"):
        build(lambda *args: Folder("town", *args), tmp_path / "other", source)


def test_a_split_is_a_data_source_for_grain(source, tmp_path):
    split = prepared(source, tmp_path / "root")
    assert isinstance(split, grain.sources.RandomAccessDataSource)
    dataset = grain.MapDataset.source(split).map(lambda record: record.id)
    assert [dataset[i] for i in (2, 0, 1)] == ["2", "0", "1"]


def test_a_split_can_be_sent_to_another_process_before_and_after_it_was_read(source, tmp_path):
    split = prepared(source, tmp_path / "root")
    unread = pickle.loads(pickle.dumps(split))
    records = list(split)
    for copy in unread, pickle.loads(pickle.dumps(split)):
        assert list(copy) == records
        assert (copy.spec, copy.fingerprint, copy.name) == (split.spec, split.fingerprint, split.name)
        np.testing.assert_array_equal(copy.sizes_hw, split.sizes_hw)


def test_records_can_be_read_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHAPES_SPLITS", {"train": range(20)})
    monkeypatch.setattr(builders, "SHAPES_SIZE_HW", (16, 24))
    monkeypatch.setattr(builders, "RECORDS_PER_FILE", 3)
    build(Shapes, tmp_path, None)
    split = open_split(str(tmp_path), "shapes", "train")
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 30))
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(split.__getitem__, order))
    assert [int(record.id) for record in records] == order.tolist()


@pytest.mark.parametrize("index", [-1, 3, np.int64(3)])
def test_a_position_outside_the_split_is_an_index_error(source, tmp_path, index):
    split = prepared(source, tmp_path / "root")
    with pytest.raises(IndexError, match=f"record {index} of 3"):
        split[index]


def test_a_damaged_record_is_an_error_that_names_it(source, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "RECORDS_PER_FILE", 1)
    prepared(source, tmp_path)
    file = sorted((tmp_path / "town").glob("*/*.array_record-*"))[1]
    file.write_bytes(file.read_bytes()[:1000])
    split = open_split(str(tmp_path), "town", "train")
    assert split[0].id == "0" and split[2].id == "2"
    with pytest.raises(InputError, match=r"record 1 of town, split train: cannot be read .* prepare it anew"):
        split[1]


def test_sizes_and_fingerprint_are_known_without_reading_records(source, tmp_path):
    prepared(source, tmp_path)
    (file,) = (tmp_path / "town").glob("*/*.array_record-*")
    file.write_bytes(b"")
    split = open_split(str(tmp_path), "town", "train")
    assert split.sizes_hw.tolist() == [list(size_hw) for size_hw in SIZES_HW]
    assert len(split.fingerprint) == 32


def test_the_fingerprint_changes_with_the_content_alone(source, tmp_path):
    first = prepared(source, tmp_path / "first")
    again = prepared(shutil.copytree(source, tmp_path / "copy"), tmp_path / "again")
    assert again.fingerprint == first.fingerprint
    save(source / "masks" / "train" / "1.png", 2 - labels_of(1))
    assert prepared(source, tmp_path / "second").fingerprint != first.fingerprint


def test_a_file_that_changes_while_it_is_prepared_is_noticed(source, tmp_path):
    builder = Folder("town", FolderSource(source), tmp_path / "root", tmp_path / "problems.txt")
    assert builder.checked_splits
    save(source / "masks" / "train" / "1.png", 2 - labels_of(1))
    with pytest.raises(InputError, match=r"1\.png: it or its mask changed while being prepared"):
        builder.download_and_prepare()


def test_records_keep_the_order_of_their_names_over_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHAPES_SPLITS", {"train": range(7), "val": range(7, 9)})
    monkeypatch.setattr(builders, "SHAPES_SIZE_HW", (16, 24))
    monkeypatch.setattr(builders, "RECORDS_PER_FILE", 3)
    build(Shapes, tmp_path, None)
    assert len(list(tmp_path.glob("shapes/*/shapes-train.array_record-*"))) == 3
    assert [record.id for record in open_split(str(tmp_path), "shapes", "train")] == [f"{i:05}" for i in range(7)]
    assert [record.id for record in open_split(str(tmp_path), "shapes", "val")] == ["00007", "00008"]


def test_memory_does_not_grow_with_the_split(tmp_path, monkeypatch):
    """TFDS's other kind of builder gathers each split, and takes TensorFlow for those above a gigabyte."""
    monkeypatch.setattr(builders, "SHAPES_SPLITS", {"train": range(80)})
    monkeypatch.setattr(builders, "RECORDS_PER_FILE", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    noise = cv2.imencode(".png", pixels)[1].tobytes()
    builder = Shapes(None, tmp_path, tmp_path / "problems.txt")
    builder._draw = lambda _: (bytes(bytearray(noise)), np.zeros((300, 300), np.uint8))  # New bytes for every record.
    assert len(builder.checked_splits["train"].pairs) * len(noise) > 20_000_000
    tracemalloc.start()
    try:
        builder.download_and_prepare()
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["dataset_info.json", "metadata.json", "features.json"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])])
def test_a_damaged_description_is_an_error_that_names_the_data_set(source, tmp_path, damage, spoil):
    prepared(source, tmp_path)
    spoil(tmp_path / "town" / "1.0.0" / damage)
    with pytest.raises(InputError, match=r"town/1\.0\.0: damaged |'town' is not prepared"):
        open_split(str(tmp_path), "town", "train")


def test_shapes_are_the_drawn_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHAPES_SPLITS", {"train": range(3)})
    build(Shapes, tmp_path, None)
    split = open_split(str(tmp_path), "shapes", "train")
    assert split.spec == SHAPES
    image, labels = builders.draw_scene(2, builders.SHAPES_SEED, builders.SHAPES_SIZE_HW)
    np.testing.assert_array_equal(decode_image(split[2].image, "a"), image)
    np.testing.assert_array_equal(decode_mask(split[2].label, "a"), labels)


def test_no_scene_is_in_two_splits():
    numbers = [number for split in builders.SHAPES_SPLITS.values() for number in split]
    assert len(numbers) == len(set(numbers)) == 500


def test_camvid_s_void_becomes_255_and_its_present_splits_are_read(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for split in "train", "test":
        save(tmp_path / "source" / split / "0.png", image_of(0)[:3, :4])
        save(tmp_path / "source" / f"{split}annot" / "0.png", labels)
    build(Camvid, tmp_path, tmp_path / "source")
    split = open_split(str(tmp_path), "camvid", "test")
    assert split.spec == CAMVID
    np.testing.assert_array_equal(decode_mask(split[0].label, "a").ravel(), [*range(11), 255])
    with pytest.raises(InputError, match="has no split 'val': choose one of train, test"):
        open_split(str(tmp_path), "camvid", "val")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: (source / "classes.txt").unlink(), "wants one class list, .*, and has 0"),
        (lambda source: (source / "classes.json").write_text("{}"), "wants one class list, .*, and has 2"),
        (lambda source: shutil.rmtree(source / "images"), "there is no images/<split>/"),
        (lambda source: (source / "masks" / "val").mkdir(), r"masks/val/ has no images/val/"),
        (lambda source: (source / "images" / "all").mkdir(), "images/all: not a name for a split"),
        (lambda source: (source / "images" / "a-b").mkdir(), "images/a-b: not a name for a split"),
    ],
)
def test_a_folder_laid_out_otherwise_is_refused_with_what_is_missing(source, tmp_path, spoil, message):
    spoil(source)
    with pytest.raises(InputError, match=message):
        build(lambda *args: Folder("town", *args), tmp_path / "root", source)


def test_files_beside_the_splits_are_told(source, tmp_path):
    (source / "images" / "loose.png").write_bytes(b"")
    builder = build(lambda *args: Folder("town", *args), tmp_path / "root", source)
    assert builder.notes == [f"{source}/images: 1 files beside the splits' folders were not read, as loose.png"]


def test_a_camvid_folder_without_its_splits_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no train/ or val/"):
        build(Camvid, tmp_path / "root", tmp_path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("shapes", "dsnet prepare shapes --root=ROOT"),
        ("camvid", "dsnet prepare camvid --source=DIR --root=ROOT"),
        ("voc2012", "dsnet prepare voc2012 --source=DIR --root=ROOT"),
        ("pascal_context_60", "dsnet prepare pascal_context_60 --source=DIR --root=ROOT"),
        ("town", "dsnet prepare folder --name=town --source=DIR --root=ROOT"),
    ],
)
def test_a_data_set_that_is_not_prepared_is_an_error_that_tells_how_to_prepare_it(tmp_path, name, command):
    (tmp_path / name / "1.0.0").mkdir(parents=True)  # Whatever this is, it is no data set.
    with pytest.raises(InputError) as error:
        open_split(str(tmp_path), name, "train")
    assert command.replace("ROOT", str(tmp_path)) in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}: data set '{name}' is not prepared")


def test_a_data_set_in_a_folder_of_an_impossible_name_is_told(tmp_path):
    with pytest.raises(InputError, match=r"json: cannot be read: File name too long$"):
        open_split(str(tmp_path / ("x" * 300)), "town", "train")


def test_a_prepared_data_set_is_an_ordinary_tfds_data_set(source, tmp_path):
    prepared(source, tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "town" / "1.0.0")
    example = builder.as_data_source("train")[1]
    np.testing.assert_array_equal(example["image"], image_of(1))
    np.testing.assert_array_equal(example["label"][..., 0], labels_of(1))
    assert json.loads((Path(builder.data_dir) / "metadata.json").read_text())["spec"]["name"] == "town"
