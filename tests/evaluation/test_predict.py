"""Labelling images of all kinds that are in no data set."""

import errno
import os
import re
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dsnet_jax import cli, parallel
from dsnet_jax.data.decoding import MAX_PIXELS
from dsnet_jax.data.drawing import overlay
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import predict
from dsnet_jax.evaluation.canvases import canvas_hw
from dsnet_jax.evaluation.predict import predict_files
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.normalise import normalise


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """With eight, every image is computed with seven that pad the batch."""
    one = parallel.mesh_over(jax.devices()[:1])
    monkeypatch.setattr(parallel, "local_mesh", lambda: one)


def random_image(height, width, channels=3, seed=0):
    """Blocks of colour, as photographs have them, and noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), channels), np.uint8)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST).reshape(height, width, channels)


def write_image(path, height, width, mode="RGB", seed=0):
    image = random_image(height, width, len(Image.new(mode, (1, 1)).getbands()), seed)
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image, mode).save(path)
    return path


def read_labels(path):
    """Of a palette PNG; with its palette."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "P")
        return np.array(picture), picture.getpalette()


def read_rgb(path):
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def plain_labels(workdir, image, size_hw):
    """By the network on the bare image, without a canvas; labels of another size."""
    trained = load_trained(workdir)

    @jax.jit
    def labels_of(image):
        logits = trained.model.apply(trained.variables, normalise(image[None]), train=False).logits
        ratio_hw = np.array(image.shape[:2]) / np.array(size_hw) / 8  # The network's stride is 8.
        return jnp.argmax(resize_bilinear(logits, size_hw, ratio_hw), axis=-1)[0]

    return np.asarray(labels_of(image))


def outputs(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size_hw", [(1, 1), (37, 61), (64, 32)], ids=["1x1", "odd", "multiples of 32"])
def test_the_labels_are_those_of_the_network_on_the_bare_image_at_its_own_size(random_run, rooms, tmp_path, size_hw):
    file = write_image(tmp_path / "photo.png", *size_hw)
    assert predict_files(random_run, None, [str(file)], tmp_path / "out") == 0
    labels, palette = read_labels(tmp_path / "out" / "photo.png")
    expected = plain_labels(random_run, read_rgb(file), size_hw)
    assert labels.shape == size_hw
    assert (labels != expected).sum() <= 1  # Rounding may decide between two equal logits.
    trained = load_trained(random_run)
    assert palette[:9] == [channel for colour in trained.spec.palette for channel in colour]
    np.testing.assert_array_equal(
        read_rgb(tmp_path / "out" / "photo_overlay.png"), overlay(read_rgb(file), labels, trained.spec)
    )


def test_a_large_image_is_labelled_at_its_own_size(random_run, tmp_path):
    file = write_image(tmp_path / "large.jpg", 1500, 2000)
    assert predict_files(random_run, None, [str(file)], tmp_path / "out") == 0
    labels, _ = read_labels(tmp_path / "out" / "large.png")
    assert labels.shape == (1500, 2000) and labels.max() < 3
    assert len(np.unique(labels[-100:, -100:])) > 1  # To the last corner.
    assert read_rgb(tmp_path / "out" / "large_overlay.png").shape == (1500, 2000, 3)


@pytest.mark.parametrize(
    "mode, ending", [("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("RGB", "webp"), ("RGB", "bmp")]
)
def test_images_of_every_mode_are_labelled_as_the_colours_that_they_have(random_run, tmp_path, mode, ending):
    file = write_image(tmp_path / f"photo.{ending}", 40, 50, mode)
    assert predict_files(random_run, None, [str(file)], tmp_path / "out") == 0
    labels, _ = read_labels(tmp_path / "out" / "photo.png")
    as_rgb = write_image(tmp_path / "rgb.png", 1, 1)
    Image.fromarray(read_rgb(file)).save(as_rgb)
    predict_files(random_run, None, [str(as_rgb)], tmp_path / "out")
    differing = (labels != read_labels(tmp_path / "out" / "rgb.png")[0]).mean()
    assert differing < 0.05  # Two decoders may round the colours of JPEG and WebP differently.


def test_the_working_resolution_of_the_run_is_used_and_the_size_stays(random_run, tmp_path):
    text = (random_run / "config.json").read_text()
    (random_run / "config.json").write_text(text.replace('"image_scale": 1.0', '"image_scale": 0.5'))
    image = read_rgb(write_image(tmp_path / "photo.png", 60, 44))
    predict_files(random_run, None, [str(tmp_path / "photo.png")], tmp_path / "out")
    halved = cv2.resize(image, (22, 30), interpolation=cv2.INTER_LINEAR)
    expected = plain_labels(random_run, halved, (60, 44))
    assert (read_labels(tmp_path / "out" / "photo.png")[0] != expected).sum() <= 1


def test_what_cannot_be_read_is_named_and_counted_and_the_rest_is_labelled(random_run, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        write_image(photos / f"{index}.png", 40, 50, seed=index)
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:200])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "notes.txt").write_text("not an image")
    (photos / "deeper").mkdir()
    write_image(photos / "deeper" / "not_taken.png", 40, 50)
    arguments = [
        "predict",
        f"--workdir={random_run}",
        f"--output={tmp_path / 'out'}",
        str(photos),
        str(photos / "no.png"),
    ]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("dsnet: ")]
    assert [any(name in line for line in told) for name in ("1.png", "empty.jpg", "no.png")] == [True] * 3
    assert len(told) == 3
    assert "2 images labelled into" in printed.out
    assert "3 could not be read, 1 files in the folders are not images, 1 folders in them" in printed.out
    assert outputs(tmp_path / "out") == ["0.png", "0_overlay.png", "2.png", "2_overlay.png"]


def test_files_that_the_system_does_not_give_are_named_and_counted(random_run, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    write_image(photos / "good.png", 40, 50)
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "nowhere.png").symlink_to("not_there.png")
    (photos / "nowhere.txt").symlink_to("not_there.txt")
    too_long = photos / ("x" * 300) / "a.png"
    assert predict_files(random_run, None, [str(photos), str(too_long)], tmp_path / "out") == 3
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("dsnet: ")]
    assert [file in line for file, line in zip(("loop.png", "nowhere.png", "x/a.png"), told, strict=True)] == [True] * 3
    assert "1 images labelled into" in printed.out and "3 could not be read, 1 files in" in printed.out


def test_a_folder_whose_files_may_not_be_looked_at_names_and_counts_them(random_run, tmp_path, capsys, monkeypatch):
    """As where it may be read but not entered; root always may."""
    photos, stat = tmp_path / "photos", os.stat
    photos.mkdir()
    write_image(photos / "a.png", 40, 50)

    def refused(path, **options):
        if os.fspath(path).startswith(f"{photos}/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert predict_files(random_run, None, [str(photos)], tmp_path / "out") == 1
    assert "a.png: cannot be read: Permission denied" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_told_in_one_line(random_run, tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(predict.Path, "iterdir", refused)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=r"photos: cannot be read \(Permission denied\): give yourself the right to"):
        predict_files(random_run, None, [str(tmp_path / "photos")], tmp_path / "out")


@pytest.mark.parametrize("inputs", ["photos", "photos/x\033[31mA.png"])
def test_a_name_that_controls_a_terminal_is_refused_and_shown_escaped(random_run, tmp_path, inputs):
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "x\033[31mA.png", 8, 8)
    with pytest.raises(
        InputError, match=r"photos: 'x\\x1b\[31mA\.png' is not UTF-8, or has control characters: ren"
    ) as raised:
        predict_files(random_run, None, [str(tmp_path / inputs)], tmp_path / "out")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("there", [True, False])
def test_names_that_are_too_long_are_told_in_one_line_before_anything_is_written(random_run, tmp_path, there):
    file = tmp_path / f"{'x' * (250 if there else 300)}.png"
    if there:
        write_image(file, 8, 8)
    with pytest.raises(InputError, match=r"x_overlay\.png has more than 250 bytes: give it a shorter name$"):
        predict_files(random_run, None, [str(file)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_with_an_orientation_that_is_not_applied_are_counted(random_run, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("a", {"exif": exif}), ("b", {})):
        Image.fromarray(random_image(40, 50)).save(tmp_path / f"{name}.jpg", **options)
    assert predict_files(random_run, None, [str(tmp_path / "b.jpg")], tmp_path / "out") == 0
    assert "EXIF" not in capsys.readouterr().out
    assert predict_files(random_run, None, [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith("not images, 1 have an EXIF orientation, which is not applied\n")
    assert read_labels(tmp_path / "out" / "a.png")[0].shape == (40, 50)


def test_an_output_in_an_object_store_whose_package_is_missing_is_told_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # An import raises.
    file = write_image(tmp_path / "photo.png", 8, 8)
    with pytest.raises(InputError, match=r"^gs://bucket/out cannot be reached .*pip install -e '\.\[gcs\]'"):
        predict_files(tmp_path / "no_run", None, [str(file)], "gs://bucket/out")


def test_an_image_that_needs_a_larger_canvas_is_refused_from_its_header_named_and_counted(
    random_run, tmp_path, capsys, monkeypatch
):
    for name, size_hw in (("fits", (64, 64)), ("high", (65, 64)), ("thin", (1, 129))):
        write_image(tmp_path / f"{name}.png", *size_hw)
    decoded = []
    decode_image = predict.decode_image
    monkeypatch.setattr(
        predict, "decode_image", lambda data, name, *rest: decoded.append(name) or decode_image(data, name)
    )
    assert predict_files(random_run, None, [str(tmp_path)], tmp_path / "out", max_pixels=64 * 64) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path / 'high.png'}: 65 x 64 pixels (height x width) need a canvas of 96 x 64, " in printed.err
    assert f"{tmp_path / 'thin.png'}: 1 x 129 pixels (height x width) need a canvas of 32 x 160, " in printed.err
    assert "1 images labelled into" in printed.out and "2 could not be read" in printed.out
    assert decoded == [str(tmp_path / "fits.png")]


def test_the_limit_is_on_the_canvas_at_the_working_resolution(random_run, tmp_path):
    text = (random_run / "config.json").read_text()
    (random_run / "config.json").write_text(text.replace('"image_scale": 1.0', '"image_scale": 0.5'))
    file = write_image(tmp_path / "photo.png", 128, 128)
    assert predict_files(random_run, None, [str(file)], tmp_path / "out", max_pixels=64 * 64) == 0
    assert predict_files(random_run, None, [str(file)], tmp_path / "out", max_pixels=64 * 64 - 1) == 1


def test_the_limit_is_on_the_largest_canvas_of_a_protocol(random_run, tmp_path, capsys):
    file = write_image(tmp_path / "photo.png", 60, 50)
    limit = {"max_pixels": 2 * 128 * 128, "protocol": "ms_flip"}
    less = limit | {"max_pixels": 2 * 128 * 128 - 1}
    assert predict_files(random_run, None, [str(file)], tmp_path / "out", **less) == 1
    told = (
        "60 x 50 pixels (height x width) need a canvas of 128 x 128, and one more for the mirror image, which is more"
    )
    assert told in capsys.readouterr().err
    text = (random_run / "config.json").read_text()
    scales = re.search(r'"scales": \[[^]]*\]', text)[0]
    (random_run / "config.json").write_text(text.replace(scales, '"scales": [2.0]'))
    assert predict_files(random_run, None, [str(file)], tmp_path / "out", **limit) == 0
    assert read_labels(tmp_path / "out" / "photo.png")[0].shape == (60, 50)


def test_a_photo_of_12_million_pixels_fits_and_the_largest_that_is_decoded_does_not():
    assert np.prod(canvas_hw((3000, 4000))) <= predict.LABELLED_PIXELS < MAX_PIXELS


def test_a_file_that_vanishes_after_it_was_read_is_labelled_all_the_same(random_run, tmp_path, monkeypatch):
    file = write_image(tmp_path / "photo.png", 40, 50)
    read_file = predict.read_file

    def read_and_remove(path):
        data = read_file(path)
        path.unlink()
        return data

    monkeypatch.setattr(predict, "read_file", read_and_remove)
    assert predict_files(random_run, None, [str(file)], tmp_path / "out") == 0
    assert outputs(tmp_path / "out") == ["photo.png", "photo_overlay.png"]


def test_when_all_is_well_the_exit_code_is_0(random_run, tmp_path):
    file = write_image(tmp_path / "photo.png", 40, 50)
    assert cli.main(["predict", f"--workdir={random_run}", f"--output={tmp_path / 'out'}", str(file)]) == 0


def test_files_of_one_name_but_another_ending_keep_their_endings(random_run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "a.jpg", "b.PNG"):
        write_image(photos / name, 40, 50)
    predict_files(random_run, None, [str(photos)], tmp_path / "out")
    names = [name for name in outputs(tmp_path / "out") if "overlay" not in name]
    assert names == ["a.jpg.png", "a.png.png", "b.png"]


def test_a_file_given_twice_is_labelled_once(random_run, tmp_path, capsys):
    file = write_image(tmp_path / "photo.png", 40, 50)
    predict_files(random_run, None, [str(file), str(tmp_path), str(file)], tmp_path / "out")
    assert "1 images labelled" in capsys.readouterr().out


def two_folders(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / "a.png", 8, 8)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def overlay_of_another(tmp_path):
    for name in ("a.jpg", "a_overlay.jpg"):
        write_image(tmp_path / name, 8, 8)
    return [str(tmp_path / "a.jpg"), str(tmp_path / "a_overlay.jpg")]


@pytest.mark.parametrize("make", [two_folders, overlay_of_another])
def test_two_pictures_for_one_place_are_refused_before_anything_is_written(random_run, tmp_path, make):
    with pytest.raises(InputError, match="would both be written to"):
        predict_files(random_run, None, make(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inputs", ["photos", "photos/a.png"])
def test_an_image_is_never_replaced_by_its_own_labels(random_run, tmp_path, inputs):
    (tmp_path / "photos").mkdir()
    before = write_image(tmp_path / "photos" / "a.png", 8, 8).read_bytes()
    with pytest.raises(InputError, match=r"photos is where .*a\.png lies, and pictures could replace files: "):
        predict_files(random_run, None, [str(tmp_path / inputs)], tmp_path / "other" / ".." / "photos")
    assert (tmp_path / "photos" / "a.png").read_bytes() == before


@pytest.mark.parametrize("folder", ["photos", "links"])
def test_nor_by_those_of_an_image_beside_it(random_run, tmp_path, folder):
    for name in ("photos", "links"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "photos" / "a.jpg", 8, 8)
    mask = write_image(tmp_path / "photos" / "a.png", 8, 8)
    before = mask.read_bytes()
    (tmp_path / "links" / "a.jpg").symlink_to(tmp_path / "photos" / "a.jpg")
    with pytest.raises(InputError, match=r"photos is where .*a\.jpg lies"):
        predict_files(random_run, None, [str(tmp_path / folder / "a.jpg")], tmp_path / "photos")
    assert mask.read_bytes() == before


def test_an_empty_folder_is_refused(random_run, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=r"photos: no image found \(\.bmp, "):
        predict_files(random_run, None, [str(tmp_path / "photos")], tmp_path / "out")


def test_a_place_that_cannot_be_written_is_told(random_run, tmp_path):
    file = write_image(tmp_path / "photo.png", 8, 8)
    with pytest.raises(InputError, match="cannot be written"):
        predict_files(random_run, None, [str(file)], file)


def test_a_disk_that_is_full_is_told(random_run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(predict, "write_labels", full)
    file = write_image(tmp_path / "photo.png", 40, 50)
    with pytest.raises(InputError, match=r"out cannot be written \(No space left on device\): give another --output"):
        predict_files(random_run, None, [str(file)], tmp_path / "out")


def test_images_are_labelled_beside_each_other_on_several_devices(random_run, tmp_path, monkeypatch):
    """Eleven images of three sizes, on eight devices: the same labels, each at its place."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(11):
        write_image(photos / f"{index:02}.png", *[(40, 50), (33, 64), (20, 30)][index % 3], seed=index)
    predict_files(random_run, None, [str(photos)], tmp_path / "one")
    eight = parallel.mesh_over(jax.devices())
    monkeypatch.setattr(parallel, "local_mesh", lambda: eight)
    predict_files(random_run, None, [str(photos)], tmp_path / "eight")
    assert outputs(tmp_path / "one") == outputs(tmp_path / "eight") and len(outputs(tmp_path / "one")) == 22
    for index in range(11):
        ours, theirs = (read_labels(tmp_path / folder / f"{index:02}.png")[0] for folder in ("one", "eight"))
        assert (ours != theirs).sum() <= 1
