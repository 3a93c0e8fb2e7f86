"""The whole networks, DSNet and FCN, a Baseline without context: sizes, modes, types, gradients that reach all."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.models.baseline import Baseline
from dsnet_jax.models.cgds import CGDS
from dsnet_jax.models.deeplabv3plus import DeepLabV3Plus
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.models.layers import ConvNormRelu
from dsnet_jax.models.resnet import RESNETS, BasicBlock, ResNet

IMAGES = np.random.default_rng(0).standard_normal((4, 33, 64, 3)).astype(np.float32)


def small(network, output_stride=16, **arguments):
    dtype = {"dtype": arguments["dtype"]} if "dtype" in arguments else {}
    return network(ResNet((1, 1, 1, 1), BasicBlock, output_stride=output_stride, **dtype), 5, width=8, **arguments)


def train(network, variables, images, dropout_key):
    """The output in training and the new running statistics."""
    rngs = {"dropout": dropout_key}
    return network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])


def evaluate(network, variables, images):
    return jax.jit(lambda variables, images: network.apply(variables, images, train=False))(variables, images)


def shapes(network, images=IMAGES, train=False):
    """Output and variables, without computing anything."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.eval_shape(lambda: network.init_with_output(rngs, images, train=train))


def by_name(tree):
    return {"/".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module", params=[DSNet, Baseline])
def network(request):
    return small(request.param)


@pytest.fixture(scope="module")
def variables(network, random_variables):
    return random_variables(network, IMAGES, train=True)


@pytest.fixture(scope="module")
def gradients(network, variables):
    """A function of the dropout key: gradients, output and new statistics of a step whose points are all at zero."""

    def loss(params, statistics, key):
        output, updated = train(network, {"params": params, "batch_stats": statistics}, IMAGES, key)
        total = jnp.mean(output.logits**3) + jnp.mean(output.auxiliary_logits**3)
        return total, (output, updated["batch_stats"])

    program = jax.jit(jax.grad(loss, has_aux=True))
    if "cgds" in variables["params"]:
        cgds = variables["params"]["cgds"]
        at_zero = jax.tree.map(np.zeros_like, cgds["offset"])
        variables = variables | {"params": variables["params"] | {"cgds": cgds | {"offset": at_zero}}}
    return lambda key: program(variables["params"], variables["batch_stats"], jax.random.key(key))


@pytest.mark.parametrize("low_level_stage", [3, 4, 5])
@pytest.mark.parametrize(("output_stride", "strides"), [(8, (8, 8, 8)), (16, (8, 16, 16)), (32, (8, 16, 32))])
def test_logits_stand_on_the_grid_of_the_sampled_stage(low_level_stage, output_stride, strides):
    network = small(DSNet, output_stride, low_level_stage=low_level_stage, guide="stage5", sampling_kernel=5)
    output, _ = shapes(network, jnp.zeros((2, 64, 99, 3)))
    stride = strides[low_level_stage - 3]
    grid = (2, 64 // stride, -(-99 // stride))
    assert output.logits.shape == (*grid, 5) and output.offsets.shape == (*grid, 25, 2)


def test_the_logits_of_deeplabv3plus_have_stride_4():
    for output_stride in (8, 16, 32):
        output, _ = shapes(small(DeepLabV3Plus, output_stride), jnp.zeros((2, 64, 99, 3)))
        assert output.logits.shape == (2, 16, 25, 5) and output.offsets is None


def test_the_logits_of_an_fcn_have_the_backbones_output_stride():
    for output_stride in (8, 16, 32):
        output, _ = shapes(small(Baseline, output_stride), jnp.zeros((2, 64, 99, 3)))
        assert output.logits.shape == (2, 64 // output_stride, -(-99 // output_stride), 5) and output.offsets is None


@pytest.mark.parametrize(("backbone", "millions"), [("resnet18", 18.3), ("resnet50", 43.9), ("resnet101", 62.9)])
def test_dsnet_has_as_many_parameters_as_documented(backbone, millions):
    _, variables = shapes(DSNet(RESNETS[backbone](), 21), jnp.zeros((1, 32, 32, 3)), train=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert round(count / 1e6, 1) == millions


def test_the_guide_is_aspp_or_the_projected_last_stage():
    for guide, other in (("aspp", "guide"), ("guide", "aspp")):
        _, variables = shapes(small(DSNet, guide={"aspp": "aspp", "guide": "stage5"}[guide]))
        assert guide in variables["params"] and other not in variables["params"]
    assert variables["params"]["guide"]["conv"]["kernel"].shape == (1, 1, 512, 8)
    assert variables["params"]["classifier"]["conv"]["conv"]["kernel"].shape == (3, 3, 24, 8)


@pytest.mark.parametrize("arguments", [{"guide": "ASPP"}, {"low_level_stage": 2}, {"sampling": "random"}])
def test_a_guide_or_stage_that_there_is_not_is_refused(arguments):
    with pytest.raises(ValueError, match="|".join(map(str, arguments.values()))):
        shapes(small(DSNet, **arguments))


@pytest.mark.parametrize(("output_stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
def test_atrous_rates_are_scaled_with_the_output_stride(output_stride, rates):
    found = []

    def note(call, arguments, keywords, context):
        if isinstance(context.module, ConvNormRelu) and (context.module.name or "").startswith("atrous"):
            found.append(context.module.dilation)
        return call(*arguments, **keywords)

    for network in (DSNet, DeepLabV3Plus):
        found.clear()
        with nn.intercept_methods(note):
            shapes(small(network, output_stride))
        assert found == rates


def test_the_sampled_map_and_the_guide_are_the_stages_asked_for():
    widths = {}

    def note(call, arguments, keywords, context):
        if isinstance(context.module, CGDS) and context.method_name == "__call__":
            widths[stage] = [argument.shape[-1] for argument in arguments[:2]]
        return call(*arguments, **keywords)

    for stage in (3, 4, 5):
        with nn.intercept_methods(note):
            shapes(small(DSNet, low_level_stage=stage))
    assert widths == {3: [128, 8], 4: [256, 8], 5: [512, 8]}


def test_deep_supervision_reads_stage4_in_training_only():
    for network in (small(DSNet), small(Baseline)):
        output, variables = shapes(network, train=True)
        assert output.auxiliary_logits.shape == (4, 3, 4, 5)
        assert variables["params"]["auxiliary"]["conv"]["conv"]["kernel"].shape == (3, 3, 256, 8)
        evaluated, _ = shapes(network, train=False)
        assert evaluated.auxiliary_logits is None
        _, variables = shapes(network.clone(auxiliary_width=4), train=True)
        assert variables["params"]["auxiliary"]["conv"]["conv"]["kernel"].shape == (3, 3, 256, 4)
        assert variables["params"]["classifier"]["conv"]["conv"]["kernel"].shape[-1] == 8
    for network in (small(DSNet, deep_supervision=False), small(Baseline, deep_supervision=False)):
        output, variables = shapes(network, train=True)
        assert output.auxiliary_logits is None and "auxiliary" not in variables["params"]


def test_dropout_is_drawn_from_its_key_in_training(gradients):
    logits = [gradients(key)[1][0].logits for key in (0, 0, 1)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0.01


def test_evaluation_needs_no_key_and_uses_the_running_statistics(network, variables):
    output = evaluate(network, variables, IMAGES)
    alone = evaluate(network, variables, IMAGES[:1])
    np.testing.assert_allclose(output.logits[:1], alone.logits, rtol=1e-3, atol=1e-4)
    other = variables | {"batch_stats": jax.tree.map(lambda leaf: 1.1 * leaf, variables["batch_stats"])}
    assert np.abs(evaluate(network, other, IMAGES).logits - output.logits).max() > 0.01


def test_gradients_reach_every_parameter_from_the_first_step(gradients, network):
    gradient, _ = gradients(0)
    norms = {name: float(np.linalg.norm(leaf)) for name, leaf in by_name(gradient).items()}
    assert all(np.isfinite(norm) for norm in norms.values())
    assert {name for name, norm in norms.items() if norm < 1e-6} == set()


def test_every_running_statistic_moves_in_training(gradients, variables):
    _, (_, updated) = gradients(0)
    old, new = by_name(variables["batch_stats"]), by_name(updated)
    assert old.keys() == new.keys()
    assert [name for name in old if np.allclose(old[name], new[name])] == []


@pytest.mark.parametrize("network_type", [DSNet, Baseline])
def test_in_bfloat16_parameters_statistics_offsets_and_logits_are_float32(network_type, random_variables):
    exact, rounded = small(network_type), small(network_type, dtype=jnp.bfloat16)
    output, started = shapes(rounded, train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((output, started))} == {jnp.dtype("float32")}
    variables = random_variables(exact, IMAGES, train=False)
    wanted, result = (evaluate(network, variables, IMAGES).logits for network in (exact, rounded))
    error = np.linalg.norm(result - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.05  # It did compute in bfloat16.
