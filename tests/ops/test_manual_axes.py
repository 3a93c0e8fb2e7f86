"""The sampling convolution in other people's code: `jax.shard_map`, meshes whose axes are explicit, `jax.vmap`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsnet_jax.ops import dynamic_sampling_conv
from dsnet_jax.ops.dynamic_sampling import FORMULATIONS

SPECS = P("data"), P("data"), P(), P("data")  # Of features, offsets, kernel, modulation.


@pytest.fixture(scope="module")
def arguments():
    rng = np.random.default_rng(0)
    shapes = (8, 5, 6, 4), (8, 5, 6, 9, 2), (3, 3, 4, 3), (8, 5, 6, 9)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def total(*arguments, formulation):
    return jnp.sum(jnp.sin(dynamic_sampling_conv(*arguments, formulation=formulation)))


def value_and_gradients(function):
    return jax.jit(jax.value_and_grad(function, argnums=range(4)))


def assert_agree(ours, theirs):
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_in_shard_map_value_and_gradients_are_those_of_the_whole_batch(formulation, arguments):
    """That by the kernel, which all devices share, is the sum over them."""
    function = partial(total, formulation=formulation)

    def of_a_device(*arguments):
        return jax.value_and_grad(lambda *own: jax.lax.psum(function(*own), "data"), argnums=range(4))(*arguments)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(of_a_device, mesh=mesh, in_specs=SPECS, out_specs=(P(), SPECS)))
    assert_agree(sharded(*arguments), value_and_gradients(function)(*arguments))


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_on_a_mesh_with_explicit_axes_it_is_called_by_auto_axes(formulation, arguments):
    function = partial(total, formulation=formulation)
    expected = value_and_gradients(function)(*arguments)

    def on_explicit_axes(*arguments):
        convolution = partial(dynamic_sampling_conv, formulation=formulation)
        sharded = jax.sharding.auto_axes(convolution, out_sharding=P("data", None, None, None))
        return jnp.sum(jnp.sin(sharded(*arguments)))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arguments, SPECS, strict=True)
        ]
        assert_agree(value_and_gradients(on_explicit_axes)(*placed), expected)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_mapped_over_batches_and_checkpointed_it_gives_what_each_batch_gives(formulation, arguments):
    function = partial(total, formulation=formulation)
    features, offsets, kernel, modulation = arguments
    halves = [x.reshape(2, 4, *x.shape[1:]) for x in (features, offsets, modulation)]

    def of_halves(kernel):
        return jnp.sum(jax.vmap(jax.checkpoint(lambda x, z, m: function(x, z, kernel, m)))(*halves))

    expected, gradients = value_and_gradients(function)(*arguments)
    assert_agree(jax.jit(jax.value_and_grad(of_halves))(kernel), (expected, gradients[2]))
