import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from dsnet_jax.cli import main
from dsnet_jax.data.builders import pascal_context
from dsnet_jax.data.builders.pascal_context import PascalContext
from dsnet_jax.data.decoding import decode_mask
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import open_split
from dsnet_jax.data.specs import PASCAL_CONTEXT, PASCAL_CONTEXT_60, PASCAL_CONTEXT_IDS
from dsnet_jax.errors import InputError

# trainval_merged.json of PASCAL in Detail, as its interface reads it (detail-api, PythonAPI/detail/__init__.py): images
# of image_id, file_name, height, width and phase; annos_segmentation of image_id, category_id, segmentation (COCO's
# compressed run lengths), in which what comes later covers what came before; arrays that are not needed here.
SIZE_HW = 11, 9
TRAIN, VAL = ["2008_000002", "2008_000003"], ["2008_000007"]


def image_id_of(name):
    return int(name.replace("_", ""))


def mask_of(rows, columns):
    mask = np.zeros(SIZE_HW, bool)
    mask[rows, columns] = True
    return mask


def annotation(name, category, mask):
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return {"image_id": image_id_of(name), "category_id": category, "segmentation": rle, "iscrowd": 0, "id": 1}


def content():
    height, width = SIZE_HW
    phases = dict.fromkeys(TRAIN, "train") | dict.fromkeys(VAL, "val") | {"2008_000001": "test"}
    return {
        "info": {"description": "PASCAL in Detail", "version": [1, 0]},
        "images": [
            {
                "file_name": f"{name}.jpg",
                "phase": phase,
                "height": height,
                "width": width,
                "image_id": image_id_of(name),
            }
            for name, phase in phases.items()
        ],
        "annos_segmentation": [
            annotation(TRAIN[0], 440, mask_of(slice(0, 8), slice(None))),
            annotation(TRAIN[0], 427, mask_of(slice(2, 5), slice(3, 7))),  # In front of the wall.
            annotation(TRAIN[1], 2, mask_of(slice(None), slice(0, 4))),
            annotation(TRAIN[1], 458, mask_of(slice(None), slice(3, 9))),
            annotation(VAL[0], 397, mask_of(slice(4, 6), slice(None))),
            annotation(VAL[0], 0, mask_of(slice(5, 6), slice(None))),
        ],
        "annos_occlusion": [{"image_id": 1, "segmentation": {}}],
        "categories": [],
    }


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(PascalContext, "counts", {"train": 2, "val": 1})


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source" / "VOCdevkit" / "VOC2010" / "JPEGImages"
    folder.mkdir(parents=True)
    for name in TRAIN + VAL:
        pixels = np.random.default_rng(image_id_of(name)).integers(0, 256, (*SIZE_HW, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    return tmp_path / "source"


@pytest.fixture
def prepared(source, tmp_path, capsys):
    """Called with the annotations, prepares them and opens a split."""

    def run(annotations, name="pascal_context", split="train", sources=None):
        (source / "trainval_merged.json").write_text(json.dumps(annotations))
        prepare(name, sources or str(source), str(tmp_path / name), accept_repacked=True, overwrite=True)
        return open_split(str(tmp_path / name), name, split)

    return run


def labels_of(record):
    return decode_mask(record.label, record.id)


def test_the_published_numbers_of_images(monkeypatch):
    monkeypatch.undo()
    assert PascalContext.counts == {"train": 4996, "val": 5104}
    assert pascal_context.PAPER_COUNTS == {"train": 4998, "val": 5105}
    files = {**pascal_context.IMAGES.files, **pascal_context.ANNOTATIONS.files}
    assert files == {
        "VOCtrainval_03-May-2010.tar": "sha1:bf9985e9f2b064752bf6bd654d89f017c76c395a",
        "trainval_merged.json": "sha1:169325d9f7e9047537fedca7b04de4dddf10b881",
    }


def test_categories_are_painted_in_their_order_and_what_is_none_of_59_is_ignored(prepared):
    split = prepared(content())
    assert split.spec == PASCAL_CONTEXT
    assert [record.id for record in split] == TRAIN
    first, second = map(labels_of, split)
    names = PASCAL_CONTEXT.class_names
    assert set(np.unique(first)) == {names.index("wall"), names.index("tvmonitor"), 255}
    assert (first[2:5, 3:7] == names.index("tvmonitor")).all() and (first[8:] == 255).all()
    assert (first == names.index("wall")).sum() == 8 * 9 - 3 * 4
    assert second[0].tolist() == [names.index("aeroplane")] * 3 + [names.index("wood")] * 6


def test_with_background_classes_are_one_higher_and_the_background_is_class_0(prepared):
    annotations = content()
    plain, with_background = prepared(annotations), prepared(annotations, "pascal_context_60")
    assert with_background.spec == PASCAL_CONTEXT_60
    for record, other in zip(plain, with_background, strict=True):
        labels, labels_60 = labels_of(record), labels_of(other)
        np.testing.assert_array_equal(labels_60, np.where(labels == 255, 0, labels + 1))
        assert record.image == other.image
    val = labels_of(prepared(annotations, "pascal_context_60", "val")[0])
    assert val[:, 0].tolist() == [0] * 4 + [PASCAL_CONTEXT_60.class_names.index("table"), 0] + [0] * 5


def test_every_id_has_the_label_of_its_own_name(prepared):
    annotations = content()
    pixels = np.arange(SIZE_HW[0] * SIZE_HW[1]).reshape(SIZE_HW)
    annotations["annos_segmentation"] += [
        annotation(VAL[0], id_, pixels == label) for label, id_ in enumerate(PASCAL_CONTEXT_IDS)
    ]
    assert labels_of(prepared(annotations, split="val")[0]).ravel()[:59].tolist() == list(range(59))


def test_numbers_that_differ_from_the_papers_and_images_without_annotations_are_told(prepared, capsys):
    annotations = content()
    annotations["annos_segmentation"] = annotations["annos_segmentation"][:4]
    split = prepared(annotations, split="val")
    assert (labels_of(split[0]) == 255).all()
    out = capsys.readouterr().out
    assert "\ntrain: 2 images are annotated; papers speak of 4998\n" in out
    assert "\n1 images have no annotation, and are all background\n" in out
    assert "(packed anew: its sha1 is " in out


def test_the_file_may_be_given_by_itself_and_its_arrays_may_come_in_any_order(prepared, source, tmp_path):
    annotations = content()
    wanted = prepared(annotations).fingerprint
    (tmp_path / "context.json").write_text(json.dumps(dict(reversed(annotations.items()))))
    (source / "trainval_merged.json").unlink()
    sources = [f"--source={source / 'VOCdevkit'}", f"--source={tmp_path / 'context.json'}"]
    options = [*sources, "--accept-repacked", f"--root={tmp_path / 'again'}"]
    assert main(["prepare", "pascal_context", *options]) == 0
    assert open_split(str(tmp_path / "again"), "pascal_context", "train").fingerprint == wanted


def test_another_checksum_is_refused_unless_it_is_accepted(source, tmp_path):
    (source / "trainval_merged.json").write_text(json.dumps(content()))
    with pytest.raises(
        InputError, match=r"its sha1 is \w+, and that of trainval_merged.json is 169325d9.*accept-repacked"
    ):
        prepare("pascal_context", str(source), str(tmp_path / "root"))


def other_category(annotations):
    annotations["annos_segmentation"][2]["category_id"] = 3


def other_numbers(annotations):
    """The 59 numbered through, as lists in circulation have them."""
    for element in annotations["annos_segmentation"]:
        element["category_id"] = 2


def an_image_less(annotations):
    del annotations["images"][1]


def twice(annotations):
    annotations["images"].append(annotations["images"][0] | {"phase": "val"})


def a_path(annotations):
    annotations["images"][0]["file_name"] = "../2008_000002.jpg"


def other_size(annotations):
    annotations["images"][0]["height"] = 12


def all_of_another_size(annotations):
    other_size(annotations)
    annotations["annos_segmentation"][:2] = [annotation(TRAIN[0], 427, np.ones((12, 9), bool))]


def damaged_runs(annotations):
    annotations["annos_segmentation"][0]["segmentation"]["counts"] += "1"


def no_phase(annotations):
    del annotations["images"][0]["phase"]


def huge(annotations):
    annotations["images"][0].update(height=65_536, width=65_536)


def no_end(annotations):
    annotations["images"][0]["height"] = float("inf")


def negative(annotations):
    annotations["images"][0].update(height=-11, width=-9)


def too_long(annotations):
    annotations["images"][0].update(height=65_537)


def broken_runs(annotations):
    annotations["annos_segmentation"][0]["segmentation"]["counts"] = [10**30]


REFUSED = {
    other_category: "category 3 is none of the 59",
    other_numbers: "image 2008_000002, which shows a tvmonitor, has no category 427",
    an_image_less: "train has 1 images here, and 2 as it was published",
    twice: "'2008_000002.jpg' is no image of VOC, or occurs twice",
    a_path: "'../2008_000002.jpg' is no image of VOC",
    other_size: "image 2008_000002: category 440: it has 11 x 9 pixels, the image 12 x 9",
    all_of_another_size: "the mask has 12 x 9 pixels .*, the image 11 x 9",
    damaged_runs: "image 2008_000002: category 440: its runs do not make 11 x 9 pixels",
    no_phase: r"not PASCAL in Detail's annotations \('phase'\)",
    no_end: r"image '2008_000002.jpg' has height and width \(inf, 9\)",
    negative: r"image '2008_000002.jpg' has height and width \(-11, -9\)",
    too_long: r"image '2008_000002.jpg' has height and width \(65537, 9\)",
    broken_runs: "image 2008_000002: category 440: its runs do not make 11 x 9 pixels",
    huge: "65536 x 65536 pixels are more than the limit",
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_what_is_not_as_it_was_published_is_refused(prepared, tmp_path, spoil):
    annotations = content()
    spoil(annotations)
    with pytest.raises(InputError, match=REFUSED[spoil]):
        prepared(annotations)
    assert list((tmp_path / "pascal_context").iterdir()) == []


@pytest.mark.parametrize("missing", ["trainval_merged.json", "VOCtrainval_03-May-2010.tar"])
def test_a_missing_piece_is_named(source, tmp_path, missing):
    if missing.endswith("tar"):
        (source / "VOCdevkit" / "VOC2010").rename(source / "VOCdevkit" / "VOC2012")
        (source / "trainval_merged.json").write_text(json.dumps(content()))
    with pytest.raises(InputError, match=f"not found: give the folder with {missing}"):
        prepare("pascal_context", str(source), str(tmp_path / "root"), accept_repacked=True)
