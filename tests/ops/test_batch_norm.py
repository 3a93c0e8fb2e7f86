"""Batch normalisation and ReLU against their formulas in float64, and what their gradients keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.ops.batch_norm import batch_norm, relu

EPSILON = 1e-5


def arguments(dtype=np.float64):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(2, 3, shape).astype(dtype) for shape in ((3, 4, 5, 6), (6,), (6,)))


def by_formula(x, scale, bias, active):
    mean, variance = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    y = (x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias
    return (jax.nn.relu(y) if active else y), mean, variance


@pytest.mark.parametrize("active", [False, True])
def test_the_result_the_statistics_and_the_gradients_are_those_of_the_formula(active):
    with jax.enable_x64(True):
        weights = np.random.default_rng(1).normal(0, 1, (3, 4, 5, 6))

        def outcome(normalise):
            def loss(*given):
                y, *statistics = normalise(*given)
                return jnp.sum(weights * jnp.sin(y)), (y, *statistics)

            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments())

        found = outcome(lambda *given: batch_norm(*given, EPSILON, active))
        expected = outcome(lambda *given: by_formula(*given, active))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert value.dtype == jnp.float64
            np.testing.assert_allclose(value, wanted, rtol=1e-10, atol=1e-12)


def test_a_large_mean_does_not_cancel_in_the_variance():
    x = 1e4 + np.random.default_rng(0).normal(0, 1, (4, 16, 16, 2)).astype(np.float32)
    _, _, variance = batch_norm(x, np.ones(2, np.float32), np.zeros(2, np.float32), EPSILON)
    np.testing.assert_allclose(variance, x.astype(np.float64).var((0, 1, 2)), rtol=1e-3)


def test_the_map_stays_bfloat16_and_statistics_and_gradients_of_parameters_float32():
    x, scale, bias = arguments(np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    (y, mean, variance), pullback = jax.vjp(lambda *given: batch_norm(*given, EPSILON, True), x, scale, bias)
    gradients = pullback((jnp.ones_like(y), jnp.zeros_like(mean), jnp.zeros_like(variance)))
    assert [value.dtype for value in (y, mean, variance, *gradients)] == [
        x.dtype,
        *["float32"] * 2,
        x.dtype,
        *["float32"] * 2,
    ]


@pytest.mark.parametrize("active", [False, True])
def test_of_the_size_of_the_map_the_gradient_keeps_the_map_alone(active):
    x, scale, bias = arguments(np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    _, pullback = jax.vjp(lambda *given: batch_norm(*given, EPSILON, active), x, scale, bias)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array) and leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
    np.testing.assert_array_equal(kept[0], x)


def test_relu_is_the_maximum_with_zero_and_keeps_its_result_alone():
    x = jnp.asarray([[-2.0, 0.0, 3.0, -0.0]])
    y, pullback = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, [[0, 0, 3, 0]])
    np.testing.assert_array_equal(pullback(jnp.full_like(x, 5.0))[0], [[0, 0, 5, 0]])
    assert [np.array_equal(leaf, y) for leaf in jax.tree.leaves(pullback)] == [True]
