"""Pictures of labels, to the pixel, and sheets that hold any number of pictures of any size."""

import numpy as np
import pytest
from PIL import Image

from dsnet_jax.data.drawing import fitted_hw, overlay, resized, sheet, write_picture
from dsnet_jax.data.specs import IGNORE_COLOUR, SHAPES


def test_an_overlay_blends_colours_outlines_classes_and_leaves_ignored_pixels():
    image = np.full((4, 6, 3), 100, np.uint8)
    labels = np.zeros((4, 6), np.uint8)
    labels[:, 3:] = 3
    labels[3, :] = 255
    picture = overlay(image, labels, SHAPES, opacity=0.25)
    expected = np.empty_like(picture)
    expected[:, :3] = np.rint(75 + 0.25 * np.array(SHAPES.palette[0]))
    expected[:, 3:] = np.rint(75 + 0.25 * np.array(SHAPES.palette[3]))
    expected[2] = expected[:3, 2] = 255  # The outlines, above the ignored row and left of class 3.
    expected[3] = 100
    np.testing.assert_array_equal(picture, expected)


def test_a_picture_is_written_as_it_is(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_picture(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(Image.open(tmp_path / "a.png"), picture)


@pytest.mark.parametrize(
    "size_hw, fitted", [((90, 240), (75, 200)), ((300, 100), (100, 33)), ((10, 20), (100, 200)), ((5000, 3), (100, 1))]
)
def test_pictures_are_fitted_in_their_proportions(size_hw, fitted):
    assert fitted_hw(size_hw, (100, 200)) == fitted


def test_labels_are_resized_without_inventing_any():
    labels = np.array([[0, 4], [255, 0]], np.uint8)
    assert resized(labels, (4, 6)).tolist() == [[0, 0, 0, 4, 4, 4]] * 2 + [[255, 255, 255, 0, 0, 0]] * 2
    assert len(np.unique(resized(np.dstack([labels] * 3), (40, 60)))) > 3  # An image is interpolated.


def panel(size_hw, colour):
    return np.full((*size_hw, 3), colour, np.uint8)


def places_of(picture, colour):
    """Top, bottom, left and right of what has a colour."""
    rows, columns = np.nonzero((picture == colour).all(axis=-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_a_sheet_sets_pictures_in_columns_of_one_width_and_rows_of_their_own_height():
    rows = [
        [("a", panel((30, 80), (200, 0, 0))), ("b", panel((20, 40), (0, 200, 0)))],
        [("", panel((50, 60), (0, 0, 200)))],
    ]
    picture = sheet(rows, [], SHAPES, column=50)
    assert places_of(picture, (200, 0, 0)) == (36, 65, 12, 91)  # A margin of 12, and a line of 24.
    assert places_of(picture, (0, 200, 0)) == (36, 55, 124, 163)  # In the middle of its column of 80.
    assert places_of(picture, (0, 0, 200)) == (78, 127, 22, 81)  # No line for captions that are not there.
    assert picture.shape[1] == 12 + 2 * (80 + 12)


def test_the_legend_of_a_sheet_has_the_labels_that_are_given_also_the_ignored_one():
    picture = sheet([[("", panel((10, 60), (1, 2, 3)))]], [3, 255], SHAPES, column=300)
    legend = {tuple(colour) for colour in np.unique(picture[34:].reshape(-1, 3), axis=0).tolist()}
    assert legend >= {SHAPES.palette[3], IGNORE_COLOUR}
    assert not legend & {SHAPES.palette[index] for index in (0, 1, 2, 4)}


def test_a_caption_that_is_too_long_stays_in_its_column():
    long, short = f"a/very/long/path/{'x' * 80}", "x"
    blank = panel((10, 30), 255)
    for caption, is_wide in ((long, True), (short, False)):
        picture = sheet([[(caption, blank), ("", blank)]], [], SHAPES, column=100)
        ink = np.nonzero((picture[:34] < 100).any(axis=(0, 2)))[0]
        assert ink.min() >= 12 and ink.max() <= 112
        assert (ink.max() - ink.min() > 80) == is_wide
