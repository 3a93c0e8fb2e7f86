"""The compiled program of the operator: its memory, its collectives, and which formulation it holds."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dsnet_jax import parallel
from dsnet_jax.ops import dynamic_sampling_conv

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(params=["gather", "hat"])
def formulation(request):
    return request.param


def loss(features, offsets, kernel, formulation=None):
    return jnp.sum(dynamic_sampling_conv(features, offsets, kernel, formulation=formulation) ** 2)


def gradient_program(shape, side, formulation):
    """The compiled gradient by features, offsets and kernel, in float32, and the shapes that it takes."""
    shapes = shape, (*shape[:3], side**2, 2), (side, side, shape[-1], shape[-1])
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(jax.grad(partial(loss, formulation=formulation), (0, 1, 2))).lower(*structs).compile()


def test_the_memory_of_the_gradient_does_not_grow_with_the_kernel(formulation):
    shape = (2, 16, 16, 128)
    temporaries = {
        side: gradient_program(shape, side, formulation).memory_analysis().temp_size_in_bytes for side in (3, 5, 7)
    }
    one_map = 4 * np.prod(shape)
    assert one_map < temporaries[3] < 12 * one_map
    assert max(temporaries.values()) < 1.001 * temporaries[3]


def test_the_gradient_keeps_the_arguments_alone():
    shapes = (2, 4, 5, 3), (2, 4, 5, 9, 2), (3, 3, 3, 2), (2, 4, 5, 9)
    arguments = [jnp.ones(shape) for shape in shapes]
    _, pullback = jax.vjp(dynamic_sampling_conv, *arguments)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array))
    assert kept == sum(array.nbytes for array in arguments)


@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, 4), (jnp.bfloat16, 0)])
def test_products_that_stand_for_reading_keep_all_bits_of_float32(dtype, exact):
    """One of the forward pass and three of the backward pass; by the kernel there are one and two."""

    def precisions(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive is jax.lax.dot_general_p:
                yield equation.params["precision"]
            for program in jaxprs_in_params(equation.params):
                yield from precisions(program)

    shapes = ((1, 4, 5, 3), dtype), ((1, 4, 5, 9, 2), jnp.float32), ((3, 3, 3, 2), jnp.float32)
    gradient = jax.grad(partial(loss, formulation="hat"), (0, 1, 2))
    found = list(precisions(jax.make_jaxpr(gradient)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).jaxpr))
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert (found.count(highest), found.count(None)) == (exact, 7 - exact)


def test_the_platform_decides_on_the_formulation_unless_the_caller_does():
    def gathers(platform, formulation, shape=(1, 8, 8, 4)):
        shapes = shape, (*shape[:3], 9, 2), (3, 3, shape[-1], 2)
        structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        gradient = jax.jit(jax.grad(partial(loss, formulation=formulation), (0, 1, 2)))
        text = gradient.trace(*structs).lower(lowering_platforms=(platform,)).as_text()
        found = [f"stablehlo.{operation}" in text for operation in ("gather", "scatter")]
        assert found[0] == found[1]
        return found[0]

    assert gathers("cpu", None) and gathers("cuda", None) and not gathers("tpu", None)
    assert gathers("tpu", "gather") and not gathers("cpu", "hat")
    assert gathers("tpu", None, (1, 128, 65, 4))  # The products grow with the square of the area.


@pytest.mark.parametrize(
    ("function", "collectives"),
    [
        (dynamic_sampling_conv, set()),
        (jax.grad(loss, (0, 1)), set()),
        (jax.grad(loss, 2), {"all-reduce"}),
    ],
    ids=["forward", "gradient by features and offsets", "gradient by kernel"],
)
def test_images_on_eight_devices_stay_where_they_are(function, collectives, formulation):
    mesh = parallel.mesh_over(jax.devices())
    split, whole = parallel.split_by_batch(mesh), parallel.replicated(mesh)
    structs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for shape, sharding in (((16, 4, 5, 3), split), ((16, 4, 5, 9, 2), split), ((3, 3, 3, 2), whole))
    ]
    text = jax.jit(partial(function, formulation=formulation)).lower(*structs).compile().as_text()
    assert "num_partitions=8" in text
    found = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)
    assert set(found) == collectives
