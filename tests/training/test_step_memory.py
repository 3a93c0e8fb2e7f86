"""What the compiled training step needs: exact quantities, of a small network on eight devices."""

import math
import re
from functools import partial

import jax
import pytest

from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model
from dsnet_jax.models.resnet import RESNETS, BasicBlock, ResNet
from dsnet_jax.plan.programs import collectives_in, lower_training
from dsnet_jax.plan.targets import TARGETS, mesh_of
from dsnet_jax.training.program import step_of

CLASSES, SIDE, IMAGES = 150, 64, 2  # Of a device.


@pytest.fixture
def config(small_config):
    small_config.data.update(crop_size_hw=(SIDE, SIDE), batch_size=8 * IMAGES)
    small_config.model.deep_supervision = True
    return small_config


def test_the_step_reduces_gradients_statistics_and_metrics_and_needs_no_logits_of_the_images_size(config):
    model = build_model(config.model, CLASSES)
    program = lower_training(config, model, mesh_of(TARGETS["cpu"])).compile()
    text = program.as_text()
    collectives = collectives_in(text)
    assert collectives.keys() == {"all-reduce"}

    params = jax.eval_shape(step_of(config, model, 1)[0]).variables["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    norms = [leaf.size for path, leaf in leaves if path[-1].key == "scale"]
    metrics = 10
    # At most the gradient of each leaf and two statistics of each normalisation, some together. Of the kernel that is
    # sampled with, the sum over devices lies in the loop over its nine taps, and counts once.
    count, size = collectives["all-reduce"]
    assert count <= len(leaves) + 2 * len(norms) + metrics
    weights = sum(leaf.size for _, leaf in leaves)
    assert 4 * 0.8 * weights <= size <= 4 * (weights + 2 * sum(norms) + metrics)

    arrays = (found[1] for found in re.finditer(r"\bf32\[([\d,]+)\]", text))
    largest = max(math.prod(map(int, shape.split(","))) for shape in arrays)
    logits = IMAGES * SIDE * SIDE * CLASSES
    assert largest == logits // 4  # A band of 16 rows.
    # What a band needs, three times its logits, and of the network less than one more of it.
    assert logits < program.memory_analysis().temp_size_in_bytes < 0.9 * 4 * logits


def test_the_backbone_computes_anew_what_the_config_says_but_for_sums_over_the_batch(config, monkeypatch):
    monkeypatch.setitem(RESNETS, "resnet18", partial(ResNet, (1, 1, 1, 1), BasicBlock))
    mesh = mesh_of(TARGETS["cpu"])

    def count(remat):
        config.training.remat = remat
        text = lower_training(config, build_model(config.model, 3), mesh).as_text()
        return [text.count(f"stablehlo.{name}") for name in ("optimization_barrier", "convolution", "reduce(")]

    (barriers, convolutions, sums), without = count("blocks"), count("none")
    assert barriers == without[0] + 3  # Behind which the gradient computes anew: stem and stage2 have theirs anyway.
    assert convolutions > without[1]
    assert sums == without[2]


def test_an_unknown_rematerialisation_is_refused_and_the_choices_are_named(config):
    config.training.remat = "block"
    with pytest.raises(
        InputError, match=r"config.training.remat is 'block': one of none, stem, blocks is needed"
    ) as error:
        step_of(config, build_model(config.model, 3), steps=1)
    assert error.value.exit_code == 2
