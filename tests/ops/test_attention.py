"""Attention against a loop over queries, in one band and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.ops.attention import attend

RNG = np.random.default_rng(0)
QUERIES, KEYS, VALUES = (RNG.standard_normal((2, *shape)).astype(np.float32) for shape in ((7, 4), (5, 4), (5, 3)))
VALID = np.array([[True, False, True, True, False], [True] * 5])


def by_loop(valid):
    result = np.zeros((2, 7, 3))
    for image in range(2):
        for query in range(7):
            weights = np.exp(KEYS[image] @ QUERIES[image, query].astype(np.float64) / 2) * valid[image]
            result[image, query] = weights @ VALUES[image] / weights.sum()
    return result


@pytest.mark.parametrize("max_products", [10**6, 15, 1])  # One band; 3, 3 and 1 queries; one query at a time.
def test_it_is_the_mean_of_the_values_by_the_softmax_of_scaled_products(max_products):
    for valid, expected in ((None, by_loop(np.ones((2, 5), bool))), (VALID, by_loop(VALID))):
        result = jax.jit(attend, static_argnums=4)(QUERIES, KEYS, VALUES, valid, max_products)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_keys_that_are_not_valid_have_no_influence_and_no_gradient():
    def total(keys, values, max_products):
        return jnp.sum(attend(QUERIES, keys, values, VALID, max_products) ** 2)

    whole, banded = (jax.jit(jax.grad(total, (0, 1)), static_argnums=2)(KEYS, VALUES, n) for n in (10**6, 15))
    for one, other in zip(whole, banded, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert not np.any(one[0, [1, 4]]) and np.all(np.any(one[1], axis=-1))


def test_no_array_of_all_products_exists_in_bands_forward_or_backward():
    def total(queries, keys, values):
        return jnp.sum(attend(queries, keys, values, max_products=64 * 256))

    arguments = [jax.ShapeDtypeStruct((1, 256, 4), jnp.float32)] * 3
    text = str(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*arguments))
    assert "1,64,256]" in text and "256,256]" not in text and "4,1,64,256]" not in text
