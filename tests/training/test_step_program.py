"""The program that a step compiles to: what it sends between devices, and what it computes in which precision."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from dsnet_jax import parallel
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.step import initial_state, make_train_step

SCHEDULE = poly_schedule(0.05, 0.9, 10)
OPTIMIZER = sgd(0.9, 1e-4, True, 0.1, 1.0, 1.0)


def batch_shapes():
    """Of 16 crops of 32x32 on eight devices."""
    return {
        "image": jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((16, 32, 32), jnp.uint8),
        "stop_requested": jax.ShapeDtypeStruct((8,), jnp.int32),
    }


@pytest.mark.parametrize(("backbone", "accumulation_steps"), [("tiny_backbone", 1), ("four_convolutions", 2)])
def test_the_program_of_eight_devices_reduces_and_gathers_nothing(backbone, accumulation_steps, request):
    """An all-gather would be a feature map, or a batch, copied to every device; the others a batch laid out anew."""
    model = DSNet(request.getfixturevalue(backbone)(), 3, width=8)
    mesh = parallel.global_mesh()
    step = jax.jit(
        make_train_step(model, OPTIMIZER, SCHEDULE, 0, 0.4, accumulation_steps),
        in_shardings=(parallel.replicated(mesh), parallel.split_by_batch(mesh)),
        out_shardings=parallel.replicated(mesh),
    )
    state = jax.eval_shape(lambda: initial_state(model, OPTIMIZER, 0))
    text = step.lower(state, batch_shapes()).compile().as_text()
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_the_step_of_a_tpu_has_no_gather_and_no_scatter(tiny_backbone):
    """Which a TPU does one row after another."""
    model = DSNet(tiny_backbone(), 3, width=8)
    step = jax.jit(make_train_step(model, OPTIMIZER, SCHEDULE, 0, 0.4))
    state = jax.eval_shape(lambda: initial_state(model, OPTIMIZER, 0))
    text = step.trace(state, batch_shapes()).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.gather" not in text and "stablehlo.scatter" not in text


def test_a_float64_network_computes_nothing_in_float32(tiny_backbone):
    """Of the scope of the network and of its gradient: only what it is compared by is precise throughout."""

    def float32_operations(jaxpr, scope=""):
        for equation in jaxpr.eqns:
            inner = f"{scope}/{equation.source_info.name_stack}"
            if "DSNet" in inner and any(getattr(v.aval, "dtype", None) == jnp.float32 for v in equation.outvars):
                yield f"{inner}: {equation.primitive}"
            for program in jaxprs_in_params(equation.params):
                yield from float32_operations(program, inner)

    with jax.enable_x64(True):
        model = DSNet(tiny_backbone(dtype=jnp.float64), 3, width=8, dtype=jnp.float64)
        state = jax.eval_shape(lambda: initial_state(model, OPTIMIZER, 0))
        state = jax.tree.map(lambda x: x.update(dtype=jnp.promote_types(x.dtype, jnp.float64)), state)
        program = jax.make_jaxpr(make_train_step(model, OPTIMIZER, SCHEDULE, 0, 0.4))(state, batch_shapes())
        assert list(float32_operations(program.jaxpr)) == []
