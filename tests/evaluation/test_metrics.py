"""The confusion matrix against scikit-learn's, the scores against figures computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import metrics
from dsnet_jax.evaluation.metrics import confusion_counts, score

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
