"""Resizing against PyTorch, and of maps whose valid parts differ in size."""

import jax
import jax.numpy as jnp
import numpy as np

from dsnet_jax.ops import resize_bilinear

resize = jax.jit(resize_bilinear, static_argnums=1)


def random_map(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_it_computes_what_torch_interpolate_does(torch_cases):
    cases = torch_cases("ops", "interpolate")
    assert len(cases) > 5
    with jax.enable_x64(True):
        for name, case in cases.items():
            x, expected = (array.transpose(0, 2, 3, 1) for array in case.values())
            np.testing.assert_allclose(resize(x, expected.shape[1:3]), expected, rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_ramp_shrunk_by_two_and_grown_by_two():
    ramp = jnp.arange(4.0).reshape(1, 1, 4, 1)
    np.testing.assert_allclose(resize(ramp, (1, 2)).ravel(), [0.5, 2.5])
    np.testing.assert_allclose(resize(ramp, (1, 8)).ravel(), [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_nothing_is_antialiased():
    stripes = jnp.array([1.0, 0, 0, 0, 0, 0] * 2).reshape(1, 1, 12, 1)
    np.testing.assert_allclose(resize(stripes, (1, 4)).ravel(), 0, atol=1e-6)  # Cells 1, 4, 7 and 10.


def test_the_same_size_changes_nothing():
    x = random_map(2, 5, 7, 3)
    np.testing.assert_array_equal(resize(x, (5, 7)), x)


def test_valid_parts_are_resized_where_the_maps_are_of_one_size():
    x = random_map(1, 5, 7, 3)
    result = resize(x, (5, 7), jnp.array([[2, 3]]), jnp.array([[4, 6]]))
    np.testing.assert_allclose(result[:, :4, :6], resize(x[:, :2, :3], (4, 6)), rtol=1e-5, atol=1e-5)


# Maps of 9 x 12 cells with other valid parts, resized to 33 x 20 with other valid parts: (valid in, valid out).
PARTS = [
    ((9, 12), (33, 20)),
    ((5, 3), (17, 20)),
    ((1, 1), (1, 1)),
    ((1, 12), (33, 1)),
    ((8, 7), (3, 5)),
    ((7, 8), (7, 8)),
]


def test_the_valid_part_is_the_bare_map_resized_and_beyond_it_the_last_valid_cell_is_repeated():
    x = random_map(len(PARTS), 9, 12, 3)
    for row, ((h, w), _) in enumerate(PARTS):
        x[row, h:], x[row, :, w:] = 1e6, -1e6
    result = np.asarray(resize(x, (33, 20), *jnp.array(PARTS).swapaxes(0, 1)))
    for row, ((h, w), (height, width)) in enumerate(PARTS):
        bare = resize(x[row : row + 1, :h, :w], (height, width))[0]
        np.testing.assert_allclose(result[row, :height, :width], bare, rtol=1e-5, atol=1e-5)
        beyond = result[row, height:, width:]
        np.testing.assert_allclose(beyond, np.broadcast_to(x[row, h - 1, w - 1], beyond.shape), rtol=1e-5)


def test_bfloat16_is_resized_in_float32():
    x = jnp.array([0, 1], jnp.bfloat16).reshape(1, 1, 2, 1)
    result = resize(x, (1, 512))
    assert result.dtype == resize(x, (1, 2)).dtype == jnp.float32
    np.testing.assert_allclose(result[0, 0, 128:384, 0], (np.arange(256) + 0.5) / 256, rtol=1e-5)
