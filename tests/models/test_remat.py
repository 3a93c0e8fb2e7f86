"""Rematerialisation: what the gradient keeps, and that nothing else is different."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.models.resnet import REMAT, BasicBlock, Bottleneck, ResNet

OTHERS = [name for name in REMAT if name != "none"]


def features(network, batch_stats, params, images):
    return network.apply({"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"])


def kept_an_image(network):
    """Bytes that the gradient keeps for each image of 32x32, as it is written down; weights are kept once."""

    def kept(images):
        images = jnp.zeros((images, 32, 32, 3))
        variables = network.init(jax.random.key(0), images, train=True)
        return jax.vjp(partial(features, network, variables["batch_stats"]), variables["params"], images)[1]

    one, two = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(partial(kept, images))))
        for images in (1, 2)
    )
    return two - one


@pytest.mark.parametrize("depth, one_map, maps", [((2, 1, 1, 1), 8 * 8 * 64, 2.5), ((1, 1, 2, 1), 2 * 2 * 256, 3)])
def test_of_a_block_its_input_is_kept_alone(depth, one_map, maps):
    a_block_more = {
        remat: kept_an_image(ResNet(depth, Bottleneck, remat=remat))
        - kept_an_image(ResNet((1, 1, 1, 1), Bottleneck, remat=remat))
        for remat in REMAT
    }
    one_map *= 4 * Bottleneck.expansion
    assert a_block_more["blocks"] == one_map
    # Inputs and, but for stage2, outputs of two normalisations, a quarter as wide; input of the third; the block's.
    assert a_block_more["none"] == a_block_more["stem"] == maps * one_map


def test_of_the_stem_its_input_is_kept_alone_or_what_its_convolution_made_too():
    kept = {remat: kept_an_image(ResNet((1, 1, 1, 1), Bottleneck, remat=remat)) for remat in REMAT}
    convolved = 4 * 16 * 16 * 64  # Bytes of the map that the convolution makes.
    assert kept["none"] - kept["stem"] == convolved
    assert kept["blocks"] < kept["stem"]


@pytest.mark.parametrize("remat", OTHERS)
def test_variables_statistics_and_gradients_are_those_without(remat, random_variables):
    """Statistics moved twice would differ; so would dropped gradients."""
    with jax.enable_x64(True):
        images = np.random.default_rng(0).normal(0, 1, (2, 32, 32, 3))
        networks = [ResNet((1, 1, 1, 1), BasicBlock, remat=name, dtype=jnp.float64) for name in ("none", remat)]
        shapes = [jax.eval_shape(partial(n.init, train=True), jax.random.key(0), images) for n in networks]
        assert shapes[0] == shapes[1]
        variables = random_variables(networks[0], images, train=True)

        def outcome(network):
            def loss(params):
                maps, updated = features(network, variables["batch_stats"], params, images)
                return sum(jnp.mean(jnp.sin(stage)) for stage in maps.values()), (maps, updated)

            return jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(np.float64, variables["params"]))

        found, expected = outcome(networks[1]), outcome(networks[0])
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-9, atol=1e-11)
