import zipfile

import numpy as np
import pytest
from PIL import Image

from dsnet_jax.data.builders import ade20k
from dsnet_jax.data.builders.ade20k import Ade20k
from dsnet_jax.data.decoding import decode_mask
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.data.specs import ADE20K
from dsnet_jax.errors import InputError

# ADEChallengeData2016/: images/{training,validation}/ADE_{train,val}_<number>.jpg, annotations/ likewise with .png,
# objectInfo150.txt. The development kit's README (github.com/CSAILVision/sceneparsing): "annotations masks contain
# labels ranging from 0 to 150, where 0 refers to "other objects". We do not consider those pixels in our evaluation."
SIZE_HW = 13, 12


def values_of(index):
    """Each of 0 to 150, in another place in every mask."""
    return np.roll(np.arange(SIZE_HW[0] * SIZE_HW[1]) % 151, 7 * index).astype(np.uint8).reshape(SIZE_HW)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pair(root, folder, name, values):
    image = np.random.default_rng(len(name)).integers(0, 256, (*SIZE_HW, 3), np.uint8)
    save(root / "images" / folder / f"{name}.jpg", image)
    save(root / "annotations" / folder / f"{name}.png", values)


def write_classes(file, names):
    """As the archive has it: tabs, a heading, several names to a class, stray spaces."""
    lines = [f"{index} \t0.1\t5\t2\t{name}, another {name} " for index, name in enumerate(names, 1)]
    file.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines, ""]))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(Ade20k, "counts", {"train": 3, "val": 2})


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source" / "ADEChallengeData2016"
    for index in range(3):
        write_pair(root, "training", f"ADE_train_{index + 1:08}", values_of(index))
    for index in range(2):
        write_pair(root, "validation", f"ADE_val_{index + 1:08}", values_of(index))
    write_classes(root / "objectInfo150.txt", ADE20K.class_names)
    return tmp_path / "source"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


def prepared(source, root, **options):
    prepare("ade20k", str(source), str(root), **options)
    return lambda split: open_split(str(root), "ade20k", split)


def test_the_published_numbers_of_images(monkeypatch):
    monkeypatch.undo()
    assert Ade20k.counts == {"train": 20_210, "val": 2000}
    checksums = [*ade20k.TRAINVAL.files.values(), *ade20k.TEST.files.values()]
    assert checksums == [
        "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        "sha1:e05747892219d10e9243933371a497e905a4860c",
    ]


def test_labels_are_the_mask_s_values_less_one_and_0_is_ignored(source, root):
    split = prepared(source, root)("train")
    assert split.spec == ADE20K
    for index, record in enumerate(split):
        labels, values = decode_mask(record.label, record.id), values_of(index)
        assert set(np.unique(labels)) == {*range(150), 255}
        np.testing.assert_array_equal(labels[values > 0], values[values > 0] - 1)
        assert (labels[values == 0] == 255).all()
        assert ADE20K.class_names[labels[values == 1][0]] == "wall"
        assert ADE20K.class_names[labels[values == 150][0]] == "flag"


def test_validation_is_val_and_the_test_set_has_the_images_that_are_there_and_no_labels(source, root, capsys):
    folder = source / "release_test" / "testing"
    for index in range(4):
        save(folder / f"ADE_test_{index + 1:08}.jpg", np.zeros((5, 6, 3), np.uint8))
    split = prepared(source, root)
    assert [record.id for record in split("val")] == ["ADE_val_00000001", "ADE_val_00000002"]
    assert [(record.id[-1], record.label) for record in split("test")] == [(number, None) for number in "1234"]
    assert "\ntest: 4 images, 5 high, 6 wide\n" in capsys.readouterr().out


def test_without_test_images_there_is_no_test_and_it_is_told(source, root, capsys):
    split = prepared(source, root)
    assert "\nno test images, so there is no test: give the folder with release_test.zip" in capsys.readouterr().out
    with pytest.raises(InputError, match="no split 'test': choose one of train, val"):
        split("test")


def test_the_archive_gives_the_records_of_the_folder(source, root, tmp_path):
    wanted = prepared(source, root)("train").fingerprint
    with zipfile.ZipFile(tmp_path / "ade.zip", "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(source))
    with pytest.raises(InputError, match=r"that of ADEChallengeData2016\.zip is 219e1696"):
        prepared(tmp_path / "ade.zip", tmp_path / "other")
    assert prepared(tmp_path / "ade.zip", tmp_path / "other", accept_repacked=True)("train").fingerprint == wanted


def instance_masks(root):
    """R is the class of the stuff or thing, G its instance, as in TFDS's scene_parse150: three channels."""
    save(root / "annotations" / "training" / "ADE_train_00000002.png", np.zeros((*SIZE_HW, 3), np.uint8))


def instance_folder(root):
    (root / "annotations").rename(root / "annotations_instance")


def converted_masks(root):
    """What readers make of the masks: 255 for unlabelled, and classes from 0."""
    save(root / "annotations" / "training" / "ADE_train_00000002.png", values_of(1) - np.uint8(1))


def converted_masks_without_unlabelled_pixels(root):
    """Each looks as if it were as published."""
    for path in (root / "annotations").rglob("*.png"):
        save(path, np.maximum(np.array(Image.open(path)), 1) - np.uint8(1))


def converted_masks_of_val_alone(root):
    for path in (root / "annotations" / "validation").rglob("*.png"):
        save(path, np.maximum(np.array(Image.open(path)), 1) - np.uint8(1))


def a_renamed_mask(root):
    path = root / "annotations" / "training" / "ADE_train_00000002.png"
    path.rename(path.with_name("ADE_train_00000022.png"))


def another_s_test_set(root):
    save(root.parent / "kitti" / "testing" / "image_2" / "000000.png", np.zeros((5, 6, 3), np.uint8))


def another_name(root):
    for folder, suffix in (("images", "jpg"), ("annotations", "png")):
        path = root / folder / "validation" / f"ADE_val_00000002.{suffix}"
        path.rename(path.with_stem("ADE_train_00000002"))


def another_release(root):
    save(root / "annotations" / "training" / "ADE_train_00000002.png", np.full(SIZE_HW, 151, np.uint8))


def alphabetical_classes(root):
    write_classes(root / "objectInfo150.txt", sorted(ADE20K.class_names))


def classes_cut_short(root):
    write_classes(root / "objectInfo150.txt", ADE20K.class_names[:149])


def an_image_less(root):
    for folder, suffix in (("images", "jpg"), ("annotations", "png")):
        (root / folder / "training" / f"ADE_train_00000003.{suffix}").unlink()


def a_mask_less(root):
    (root / "annotations" / "validation" / "ADE_val_00000002.png").unlink()


REFUSED = {
    instance_masks: r"ADE_train_00000002.png: an RGB mask, so of instances or of all of ADE20K, not of SceneParse150",
    instance_folder: r"training and validation: not found \(the masks in .*/annotations_instance belong to another",
    converted_masks: "ADE_train_00000002.png: value 255, and SceneParse150's are 0, unlabelled, to 150: somebody has",
    another_release: "ADE_train_00000002.png: value 151, and SceneParse150's",
    alphabetical_classes: "objectInfo150.txt: class 1 is airplane/another airplane, not wall",
    classes_cut_short: "objectInfo150.txt: 149 classes, not 150",
    converted_masks_without_unlabelled_pixels: "no mask of train has the value 150, .*: somebody has converted them",
    converted_masks_of_val_alone: "no mask of val has the value 150, .*: somebody has converted them",
    a_renamed_mask: r"(?s)/ADE_train_00000002.jpg: an image without .*/ADE_train_00000022.png: a mask without an image",
    another_s_test_set: "testing/image_2/000000.png: no image of SceneParse150's test, such as ADE_test_00000001",
    another_name: "ADE_train_00000002.jpg: no image of SceneParse150's val, such as ADE_val_00000001",
    an_image_less: "train has 2 images here, and 3 as it was published",
    a_mask_less: r"ADE_val_00000002.jpg: an image without a mask",
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_what_is_not_as_it_was_published_is_refused(source, root, spoil):
    spoil(source / "ADEChallengeData2016")
    with pytest.raises(InputError, match=REFUSED[spoil]) as error:
        prepared(source, root)
    assert "--skip-bad" not in str(error.value)
    assert list(root.iterdir()) == []
