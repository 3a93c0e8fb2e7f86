"""A trained network as an ONNX model, for onnxruntime and what else reads ONNX."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsnet_jax.errors import InputError


def to_onnx(
    program: Callable[[jax.Array], jax.Array],
    description: dict[str, Any],
    size_hw: tuple[int, int],
    batch_size: int | None = None,
) -> bytes:
    """An ONNX model of opset 22 with an input `image`, uint8 [B, H, W, 3], and an output `labels`, uint8 [B, H, W].

    The description is in its metadata, as JSON, under "description"; class names stand there once more, a line each,
    where tools look for them. Dynamic sampling is ONNX's own DeformConv.

    Args:
      program: of images to labels; its weights inside.
      description: what travels with it.
      size_hw: H and W; ONNX files have one size.
      batch_size: B; None: any.

    Raises:
      InputError: the packages of the extra `export` are not installed, the program has an operation that is not known
        here, or the network is too large for one file.
    """
    try:
        import onnx

        from dsnet_jax.weights.onnx_graph import IR_VERSION, OPSET, to_graph
    except ImportError as error:
        raise InputError(f"{error}: pip install -e '.[export]', or export to StableHLO") from error
    batch = jax.export.symbolic_shape("b")[0] if batch_size is None else batch_size
    try:
        graph = to_graph(program, jax.ShapeDtypeStruct((batch, *size_hw, 3), jnp.uint8))
    except NotImplementedError as error:
        raise InputError(f"{error}: export to StableHLO, or smaller images") from error
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="dsnet_jax"
    )
    weights = sum(int(np.prod(constant.dims)) * 4 for constant in graph.initializer)
    if weights > 2**31 - 2**24:
        raise InputError(f"ONNX: {weights} bytes of weights do not fit into one file: export to StableHLO")
    description = description | {"opset": OPSET}
    description["input"] = description["input"] | {"shape": [batch_size, *size_hw, 3]}
    onnx.helper.set_model_props(
        model, {"description": json.dumps(description), "names": "\n".join(description["class_names"])}
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()
