"""The backbone against torchvision's, against itself at other output strides, and by its strides and dilations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.models.layers import Conv
from dsnet_jax.models.resnet import RESNETS, BasicBlock, Bottleneck, ResNet

BLOCKS = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}
STRIDES = {  # Output stride -> stage -> image pixels per cell.
    8: {2: 4, 3: 8, 4: 8, 5: 8},
    16: {2: 4, 3: 8, 4: 16, 5: 16},
    32: {2: 4, 3: 8, 4: 16, 5: 32},
}


def torchvision_name(path):
    """('params', 'stage3_block0', 'norm1', 'scale') -> 'layer2.0.bn1.weight'."""
    *modules, leaf = path[1:]
    module = ".".join(modules).replace("stem.conv", "conv1").replace("stem.norm", "bn1").replace("norm", "bn")
    module = module.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    for stage in (2, 3, 4, 5):
        module = module.replace(f"stage{stage}_block", f"layer{stage - 1}.")
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return f"{module}.{leaves[leaf]}"


def variables_by_torchvisions_names(network, image, parameter):
    def value(path, leaf):
        name = torchvision_name([entry.key for entry in path])
        if leaf.ndim == 1:
            return parameter(name, leaf.shape)
        return parameter(name, tuple(leaf.shape[i] for i in (3, 2, 0, 1))).transpose(2, 3, 1, 0)

    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), image, train=False))
    return jax.tree_util.tree_map_with_path(value, shapes)


def evaluate(network, variables, images):
    return jax.jit(lambda variables, images: network.apply(variables, images, train=False))(variables, images)


def convolutions(network):
    """Stride and dilation of every convolution, by the path of its module."""
    found = {}

    def note(call, arguments, keywords, context):
        if isinstance(context.module, Conv):
            found["/".join(context.module.path)] = (context.module.stride, context.module.dilation)
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))
    return found


def test_features_are_torchvisions(torch_cases, make_torch_fixtures):
    for name, case in torch_cases("models", "resnet").items():
        block, output_stride = name.split(", ")[:2]
        network = ResNet((1, 1, 2, 2), BLOCKS[block], output_stride=int(output_stride))
        image = case["image"].transpose(0, 2, 3, 1)
        variables = variables_by_torchvisions_names(network, image, make_torch_fixtures.resnet_parameter)
        features = evaluate(network, variables, image)
        assert features.keys() == {2, 3, 4, 5}
        for stage, feature in features.items():
            expected = case[f"stage{stage}"].transpose(0, 2, 3, 1)
            assert expected.std() > 0.1
            np.testing.assert_allclose(feature[..., ::37], expected, rtol=1e-3, atol=1e-4, err_msg=f"{name} {stage}")


@pytest.mark.parametrize(("block", "size_hw"), [(BasicBlock, (65, 47)), (Bottleneck, (48, 64))])
def test_features_at_finer_output_strides_subsampled_are_those_at_coarser_ones(block, size_hw, random_variables):
    images = np.random.default_rng(0).standard_normal((1, *size_hw, 3)).astype(np.float32)
    networks = {stride: ResNet((1, 1, 2, 2), block, output_stride=stride) for stride in (8, 16, 32)}
    variables = random_variables(networks[16], images, train=False)
    features = {stride: evaluate(network, variables, images) for stride, network in networks.items()}
    for stage, coarsest in features[32].items():
        assert np.std(coarsest) > 0.1
        for output_stride in (8, 16):
            step = STRIDES[32][stage] // STRIDES[output_stride][stage]
            subsampled = features[output_stride][stage][:, ::step, ::step]
            np.testing.assert_allclose(subsampled, coarsest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [64, 67, 1])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_a_feature_has_ceil_of_size_by_stride_cells(size, output_stride):
    network = ResNet((1, 1, 1, 1), Bottleneck, output_stride=output_stride)
    images = jnp.zeros((2, size, 2 * size, 3))
    features, _ = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), images, train=False))
    for stage, stride in STRIDES[output_stride].items():
        assert features[stage].shape == (2, -(-size // stride), -(-2 * size // stride), 2 ** (stage + 6))


# Stride and dilation of the 3x3 convolutions of stages 4 and 5, two blocks each.
STRIDED, PLAIN, BY_2, BY_4 = (2, 1), (1, 1), (1, 2), (1, 4)


@pytest.mark.parametrize(
    ("block", "output_stride", "multi_grid", "expected"),
    [
        (Bottleneck, 32, (), [STRIDED, PLAIN, STRIDED, PLAIN]),
        (Bottleneck, 16, (), [STRIDED, PLAIN, PLAIN, BY_2]),
        (Bottleneck, 8, (), [PLAIN, BY_2, BY_2, BY_4]),
        (Bottleneck, 16, (1, 4), [STRIDED, PLAIN, PLAIN, (1, 8)]),
        (Bottleneck, 8, (2, 4), [PLAIN, BY_2, BY_4, (1, 16)]),
        (BasicBlock, 32, (), [STRIDED, PLAIN, PLAIN, PLAIN, STRIDED, PLAIN, PLAIN, PLAIN]),
        (BasicBlock, 16, (), [STRIDED, PLAIN, PLAIN, PLAIN, PLAIN, BY_2, BY_2, BY_2]),
        (BasicBlock, 8, (), [PLAIN, BY_2, BY_2, BY_2, BY_2, BY_4, BY_4, BY_4]),
        (BasicBlock, 16, (1, 2), [STRIDED, PLAIN, PLAIN, PLAIN, PLAIN, BY_2, BY_4, BY_4]),
    ],
)
def test_strides_that_are_taken_become_dilations_and_multi_grid_multiplies_those_of_the_last_stage(
    block, output_stride, multi_grid, expected
):
    found = convolutions(ResNet((1, 1, 2, 2), block, output_stride=output_stride, multi_grid=multi_grid))
    names = ("conv2",) if block is Bottleneck else ("conv1", "conv2")
    of_3x3 = [found[f"stage{stage}_block{i}/{name}"] for stage in (4, 5) for i in (0, 1) for name in names]
    assert of_3x3 == expected
    assert found["stem/conv"] == STRIDED and found["stage2_block0/conv2"] == PLAIN
    shortcuts = [found[f"stage{stage}_block0/downsample_conv"][0] for stage in (3, 4, 5)]
    assert shortcuts == {8: [2, 1, 1], 16: [2, 2, 1], 32: [2, 2, 2]}[output_stride]


@pytest.mark.parametrize(
    ("stem", "kernels"),
    [
        ("v1", [(7, 7, 3, 64)]),
        ("v1c", [(3, 3, 3, 32), (3, 3, 32, 32), (3, 3, 32, 64)]),
        ("v1s", [(3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 64, 128)]),
    ],
)
def test_a_stem_is_one_7x7_or_three_3x3_and_halves_the_image(stem, kernels):
    network = ResNet((1, 1, 1, 1), BasicBlock, stem=stem)
    images = jnp.zeros((1, 64, 96, 3))
    features, variables = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), images, train=False))
    stems = [value["conv"]["kernel"].shape for name, value in variables["params"].items() if name.startswith("stem")]
    assert stems == kernels
    assert features[2].shape == (1, 16, 24, 64)
    strides = [stride for name, (stride, _) in convolutions(network).items() if name.startswith("stem")]
    assert strides == [2, 1, 1][: len(kernels)]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnet152", 58_143_808),
    ],
)
def test_there_are_as_many_parameters_as_in_torchvision_without_its_classifier(name, count):
    variables = jax.eval_shape(lambda: RESNETS[name]().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_stride": 4}, "output_stride is 4"),
        ({"output_stride": 64}, "output_stride is 64"),
        ({"multi_grid": (1, 2, 4)}, r"multi_grid is \(1, 2, 4\): stage5 has 2 blocks"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(arguments, message):
    network = RESNETS["resnet18"](**arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
