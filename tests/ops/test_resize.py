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


def test_a_cell_stays_where_its_stride_puts_it_whatever_the_size_of_the_image():
    """23 cells of stride 8 on 180 pixels are the first 23 of those on 192, and are resized as those are."""
    cells = random_map(1, 24, 30, 3)
    whole = resize(cells, (192, 240))
    part = resize(cells[:, :23], (180, 240), (1 / 8, 1 / 8))
    np.testing.assert_allclose(part, whole[:, :180], rtol=1e-5, atol=1e-5)
    assert np.abs(resize(cells[:, :23], (180, 240)) - whole[:, :180]).max() > 1  # By the sizes they would move.


# Valid parts of maps of 9 x 12 cells, resized to 33 x 20 by these cells per cell.
PARTS = [
    ((9, 12), (9 / 33, 12 / 20)),
    ((5, 3), (0.25, 0.125)),
    ((1, 1), (1, 1)),
    ((1, 12), (1 / 32, 2.5)),
    ((8, 7), (0.3, 0.5)),
    ((7, 8), (1, 1)),
]


def test_beyond_the_valid_part_its_last_cells_are_repeated():
    x = random_map(len(PARTS), 9, 12, 3)
    for row, ((h, w), _) in enumerate(PARTS):
        x[row, h:], x[row, :, w:] = 1e6, -1e6
    valid_in_hw, ratio_hw = (jnp.array(values) for values in zip(*PARTS, strict=True))
    result = np.asarray(resize(x, (33, 20), ratio_hw, valid_in_hw))
    for row, ((h, w), ratio) in enumerate(PARTS):
        repeated = np.pad(x[row, :h, :w], [(0, 100), (0, 100), (0, 0)], mode="edge")
        bare = resize(repeated[None], (33, 20), ratio)[0]
        np.testing.assert_allclose(result[row], bare, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_resized_in_float32():
    x = jnp.array([0, 1], jnp.bfloat16).reshape(1, 1, 2, 1)
    result = resize(x, (1, 512))
    assert result.dtype == resize(x, (1, 2)).dtype == jnp.float32
    np.testing.assert_allclose(result[0, 0, 128:384, 0], (np.arange(256) + 0.5) / 256, rtol=1e-5)
