"""Means over bins: against PyTorch, and of maps whose valid parts differ in size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.ops import Extent
from dsnet_jax.ops.pooling import adaptive_mean

pool = jax.jit(adaptive_mean, static_argnums=1)


def test_it_computes_what_torch_adaptive_avg_pool2d_does(torch_cases):
    cases = torch_cases("ops", "adaptive_avg_pool2d")
    assert len(cases) > 5
    with jax.enable_x64(True):
        for name, case in cases.items():
            x, expected = (array.transpose(0, 2, 3, 1) for array in case.values())
            result = pool(x, expected.shape[1])
            np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("bins", [3, 6])
def test_each_image_is_pooled_over_its_own_valid_part(bins):
    sizes_hw = [(40, 64), (7, 25), (64, 9)]  # Of canvases of 64 x 64, at stride 8: 5 x 8, 1 x 4 and 8 x 2 cells.
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 2)).astype(np.float32)
    pooled = pool(x, bins, Extent(jnp.array(sizes_hw), (64, 64)))
    for row, (height, width) in enumerate(((5, 8), (1, 4), (8, 2))):
        alone = pool(x[row : row + 1, :height, :width], bins)
        np.testing.assert_allclose(pooled[row], alone[0], rtol=1e-5, atol=1e-6)


def test_sums_of_bfloat16_are_float32():
    x = jnp.ones((1, 48, 48, 1), jnp.bfloat16).at[0, 0, 0, 0].set(3)
    result = pool(x, 1)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, 1 + 2 / 48**2, rtol=1e-6)
