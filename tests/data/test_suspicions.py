"""What is told about a data set that may be wrong, each kind in a split of its own, and not about one that is right."""

import numpy as np
import pytest

from dsnet_jax.data.specs import DatasetSpec, voc_palette
from dsnet_jax.data.survey import Look, Seen
from dsnet_jax.data.suspicions import suspicious

SPEC = DatasetSpec("streets", ("road", "car", "tree"), voc_palette(3))


def seen(id_, pixels=None, labels=None, *, size_hw=(3, 4), label_hw=(3, 4), deviation=50.0, counts=(4, 4, 3)):
    """An image of `size_hw` whose pixels and labels stand for themselves by a text each."""
    label_pixels = np.zeros(256, np.int64)
    label_pixels[:3], label_pixels[255] = counts, 1
    digests = (labels or f"labels of {id_}").encode(), (pixels or f"pixels of {id_}").encode()
    return Seen(id_, size_hw, label_hw, label_pixels, *digests, deviation)


def look(*images, name="train"):
    return Look(name, SPEC, list(images), [], [])


def told(*looks):
    return [(finding.what, finding.names) for finding in suspicious(looks)]


def test_nothing_is_told_of_splits_that_are_as_they_should_be():
    assert told(look(seen("a"), seen("b")), look(seen("a", "others", "others"), name="val")) == []


@pytest.mark.parametrize(
    "image, what",
    [
        (seen("b", deviation=4.0), "hardly vary"),
        (seen("b", size_hw=(2, 7), label_hw=(2, 7)), "unusual proportions"),
        (seen("b", size_hw=(7, 2), label_hw=(7, 2)), "unusual proportions"),
        (seen("b", label_hw=(4, 3)), "labels of another size"),
        (seen("b", counts=(0, 0, 0)), "only ignored labels"),
        (seen("b", counts=(0, 5, 0)), "labels of one class only"),
    ],
)
def test_an_image_that_differs_is_told_and_named(image, what):
    ((line, names),) = told(look(seen("a"), image, seen("c")))
    assert line.startswith("train: 1 of 3 images ") and what in line
    assert names == ["train/b"]


def test_images_that_are_nearly_unusual_are_not_told():
    """As an upright photograph among those that lie is not."""
    images = seen("a"), seen("b", size_hw=(4, 3), label_hw=(4, 3), deviation=4.1, counts=(1, 10, 0)), seen("c")
    assert told(look(*images)) == []


def test_labels_of_one_class_are_no_fault_of_images_without_labels():
    unlabelled = Seen("a", (3, 4), None, None, None, b"pixels", 50.0)
    assert told(look(unlabelled, name="test")) == []
    assert told(look(seen("b")), look(unlabelled, name="test")) == []


def test_classes_that_never_occur_are_named():
    looks = look(seen("a", counts=(5, 0, 6))), look(seen("b"), name="val")
    assert told(*looks) == [("train: 1 of 3 classes never occur", ["car"])]


def test_copies_within_a_split_are_told_with_how_many_have_other_labels():
    images = [seen("a", "x", "same"), seen("b", "x", "same"), seen("c", "x", "same"), seen("d", "y"), seen("e", "y")]
    what = "train: 3 of 6 images are exact copies of others, 1 of the 2 pictures with different labels"
    assert told(look(*images, seen("f"))) == [(what, ["train/a = train/b = train/c", "train/d = train/e"])]


def test_images_that_two_splits_share_are_told_with_both_names():
    train = look(seen("a", "x", "same"), seen("b", "y"), seen("c"))
    val = look(seen("k", "y"), seen("l", "x", "same"), name="val")
    what = (
        "train and val share 2 images: a network trained on one must not be scored on the other; "
        "1 of them have other labels there"
    )
    assert told(train, val, look(seen("m"), name="test")) == [(what, ["train/a = val/l", "train/b = val/k"])]


def test_labels_are_not_compared_with_none_of_an_image_without_labels():
    unlabelled = Seen("k", (3, 4), None, None, None, b"x", 50.0)
    what = "train and test share 1 images: a network trained on one must not be scored on the other"
    assert told(look(seen("a", "x")), look(unlabelled, name="test")) == [(what, ["train/a = test/k"])]


def test_a_class_whose_share_differs_much_is_told_and_a_rare_one_is_not():
    train = look(seen("a", counts=(6_000, 300, 4)))
    val = look(seen("b", counts=(6_000, 900, 1)), name="val")
    assert told(train, val) == []  # Nearly three times; and four times, of hardly any pixels.
    test = look(seen("c", counts=(6_000, 1_100, 1)), name="test")
    ((what, names),) = told(train, val, test)
    assert what == "car is 3.3 times as frequent in test (15.49%) as in train (4.76%)" and names == []
