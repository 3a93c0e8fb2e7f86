"""The operator against its definition, lax's convolution, finite differences and torchvision."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.ops import bilinear_sample, dynamic_sampling_conv


def sample_by_definition(features, y, x):
    """[H, W, C] at one point, cell by cell, as equation 2 has it."""
    total = np.zeros(features.shape[-1])
    for row in range(features.shape[0]):
        for column in range(features.shape[1]):
            total += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * features[row, column]
    return total


def convolve_by_definition(features, offsets, kernel, modulation):
    batch, height, width, _ = features.shape
    side = kernel.shape[0]
    result = np.zeros((batch, height, width, kernel.shape[-1]))
    for b, i, j, m, n in np.ndindex(batch, height, width, side, side):
        dy, dx = offsets[b, i, j, m * side + n]
        sample = sample_by_definition(features[b], i + m - (side - 1) / 2 + dy, j + n - (side - 1) / 2 + dx)
        result[b, i, j] += modulation[b, i, j, m * side + n] * sample @ kernel[m, n]
    return result


def random_arguments(side, shape=(2, 4, 5, 3), out=2, seed=0):
    """Float64 features, offsets of up to three cells that are no whole numbers, kernel, modulation."""
    rng = np.random.default_rng(seed)
    offsets = rng.integers(-3, 3, (*shape[:3], side**2, 2)) + rng.uniform(0.1, 0.9, (*shape[:3], side**2, 2))
    kernel = rng.standard_normal((side, side, shape[-1], out))
    return rng.standard_normal(shape), offsets, kernel, rng.uniform(0, 2, offsets.shape[:-1])


compiled = jax.jit(dynamic_sampling_conv, static_argnames="formulation")
compiled_sample = jax.jit(bilinear_sample)


@partial(jax.jit, static_argnames="formulation")
def with_gradients(cotangent, *arguments, formulation=None):
    """The output, and the gradients of sum(cotangent * output) by every argument."""
    output, pullback = jax.vjp(partial(dynamic_sampling_conv, formulation=formulation), *arguments)
    return output, pullback(cotangent)


@pytest.fixture(params=["gather", "hat"])
def formulation(request):
    return request.param


def as_float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def all_taps_to_the_centre():
    """Offsets [1, 1, 1, 9, 2]."""
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(-1.0, 2)] * 2, indexing="ij"), axis=-1)
    return -grid.reshape(1, 1, 1, 9, 2)


def lax_convolution(features, kernel, padding):
    return jax.lax.conv_general_dilated(
        features,
        kernel,
        (1, 1),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


@pytest.mark.parametrize(
    ("point_yx", "expected"),
    [
        ((0, 0), 1),
        ((1, 0), 3),
        ((0, 1), 2),
        ((0.5, 0.5), 2.5),
        ((0, 0.25), 1.25),
        ((0.25, 0), 1.5),
        ((-0.5, 0), 0.5),
        ((0, 1.5), 1),
        ((1.5, 1.5), 1),
        ((-0.75, 1.25), 0.375),
        ((-1, 0), 0),
        ((0, 2), 0),
        ((7, -9), 0),
        ((1e9, 0), 0),
        ((-1e30, 1e30), 0),
    ],
)
def test_a_point_reads_the_weighted_mean_of_four_cells_and_zero_outside(point_yx, expected):
    features = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    assert compiled_sample(features, jnp.array([point_yx], jnp.float32))[0, 0] == expected


def test_points_of_any_rank_are_read_each_in_its_own_image():
    features = jnp.arange(2.0)[:, None, None, None] * jnp.ones((2, 1, 1, 5)) + jnp.arange(5.0)
    read = compiled_sample(features, jnp.zeros((2, 3, 4, 6, 2)))
    np.testing.assert_array_equal(read, jnp.broadcast_to(features[:, :, :, None], (2, 3, 4, 6, 5)))


def test_a_single_cell_is_read_by_the_tap_that_hits_it(formulation):
    features, kernel = jnp.full((1, 1, 1, 1), 2.0), jnp.arange(9.0).reshape(3, 3, 1, 1)
    offsets = jnp.zeros((1, 1, 1, 9, 2))
    assert compiled(features, offsets, kernel, formulation=formulation) == 2 * 4
    assert compiled(features, all_taps_to_the_centre(), kernel, formulation=formulation) == 2 * sum(range(9))


@pytest.mark.parametrize(
    ("side", "shape"), [(1, (1, 3, 6, 2)), (3, (2, 4, 5, 3)), (3, (1, 1, 7, 2)), (5, (1, 5, 4, 3))]
)
def test_it_computes_its_definition(side, shape, formulation):
    arguments = as_float32(*random_arguments(side, shape))
    expected = convolve_by_definition(*(np.asarray(array, np.float64) for array in arguments))
    np.testing.assert_allclose(compiled(*arguments, formulation=formulation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_zero_offsets_make_it_a_convolution_with_zero_padding(side, formulation):
    features, offsets, kernel, _ = as_float32(*random_arguments(side, (2, 7, 6, 3)))
    expected = lax_convolution(features, kernel, side // 2)
    np.testing.assert_allclose(
        compiled(features, 0 * offsets, kernel, formulation=formulation), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shift_yx", [(1, 0), (0, 1), (-2, 3), (4, -1)])
def test_the_same_whole_offset_everywhere_shifts_the_map(shift_yx):
    features, offsets, kernel, _ = as_float32(*random_arguments(3, (1, 5, 6, 2)))
    beyond = 5  # The map goes on as zero.
    y, x = beyond + shift_yx[0], beyond + shift_yx[1]
    expected = lax_convolution(features, kernel, beyond + 1)[:, y : y + 5, x : x + 6]
    shifted = compiled(features, 0 * offsets + jnp.array(shift_yx), kernel)
    np.testing.assert_allclose(shifted, expected, rtol=1e-5, atol=1e-5)


def test_it_computes_what_torchvision_does_and_so_do_its_gradients(torch_cases, formulation):
    for name, case in torch_cases("ops", "deform_conv2d").items():
        batch, _, height, width = case["input"].shape

        def as_points(array, batch=batch, height=height, width=width):
            """[B, 2 * k * k, H, W] -> [B, H, W, k * k, 2]: torch keeps dy and dx of a tap side by side."""
            return array.transpose(0, 2, 3, 1).reshape(batch, height, width, -1, 2)

        to_ours = {
            "input": lambda array: array.transpose(0, 2, 3, 1),
            "offset": as_points,
            "weight": lambda array: array.transpose(2, 3, 1, 0),
            "mask": lambda array: array.transpose(0, 2, 3, 1),
        }
        names = [argument for argument in to_ours if argument in case]
        with jax.enable_x64(True):
            arguments = [to_ours[argument](case[argument]) for argument in names]
            output, gradients = with_gradients(to_ours["input"](case["cotangent"]), *arguments, formulation=formulation)
        in_float32 = as_float32(to_ours["input"](case["cotangent"]), *arguments)
        rough_output, rough_gradients = with_gradients(*in_float32, formulation=formulation)
        results = {"output": (output, rough_output, to_ours["input"](case["output"]))}
        for argument, *gradient in zip(names, gradients, rough_gradients, strict=True):
            results[argument] = (*gradient, to_ours[argument](case[f"{argument}_gradient"]))
        for result, (exact, rough, expected) in results.items():
            np.testing.assert_allclose(exact, expected, rtol=1e-9, atol=1e-9, err_msg=f"{name}: {result}")
            assert np.linalg.norm(rough - expected) <= 1e-6 * np.linalg.norm(expected), f"{name}: {result}"


def test_gradients_between_cells_are_the_central_differences(formulation):
    arguments = random_arguments(3)
    rng = np.random.default_rng(1)
    cotangent = rng.standard_normal((2, 4, 5, 2))
    with jax.enable_x64(True):
        _, gradients = with_gradients(cotangent, *arguments, formulation=formulation)
    for position, name in enumerate(("features", "offsets", "kernel", "modulation")):
        for _ in range(4):
            direction = rng.standard_normal(arguments[position].shape)
            ahead, behind = (
                convolve_by_definition(*arguments[:position], arguments[position] + step, *arguments[position + 1 :])
                for step in (1e-6 * direction, -1e-6 * direction)
            )
            difference = np.sum(cotangent * (ahead - behind)) / 2e-6
            slope = np.sum(np.asarray(gradients[position]) * direction)
            np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_by_offsets_at_whole_numbers_are_the_forward_differences(axis, formulation):
    features, offsets, kernel, modulation = random_arguments(3)
    offsets = np.round(offsets)
    rng = np.random.default_rng(1)
    cotangent = rng.standard_normal((2, 4, 5, 2))
    with jax.enable_x64(True):
        _, (_, gradient, _, _) = with_gradients(
            cotangent, features, offsets, kernel, modulation, formulation=formulation
        )
    bends = []
    for _ in range(5):
        direction = np.zeros_like(offsets)
        direction[..., axis] = rng.uniform(0, 1, offsets.shape[:-1])
        behind, here, ahead = (
            np.sum(cotangent * convolve_by_definition(features, offsets + step, kernel, modulation))
            for step in (-1e-6 * direction, 0, 1e-6 * direction)
        )
        bends.append((ahead - 2 * here + behind) / 1e-6)
        slope = np.sum(np.asarray(gradient) * direction)
        np.testing.assert_allclose(slope, (ahead - here) / 1e-6, rtol=1e-6, atol=1e-6)
    assert np.abs(bends).min() > 1e-3  # The backward difference is another one.


@pytest.mark.parametrize("distance", [50, 1e9, -1e9, 1e30])
def test_far_points_give_zero_and_finite_gradients(distance, formulation):
    features, offsets, kernel, modulation = as_float32(*random_arguments(3))
    cotangent = jnp.ones((2, 4, 5, 2))
    output, gradients = with_gradients(
        cotangent, features, offsets + distance, kernel, modulation, formulation=formulation
    )
    assert not np.any(output)
    assert all(not np.any(gradient) for gradient in gradients)


def test_coordinates_stay_in_float32_where_features_are_bfloat16(formulation):
    stripes = jnp.tile(jnp.array([0, 1], jnp.bfloat16), 64).reshape(1, 1, 128, 1)  # bfloat16 has steps of 1/2 at 100.
    position = jnp.arange(128) == 100
    offsets = jnp.where(position[None, None, :, None, None], jnp.array([0, 0.3]), 0.0)
    output = compiled(stripes, offsets, jnp.ones((1, 1, 1, 1)), formulation=formulation)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output[0, 0, 100, 0].astype(float), 0.3, atol=2e-3)
    assert compiled_sample(stripes, jnp.array([[[0, 100.3]]])).dtype == jnp.bfloat16


def test_samples_of_bfloat16_are_summed_in_float32(formulation):
    kernel = jnp.array([256.0, *[1] * 7, -256]).reshape(3, 3, 1, 1)  # 257 is no bfloat16.
    output = compiled(jnp.ones((1, 3, 3, 1), jnp.bfloat16), jnp.zeros((1, 3, 3, 9, 2)), kernel, formulation=formulation)
    assert output[0, 1, 1, 0] == 7


def test_what_is_read_of_one_cell_of_bfloat16_adds_up_in_the_gradient_over_points_and_taps(formulation):
    features, points = jnp.ones((1, 1, 1, 1), jnp.bfloat16), jnp.zeros((1, 1024, 2))
    _, pullback = jax.vjp(lambda features: bilinear_sample(features, points), features)
    assert pullback(jnp.ones((1, 1024, 1), jnp.bfloat16))[0] == 1024  # A sum of ones in bfloat16 ends at 256.
    kernel = jnp.ones((3, 3, 1, 1)).at[1, 1].set(256)
    _, (gradient, _, _) = with_gradients(features, features, all_taps_to_the_centre(), kernel, formulation=formulation)
    assert gradient == 264


def test_gradients_of_bfloat16_features_are_those_of_float32_to_their_precision(formulation):
    features, offsets, kernel, modulation = as_float32(*random_arguments(3))
    features = features.astype(jnp.bfloat16)
    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)

    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 5, 2)), jnp.bfloat16)
    _, rounded = with_gradients(cotangent, features, offsets, kernel, modulation, formulation=formulation)
    _, exact = with_gradients(*as_float32(cotangent, features, offsets, kernel, modulation), formulation=formulation)
    types = {"features": jnp.bfloat16, "offsets": jnp.float32, "kernel": jnp.float32, "modulation": jnp.float32}
    for (name, dtype), gradient, wanted in zip(types.items(), rounded, exact, strict=True):
        assert gradient.dtype == dtype, name
        gradient, wanted = np.asarray(gradient, np.float32), np.asarray(wanted)
        error = np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted)
        assert error < 0.02, name


@pytest.mark.parametrize(
    ("argument", "shape", "named"),
    [
        ("kernel", (2, 2, 3, 2), "kernel"),
        ("kernel", (3, 1, 3, 2), "kernel"),
        ("kernel", (3, 3, 4, 2), "kernel"),
        ("kernel", (3, 3, 3), "kernel"),
        ("offsets", (2, 4, 5, 18), "offsets"),
        ("offsets", (2, 4, 5, 8, 2), "offsets"),
        ("offsets", (2, 5, 4, 9, 2), "offsets"),
        ("offsets", (1, 4, 5, 9, 2), "offsets"),
        ("modulation", (2, 4, 5, 1), "modulation"),
        ("modulation", (2, 4, 5, 9, 1), "modulation"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_named(argument, shape, named):
    arguments = dict(
        zip(("features", "offsets", "kernel", "modulation"), as_float32(*random_arguments(3)), strict=True)
    )
    with pytest.raises(ValueError, match=rf"^{named} .*{re.escape(str(shape))}"):
        dynamic_sampling_conv(**arguments | {argument: jnp.zeros(shape)})


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (7, 3)])
def test_both_formulations_agree_on_odd_maps_and_bands_of_any_size(height, width):
    for channels in (1, 5, 64):  # One row to a band, several, all.
        features, offsets, kernel, modulation = as_float32(*random_arguments(3, (2, height, width, channels), 4))
        offsets = offsets.at[:, :, :, ::2].set(jnp.round(offsets[:, :, :, ::2]))
        cotangent = as_float32(np.random.default_rng(1).standard_normal((2, height, width, 4)))[0]
        results = [
            jax.tree.leaves(with_gradients(cotangent, features, offsets, kernel, modulation, formulation=formulation))
            for formulation in ("gather", "hat")
        ]
        for by_gather, by_products in zip(*results, strict=True):
            assert np.linalg.norm(by_gather - by_products) < 1e-5 * (1e-3 + np.linalg.norm(by_gather))


def test_an_unknown_formulation_is_refused():
    with pytest.raises(ValueError, match=r"'im2col'.*'gather', 'hat'"):
        dynamic_sampling_conv(*as_float32(*random_arguments(3)), formulation="im2col")
