import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dsnet_jax.data import validation
from dsnet_jax.data.decoding import decode_mask
from dsnet_jax.data.files import FolderSource
from dsnet_jax.data.validation import FoundSplit, Pair, check_splits, content_digest, find_pairs
from dsnet_jax.errors import InputError

NUM_CLASSES = 3


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def random_image(seed, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def labels_of(seed, height=6, width=8):
    return np.random.default_rng(seed).integers(0, NUM_CLASSES, (height, width), np.uint8)


@pytest.fixture
def data(tmp_path):
    """A folder with images/ and masks/ of four good pairs."""
    for index in range(4):
        save(tmp_path / "images" / f"{index}.png", random_image(index))
        save(tmp_path / "masks" / f"{index}.png", labels_of(index))
    return tmp_path


def find(data):
    return find_pairs(FolderSource(data), f"{data}/images", f"{data}/masks")


def check(data, skip_bad=False, **options):
    splits = check_splits(
        {"train": find(data)},
        lambda pair: Path(pair.image).read_bytes(),
        lambda pair: pair.mask and decode_mask(Path(pair.mask).read_bytes(), pair.mask),
        NUM_CLASSES,
        problems_file=data / "problems.txt",
        skip_bad=skip_bad,
        **options,
    )
    return splits["train"]


def problems_of(data, **options):
    """The message's first line, and its other lines."""
    with pytest.raises(InputError) as error:
        check(data, **options)
    first, *others = str(error.value).splitlines()
    return first, others


def test_pairs_come_in_order_of_their_names_with_all_that_is_known_of_them(data):
    save(data / "images" / "0.png", random_image(0, 3, 5))
    save(data / "masks" / "0.png", np.array([[0, 1, 2, 255, 0]] * 3, np.uint8))
    checked = check(data)
    assert [pair.id for pair in checked.pairs] == ["0", "1", "2", "3"]
    assert checked.sizes_hw.tolist() == [[3, 5], [6, 8], [6, 8], [6, 8]]
    expected = np.bincount(np.concatenate([labels_of(i).ravel() for i in (1, 2, 3)]), minlength=256)
    expected[[0, 1, 2, 255]] += 6, 3, 3, 3
    np.testing.assert_array_equal(checked.label_pixels, expected)
    assert (checked.left_out, checked.other_files, checked.rotated_count) == ([], [], 0)
    image = (data / "images" / "2.png").read_bytes()
    assert checked.digests[2] == content_digest("2", image, labels_of(2))


def test_the_fingerprint_follows_images_labels_names_and_order_and_nothing_else(data):
    def fingerprint():
        return check(data).fingerprint

    seen = {fingerprint()}
    mask = (data / "masks" / "1.png").read_bytes()
    save(data / "masks" / "1.png", labels_of(1), compress_level=0)
    assert (data / "masks" / "1.png").read_bytes() != mask
    assert fingerprint() in seen, "the same labels in another file"

    def changed():
        before = len(seen)
        seen.add(fingerprint())
        return len(seen) == before + 1

    labels = labels_of(1)
    labels[0, 0] = 255
    save(data / "masks" / "1.png", labels)
    assert changed(), "one label"
    save(data / "images" / "1.png", random_image(99))
    assert changed(), "one image"
    for folder in "images", "masks":
        (data / folder / "3.png").rename(data / folder / "4.png")
    assert changed(), "a name"
    for folder in "images", "masks":
        (data / folder / "4.png").unlink()
    assert changed(), "one image less"


def test_subfolders_belong_to_the_name_and_extensions_do_not(data):
    save(data / "images" / "town" / "0.JPG", random_image(9), format="JPEG")
    save(data / "masks" / "town" / "0.png", labels_of(9))
    found = find(data)
    assert [pair.id for pair in found.pairs] == ["0", "1", "2", "3", "town/0"]
    assert found.pairs[4].image == str(data / "images" / "town" / "0.JPG")
    assert found.problems == []


def test_files_that_are_no_images_are_named_and_hidden_ones_passed_over(data):
    (data / "images" / "Thumbs.db").touch()
    (data / "masks" / "notes.txt").touch()
    (data / "images" / ".0.png").touch()
    found = find(data)
    assert found.other_files == [str(data / "images" / "Thumbs.db"), str(data / "masks" / "notes.txt")]
    assert len(found.pairs) == 4 and found.problems == []


def test_without_a_mask_folder_every_image_is_a_pair_without_mask(data):
    found = find_pairs(FolderSource(data), f"{data}/images", None)
    assert [(pair.id, pair.mask) for pair in found.pairs] == [(str(i), None) for i in range(4)]
    checked = check_splits(
        {"test": found}, lambda pair: Path(pair.image).read_bytes(), lambda _: None, NUM_CLASSES, data / "p.txt"
    )["test"]
    assert len(checked.pairs) == 4 and checked.label_pixels.sum() == 0
    assert checked.digests[0] == content_digest("0", (data / "images" / "0.png").read_bytes(), None)


def cut_image(data):
    path = data / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:-20])
    return path, "damaged"


def cut_jpeg(data):
    path = data / "images" / "1.png"
    jpeg = cv2.imencode(".jpg", random_image(1, 64, 64))[1].tobytes()
    path.write_bytes(jpeg[: len(jpeg) // 2])
    return path, "damaged"


def text_as_image(data):
    path = data / "images" / "1.png"
    path.write_text("404 not found")
    return path, "not a JPEG, PNG, WebP or BMP file"


def cut_mask(data):
    path = data / "masks" / "1.png"
    path.write_bytes(path.read_bytes()[:-20])
    return path, "damaged"


def rgb_mask(data):
    save(data / "masks" / "1.png", random_image(1))
    return data / "masks" / "1.png", "a mask in mode 8-bit RGB: store class numbers as 8-bit grey or palette PNG"


def strange_label(data):
    labels = labels_of(1)
    labels[2, :3] = 3
    labels[3, :2] = 254
    save(data / "masks" / "1.png", labels)
    return data / "masks" / "1.png", "labels that are neither 0 to 2 nor 255: 3 (3 pixels), 254 (2 pixels)"


def other_size(data):
    save(data / "masks" / "1.png", labels_of(1, 8, 6))
    return (
        data / "masks" / "1.png",
        f"the mask has 8 x 6 pixels (height x width), the image 6 x 8: {data / 'images' / '1.png'}",
    )


def missing_mask(data):
    (data / "masks" / "1.png").unlink()
    return data / "images" / "1.png", f"an image without a mask: there is no {data / 'masks' / '1'}.png"


def extra_mask(data):
    (data / "images" / "1.png").unlink()
    return data / "masks" / "1.png", f"a mask without an image: there is no {data / 'images' / '1'}.*"


def image_of_another_format(data):
    path = data / "images" / "1.png"
    path.rename(path.with_suffix(".tif"))
    cause = f"a mask without an image: {path.with_suffix('.tif')} is there, and .tif is not read: convert it"
    return data / "masks" / "1.png", cause


def mask_of_another_format(data):
    path = data / "masks" / "1.png"
    path.rename(path.with_suffix(".gif"))
    cause = f"an image without a mask: {path.with_suffix('.gif')} is there, and .gif is not read: convert it"
    return data / "images" / "1.png", cause


def file_without_ending(data):
    path = data / "images" / "1.png"
    path.rename(path.with_suffix(""))
    return data / "masks" / "1.png", f"a mask without an image: there is no {data / 'images' / '1'}.*"


def duplicate_image(data):
    save(data / "images" / "1.jpg", random_image(1))
    return "1", f"2 files of one name, keep one: {data / 'images' / '1.jpg'}, {data / 'images' / '1.png'}"


def duplicate_mask(data):
    save(data / "masks" / "1.bmp", labels_of(1))
    return "1", f"2 files of one name, keep one: {data / 'masks' / '1.bmp'}, {data / 'masks' / '1.png'}"


FAULTS = [cut_image, cut_jpeg, text_as_image, cut_mask, rgb_mask, strange_label, other_size]
FAULTS += [missing_mask, extra_mask, duplicate_image, duplicate_mask]
FAULTS += [image_of_another_format, mask_of_another_format, file_without_ending]


@pytest.mark.parametrize("spoil", FAULTS)
def test_a_problem_is_told_with_file_and_cause(data, spoil):
    path, cause = spoil(data)
    first, others = problems_of(data)
    assert first.startswith("problems: 1, with ") and "--skip-bad" in first
    assert others[-1].startswith(f"train: {path}: {cause}")


@pytest.mark.parametrize("spoil", FAULTS)
def test_what_has_a_problem_is_left_out_and_told_when_asked_for(data, spoil):
    path, cause = spoil(data)
    checked = check(data, skip_bad=True)
    assert [pair.id for pair in checked.pairs] == ["0", "2", "3"]
    assert checked.sizes_hw.shape == (3, 2) and len(checked.digests) == 3
    assert checked.label_pixels.sum() == 3 * 6 * 8
    (problem,) = checked.left_out
    assert problem.startswith(f"{path}: {cause}")


def test_an_image_that_is_too_large_is_told_with_its_size_and_the_limit(data):
    save(data / "images" / "2.png", random_image(2, 30, 40))
    first, others = problems_of(data, max_pixels=1199)
    assert first.startswith("problems: 1, with 4 images checked")
    assert others == [
        f"train: {data / 'images' / '2.png'}: 30 x 40 pixels (height x width) are more than the limit of 1199: "
        "make it smaller or raise the limit"
    ]


def test_all_problems_are_told_together(data):
    cut_image(data)
    (data / "masks" / "1.png").write_text("")
    (data / "masks" / "3.png").unlink()
    save(data / "masks" / "2.png", labels_of(2, 2, 2) + NUM_CLASSES)
    first, others = problems_of(data)
    assert first.startswith("problems: 5, with 3 images checked")
    listed = [line for line in others if line.startswith("train: ")]
    for name in "masks/3.png", "images/1.png", "masks/1.png", "neither 0 to 2", "2 x 2 pixels":
        assert sum(name in line for line in listed) == 1, name
    assert len(listed) == 5


def test_labels_out_of_range_are_counted_over_all_files(data):
    for index, values in enumerate([(7, 7), (7, 9), (0, 0), (9, 9)]):
        labels = labels_of(index)
        labels[0, :2] = values
        save(data / "masks" / f"{index}.png", labels)
    _, others = problems_of(data)
    assert others[0] == "labels out of range, in all: 7 (3 pixels in 2 files), 9 (3 pixels in 2 files)"
    assert len(others) == 4


def test_ten_problems_are_shown_and_more_go_to_a_file_whose_path_is_told(data):
    for index in range(10):
        (data / "images" / f"x{index}.png").write_text("")
        save(data / "masks" / f"x{index}.png", labels_of(index))
    _, others = problems_of(data)
    assert len(others) == 10 and not (data / "problems.txt").exists()
    (data / "images" / "x10.png").write_text("")
    save(data / "masks" / "x10.png", labels_of(0))
    _, others = problems_of(data)
    assert len(others) == 11
    assert others[-1] == f"and 1 more, all listed in {data / 'problems.txt'}"
    assert len((data / "problems.txt").read_text().splitlines()) == 11


def test_an_empty_split_is_an_error_even_when_problems_may_be_left_out(data):
    for path in (data / "images").iterdir():
        path.write_text("")
    first, others = problems_of(data, skip_bad=True)
    assert first == "split train is empty: of 4 images that were found none can be used"
    assert len(others) == 4
    for path in data.glob("*/*.png"):
        path.unlink()
    first, others = problems_of(data)
    assert first == "split train is empty: of 0 images that were found none can be used"


def test_a_split_of_other_files_alone_is_empty_and_one_of_them_and_what_is_read_are_told(data):
    for path in data.glob("*/*.png"):
        path.rename(path.with_suffix(".tif"))
    first, others = problems_of(data)
    assert first == (
        "split train is empty: of 0 images that were found none can be used; 8 other files were not read, such as "
        f"{data / 'images' / '0.tif'}: convert images to one of .bmp .jpeg .jpg .png .webp"
    )
    assert others == []


def test_images_that_ask_for_a_rotation_are_counted(data):
    exif = Image.Exif()
    exif[0x0112] = 8
    for index in (0, 2):
        save(data / "images" / f"{index}.png", random_image(index), exif=exif)
    checked = check(data)
    assert checked.rotated_count == 2
    assert checked.sizes_hw.tolist() == [[6, 8]] * 4


@pytest.mark.parametrize("place", ["an image", "the list of images"])
def test_an_interruption_does_not_wait_for_the_images_that_are_left(place, tmp_path, monkeypatch):
    read = []

    def interrupt(*_):
        raise KeyboardInterrupt

    def read_image(pair):
        read.append(pair)
        time.sleep(0.01)
        return interrupt() if place == "an image" else b""

    if place == "the list of images":
        monkeypatch.setattr(validation, "track", interrupt)
    pairs = [Pair(str(index), "image", None) for index in range(300)]
    with pytest.raises(KeyboardInterrupt):
        check_splits({"train": FoundSplit(pairs, [], [])}, read_image, lambda _: None, NUM_CLASSES, tmp_path / "p.txt")
    assert len(read) < 200
