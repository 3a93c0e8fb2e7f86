"""The CGDS module: what predicts the points, what is sampled, and that it starts as an ordinary convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.models.cgds import CGDS, DynamicSamplingConv
from dsnet_jax.ops import dynamic_sampling_conv, resize_bilinear

MODULE = CGDS(width=4)


def random_map(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


LOW, HIGH = random_map(2, 7, 9, 6), random_map(2, 4, 5, 3, seed=1)


@pytest.fixture(scope="module")
def variables(random_variables):
    return random_variables(MODULE, LOW, HIGH, train=False)


@jax.jit
def evaluate(variables, low_level, high_level):
    return MODULE.apply(variables, low_level, high_level, train=False)


def with_offset(variables, **offset):
    return variables | {"params": variables["params"] | {"offset": offset}}


def normalised(variables, x):
    """X(S) of what the operator gives."""
    params, statistics = variables["params"]["norm"], variables["batch_stats"]["norm"]
    x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    return np.maximum(x * params["scale"] + params["bias"], 0)


def test_points_start_at_zero_and_sampling_as_an_ordinary_convolution(variables):
    started = jax.jit(lambda: MODULE.init(jax.random.key(0), LOW, HIGH, train=False))()["params"]
    assert not np.any(started["offset"]["kernel"]) and not np.any(started["offset"]["bias"])
    bound = (9 * 4) ** -0.5  # As PyTorch starts a convolution.
    assert 0.9 * bound < np.abs(started["kernel"]).max() <= bound
    variables = with_offset(variables, **started["offset"])
    output = evaluate(variables, LOW, HIGH)
    assert not np.any(output.offsets)
    convolved = jax.lax.conv_general_dilated(
        output.modified, variables["params"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(output.sampled, normalised(variables, convolved), rtol=1e-4, atol=1e-5)


def test_points_come_from_the_resized_high_level_map_alone_and_the_modified_low_level_map_is_sampled(variables):
    output = evaluate(variables, LOW, HIGH)
    assert [leaf.shape for leaf in (output.modified, output.sampled, output.guide, output.offsets)] == [
        (2, 7, 9, 4),
        (2, 7, 9, 4),
        (2, 7, 9, 3),
        (2, 7, 9, 9, 2),
    ]
    np.testing.assert_allclose(output.guide, resize_bilinear(HIGH, (7, 9), (0.5, 0.5)), rtol=1e-5, atol=1e-6)
    sampled = dynamic_sampling_conv(output.modified, output.offsets, variables["params"]["kernel"])
    np.testing.assert_allclose(output.sampled, normalised(variables, sampled), rtol=1e-4, atol=1e-5)
    assert np.std(output.offsets) > 0.3

    other_low = evaluate(variables, LOW + random_map(*LOW.shape, seed=2), HIGH)
    np.testing.assert_array_equal(other_low.offsets, output.offsets)
    assert np.abs(other_low.modified - output.modified).max() > 0.1
    other_high = evaluate(variables, LOW, HIGH + random_map(*HIGH.shape, seed=2))
    np.testing.assert_array_equal(other_high.modified, output.modified)
    assert np.abs(other_high.offsets - output.offsets).max() > 0.1


@pytest.mark.parametrize(("dy", "dx"), [(1, 0), (0, -2)])
def test_predicted_numbers_are_pairs_of_dy_and_dx_tap_by_tap(variables, dy, dx):
    kernel = variables["params"]["offset"]["kernel"]
    still = with_offset(variables, kernel=0 * kernel, bias=jnp.zeros(18))
    moved = with_offset(variables, kernel=0 * kernel, bias=jnp.tile(jnp.array([dy, dx], jnp.float32), 9))
    one, other = evaluate(still, LOW, HIGH), evaluate(moved, LOW, HIGH)
    np.testing.assert_array_equal(other.offsets, np.broadcast_to([dy, dx], other.offsets.shape))
    # Where neither reads beyond the map, a shift of the points is a shift of the result.
    inner = slice(1, 5), slice(3, 7)
    shifted = slice(1 + dy, 5 + dy), slice(3 + dx, 7 + dx)
    np.testing.assert_allclose(other.sampled[:, *inner], one.sampled[:, *shifted], rtol=1e-4, atol=1e-5)


def other_sampling(sampling, random_variables, seed=0):
    """What a module of that sampling computes of the two maps, of another low map and of another high one."""
    module = CGDS(width=4, sampling=sampling)
    variables = random_variables(module, LOW, HIGH, train=False, seed=seed)
    apply = jax.jit(lambda low, high: module.apply(variables, low, high, train=False))
    other_low, other_high = LOW + random_map(*LOW.shape, seed=2), HIGH + random_map(*HIGH.shape, seed=2)
    return variables, apply(LOW, HIGH), apply(other_low, HIGH), apply(LOW, other_high)


def test_a_map_that_is_its_own_guide_predicts_its_points_and_the_guide_only_joins(random_variables):
    variables, output, other_low, other_high = other_sampling("self", random_variables)
    assert variables["params"]["offset"]["kernel"].shape == (3, 3, 4, 18)  # Of X(M).
    sampled = dynamic_sampling_conv(output.modified, output.offsets, variables["params"]["kernel"])
    np.testing.assert_allclose(output.sampled, normalised(variables, sampled), rtol=1e-4, atol=1e-5)
    assert np.abs(other_low.offsets - output.offsets).max() > 0.1
    np.testing.assert_array_equal(other_high.offsets, output.offsets)
    assert np.abs(other_high.guide - output.guide).max() > 0.1


def test_a_subnetwork_predicts_the_points_from_the_guide_which_joins_as_it_is(random_variables):
    variables, output, other_low, other_high = other_sampling("nonlocal", random_variables)
    assert variables["params"]["nonlocal"]["key"]["kernel"].shape == (1, 1, 3, 1)
    np.testing.assert_allclose(output.guide, resize_bilinear(HIGH, (7, 9), (0.5, 0.5)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other_low.offsets, output.offsets)
    assert np.abs(other_high.offsets - output.offsets).max() > 0.1
    one_cell = HIGH + 0
    one_cell[:, 0, 0] += 3  # Every point hears of every cell.
    far = CGDS(width=4, sampling="nonlocal").apply(variables, LOW, one_cell, train=False)
    assert np.abs(far.offsets - output.offsets)[:, 5:, 7:].max() > 1e-3


def test_on_the_regular_grid_nothing_is_predicted_and_sampling_is_an_ordinary_convolution(random_variables):
    variables, output, _, other_high = other_sampling("regular", random_variables)
    assert output.offsets is None and "offset" not in variables["params"]
    convolved = jax.lax.conv_general_dilated(
        output.modified, variables["params"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(output.sampled, normalised(variables, convolved), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(other_high.sampled, output.sampled)


def test_modulation_is_a_sigmoid_of_what_the_guide_predicts_behind_the_offsets(random_variables):
    module = DynamicSamplingConv(width=4, modulated=True)
    variables = random_variables(module, LOW, LOW, train=False)
    sampled, offsets = jax.jit(lambda: module.apply(variables, LOW, LOW, train=False))()
    kernel, bias = (variables["params"]["offset"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (3, 3, 6, 27)
    predicted = bias + jax.lax.conv_general_dilated(
        LOW, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(offsets, predicted[..., :18].reshape(2, 7, 9, 9, 2), rtol=1e-4, atol=1e-5)
    modulation = 1 / (1 + np.exp(-predicted[..., 18:]))
    expected = dynamic_sampling_conv(LOW, offsets, variables["params"]["kernel"], modulation)
    np.testing.assert_allclose(sampled, normalised(variables, expected), rtol=1e-4, atol=1e-5)
    started = jax.eval_shape(lambda: module.init(jax.random.key(0), LOW, LOW, train=False))["params"]
    assert started["offset"]["bias"].shape == (27,)


def test_the_classifier_reads_modified_sampled_and_guide_in_this_order(variables):
    output = evaluate(variables, LOW, HIGH)
    concatenated = output.concatenated()
    assert concatenated.shape == (2, 7, 9, 11)
    for part, columns in ((output.modified, slice(4)), (output.sampled, slice(4, 8)), (output.guide, slice(8, 11))):
        np.testing.assert_array_equal(concatenated[..., columns], part)


def test_kernel_sides_are_those_asked_for():
    module = CGDS(width=4, sampling_kernel=5, modification_kernel=3)
    output, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), LOW, HIGH, train=False))
    assert output.offsets.shape == (2, 7, 9, 25, 2)
    params = variables["params"]
    assert params["kernel"].shape == (5, 5, 4, 4) and params["modification"]["conv"]["kernel"].shape == (3, 3, 6, 4)
    assert params["offset"]["kernel"].shape == (3, 3, 3, 50) and params["offset"]["bias"].shape == (50,)


def test_in_bfloat16_points_and_parameters_are_float32(variables):
    module = CGDS(width=4, dtype=jnp.bfloat16)
    low, high = jnp.asarray(LOW, jnp.bfloat16), jnp.asarray(HIGH, jnp.bfloat16)
    output, started = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), low, high, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(started)} == {jnp.dtype("float32")}
    assert output.offsets.dtype == jnp.float32
    assert output.modified.dtype == output.sampled.dtype == output.guide.dtype == jnp.bfloat16
    # Not merely cast at the end: a bias of 40.1 pixels comes out as such, which bfloat16 would round to 40.
    far = with_offset(variables, kernel=0 * variables["params"]["offset"]["kernel"], bias=jnp.full(18, 40.1))
    offsets = jax.jit(lambda: module.apply(far, low, high, train=False))().offsets
    np.testing.assert_allclose(offsets, 40.1, rtol=1e-6)
