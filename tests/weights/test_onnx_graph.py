import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from dsnet_jax.config import default_config
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.weights.onnx import to_onnx
from dsnet_jax.weights.onnx_graph import IR_VERSION, OPSET, to_graph
from dsnet_jax.weights.program import label_program


def run(graph, image):
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # What the runtime infers for itself from the operations, as what the file declares.
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.output[0]
    declared = [side.dim_param or side.dim_value for side in graph.output[0].type.tensor_type.shape.dim]
    assert [side.dim_param or side.dim_value for side in inferred.type.tensor_type.shape.dim] == declared
    assert session.get_outputs()[0].shape == declared
    return session.run(None, {"image": image})[0]


# The DSNet itself is exported in test_export.py.
@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "nonlocal", "guide": "pyramid"},
        {"name": "dynamic_filter"},
        {"name": "pspnet"},
        {"name": "dcnv2"},
        {"name": "deeplabv3plus"},
    ],
    ids=lambda changes: "_".join(changes.values()),
)
def test_every_network_s_parts_give_the_same_labels(changes, four_convolutions, random_variables, monkeypatch):
    monkeypatch.setitem(RESNETS, "resnet18", four_convolutions)
    config = default_config()
    config.model.update(backbone="resnet18", width=8, deep_supervision=False, **changes)
    network = build_model(config.model, 5)
    variables = random_variables(network, np.zeros((1, 64, 64, 3), np.float32), train=False, seed=7)
    program = label_program(network, variables, 1.0, in_bands=False)
    images = np.random.default_rng(0).integers(0, 256, (2, 75, 100, 3), np.uint8)
    batch = jax.export.symbolic_shape("b")[0]

    found = run(to_graph(program, jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.uint8)), images)
    expected = np.asarray(jax.jit(program)(images))
    assert len(np.unique(expected)) > 1
    assert np.mean(found == expected) > 0.9999


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.exp(x) - 2.0,
        lambda x: 2.0 - x,
        lambda x: jnp.maximum(x, 0.0) / 3.0,
        lambda x: jnp.maximum(x, 0.5),
        lambda x: jax.nn.softmax(x[:, 1:5:2, 3], axis=-1),
        lambda x: x.reshape(1, 48, 5).swapaxes(1, 2),
        lambda x: jnp.sum(x, axis=(1, 2)),
        lambda x: jnp.sum(x, axis=1),
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.25),
        lambda x: jnp.concatenate([x, 2.0 * x], axis=2),
        lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x),
        lambda x: jnp.einsum("oh,bhwc->bowc", jnp.ones((3, 6)), x),
        lambda x: jax.lax.rsqrt(x * x + 1.0) ** 3,
        lambda x: jnp.argmax(x, axis=-1).astype(jnp.float32),
    ],
)
@pytest.mark.parametrize("behind_a_convolution", [False, True])
def test_an_operation_gives_what_jax_gives_whatever_the_order_of_axes(function, behind_a_convolution):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 5, 5)).astype(np.float32)
    x = rng.standard_normal((1, 6, 8, 5)).astype(np.float32)

    def program(x):
        if behind_a_convolution:
            order = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=order)
        return function(x)

    found = run(to_graph(program, jax.ShapeDtypeStruct(x.shape, x.dtype)), x)
    np.testing.assert_allclose(found, program(x), rtol=1e-4, atol=1e-4)


def test_what_has_no_rule_is_named():
    with pytest.raises(NotImplementedError, match="sort"):
        to_graph(lambda x: jnp.sort(x), jax.ShapeDtypeStruct((4,), jnp.float32))
    batch = jax.export.symbolic_shape("b")[0]
    with pytest.raises(NotImplementedError, match=r"a part .* of the batch"):
        to_graph(lambda x: x[1:], jax.ShapeDtypeStruct((batch, 4), jnp.float32))


def test_a_network_that_onnx_cannot_have_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^ONNX: sort of .* has no rule: export to StableHLO, or smaller images$"):
        to_onnx(lambda x: jnp.sort(x), {}, (4, 4))
