"""Gradients of a batch that is taken in parts, against those of the batch at once; and where the points go."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.training.gradients import compute_gradients, offset_metrics

CLASSES, BATCH = 3, 8


class Unnormalised(nn.Module):
    """A network of the images alone, whichever they are with; its statistics are the images' mean, which it ignores."""

    @nn.compact
    def __call__(self, images, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, (3,))
        mean.value = 0.9 * mean.value + 0.1 * jnp.mean(images, axis=(0, 1, 2))
        features = nn.relu(nn.Conv(5, (3, 3), name="features", dtype=jnp.float64)(images))
        logits = nn.Conv(CLASSES, (1, 1), name="logits", dtype=jnp.float64)(features)
        return SegmentationOutput(logits, nn.Conv(CLASSES, (1, 1), name="auxiliary", dtype=jnp.float64)(features))


def uneven_batch():
    """Images of which two have no labelled pixel, and the others one row to eight."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, (BATCH, 8, 8)).astype(np.uint8)
    for index in range(BATCH):
        label[index, 1 + index :] = 255
    label[[2, 6]] = 255
    return {"image": rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8), "label": label}


def fresh_variables():
    variables = Unnormalised().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=True)
    return jax.tree.map(lambda x: x.astype(jnp.float64), variables)


def gradients_of(accumulation_steps, variables, batch):
    return compute_gradients(Unnormalised(), variables, batch, jax.random.key(1), 0.4, accumulation_steps)


@pytest.mark.parametrize("accumulation_steps", [2, 4, 8])
def test_without_batch_normalisation_micro_batches_give_what_the_batch_gives(accumulation_steps):
    """Losses, gradients and statistics, though the micro-batches have unequally many labelled pixels, one of them none.

    The statistics are means of images, which start from the same old value: their mean is that of the batch.
    """
    with jax.enable_x64(True):
        run = jax.jit(gradients_of, static_argnums=0)
        parts, whole = (run(steps, fresh_variables(), uneven_batch()) for steps in (accumulation_steps, 1))
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    gradients, _, metrics = parts
    assert gradients["features"]["kernel"].dtype == np.float64
    assert set(metrics) == {"loss", "main_loss", "auxiliary_loss"}
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 1e-3
    for tree, of_whole, tolerance in zip(parts, whole, (1e-12, 1e-6, 1e-12), strict=True):
        jax.tree.map(lambda a, b, t=tolerance: np.testing.assert_allclose(a, b, rtol=t, atol=t), tree, of_whole)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_a_batch_without_a_labelled_pixel_has_loss_zero_and_gradients_zero(accumulation_steps):
    with jax.enable_x64(True):
        batch = uneven_batch()
        batch["label"][:] = 255
        gradients, _, metrics = jax.device_get(
            jax.jit(gradients_of, static_argnums=0)(accumulation_steps, fresh_variables(), batch)
        )
    assert metrics == {"loss": 0, "main_loss": 0, "auxiliary_loss": 0}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_there_is_a_loop_over_micro_batches_only_if_there_are_several():
    def rounds(accumulation_steps):
        """Of the program's outer loops; the loss has one over bands of rows, here a single one."""
        with jax.enable_x64(True):
            program = jax.make_jaxpr(partial(gradients_of, accumulation_steps))(fresh_variables(), uneven_batch())
        return {equation.params["length"] for equation in program.eqns if equation.primitive.name == "scan"}

    assert rounds(2) == {2}
    assert rounds(1) == {1}


class Observer:
    """In the place of a network: says what it is called with.

    Its statistics are the largest value in the images and a number drawn with its key. Its map has four points, one of
    which is moved by ten times the value of the first image.
    """

    def apply(self, variables, images, train, rngs, mutable):
        stats = {"largest": jnp.max(images), "draw": jax.random.normal(rngs["dropout"])}
        logits = jnp.zeros((*images.shape[:3], CLASSES)) + variables["params"]["bias"]
        offsets = jnp.zeros((images.shape[0], 2, 2, 1, 2)).at[0, 0, 0, 0, 0].set(10 * images[0, 0, 0, 0])
        return SegmentationOutput(logits, offsets=offsets), {"batch_stats": stats}


def observe(values, accumulation_steps, key):
    """Statistics and metrics of a batch of images that have one value each."""
    image = np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 2, 2, 3))
    batch = {"image": image, "label": np.zeros(image.shape[:3], np.uint8)}
    variables = {"params": {"bias": jnp.zeros(CLASSES)}, "batch_stats": {}}
    compute = jax.jit(lambda v, b: compute_gradients(Observer(), v, b, key, 0.4, accumulation_steps)[1:])
    return jax.device_get(compute(variables, batch))


def test_a_micro_batch_has_every_nth_image():
    """Of values 10 to 60, alternately: the largest are 50 and 60. Of halves they would be 30 and 60."""
    values = [10, 20, 30, 40, 50, 60]
    stats, _ = observe(values, 2, jax.random.key(0))
    fifty, sixty = (observe([value], 1, jax.random.key(0))[0]["largest"] for value in (50, 60))
    assert stats["largest"] == pytest.approx((fifty + sixty) / 2, rel=1e-6)


def test_a_micro_batch_has_a_dropout_key_of_its_own():
    key = jax.random.key(3)
    draws = [float(jax.random.normal(part)) for part in jax.random.split(key, 2)]
    assert abs(draws[0] - draws[1]) > 0.01
    assert observe([1, 2, 3, 4], 2, key)[0]["draw"] == pytest.approx(np.mean(draws), rel=1e-6)
    assert observe([1, 2, 3, 4], 1, key)[0]["draw"] == jax.random.normal(key)


def test_offsets_of_micro_batches_are_averaged_and_the_largest_is_the_largest():
    key = jax.random.key(0)
    _, metrics = observe([0, 255], 2, key)
    alone = [observe([value], 1, key)[1] for value in (0, 255)]
    assert metrics["offset_max"] == pytest.approx(max(float(m["offset_max"]) for m in alone))
    assert alone[0]["offset_max"] != pytest.approx(alone[1]["offset_max"])
    for name in ("offset_mean", "offset_outside"):
        assert metrics[name] == pytest.approx(np.mean([m[name] for m in alone]), rel=1e-6)


def test_offsets_are_measured_in_pixels_and_points_outside_counted():
    """A map of 2x3 cells sampled at one point each: (y, x) plus the offset."""
    offsets = np.zeros((1, 2, 3, 1, 2), np.float32)
    offsets[0, 0, 0, 0] = (-0.5, 0)  # Above the map.
    offsets[0, 1, 2, 0] = (-3, 4)  # Above it and right of it.
    offsets[0, 1, 1, 0] = (0, 1)  # On the last cell's centre.
    metrics = offset_metrics(SegmentationOutput(None, None, jnp.asarray(offsets)))
    assert metrics["offset_mean"] == pytest.approx((0.5 + 5 + 1) / 6)
    assert metrics["offset_max"] == 5
    assert metrics["offset_outside"] == pytest.approx(2 / 6)


def test_without_offsets_the_points_outside_are_those_of_the_border():
    """Of the nine points of each cell of a 2x3 map, those of the 3x3 grid that leave it."""
    metrics = offset_metrics(SegmentationOutput(None, None, jnp.zeros((1, 2, 3, 9, 2))))
    inside = sum(
        0 <= y + dy < 2 and 0 <= x + dx < 3 for y in (0, 1) for x in (0, 1, 2) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    )
    assert metrics["offset_outside"] == pytest.approx(1 - inside / 54)
    assert metrics["offset_mean"] == metrics["offset_max"] == 0


def test_a_network_without_offsets_reports_none():
    assert offset_metrics(SegmentationOutput(None)) == {}
