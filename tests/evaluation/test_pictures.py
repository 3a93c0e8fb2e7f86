"""Pictures of labels: exact where programs read them, legible where people do."""

import errno
import itertools

import numpy as np
import pytest
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dsnet_jax.data.decoding import decode_mask
from dsnet_jax.data.drawing import write_picture
from dsnet_jax.data.specs import CAMVID, IGNORE_COLOUR, SHAPES, VOC2012, DatasetSpec, voc_palette
from dsnet_jax.evaluation.pictures import (
    _draw_confusion_matrix,
    comparison,
    write_confusion_matrix,
    write_labels,
)

MANY = DatasetSpec("many", tuple(f"chest of drawers {i}" for i in range(150)), voc_palette(150))


def colours_of(picture):
    return {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


def test_a_comparison_shows_image_truth_and_prediction_side_by_side():
    image = np.full((90, 120, 3), (10, 250, 20), np.uint8)  # At half the labels' resolution.
    truth, prediction = np.full((180, 240), 1, np.uint8), np.full((180, 240), 4, np.uint8)
    truth[90:] = 255
    picture = comparison(image, truth, prediction, SHAPES)
    panels = [picture[40:390, 12 + 492 * index : 12 + 492 * index + 480] for index in range(3)]
    assert colours_of(panels[0]) == {(10, 250, 20)}
    assert colours_of(panels[1]) == {SHAPES.palette[1], IGNORE_COLOUR}
    assert colours_of(panels[1][:170]) == {SHAPES.palette[1]}
    assert colours_of(panels[2]) == {SHAPES.palette[4]}


def test_a_legend_has_the_classes_that_occur_and_no_others():
    blank = np.zeros((30, 40, 3), np.uint8)
    picture = comparison(blank, np.full((30, 40), 3, np.uint8), np.full((30, 40), 8, np.uint8), CAMVID)
    legend = colours_of(picture[400:])
    assert legend >= {CAMVID.palette[3], CAMVID.palette[8], (32, 32, 32)}  # Ink: their names.
    assert not legend & ({*CAMVID.palette, IGNORE_COLOUR} - {CAMVID.palette[3], CAMVID.palette[8]})


@pytest.mark.parametrize("size_hw", [(1, 1), (2000, 3), (3, 2000), (37, 50)])
def test_a_comparison_of_any_size_fits_a_screen(size_hw):
    labels = np.zeros(size_hw, np.uint8)
    picture = comparison(np.zeros((*size_hw, 3), np.uint8), labels, labels, SHAPES)
    assert 50 < picture.shape[0] < 480 and 700 < picture.shape[1] < 1500
    assert SHAPES.palette[0] in colours_of(picture)


def test_a_long_legend_goes_on_in_further_rows():
    labels = np.arange(150, dtype=np.uint8).reshape(10, 15)
    image = np.zeros((10, 15, 3), np.uint8)
    picture = comparison(image, labels, labels, MANY)
    assert picture.shape[0] > comparison(image, labels * 0, labels * 0, MANY).shape[0] + 300
    assert colours_of(picture[-60:]) & set(MANY.palette[140:])
    assert colours_of(picture[:, -6:]) == {(255, 255, 255)}  # Nothing runs out of the picture.


@pytest.mark.parametrize("size_hw", [(1, 1), (37, 501)])
def test_label_files_keep_size_and_index_and_carry_the_palette(tmp_path, size_hw):
    labels = np.random.default_rng(0).integers(0, 21, size_hw, np.uint8)
    labels[-1, -1] = 255
    write_labels(tmp_path / "a.png", labels, VOC2012.palette)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P" and picture.size == size_hw[::-1]
        np.testing.assert_array_equal(picture, labels)
        np.testing.assert_array_equal(picture.convert("RGB"), VOC2012.colourise(labels))
        palette = np.array(picture.getpalette()).reshape(-1, 3)
    assert palette.shape == (256, 3) and tuple(palette[255]) == IGNORE_COLOUR and not palette[21:255].any()
    np.testing.assert_array_equal(decode_mask((tmp_path / "a.png").read_bytes(), "a.png"), labels)


def test_labels_that_are_not_uint8_are_refused(tmp_path):
    with pytest.raises(ValueError, match="int64"):
        write_labels(tmp_path / "a.png", np.zeros((2, 2), np.int64), VOC2012.palette)


def test_a_confusion_matrix_is_drawn_in_percent_of_each_true_class():
    matrix = np.diag([300, 40, 0, 7, 9])
    matrix[0, 1], matrix[1, 4], matrix[3, 0] = 100, 10, 1
    figure = _draw_confusion_matrix(matrix, SHAPES)
    drawn = figure.axes[0].collections[0].get_array()
    np.testing.assert_allclose(drawn[0], [75, 25, 0, 0, 0])
    assert drawn.mask[2].all() and not drawn.mask[[0, 1, 3, 4]].any()  # Not 0 %: the truth has none of the class.
    figures = {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in figure.axes[0].texts
    }
    expected = {(0, 0): "75", (0, 1): "25", (1, 1): "80", (1, 4): "20", (3, 3): "88", (3, 0): "12", (4, 4): "100"}
    assert figures == expected


@pytest.mark.parametrize("spec", [SHAPES, VOC2012, MANY], ids=lambda spec: spec.name)
def test_class_names_of_a_confusion_matrix_are_legible_and_apart(tmp_path, spec):
    matrix = np.eye(spec.num_classes, dtype=np.int64)
    figure = _draw_confusion_matrix(matrix, spec)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    for labels, side in ((axes.get_yticklabels(), "y"), (axes.get_xticklabels(), "x")):
        assert [label.get_text() for label in labels] == list(spec.class_names)
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
        spans = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert min(label.get_fontsize() for label in labels) * figure.dpi / 72 >= 10  # Pixels.
    write_confusion_matrix(tmp_path / "matrix.png", matrix, spec)
    with Image.open(tmp_path / "matrix.png") as picture:
        assert min(picture.size) > 400 and max(picture.size) < 4000


def test_a_class_name_is_not_taken_for_a_formula(tmp_path):
    spec = DatasetSpec("odd", ("$x^{$", "a_b"), voc_palette(2))
    write_confusion_matrix(tmp_path / "matrix.png", np.eye(2, dtype=np.int64), spec)
    assert (tmp_path / "matrix.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_labels(file, np.zeros((8, 8), np.uint8), VOC2012.palette),
        lambda file: write_picture(file, np.zeros((8, 8, 3), np.uint8)),
        lambda file: write_confusion_matrix(file, np.eye(CAMVID.num_classes, dtype=int), CAMVID),
    ],
    ids=["labels", "picture", "confusion matrix"],
)
def test_a_picture_that_cannot_be_written_leaves_the_one_that_was_there(tmp_path, monkeypatch, write):
    (tmp_path / "a.png").write_bytes(b"the old one")

    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
        write(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"the old one"
    write(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
