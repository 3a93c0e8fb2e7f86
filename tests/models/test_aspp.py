"""ASPP against its parts, written with lax."""

import jax
import numpy as np
import pytest

from dsnet_jax.models.aspp import ASPP

RATES = (1, 2, 4)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, 6, 7, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(random_variables, x):
    return random_variables(ASPP(4, RATES), x, train=False)


def branch(variables, name, x, rate=1):
    """Convolution, normalisation by running statistics, ReLU."""
    params, statistics = variables["params"][name], variables["batch_stats"][name]["norm"]
    kernel = params["conv"]["kernel"]
    padding = [(rate * (kernel.shape[0] // 2),) * 2] * 2
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, None, (rate, rate), ("NHWC", "HWIO", "NHWC"))
    y = (y - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    return np.maximum(y * params["norm"]["scale"] + params["norm"]["bias"], 0)


def test_it_is_a_point_three_rates_and_the_mean_concatenated_in_this_order_and_projected(x, variables):
    parts = [branch(variables, "point", x)]
    parts += [branch(variables, f"atrous{i}", x, rate) for i, rate in enumerate(RATES)]
    pooled = branch(variables, "pool", x.mean(axis=(1, 2), keepdims=True))
    parts.append(np.broadcast_to(pooled, parts[0].shape))
    expected = branch(variables, "project", np.concatenate(parts, axis=-1))
    result = ASPP(4, RATES).apply(variables, x, train=False)
    assert result.shape == (2, 6, 7, 4)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    kernels = {name: module["conv"]["kernel"].shape for name, module in variables["params"].items()}
    sides = {"point": 1, "atrous0": 3, "atrous1": 3, "atrous2": 3, "pool": 1}
    assert kernels == {name: (k, k, 5, 4) for name, k in sides.items()} | {"project": (1, 1, 20, 4)}


def test_a_rate_changes_the_result(x, variables):
    one, other = (ASPP(4, rates).apply(variables, x, train=False) for rates in (RATES, (1, 2, 3)))
    assert np.abs(one - other).max() > 0.01
