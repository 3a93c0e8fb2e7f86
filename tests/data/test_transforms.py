"""Paired transforms against whole-picture definitions: scale everything, then crop, pad and mirror."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from dsnet_jax.data.specs import IGNORE_LABEL
from dsnet_jax.data.transforms import MEAN_COLOUR, augment, resize_image, scale_into_box, scaled_size_hw

COLOURS = np.random.default_rng(0).integers(0, 256, (20, 3), np.uint8)  # One for each label of a drawn picture.
CASES = [  # size_hw, crop_size_hw, image_scale
    ((36, 48), (18, 24), 0.5),
    ((37, 51), (52, 41), 1.0),
    ((60, 33), (16, 64), 1.0),
    ((25, 90), (64, 64), 0.7),
]


def noise(size_hw, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*size_hw, 3), np.uint8), rng.integers(0, 20, size_hw, np.uint8)


def bilinear(image, size_hw):
    """Half-pixel centres, no antialiasing, clamped at the edges, in float64."""
    for axis, size in enumerate(size_hw):
        pixels = image.shape[axis]
        centres = np.clip((np.arange(size) + 0.5) * pixels / size - 0.5, 0, pixels - 1)
        low = np.floor(centres).astype(int)
        share = (centres - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, pixels - 1)
        image = np.take(image, low, axis) * (1 - share) + np.take(image, high, axis) * share
    return image


def nearest(label, size_hw):
    """The pixel in which a cell's centre lies, in exact fractions."""
    rows, columns = (
        [int((cell + Fraction(1, 2)) * Fraction(pixels, size)) for cell in range(size)]
        for pixels, size in zip(label.shape, size_hw, strict=True)
    )
    return label[np.ix_(rows, columns)]


def whole_picture(image, label, rng, crop_size_hw, image_scale, scale_range, flip_probability):
    """The definition of `augment`, image in float64."""
    scaled_hw = scaled_size_hw(label.shape, image_scale * rng.uniform(*scale_range))
    top, left = (int(rng.integers(max(s - c, 0) + 1)) for s, c in zip(scaled_hw, crop_size_hw, strict=True))
    flip = rng.random() < flip_probability
    height, width = crop_size_hw
    out_image = np.full((height, width, 3), MEAN_COLOUR, np.float64)
    out_label = np.full((height, width), 255, np.uint8)
    for out, scaled in ((out_image, bilinear(image, scaled_hw)), (out_label, nearest(label, scaled_hw))):
        window = scaled[top : top + height, left : left + width]
        out[: window.shape[0], : window.shape[1]] = window
    return (out_image[:, ::-1], out_label[:, ::-1]) if flip else (out_image, out_label)


@pytest.mark.parametrize(("size_hw", "crop_size_hw", "image_scale"), CASES)
@pytest.mark.parametrize("scale_range", [(0.5, 2.0), (0.5, 0.5), (1.0, 1.0), (2.0, 2.0)])
def test_augmenting_equals_scaling_the_whole_picture_then_cropping_padding_and_mirroring(
    size_hw, crop_size_hw, image_scale, scale_range
):
    image, label = noise(size_hw)
    for seed in range(12):
        arguments = (crop_size_hw, image_scale, scale_range, 0.5)
        got_image, got_label = augment(image, label, np.random.default_rng(seed), *arguments)
        want_image, want_label = whole_picture(image, label, np.random.default_rng(seed), *arguments)
        assert got_image.dtype == got_label.dtype == np.uint8
        assert got_image.shape == (*crop_size_hw, 3)
        np.testing.assert_allclose(got_image, want_image, atol=0.51, rtol=0)  # Rounded to the nearest grey level.
        np.testing.assert_array_equal(got_label, want_label)


def test_a_scaled_picture_is_within_one_grey_level_of_opencvs_own_resizing():
    image, label = noise((45, 64))
    for scale in (0.5, 0.73, 1.0, 1.31, 2.0):
        size_hw = scaled_size_hw(label.shape, scale)
        got_image, got_label = augment(image, label, np.random.default_rng(0), size_hw, 1.0, (scale, scale), 0.0)
        difference = np.abs(got_image.astype(int) - cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_LINEAR))
        assert difference.max() <= 1
        if scale in (0.5, 1.0, 2.0):  # Where its 16 fractional bits are exact.
            want = cv2.resize(label, size_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            np.testing.assert_array_equal(got_label, want)


def test_nothing_changes_at_scale_one_without_flip_and_everything_is_mirrored_with_it():
    image, label = noise((20, 30))
    for flip_probability, step in ((0.0, 1), (1.0, -1)):
        got = augment(image, label, np.random.default_rng(0), (20, 30), 1.0, (1.0, 1.0), flip_probability)
        np.testing.assert_array_equal(got[0], image[:, ::step])
        np.testing.assert_array_equal(got[1], label[:, ::step])


@pytest.mark.parametrize(("size_hw", "crop_size_hw", "image_scale"), CASES)
def test_image_and_label_stay_aligned(size_hw, crop_size_hw, image_scale):
    blocks = np.random.default_rng(2).permutation(np.arange(1, 10, dtype=np.uint8)).reshape(3, 3)
    label = cv2.resize(blocks, size_hw[::-1], interpolation=cv2.INTER_NEAREST)
    image = COLOURS[label]
    labelled = compared = 0
    for seed in range(20):
        arguments = (np.random.default_rng(seed), crop_size_hw, image_scale, (0.5, 2.0), 0.5)
        got_image, got_label = augment(image, label, *arguments)
        reach = {"kernel": np.ones((5, 5)), "borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
        inside = (cv2.erode(got_label, **reach) == cv2.dilate(got_label, **reach)) & (got_label != IGNORE_LABEL)
        np.testing.assert_array_equal(got_image[inside], COLOURS[got_label[inside]])
        labelled += (got_label != IGNORE_LABEL).sum()
        compared += inside.sum()
    assert compared > 0.2 * labelled


def test_labels_are_those_that_were_there_or_ignored_and_padding_is_the_mean_colour():
    image = np.zeros((30, 30, 3), np.uint8)
    label = np.random.default_rng(0).choice(np.array([3, 7, 11], np.uint8), (30, 30))
    for seed in range(30):
        got_image, got_label = augment(image, label, np.random.default_rng(seed), (40, 40), 1.0, (0.5, 2.0), 0.5)
        assert set(np.unique(got_label)) <= {3, 7, 11, IGNORE_LABEL}
        padded = got_label == IGNORE_LABEL
        assert (got_image[padded] == MEAN_COLOUR).all()
        assert (got_image[~padded] == 0).all()  # The mean colour does not bleed into the picture.


def test_scale_offset_and_flip_are_drawn_over_their_whole_range():
    # Every pixel knows its place: two channels hold row and column.
    rows, columns = np.mgrid[:40, :40].astype(np.uint8)
    image, label = np.stack([rows, columns, rows], -1), np.zeros((40, 40), np.uint8)
    tops, mirrored = set(), 0
    for seed in range(400):
        crop, _ = augment(image, label, np.random.default_rng(seed), (36, 36), 1.0, (1.0, 1.0), 0.3)
        tops.add(int(crop[0, 0, 0]))
        mirrored += int(crop[0, 0, 1] > crop[0, 1, 1])
    assert tops == {0, 1, 2, 3, 4}
    assert 80 < mirrored < 160  # 120 expected, standard deviation 9.

    heights = [
        int((augment(image, label, np.random.default_rng(seed), (100, 100), 1.0, (0.5, 2.0), 0.5)[1] == 0).any(1).sum())
        for seed in range(400)
    ]
    assert (min(heights), max(heights)) == pytest.approx((20, 80), abs=1)
    assert np.mean(heights) == pytest.approx(50, abs=3)  # Uniform in the factor: standard deviation of the mean 0.9.


def test_the_same_generator_state_gives_the_same_picture():
    image, label = noise((30, 40))
    first, second, other = (
        augment(image, label, np.random.default_rng(seed), (24, 24), 1.0, (0.5, 2.0), 0.5) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != other[0]).any()


def test_the_result_is_written_to_the_place_it_is_given_and_nowhere_else():
    image, label = noise((30, 40))
    for seed in range(20):
        arguments = ((24, 48), 1.0, (0.5, 2.0), 0.5)  # Padded at the right, at the bottom, and not.
        want = augment(image, label, np.random.default_rng(seed), *arguments)
        images, labels = np.full((3, 24, 48, 3), 7, np.uint8), np.full((3, 24, 48), 7, np.uint8)
        got = augment(image, label, np.random.default_rng(seed), *arguments, out=(images[1], labels[1]))
        for batch, result, expected in zip((images, labels), got, want, strict=True):
            assert np.shares_memory(batch, result)
            np.testing.assert_array_equal(batch[1], expected)
            assert (batch[[0, 2]] == 7).all()


def test_a_picture_that_cannot_be_written_to_is_read():
    image, label = noise((30, 40))
    want = augment(image.copy(), label.copy(), np.random.default_rng(0), (20, 20), 1.0, (0.5, 2.0), 0.5)
    image.flags.writeable = label.flags.writeable = False
    got = augment(image, label, np.random.default_rng(0), (20, 20), 1.0, (0.5, 2.0), 0.5)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_pictures_of_one_pixel_and_one_row_survive():
    for size_hw in ((1, 1), (1, 50), (50, 1)):
        image, label = noise(size_hw)
        got_image, got_label = augment(image, label, np.random.default_rng(0), (8, 8), 0.5, (0.5, 0.5), 0.5)
        assert got_image.shape == (8, 8, 3)
        assert set(np.unique(got_label)) <= {*np.unique(label), IGNORE_LABEL}
        assert (got_label != IGNORE_LABEL).any()


def test_scaled_sides_are_rounded_and_at_least_one_pixel():
    assert scaled_size_hw((375, 500), 0.51) == (191, 255)
    assert scaled_size_hw((47, 23), 0.7) == scaled_size_hw((23, 47), 0.7)[::-1] == (33, 16)
    assert scaled_size_hw((1, 3), 0.2) == (1, 1)


def test_a_picture_fits_into_the_box_long_edge_along_long_edge():
    mmsegmentation, long_edge = (2048, 512), (520, 520)
    assert scaled_size_hw((375, 500), scale_into_box((375, 500), mmsegmentation)) == (512, 683)
    assert scaled_size_hw((500, 375), scale_into_box((500, 375), mmsegmentation)) == (683, 512)
    assert scaled_size_hw((100, 1000), scale_into_box((100, 1000), mmsegmentation)) == (205, 2048)  # The long edge.
    assert scaled_size_hw((375, 500), scale_into_box((375, 500), long_edge)) == (390, 520)
    assert scaled_size_hw((1000, 100), scale_into_box((1000, 100), long_edge)) == (520, 52)


def test_the_random_scale_is_of_the_box_where_there_is_one():
    for size_hw in ((30, 40), (300, 400)):
        image, label = noise(size_hw)
        arguments = (np.random.default_rng(0), (100, 100), 1.0, (0.5, 2.0), 0.0, (40, 20))
        _, cropped = augment(image, label, *arguments)
        factor = np.random.default_rng(0).uniform(0.5, 2.0)
        inside = cropped != IGNORE_LABEL
        assert (inside.any(1).sum(), inside.any(0).sum()) == (round(20 * factor), round(80 / 3 * factor))


def test_resizing_to_working_resolution_is_bilinear_and_the_identity_at_one():
    image, _ = noise((21, 34))
    assert resize_image(image, 1.0) is image
    for scale in (0.5, 0.3, 1.7):
        resized = resize_image(image, scale)
        assert resized.shape[:2] == scaled_size_hw((21, 34), scale)
        np.testing.assert_allclose(resized, bilinear(image, resized.shape[:2]), atol=0.9, rtol=0)
    assert resize_image(image[:1, :1], 0.1).shape == (1, 1, 3)
