"""Boundary IoU by hand, by its definition pixel by pixel, and as its authors' code has it, class by class."""

import cv2
import numpy as np
import pytest

from dsnet_jax.evaluation.boundary import boundary_counts, boundary_iou


def counts_of(truth, prediction, num_classes):
    return boundary_counts([(np.array(truth, np.uint8), np.array(prediction, np.uint8))], num_classes)


def blobs(shape, num_classes, ignored_share, seed):
    """Truth and a prediction that is mostly right, in patches as photographs have them."""
    rng = np.random.default_rng(seed)
    side = max(12, shape[0] // 6)
    patches = rng.integers(0, num_classes, (shape[0] // side + 1, shape[1] // side + 1), np.uint8)
    truth = patches.repeat(side, axis=0).repeat(side, axis=1)[: shape[0], : shape[1]].copy()
    prediction = np.roll(truth, (1, 2), axis=(0, 1))
    wrong = rng.random(shape) < 0.002
    prediction[wrong] = rng.integers(0, num_classes, wrong.sum())
    truth[rng.random(shape) < ignored_share] = 255
    return truth, prediction


def by_definition(truth, prediction, num_classes):
    """Every pixel's square is looked at."""
    height, width = truth.shape
    distance = max(1, round(0.02 * (height**2 + width**2) ** 0.5))
    counts = np.zeros((3, num_classes), np.int64)
    for y, x in np.argwhere(truth < num_classes):
        rows = slice(max(0, y - distance), y + distance + 1)
        columns = slice(max(0, x - distance), x + distance + 1)
        known = truth[rows, columns] < num_classes
        at_the_edge = not (distance <= y < height - distance and distance <= x < width - distance)
        near_true, near_predicted = (
            at_the_edge or bool((labels[rows, columns][known] != labels[y, x]).any()) for labels in (truth, prediction)
        )
        counts[0, truth[y, x]] += near_true and near_predicted and truth[y, x] == prediction[y, x]
        counts[1, truth[y, x]] += near_true
        counts[2, prediction[y, x]] += near_predicted
    return counts


def by_the_authors_way(truth, prediction, num_classes):
    """Class by class: the mask less what so many erosions by 3x3 leave of it, in a frame of zeros."""
    iterations = max(1, round(0.02 * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))

    def boundary(mask):
        framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        eroded = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=iterations)
        return mask & (eroded[1:-1, 1:-1] == 0)

    pairs = [(boundary(truth == label), boundary(prediction == label)) for label in range(num_classes)]
    return np.array([[(a & b).sum() for a, b in pairs], [a.sum() for a, _ in pairs], [b.sum() for _, b in pairs]])


@pytest.mark.parametrize("shape, ignored_share", [((50, 70), 0.0), ((61, 90), 0.3), ((20, 130), 0.9), ((1, 7), 0.2)])
def test_counts_are_those_of_the_definition(shape, ignored_share):
    truth, prediction = blobs(shape, 4, ignored_share, seed=shape[0])
    expected = by_definition(truth, prediction, 4)
    assert expected[:, truth[truth < 4][0]].all()
    np.testing.assert_array_equal(boundary_counts([(truth, prediction)], 4), expected)


@pytest.mark.parametrize("shape", [(40, 56), (210, 133), (360, 480)])
def test_where_nothing_is_ignored_counts_are_those_of_the_authors_code(shape):
    truth, prediction = blobs(shape, 5, 0.0, seed=shape[0])
    expected = by_the_authors_way(truth, prediction, 5)
    assert 0 < expected[0].sum() < expected[1].sum() < truth.size
    np.testing.assert_array_equal(boundary_counts([(truth, prediction)], 5), expected)


def test_a_square_shifted_by_one_is_as_counted_by_hand():
    """Distance 1. Of a square's 25 pixels 16 are boundary; the first lies in columns 2 to 6, the second in 3 to 7.

    In rows 2 and 6 both have columns 3 to 6 as boundary: 8 pixels. In rows 3 to 5 the first has columns 2 and 6, the
    second 3 and 7: none.
    """
    truth, prediction = np.zeros((2, 11, 11), np.uint8)
    truth[2:7, 2:7] = 1
    prediction[2:7, 3:8] = 1
    both, true, predicted = counts_of(truth, prediction, 2)[:, 1]
    assert (both, true, predicted) == (8, 16, 16)
    assert boundary_iou(counts_of(truth, prediction, 2))[1] == pytest.approx(8 / 24)


def test_the_images_edge_is_an_outline():
    uniform = np.zeros((4, 5), np.uint8)
    assert counts_of(uniform, uniform, 1).tolist() == [[14], [14], [14]]  # All but the 2 x 3 inside.


def test_a_hole_inside_lowers_boundary_iou_though_the_rim_is_right():
    truth, prediction = np.zeros((2, 30, 30), np.uint8)
    prediction[10:20, 10:20] = 1
    both, true, predicted = counts_of(truth, prediction, 2)[:, 0]
    assert (both, true, predicted) == (116, 116, 116 + 44)  # The rim, and the ring round the hole.
    assert boundary_iou(counts_of(truth, prediction, 2)) == pytest.approx((116 / 160, 0.0))


def test_what_is_predicted_on_ignored_pixels_does_not_matter():
    truth, prediction = blobs((40, 60), 4, 0.3, seed=1)
    other = np.where(truth == 255, (prediction + 1) % 4, prediction).astype(np.uint8)
    np.testing.assert_array_equal(boundary_counts([(truth, prediction)], 4), boundary_counts([(truth, other)], 4))


def test_an_ignored_pixel_is_no_outline_and_hides_none():
    """Seven columns, the middle one ignored: the two classes are two pixels apart, further than the distance of 1."""
    truth = np.array([[0, 0, 0, 255, 1, 1, 1]] * 5, np.uint8)
    counts = counts_of(truth, np.where(truth == 255, 1, truth), 2)
    assert counts[1].tolist() == [9, 9]  # Of 15, six inside in rows 1 to 3, columns 1 to 2.
    truth = np.array([[0, 0, 0, 1, 255, 1, 1]] * 5, np.uint8)
    assert counts_of(truth, np.where(truth == 255, 0, truth), 2)[1].tolist() == [12, 12]


def test_a_flawless_prediction_scores_1_whatever_is_ignored():
    truth, _ = blobs((200, 150), 4, 0.4, seed=2)
    prediction = np.where(truth == 255, 3, truth).astype(np.uint8)
    assert boundary_iou(boundary_counts([(truth, prediction)], 4)) == (1.0,) * 4


def test_images_are_added_up_before_the_ratio_by_any_number_of_threads():
    pairs = [blobs((40, 60 + index), 4, 0.1, seed=index) for index in range(5)]
    expected = sum(boundary_counts([pair], 4) for pair in pairs)
    for threads in (1, 3):
        np.testing.assert_array_equal(boundary_counts(iter(pairs), 4, threads), expected)
    assert boundary_counts([], 4).tolist() == [[0] * 4] * 3


def test_a_class_without_outline_has_none_and_one_that_is_only_predicted_has_0():
    assert boundary_iou(np.array([[3, 0, 0], [4, 0, 0], [5, 2, 0]], np.int64)) == (0.5, 0.0, None)
