"""Which cells are valid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.ops import Extent


def halved(size, times):
    """The side of a feature map after so many convolutions of stride 2."""
    for _ in range(times):
        size = (size + 1) // 2
    return size


def test_valid_cells_are_what_the_bare_image_would_have_given():
    sizes = np.arange(1, 161)
    extent = Extent(jnp.asarray(np.stack([sizes, sizes[::-1]], -1)), (160, 160))
    for times, stride in enumerate((1, 2, 4, 8, 16, 32)):
        expected = [[halved(h, times), halved(w, times)] for h, w in zip(sizes, sizes[::-1], strict=True)]
        np.testing.assert_array_equal(extent.valid_hw((160 // stride, 160 // stride)), expected)


def test_the_cells_of_a_long_strip_are_counted_though_its_sides_product_is_beyond_int32():
    extent = Extent(jnp.array([[200, 50_000]]), (224, 53_248))
    np.testing.assert_array_equal(extent.valid_hw((224, 53_248)), [[200, 50_000]])
    np.testing.assert_array_equal(extent.valid_hw((28, 6_656)), [[25, 6_250]])


def test_height_and_width_are_not_mixed_up():
    extent = Extent(jnp.array([[33, 40], [1, 128]]), (64, 128))
    np.testing.assert_array_equal(extent.valid_hw((8, 16)), [[5, 5], [1, 16]])
    mask = extent.mask((8, 16))
    assert mask.shape == (2, 8, 16, 1) and mask.dtype == bool
    expected = np.zeros((2, 8, 16, 1), bool)
    expected[0, :5, :5] = expected[1, :1, :16] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outside_becomes_zero_whatever_was_there_and_inside_stays(dtype):
    extent = Extent(jnp.array([[20, 64]]), (32, 64))
    x = jnp.full((1, 4, 8, 2), 5, dtype).at[:, 3:].set(jnp.nan)
    result = extent.zero_outside(x)
    assert result.dtype == x.dtype
    np.testing.assert_array_equal(result[:, :3].astype(float), 5)
    np.testing.assert_array_equal(result[:, 3:].astype(float), 0)


@pytest.mark.parametrize("canvas_hw", [(33, 64), (64, 40), (16, 32)])
def test_a_canvas_that_features_do_not_divide_is_refused(canvas_hw):
    with pytest.raises(ValueError, match="32"):
        Extent(jnp.array([[1, 1]]), canvas_hw)


def test_sizes_are_traced_and_the_canvas_is_static():
    traces = []

    @jax.jit
    def valid_at_stride_8(extent):
        traces.append(extent.canvas_hw)
        return extent.valid_hw((extent.canvas_hw[0] // 8, extent.canvas_hw[1] // 8))

    for size, canvas in ((9, 32), (17, 32), (17, 64)):
        valid = valid_at_stride_8(Extent(jnp.array([[size, size]]), (canvas, canvas)))
        np.testing.assert_array_equal(valid, [[-(-size // 8)] * 2])
    assert traces == [(32, 32), (64, 64)]
