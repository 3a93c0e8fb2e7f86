"""The convolution against lax's own, with all gradients, in whatever formulation it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax import parallel
from dsnet_jax.ops import convolution
from dsnet_jax.ops.convolution import conv2d

# Size of the map, of the kernel, stride, dilation.
CASES = {
    "1x1": ((5, 7), 1, 1, 1),
    "1x1, stride 2, odd": ((5, 7), 1, 2, 1),
    "1x1, stride 2, even": ((6, 8), 1, 2, 1),
    "1x1, stride 2, one cell": ((1, 2), 1, 2, 1),
    "3x3": ((5, 7), 3, 1, 1),
    "3x3, stride 2": ((6, 7), 3, 2, 1),
    "7x7, stride 2": ((9, 8), 7, 2, 1),
    "3x3, dilation 2 of many cells": ((24, 25), 3, 1, 2),
    "3x3, dilation 4 of few cells": ((7, 9), 3, 1, 4),
    "3x3, dilation beyond the map one way": ((4, 20), 3, 1, 5),
    "3x3, dilation beyond the map": ((3, 4), 3, 1, 6),
    "5x5, dilation 3": ((8, 6), 5, 1, 3),
    "3x3, stride 2, dilation 4": ((7, 9), 3, 2, 4),
}


def plain(x, kernel, stride, dilation):
    padding = (kernel.shape[0] // 2 * dilation,) * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), rhs_dilation=(dilation, dilation), dimension_numbers=numbers
    )


def inputs(size_hw, size, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, *size_hw, 4)), rng.standard_normal((size, size, 4, 3))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


@pytest.mark.parametrize("size_hw, size, stride, dilation", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_a_plain_convolution(size_hw, size, stride, dilation):
    def with_gradients(convolve, x, kernel):
        def both(x, kernel, upstream):
            result, gradients = jax.vjp(lambda x, kernel: convolve(x, kernel, stride, dilation), x, kernel)
            return result, *gradients(upstream)

        shape = jax.eval_shape(lambda x, kernel: plain(x, kernel, stride, dilation), x, kernel).shape
        return jax.jit(both)(x, kernel, np.random.default_rng(1).standard_normal(shape))

    with jax.enable_x64(True):
        x, kernel = inputs(size_hw, size, jnp.float64)
        for ours, theirs in zip(with_gradients(conv2d, x, kernel), with_gradients(plain, x, kernel), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_taps_are_multiplied_one_by_one_on_a_cpu_where_much_lies_outside_and_nowhere_else():
    def operations(size_hw, dilation, platform):
        x, kernel = inputs(size_hw, 3)
        lowered = jax.jit(lambda x, kernel: conv2d(x, kernel, 1, dilation)).trace(x, kernel)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert operations((8, 8), 6, "cpu") == (0, 9)
    assert operations((8, 8), 8, "cpu") == (0, 1)  # Only the middle tap is inside.
    assert operations((32, 32), 2, "cpu") == (1, 0)
    for platform in ("tpu", "cuda"):
        assert operations((8, 8), 6, platform) == (1, 0)


def test_off_the_cpu_images_wait_for_the_gradient_as_they_are_and_feature_maps_do_not():
    def selections(channels):
        x, kernel = jnp.ones((2, 9, 8, channels)), jnp.ones((3, 3, channels, 4))
        gradient = jax.grad(lambda kernel: jnp.sum(conv2d(x, kernel, 2)))
        return jax.jit(gradient).trace(kernel).lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.select ")

    assert (selections(3), selections(8)) == (1, 0)


def test_a_product_for_each_tap_is_added_up_in_float32():
    x = jnp.ones((1, 9, 9, 1), jnp.bfloat16)
    kernel = jnp.full((3, 3, 1, 1), 0.004, jnp.bfloat16).at[0, 0].set(1)  # Each less than a step at 1.
    (result,) = conv2d(x, kernel, 1, 4)[0, 4, 4]
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), 1 + 8 * 0.004, rtol=4e-3)


def test_the_share_of_taps_inside_is_counted():
    assert convolution._share_inside(32, 3, 6) == (32 + 2 * 26) / 96
    assert convolution._share_inside(4, 3, 6) == 1 / 3
    assert convolution._share_inside(5, 1, 1) == 1


@pytest.mark.parametrize("dilation", [1, 4])
def test_no_device_asks_another_for_anything_but_the_sum_of_the_kernel_s_gradient(dilation):
    mesh = parallel.mesh_over(jax.devices())
    split, whole = parallel.split_by_batch(mesh), parallel.replicated(mesh)
    shapes = (
        jax.ShapeDtypeStruct((16, 8, 8, 4), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((3, 3, 4, 3), jnp.float32, sharding=whole),
    )
    gradient = jax.grad(lambda x, kernel: jnp.sum(conv2d(x, kernel, 1, dilation) ** 2), argnums=(0, 1))
    text = jax.jit(gradient, out_shardings=(split, whole)).lower(*shapes).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
