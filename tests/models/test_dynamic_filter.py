"""The dynamic filter against a plain loop."""

import numpy as np

from dsnet_jax.models.dynamic_filter import DynamicFilter, convolve_depthwise

X = np.random.default_rng(0).standard_normal((2, 5, 6, 4)).astype(np.float32)


def by_loop(x, kernels):
    result = np.zeros(x.shape)
    (batch, height, width, _), k = x.shape, kernels.shape[1]
    for image, row, column, m, n in np.ndindex(batch, height, width, k, k):
        y, z = row + m - k // 2, column + n - k // 2
        if 0 <= y < height and 0 <= z < width:
            result[image, row, column] += x[image, y, z] * kernels[image, m, n]
    return result


def test_each_channel_of_each_image_is_convolved_with_its_own_kernel():
    for k in (1, 3, 5):
        kernels = np.random.default_rng(k).standard_normal((2, k, k, 4)).astype(np.float32)
        np.testing.assert_allclose(convolve_depthwise(X, kernels), by_loop(X, kernels), rtol=1e-4, atol=1e-5)


def test_the_kernel_comes_from_the_image_by_convolution_pooling_and_convolution(random_variables):
    module = DynamicFilter(3)
    variables = random_variables(module, X, train=False)
    params, statistics = variables["params"], variables["batch_stats"]

    def normalised(y, scale_and_bias, moments):
        y = (y - moments["mean"]) / np.sqrt(moments["var"] + 1e-5)
        return np.maximum(y * scale_and_bias["scale"] + scale_and_bias["bias"], 0)

    reduced = X @ params["reduce"]["conv"]["kernel"][0, 0]
    reduced = normalised(reduced, params["reduce"]["norm"], statistics["reduce"]["norm"])
    bins = [(slice(0, 2), slice(1, 4), slice(3, 5)), (slice(0, 2), slice(2, 4), slice(4, 6))]  # Of 5 rows, 6 columns.
    means = np.array([[reduced[:, rows, columns].mean((1, 2)) for columns in bins[1]] for rows in bins[0]])
    kernels = means.transpose(2, 0, 1, 3) @ params["generate"]["kernel"][0, 0] + params["generate"]["bias"]
    expected = normalised(by_loop(X, kernels), params["norm"], statistics["norm"])
    np.testing.assert_allclose(module.apply(variables, X, train=False), expected, rtol=1e-4, atol=1e-5)
