"""The confusion matrix against scikit-learn's, the scores against figures computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from dsnet_jax.data.specs import ADE20K, PASCAL_CONTEXT, PASCAL_CONTEXT_60, VOC2012
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import metrics
from dsnet_jax.evaluation.metrics import benchmark_figures, confusion_counts, score

WAYS = {
    "as dispatched": confusion_counts,
    "by scatter": lambda *args: metrics._counts_by_scatter(*args).sum(axis=0),
    "by product": lambda *args: metrics._counts_by_product(*args).sum(axis=0),
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 5, 12]), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_counts_equal_sklearn_whatever_is_ignored_absent_or_padding(way, num_classes, batch, seed):
    rng = np.random.default_rng(seed)
    present = rng.choice(num_classes, size=rng.integers(1, num_classes + 1), replace=False)
    labels = rng.choice(present, size=(batch, 6, 7)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    labels[rng.random(labels.shape) < 0.1] = num_classes  # Out of range: not counted, and not taken for another class.
    labels[:, :, 5:] = 255  # Padding.
    predictions = rng.integers(0, num_classes, labels.shape, dtype=np.uint8)
    counts = WAYS[way](jnp.asarray(labels, jnp.int32), jnp.asarray(predictions, jnp.int32), num_classes)
    valid = labels < num_classes
    assert counts.dtype == jnp.int32
    if valid.any():
        expected = confusion_matrix(labels[valid], predictions[valid], labels=range(num_classes))
        np.testing.assert_array_equal(counts, expected)
    else:
        assert not counts.any()


@pytest.mark.parametrize("way", WAYS)
def test_a_negative_label_is_not_counted_as_another_class(way):
    counts = WAYS[way](jnp.array([[[-1, -3, 1]]]), jnp.array([[[2, 0, 1]]]), 3)
    np.testing.assert_array_equal(counts, np.diag([0, 1, 0]))


@pytest.mark.parametrize("way", ["by scatter", "by product"])
def test_counts_beyond_the_integers_of_float32_are_exact(way):
    rows, columns = 4096, 4097  # 2^24 + 4096 pixels of one pair of classes, less one.
    labels = jnp.zeros((1, rows, columns), jnp.int32).at[0, 0, 0].set(1)
    counts = jax.jit(WAYS[way], static_argnums=2)(labels, jnp.zeros_like(labels), 2)
    np.testing.assert_array_equal(counts, [[rows * columns - 1, 0], [1, 0]])


def test_a_batch_that_could_overflow_int32_is_refused():
    labels = jax.ShapeDtypeStruct((2, 2**15, 2**15), jnp.uint8)
    with pytest.raises(ValueError, match="overflow int32"):
        jax.eval_shape(lambda *pair: confusion_counts(*pair, 2), labels, labels)


def test_scores_of_three_classes_equal_hand_computation():
    scores = score(np.array([[50, 10, 0], [5, 20, 5], [0, 0, 10]], np.int64))
    assert scores.iou == pytest.approx((50 / 65, 20 / 40, 10 / 15))
    assert scores.accuracy == pytest.approx((50 / 60, 20 / 30, 1.0))
    assert scores.miou == pytest.approx((50 / 65 + 1 / 2 + 2 / 3) / 3)
    assert scores.mean_accuracy == pytest.approx((5 / 6 + 2 / 3 + 1) / 3)
    assert scores.pixel_accuracy == pytest.approx(0.8)
    assert scores.frequency_weighted_iou == pytest.approx(0.6 * 50 / 65 + 0.3 * 0.5 + 0.1 * 2 / 3)
    assert scores.absent == () and scores.pixels == 100


def test_rows_are_the_truth():
    counts = confusion_counts(jnp.array([[[0, 0, 0, 1]]]), jnp.array([[[1, 1, 0, 1]]]), 2)
    np.testing.assert_array_equal(counts, [[1, 2], [0, 1]])
    assert score(np.asarray(counts, np.int64)).accuracy == pytest.approx((1 / 3, 1.0))


def test_a_class_absent_from_truth_and_prediction_is_named_and_left_out_of_the_means():
    scores = score(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]], np.int64))
    assert scores.absent == (2,) and scores.iou[2] is None and scores.accuracy[2] is None
    assert scores.miou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert scores.mean_accuracy == pytest.approx((3 / 4 + 1) / 2)


def test_a_class_that_is_only_predicted_counts_as_zero_in_miou_but_has_no_accuracy():
    scores = score(np.array([[3, 1], [0, 0]], np.int64))
    assert scores.absent == () and scores.iou == pytest.approx((0.75, 0.0)) and scores.miou == pytest.approx(0.375)
    assert scores.accuracy[1] is None and scores.mean_accuracy == pytest.approx(0.75)


def test_an_evaluation_without_a_valid_pixel_is_an_error():
    with pytest.raises(InputError, match="no valid pixel"):
        score(np.zeros((3, 3), np.int64))


def test_scores_hold_beyond_int32():
    scores = score(np.array([[2**40, 2**39], [0, 2**38]], np.int64))
    assert scores.pixels == 2**40 + 2**39 + 2**38 and scores.iou[0] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="int64"):
        score(np.eye(2, dtype=np.int32))


def context_matrix(cells, spec):
    """A matrix in which each (truth, prediction), by class name, has so many pixels."""
    matrix = np.zeros((spec.num_classes, spec.num_classes), np.int64)
    for (truth, prediction), pixels in cells.items():
        matrix[spec.class_names.index(truth), spec.class_names.index(prediction)] = pixels
    return matrix


def test_the_score_of_ade20k_is_the_mean_of_pixel_accuracy_and_miou():
    matrix = np.zeros((150, 150), np.int64)
    matrix[:2, :2] = [[60, 10], [5, 25]]
    (figure,) = benchmark_figures(matrix, ADE20K)
    assert figure.value == pytest.approx((0.85 + (60 / 75 + 25 / 40) / 2) / 2)  # Absent classes are left out.


def test_a_network_with_background_has_the_three_figures_of_pascal_context():
    """By hand: 100 pixels of bag, of which 10 are called background; 50 of bed; 80 of background, 20 called bag."""
    cells = {("bag", "bag"): 90, ("bag", "background"): 10, ("bed", "bed"): 40, ("bed", "bag"): 10}
    cells |= {("background", "background"): 60, ("background", "bag"): 20}
    figures = benchmark_figures(context_matrix(cells, PASCAL_CONTEXT_60), PASCAL_CONTEXT_60)
    of_59 = (90 / 110 + 40 / 50) / 2  # Bag: 90 of 100 true and 10 of bed; what is called bag in background is not seen.
    of_60 = (60 / 90 + 90 / 130 + 40 / 50) / 3
    assert [figure.name for figure in figures] == ["mIoU, 59 classes", "mIoU, 60 classes", "mIoU, 59 classes, x 59/60"]
    assert [figure.value for figure in figures] == pytest.approx([of_59, of_60, of_59 * 59 / 60])


def test_a_network_of_59_classes_has_two_of_them_and_says_why():
    cells = {("bag", "bag"): 90, ("bed", "bed"): 40, ("bed", "bag"): 10}
    figures = benchmark_figures(context_matrix(cells, PASCAL_CONTEXT), PASCAL_CONTEXT)
    of_59 = (90 / 100 + 40 / 50) / 2
    assert (figures[0].value, figures[2].value) == pytest.approx((of_59, of_59 * 59 / 60))
    assert figures[1].value is None and "needs a network trained with background" in figures[1].meaning


def test_with_nothing_but_background_there_is_no_figure_for_the_59():
    cells = {("background", "background"): 60, ("background", "bag"): 20}
    figures = benchmark_figures(context_matrix(cells, PASCAL_CONTEXT_60), PASCAL_CONTEXT_60)
    assert [figure.value for figure in figures] == [None, pytest.approx(60 / 80 / 2), None]


def test_a_data_set_without_figures_of_its_own_has_none():
    assert benchmark_figures(np.eye(21, dtype=np.int64), VOC2012) == ()
