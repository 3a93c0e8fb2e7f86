"""Each layer against lax, NumPy or PyTorch's rules; with an extent against itself on the bare map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax import parallel
from dsnet_jax.models.layers import BatchNorm, Conv, ConvNormRelu, global_mean, max_pool, resize_map
from dsnet_jax.models.resnet import BasicBlock
from dsnet_jax.ops import Extent, resize_bilinear

SIZES = [(8, 6), (7, 5), (1, 1), (2, 9)]


def random_map(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize(
    ("side", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 1, 4), (3, 2, 2), (7, 2, 1)]
)
def test_a_convolution_is_laxs_with_symmetric_padding(size_hw, side, stride, dilation):
    x, kernel, bias = random_map(2, *size_hw, 3), random_map(side, side, 3, 4, seed=1), random_map(4, seed=2)
    conv = Conv(4, side, stride, dilation, use_bias=True)
    result = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    padded = np.pad(x, [(0, 0), *[(dilation * (side - 1) // 2,) * 2] * 2, (0, 0)])
    expected = jax.lax.conv_general_dilated(
        padded, kernel, (stride, stride), "VALID", None, (dilation, dilation), ("NHWC", "HWIO", "NHWC")
    )
    assert result.shape == (2, -(-size_hw[0] // stride), -(-size_hw[1] // stride), 4)
    np.testing.assert_allclose(result, expected + bias, rtol=1e-5, atol=1e-5)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size is 2"):
        Conv(4, 2).init(jax.random.key(0), random_map(1, 3, 3, 2))


def test_a_convolution_has_no_bias_unless_asked_and_starts_as_pytorch_starts_it():
    params = Conv(256, 3).init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))["params"]
    assert params.keys() == {"kernel"} and params["kernel"].dtype == jnp.float32
    bound = (9 * 16) ** -0.5
    assert 0.99 * bound < np.abs(params["kernel"]).max() <= bound
    np.testing.assert_allclose(np.std(params["kernel"]), bound / 3**0.5, rtol=0.02)


def test_the_backbone_starts_with_he_variance_by_its_outputs():
    params = BasicBlock(256, 1, (1, 1)).init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)), train=False)["params"]
    for name, side in (("conv1", 3), ("conv2", 3), ("downsample_conv", 1)):
        np.testing.assert_allclose(np.std(params[name]["kernel"]), (2 / (side**2 * 256)) ** 0.5, rtol=0.05)


@pytest.mark.parametrize("side", [1, 3])
def test_a_convolution_computes_in_its_dtype_from_float32_parameters(side, random_variables):
    conv = Conv(4, side, use_bias=True, dtype=jnp.bfloat16)
    x = random_map(1, 5, 5, 8)
    variables = random_variables(conv, x)
    assert jax.tree.all(
        jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, jax.eval_shape(conv.init, jax.random.key(0), x))
    )
    result = conv.apply(variables, x)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), Conv(4, side, use_bias=True).apply(variables, x), atol=0.05)


@pytest.mark.parametrize("size_hw", SIZES)
def test_max_pooling_pads_one_cell_on_each_side_as_torchs_does(size_hw):
    x = np.maximum(random_map(2, *size_hw, 3), 0)
    rows, columns = (-(-side // 2) for side in size_hw)
    expected = np.zeros((2, rows, columns, 3))
    for i, j in np.ndindex(rows, columns):
        expected[:, i, j] = x[:, max(0, 2 * i - 1) : 2 * i + 2, max(0, 2 * j - 1) : 2 * j + 2].max(axis=(1, 2))
    np.testing.assert_array_equal(max_pool(x), expected)


def test_batch_statistics_of_a_large_mean_do_not_cancel():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 8, 8, 4)) + 1000
    expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    norm = BatchNorm()
    variables = {
        "params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }
    result, _ = norm.apply(variables, jnp.asarray(x, jnp.float32), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(result, expected, atol=1e-3)
    flax_default = nn.BatchNorm(use_running_average=False, epsilon=1e-5)
    cancelled, _ = flax_default.apply(variables, jnp.asarray(x, jnp.float32), mutable=["batch_stats"])
    assert np.abs(cancelled - expected).max() > 1e-2  # Or the test would say nothing.


def test_running_statistics_move_by_a_tenth_and_are_what_evaluation_uses(random_variables):
    norm, x = BatchNorm(), random_map(4, 3, 2, 5)
    variables = random_variables(norm, x, train=False)
    old, params = variables["batch_stats"], variables["params"]
    _, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    new = updated["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * x.var((0, 1, 2)), rtol=1e-5)
    expected = (x - old["mean"]) / np.sqrt(old["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(norm.apply(variables, x, train=False), expected, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_the_batch_on_all_devices(random_variables):
    norm, x = BatchNorm(), random_map(16, 2, 3, 4) + np.arange(16, dtype=np.float32)[:, None, None, None]
    variables = random_variables(norm, x, train=False)
    mesh = parallel.mesh_over(jax.devices())
    split, whole = parallel.split_by_batch(mesh), parallel.replicated(mesh)

    def train(variables, x):
        return norm.apply(variables, x, train=True, mutable=["batch_stats"])

    on_one = jax.jit(train)(variables, x)
    on_eight = jax.jit(train)(jax.device_put(variables, whole), jax.device_put(x, split))
    assert len(on_eight[0].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), on_one, on_eight)


def test_normalisation_in_bfloat16_keeps_statistics_in_float32(random_variables):
    layer = ConvNormRelu(4, 3, dtype=jnp.bfloat16)
    x = random_map(2, 4, 4, 3).astype(jnp.bfloat16)
    variables = random_variables(layer, x, train=False)
    result, updated = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert result.dtype == jnp.bfloat16 and result.min() >= 0
    started = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=True))
    assert {leaf.dtype for leaf in jax.tree.leaves((started, updated))} == {jnp.dtype("float32")}


LAYERS = {
    "3x3": lambda x, extent: Conv(2, 3).apply({"params": {"kernel": random_map(3, 3, 2, 2)}}, x, extent),
    "5x5, dilated, stride 2": lambda x, extent: Conv(2, 5, 2, 2).apply(
        {"params": {"kernel": random_map(5, 5, 2, 2)}}, x, extent
    ),
    "max_pool": max_pool,
    "global_mean": global_mean,
    "resize_map": lambda x, extent: resize_map(x, tuple(2 * side for side in x.shape[1:3]), 0.5, extent),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_valid_part_gets_what_the_bare_map_gets_whatever_lies_beyond(layer):
    sizes_hw = [(64, 96), (32, 80), (16, 16), (48, 16)]  # At stride 16: every valid side doubles exactly.
    x = np.abs(random_map(4, 4, 6, 2))
    for row, (height, width) in enumerate(sizes_hw):
        x[row, height // 16 :], x[row, :, width // 16 :] = 100, 200
    layer = jax.jit(layer)
    result = layer(x, Extent(jnp.array(sizes_hw), (64, 96)))
    for row, (height, width) in enumerate(sizes_hw):
        bare = layer(x[row : row + 1, : height // 16, : width // 16], None)[0]
        np.testing.assert_allclose(result[row, : bare.shape[0], : bare.shape[1]], bare, rtol=1e-4, atol=1e-5)


def test_a_mean_of_bfloat16_is_rounded_once():
    x = jnp.asarray(random_map(1, 5, 7, 512), jnp.bfloat16)
    expected = np.asarray(x, np.float64).mean((1, 2), keepdims=True).astype(jnp.bfloat16)
    for canvas in (None, 160):
        padded = x if canvas is None else jnp.pad(x, [(0, 0), (0, 5), (0, 3), (0, 0)])
        mean = global_mean(padded, None if canvas is None else Extent(jnp.array([[80, 112]]), (160, 160)))
        assert mean.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mean, expected)


def test_a_map_keeps_its_type_when_resized_and_stays_itself_at_its_own_size():
    x = jnp.asarray(random_map(1, 4, 6, 2), jnp.bfloat16)
    assert resize_map(x, (4, 6), 1.0) is x
    resized = resize_map(x, (8, 12), 0.5)
    assert resized.dtype == jnp.bfloat16
    np.testing.assert_array_equal(resized, resize_bilinear(x, (8, 12)).astype(jnp.bfloat16))
