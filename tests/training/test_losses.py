"""The loss, against cross-entropy written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsnet_jax import parallel
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.training.losses import BAND_ROWS, cross_entropy, labelled_pixels

CLASSES = 5


def batch(labelled=(True,) * 8, size_hw=(6, 7), seed=0):
    """Logits and labels of images, a third of whose pixels is ignored; all of them where an image is not labelled."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (len(labelled), *size_hw, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, logits.shape[:3]).astype(np.uint8)
    labels[rng.random(labels.shape) < 1 / 3] = 255
    labels[~np.array(labelled)] = 255
    return logits, labels


def by_hand(logits, labels):
    """Pixel by pixel."""
    losses = []
    for pixel, label in zip(logits.astype(np.float64).reshape(-1, CLASSES), labels.ravel(), strict=True):
        if label != 255:
            losses.append(np.log(np.exp(pixel).sum()) - pixel[label])
    return sum(losses) / len(losses)


def test_the_loss_is_the_mean_cross_entropy_of_the_labelled_pixels():
    logits, labels = batch()
    np.testing.assert_allclose(cross_entropy(logits, labels), by_hand(logits, labels), rtol=1e-6)


def test_in_float64_the_loss_is_exact_to_float64():
    with jax.enable_x64(True):
        logits, labels = batch()
        loss = cross_entropy(jnp.asarray(logits, jnp.float64), jnp.asarray(labels))
        assert loss.dtype == jnp.float64
        np.testing.assert_allclose(loss, by_hand(logits, labels), rtol=1e-13)


def test_bfloat16_logits_lose_nothing_in_the_loss():
    logits, labels = batch()
    rounded = jnp.asarray(logits, jnp.bfloat16)
    loss = cross_entropy(rounded, labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, by_hand(np.asarray(rounded, np.float32), labels), rtol=1e-6)


def test_huge_logits_do_not_overflow():
    logits = np.zeros((1, 1, 2, CLASSES), np.float32)
    logits[..., 1] = 1e4
    assert cross_entropy(logits, np.array([[[1, 0]]], np.uint8)) == pytest.approx(5e3)


def test_logits_are_resized_to_the_labels_grid():
    """Half-pixel centres: of two cells over four pixels the weights are 1, 3/4, 1/4, 0."""
    logits = np.random.default_rng(1).normal(0, 2, (1, 1, 2, CLASSES)).astype(np.float32)
    share = np.array([1, 0.75, 0.25, 0])[:, None]
    resized = share * logits[0, 0, 0] + (1 - share) * logits[0, 0, 1]
    labels = np.array([[[0, 3, 255, 4]]], np.uint8)
    np.testing.assert_allclose(cross_entropy(logits, labels), by_hand(resized[None, None], labels), rtol=1e-6)


@pytest.mark.parametrize("rows", [BAND_ROWS, BAND_ROWS + 1, 2 * BAND_ROWS + 3])
def test_bands_of_rows_make_the_loss_of_the_whole_and_its_gradient(rows):
    """Whether the bands come out even or not; against the loss of logits that were resized before."""
    logits, _ = batch(labelled=(True, True), size_hw=(9, 3))
    _, labels = batch(labelled=(True, True), size_hw=(rows, 8), seed=1)
    labels[1, rows // 2 :] = 255

    def at_once(logits):
        resized = resize_bilinear(logits, (rows, 8))
        losses = optax.softmax_cross_entropy_with_integer_labels(resized, np.where(labels == 255, 0, labels))
        return jnp.sum(losses * (labels != 255)) / np.sum(labels != 255)

    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, labels)
    expected, expected_gradient = jax.jit(jax.value_and_grad(at_once))(logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_a_label_that_is_no_class_is_no_number():
    logits, labels = jnp.zeros((1, 4, 4, CLASSES)), np.zeros((1, 8, 8), np.uint8)
    assert jnp.isfinite(cross_entropy(logits, jnp.asarray(labels)))
    labels[0, 3, 5] = CLASSES
    assert jnp.isnan(cross_entropy(logits, jnp.asarray(labels)))


def test_the_program_has_no_gather_and_no_scatter():
    """Which a TPU does one row after another."""
    shapes = (
        jax.ShapeDtypeStruct((2, 9, 3, CLASSES), jnp.float32),
        jax.ShapeDtypeStruct((2, 2 * BAND_ROWS, 8), jnp.uint8),
    )
    text = jax.jit(jax.value_and_grad(cross_entropy)).lower(*shapes).as_text()
    assert "stablehlo.while" in text
    assert "stablehlo.gather" not in text and "stablehlo.scatter" not in text


def test_logits_at_the_resolution_of_the_labels_never_exist():
    """Nothing of a compiled gradient is as large; there would be several of them."""
    shapes = jax.ShapeDtypeStruct((2, 32, 32, 40), jnp.float32), jax.ShapeDtypeStruct((2, 512, 256), jnp.uint8)
    program = jax.jit(jax.value_and_grad(cross_entropy)).lower(*shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 512 * 256 * 40 * 4


def test_the_gradient_is_softmax_minus_truth_over_the_labelled_count_and_zero_where_ignored():
    logits, labels = batch()
    gradient = jax.grad(cross_entropy)(logits, labels)
    softmax = np.exp(logits.astype(np.float64))
    softmax /= softmax.sum(axis=-1, keepdims=True)
    labelled = labels != 255
    truth = np.eye(CLASSES)[np.where(labelled, labels, 0)]
    expected = np.where(labelled[..., None], softmax - truth, 0) / labelled.sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-8)
    np.testing.assert_array_equal(np.asarray(gradient)[~labelled], 0)


def test_a_batch_without_a_labelled_pixel_has_loss_zero_and_gradient_zero():
    logits, labels = batch(labelled=(False, False))
    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, labels)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def test_labelled_pixels_are_those_that_are_not_ignored():
    _, labels = batch()
    assert labelled_pixels(labels) == (labels != 255).sum() > 0


def test_the_shares_of_unequal_parts_add_up_to_the_loss_of_the_whole():
    """In which the second image has seven labelled pixels at most, and the fourth and fifth none."""
    logits, labels = batch(labelled=(True, True, True, False, False))
    labels[1, 1:] = 255
    pixels = labelled_pixels(labels)
    shares = [cross_entropy(logits[i : i + 1], labels[i : i + 1], pixels) for i in range(5)]
    np.testing.assert_allclose(sum(shares), by_hand(logits, labels), rtol=1e-6)
    assert shares[3] == shares[4] == 0


def test_the_mean_is_over_the_global_batch_when_devices_have_unequally_many_labelled_pixels():
    logits, labels = batch(labelled=(True, False, True, True, False, True, False, True))
    labels[0, 1:] = 255  # Seven pixels at most on the first device, none on others.
    mesh = parallel.global_mesh()
    sharding = NamedSharding(mesh, PartitionSpec(parallel.AXIS))
    sharded = jax.jit(cross_entropy, in_shardings=(sharding, sharding))(logits, labels)
    np.testing.assert_allclose(sharded, by_hand(logits, labels), rtol=1e-6)


def test_devices_that_share_a_batch_add_up_their_losses_once_not_in_every_band():
    mesh = parallel.global_mesh()
    split = parallel.split_by_batch(mesh)
    shapes = ((8, 32, 8, CLASSES), jnp.float32), ((8, 4 * BAND_ROWS, 16), jnp.uint8)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=split) for shape in shapes]
    text = jax.jit(jax.value_and_grad(cross_entropy)).lower(*arrays).compile().as_text()
    loops = [part for part in text.split("\n\n") if " while(" not in part and "ENTRY" not in part]
    assert " while(" in text and "all-reduce" in text
    assert not any("all-reduce" in part for part in loops)
