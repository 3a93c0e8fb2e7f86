"""Pyramid pooling against its parts."""

import jax
import numpy as np

from dsnet_jax.models.pyramid import PyramidPooling
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.pooling import adaptive_mean


def test_it_is_the_map_and_its_means_reduced_and_resized_coarsest_first(random_variables):
    x = np.random.default_rng(0).standard_normal((2, 7, 9, 8)).astype(np.float32)
    module = PyramidPooling()
    variables = random_variables(module, x, train=False)
    expected = [x]
    for bins in (1, 2, 3, 6):
        params, moments = variables["params"][f"pool{bins}"], variables["batch_stats"][f"pool{bins}"]["norm"]
        assert params["conv"]["kernel"].shape == (1, 1, 8, 2)
        means = np.asarray(jax.jit(adaptive_mean, static_argnums=1)(x, bins)) @ params["conv"]["kernel"][0, 0]
        means = (means - moments["mean"]) / np.sqrt(moments["var"] + 1e-5)
        means = np.maximum(means * params["norm"]["scale"] + params["norm"]["bias"], 0)
        expected.append(resize_bilinear(means.astype(np.float32), (7, 9)))
    result = jax.jit(lambda: module.apply(variables, x, train=False))()
    np.testing.assert_allclose(result, np.concatenate(expected, axis=-1), rtol=1e-4, atol=1e-5)
