"""Drawn scenes: repeatable, exactly labelled, and as hard as they are meant to be."""

from itertools import groupby

import cv2
import numpy as np
import pytest

from dsnet_jax.data.shapes import BACKGROUND, CHAIR, LAMP, PLANT, TABLE, Part, Surface, compose, draw_scene, rasterise

THIN = (CHAIR, PLANT, LAMP)
SIZE_HW = (160, 160)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_scene(index, 7) for index in range(80)]


def parts_of(index: int) -> list[Part]:
    return compose(np.random.default_rng([7, index]), SIZE_HW)[0]


def square(low: float, high: float, class_id: int, grey: int) -> Part:
    """Fills [low, high): OpenCV fills a quarter pixel, the cell at the far edge, more than the corners enclose."""
    high -= 0.25
    corners = np.array([(low, low), (high, low), (high, high), (low, high)])
    return Part(corners, Surface(class_id, np.full(3, grey)))


def test_a_scene_is_a_function_of_its_index_and_seed(scenes):
    for repeated, first in zip(draw_scene(3, 7), scenes[3], strict=True):
        np.testing.assert_array_equal(repeated, first)
    for other in (draw_scene(4, 7), draw_scene(3, 8)):
        assert (other[0] != scenes[3][0]).mean() > 0.5
        assert (other[1] != scenes[3][1]).any()


@pytest.mark.parametrize("size_hw", [(160, 160), (97, 224), (320, 201), (64, 64)])
def test_images_and_labels_have_the_size_asked_for(size_hw):
    image, labels = draw_scene(0, 7, size_hw)
    assert image.shape == (*size_hw, 3)
    assert labels.shape == size_hw
    assert image.dtype == labels.dtype == np.uint8


def test_a_larger_picture_shows_the_same_scene():
    small, large = draw_scene(3, 7)[1], draw_scene(3, 7, (320, 320))[1]
    assert (small == large[::2, ::2]).mean() > 0.95


def test_each_class_is_in_most_scenes(scenes):
    for class_id in range(5):
        assert np.mean([(labels == class_id).sum() > 50 for _, labels in scenes]) > 0.75
    assert max(labels.max() for _, labels in scenes) == LAMP


def test_later_parts_hide_earlier_ones():
    parts = [square(0, 8, BACKGROUND, 0), square(1, 6, TABLE, 100), square(4, 7, LAMP, 200)]
    colours, labels, _ = rasterise(parts, (8, 8))
    expected = np.zeros((8, 8), np.uint8)
    expected[1:6, 1:6], expected[4:7, 4:7] = TABLE, LAMP
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(colours[..., 0], np.array([0, 100, 0, 0, 200])[expected])


def test_a_pixel_covered_in_part_has_the_mean_colour_and_the_label_of_the_larger_part():
    parts = [square(0, 8, BACKGROUND, 0), square(1.25, 6, PLANT, 160)]
    colours, labels, _ = rasterise(parts, (8, 8))
    assert colours[3, 1, 0] == 120
    assert labels[3, 1] == PLANT
    colours, labels, _ = rasterise([parts[0], square(1.75, 6, PLANT, 160)], (8, 8))
    assert colours[3, 1, 0] == 40
    assert labels[3, 1] == BACKGROUND


@pytest.mark.parametrize("class_id", range(5))
def test_redrawn_in_flat_colour_a_class_covers_exactly_its_labels(class_id):
    for index in range(8):
        colour_of = {True: np.full(3, 160), False: np.zeros(3)}
        flat = [
            Part(p.corners_xy, Surface(p[1].class_id, colour_of[p[1].class_id == class_id])) for p in parts_of(index)
        ]
        coverage = rasterise(flat, SIZE_HW)[0][..., 0] / 160
        labels = draw_scene(index, 7)[1]
        assert (labels[coverage > 0.5] == class_id).all()
        assert (coverage[labels == class_id] >= 0.25).all()  # More would be lost only between three classes.


def test_without_its_parts_an_object_leaves_the_picture_where_it_was_labelled_and_nowhere_else():
    near = np.ones((3, 3), np.uint8)
    for index in range(8):
        parts = parts_of(index)
        colours, labels, _ = rasterise(parts, SIZE_HW)
        for class_id in {part.surface.class_id for part in parts} - {BACKGROUND}:
            without = [part for part in parts if part.surface.class_id != class_id]
            changed = (rasterise(without, SIZE_HW)[0] != colours).any(-1)
            mask = labels == class_id
            assert changed[mask].mean() > 0.99  # A few pixels may have the colour of what they hide.
            far = cv2.dilate(mask.astype(np.uint8), near) == 0
            assert changed[far].mean() < 0.001  # A few tips cover less than half of every pixel that they touch.


def test_the_final_image_has_its_edges_where_the_labels_have_theirs(scenes):
    def edge_strength(shift: int) -> float:
        strengths = []
        for image, labels in scenes:
            steps = np.abs(np.diff(image.astype(int), axis=1)).sum(-1)
            strengths.append(steps[np.roll(np.diff(labels.astype(int), axis=1) != 0, shift, axis=1)].mean())
        return float(np.mean(strengths))

    assert edge_strength(0) > 2 * max(edge_strength(-3), edge_strength(3))


def test_chairs_plants_and_lamps_are_partly_thinner_than_five_pixels_and_tables_are_not(scenes):
    kernel = np.ones((5, 5), np.uint8)
    whole, left = np.zeros(5), np.zeros(5)
    for _, labels in scenes:
        for class_id in range(5):
            mask = (labels == class_id).astype(np.uint8)
            whole[class_id] += mask.sum()
            left[class_id] += cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel).sum()
    removed = 1 - left / whole
    assert removed[TABLE] < 0.04
    assert (removed[list(THIN)] > 0.1).all()


def test_chairs_differ_in_height_by_more_than_a_factor_of_two_and_a_half():
    heights = []
    for index in range(80):
        for class_id, parts in groupby(parts_of(index), key=lambda part: part.surface.class_id):
            if class_id == CHAIR:
                heights.append(np.ptp(np.concatenate([part.corners_xy[:, 1] for part in parts])) / SIZE_HW[0])
    assert np.quantile(heights, 0.95) > 2.5 * np.quantile(heights, 0.05)


def test_objects_stand_all_over_a_picture_that_is_not_square():
    for size_hw in ((96, 288), (288, 96)):
        drawn = np.mean([draw_scene(index, 7, size_hw)[1] != BACKGROUND for index in range(20)], axis=0)
        along = drawn.mean(int(size_hw[0] > size_hw[1]))
        assert min(along[200:240].mean(), along[120:160].mean()) > 0.1
