"""A config made into a network and step counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dsnet_jax.config import default_config
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import CHOICES, build_model, initial_variables, steps_per_epoch
from dsnet_jax.models.aspp import ASPP
from dsnet_jax.models.resnet import RESNETS


def model_config(**fields):
    config = default_config().model
    config.update({"backbone": "resnet18", "width": 16} | fields)
    return config


def output_and_parameters(train=True, **fields):
    """Shapes of the output for images of 64x96, and of the parameters by name."""
    network = build_model(model_config(**fields), num_classes=4)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    output, variables = jax.eval_shape(lambda images: network.init_with_output(keys, images, train=train), images)
    paths = jax.tree_util.tree_leaves_with_path(variables["params"])
    return output, {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}


@pytest.mark.parametrize(
    "fields, name, shape",
    [
        ({}, "classifier/conv/conv/kernel", (3, 3, 3 * 16, 16)),
        ({"name": "fcn"}, "classifier/conv/conv/kernel", (3, 3, 512, 16)),
        ({"width": 24}, "aspp/project/conv/kernel", (1, 1, 5 * 24, 24)),
        ({"stem": "v1s"}, "backbone/stem2/conv/kernel", (3, 3, 64, 128)),
        ({"backbone": "resnet50"}, "backbone/stage5_block2/conv3/kernel", (1, 1, 512, 2048)),
        ({"atrous_rates": (2, 4)}, "aspp/project/conv/kernel", (1, 1, 4 * 16, 16)),
        ({"low_level_stage": 4}, "cgds/modification/conv/kernel", (1, 1, 256, 16)),
        ({"guide": "stage5"}, "guide/conv/kernel", (1, 1, 512, 16)),
        ({"modification_kernel": 3}, "cgds/modification/conv/kernel", (3, 3, 128, 16)),
        ({"sampling_kernel": 5}, "cgds/kernel", (5, 5, 16, 16)),
        ({"sampling_kernel": 1}, "cgds/offset/kernel", (3, 3, 16, 2)),
        ({"sampling": "nonlocal"}, "cgds/nonlocal/key/kernel", (1, 1, 16, 8)),
        ({"guide": "pyramid"}, "guide/conv/kernel", (1, 1, 1024, 16)),
        ({"name": "aspp"}, "classifier/conv/conv/kernel", (3, 3, 16, 16)),
        ({"name": "aspp", "atrous_rates": (2, 4)}, "aspp/project/conv/kernel", (1, 1, 4 * 16, 16)),
        ({"name": "pspnet"}, "classifier/conv/conv/kernel", (3, 3, 1024, 16)),
        ({"name": "deeplabv3plus"}, "decoder/fuse/conv/kernel", (3, 3, 48 + 16, 16)),
        ({"name": "deeplabv3plus", "atrous_rates": (2, 4)}, "aspp/project/conv/kernel", (1, 1, 4 * 16, 16)),
        ({"name": "dcnv1", "sampling_kernel": 5}, "deformable/offset/kernel", (3, 3, 16, 50)),
        ({"name": "dcnv2"}, "deformable/offset/kernel", (3, 3, 16, 27)),
        ({"name": "dynamic_filter"}, "dynamic_filter/generate/kernel", (1, 1, 16, 16)),
    ],
)
def test_a_field_of_the_config_reaches_the_network(fields, name, shape):
    assert output_and_parameters(**fields)[1][name] == shape


def test_fields_that_leave_no_trace_in_the_parameters_reach_the_network():
    network = build_model(model_config(dropout=0.3, output_stride=8, multi_grid=(1, 2), dtype="bfloat16"), 4)
    assert network.dropout == 0.3
    assert network.backbone.output_stride == 8
    assert network.backbone.multi_grid == (1, 2)
    assert network.dtype == network.backbone.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["dsnet", "dcnv1", "dcnv2"])
def test_the_formulation_is_the_one_asked_for(name, four_convolutions, monkeypatch):
    monkeypatch.setitem(RESNETS, "resnet18", four_convolutions)
    for formulation, gathers in ("gather", True), ("hat", False), ("platform", True):
        network = build_model(model_config(name=name, sampling_formulation=formulation), 4)
        variables = jax.eval_shape(lambda network=network: initial_variables(network))
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        apply = jax.jit(lambda variables, images, network=network: network.apply(variables, images, train=False).logits)
        assert ("stablehlo.gather" in apply.lower(variables, images).as_text()) == gathers, formulation


@pytest.mark.parametrize("name", ["dsnet", "aspp", "deeplabv3plus"])
def test_dropout_behind_aspp_is_as_asked_for(name):
    dropped = {}

    def note(call, arguments, keywords, context):
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            dropped[context.module.path[0]] = context.module.rate
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        output_and_parameters(name=name, aspp_dropout=0.5, deep_supervision=False)
    assert dropped == {"aspp": 0.5, "classifier": 0.1}


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"name": "fcn", "atrous_rates": (1, 2)},
            r"atrous_rates is \(1, 2\), which fcn does not use: leave it at \(6, ",
        ),
        ({"name": "pspnet", "sampling": "regular"}, "sampling is 'regular', which pspnet does not use"),
        ({"name": "aspp", "guide": "stage5"}, "guide is 'stage5', which aspp does not use"),
        ({"name": "deeplabv3plus", "low_level_stage": 4}, "low_level_stage is 4, which deeplabv3plus does not use"),
        ({"name": "dcnv2", "modification_kernel": 3}, "modification_kernel is 3, which dcnv2 does not use"),
        ({"guide": "stage5", "aspp_dropout": 0.5}, "aspp_dropout is 0.5, which dsnet with guide 'stage5' does not use"),
        (
            {"deep_supervision": False, "auxiliary_width": 64},
            "auxiliary_width is 64, which a network without deep supervision does not use: leave it at 0",
        ),
        ({"sampling": "regular", "sampling_formulation": "hat"}, "is 'hat', which the regular grid does not use"),
        ({"deep_supervision": False, "deep_supervision_weight": 1.0}, "weight is 1.0, which a network without deep"),
    ],
)
def test_a_field_that_the_network_does_not_use_is_refused(fields, message):
    with pytest.raises(InputError, match=message) as raised:
        build_model(model_config(**fields), 4)
    assert raised.value.exit_code == 2


def test_deep_supervision_is_there_in_training_when_asked_for():
    assert output_and_parameters()[0].auxiliary_logits.shape == (2, 4, 6, 4)
    assert output_and_parameters(deep_supervision=False)[0].auxiliary_logits is None
    assert output_and_parameters(train=False)[0].auxiliary_logits is None


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(field):
    wrong = 7 if isinstance(CHOICES[field][0], int) else "other"
    with pytest.raises(InputError) as raised:
        build_model(model_config(**{field: wrong}), 4)
    assert f"config.model.{field} is {wrong!r}" in str(raised.value)
    assert all(str(choice) in str(raised.value) for choice in CHOICES[field])
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sampling_kernel": 2}, "sampling_kernel is 2: a positive odd number"),
        ({"modification_kernel": -1}, "modification_kernel is -1: a positive odd number"),
        ({"dropout": 1.0}, "dropout"),
        ({"aspp_dropout": -0.1}, "aspp_dropout"),
        ({"auxiliary_width": -1}, "auxiliary_width of 0 or more"),
        ({"atrous_rates": (0,)}, r"atrous_rates is \(0,\): whole numbers of 1 or more"),
        ({"atrous_rates": (6.5, 12, 18)}, "whole numbers of 1 or more"),
        ({"atrous_rates": ("a",)}, "whole numbers of 1 or more"),
        ({"multi_grid": (0, 1)}, r"multi_grid is \(0, 1\): whole numbers of 1 or more"),
        ({"multi_grid": (1.5, 1)}, "whole numbers of 1 or more"),
        ({"atrous_rates": (1, 2, 4), "output_stride": 32}, r"atrous_rates is \(1, 2, 4\): even numbers are needed"),
        ({"multi_grid": (1, 2, 4)}, "resnet18 has 2 blocks"),
    ],
)
def test_a_network_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message) as raised:
        build_model(model_config(**fields), 4)
    assert raised.value.exit_code == 2


def test_no_rate_of_aspp_is_rounded():
    with pytest.raises(ValueError, match=r"atrous_rates are \(2, 5\): even ones are needed at output stride 32"):
        jax.eval_shape(lambda x: ASPP(4, (2, 5), 32).init(jax.random.key(0), x, train=False), jnp.zeros((1, 4, 4, 3)))


def test_an_epoch_has_the_whole_batches_of_the_split():
    config = default_config()
    config.data.batch_size = 8
    assert [steps_per_epoch(config, records) for records in (8, 15, 16, 367)] == [1, 1, 2, 45]


def test_a_split_smaller_than_a_batch_is_refused_with_both_numbers():
    config = default_config()
    with pytest.raises(InputError, match=r"batch_size is 32, split 'train' of shapes has 31 images"):
        steps_per_epoch(config, 31)


def test_a_batch_of_one_is_refused():
    config = default_config()
    config.data.batch_size = 1
    with pytest.raises(InputError, match="batch_size is 1"):
        steps_per_epoch(config, 100)
