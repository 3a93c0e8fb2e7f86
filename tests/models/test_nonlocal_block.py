"""The non-local block against a plain loop over positions."""

import numpy as np

from dsnet_jax.models.nonlocal_block import NonLocal

X = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)


def test_each_position_adds_what_it_gathers_from_all_by_the_softmax_of_embedded_products(random_variables):
    module = NonLocal()
    variables = random_variables(module, X, train=False)
    params, moments = variables["params"], variables["batch_stats"]["norm"]
    query, key, value = (X.reshape(2, 12, 6) @ params[name]["kernel"][0, 0] for name in ("query", "key", "value"))
    gathered = np.zeros((2, 12, 3))
    for image, position in np.ndindex(2, 12):
        weights = np.exp(key[image] @ query[image, position] / 3**0.5)
        gathered[image, position] = weights @ value[image] / weights.sum()
    projected = gathered.reshape(2, 3, 4, 3) @ params["project"]["kernel"][0, 0]
    projected = (projected - moments["mean"]) / np.sqrt(moments["var"] + 1e-5)
    expected = X + projected * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(module.apply(variables, X, train=False), expected, rtol=1e-4, atol=1e-5)
