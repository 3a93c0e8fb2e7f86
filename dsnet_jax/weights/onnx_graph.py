"""A JAX program as an ONNX graph: the operations that networks of this project are made of, in inference.

The program is walked as `jax.make_jaxpr` writes it down. What depends on no input is computed on the way, so weights,
the matrices that resize and whatever was made of them become constants. Convolutions want channels before the cells in
ONNX. Arrays of four axes are therefore kept in that order from one to the next, and put back only for an operation that
wants them as they were.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.export import is_symbolic_dim
from onnx import TensorProto, helper, numpy_helper

OPSET = 22
IR_VERSION = 10
SAMPLING = "dynamic_sampling_conv"  # Becomes ONNX's DeformConv.
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
UNARY = {
    "exp": "Exp",
    "floor": "Floor",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "sqrt": "Sqrt",
    "stop_gradient": "Identity",
}
BINARY = {"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
         "remat2": "jaxpr", "checkpoint": "jaxpr", "closed_call": "call_jaxpr"}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """What the graph computes when it runs.

    Attributes:
      name: in the graph.
      shape: in JAX's order of axes; the first may be symbolic.
      dtype: NumPy's.
      channels_first: whether the graph has it as NCHW, though JAX has it as NHWC.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: np.dtype
    channels_first: bool = False


def to_graph(program: Callable, image: jax.ShapeDtypeStruct) -> onnx.GraphProto:
    """The graph of a program of one array, called `image`, that gives one array, called `labels`.

    Args:
      program: to be traced; its weights are inside.
      image: shape and type of its argument; the first axis may be symbolic.

    Raises:
      NotImplementedError: the program has an operation that is not known here.
    """
    jaxpr = jax.make_jaxpr(program)(image)
    graph = _Graph()
    (output,) = graph.run(jaxpr.jaxpr, jaxpr.consts, [Tensor("image", image.shape, np.dtype(image.dtype))])
    output = graph.in_order(output)
    graph.nodes.append(helper.make_node("Identity", [output.name], ["labels"]))
    described = [_described("image", image.shape, image.dtype), _described("labels", output.shape, output.dtype)]
    return helper.make_graph(graph.nodes, "labels", described[:1], described[1:], graph.constants)


def _described(name: str, shape: Sequence, dtype: Any) -> onnx.ValueInfoProto:
    dims = [str(side) if is_symbolic_dim(side) else side for side in shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims)


class _Graph:
    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def run(self, jaxpr: Any, consts: Sequence, arguments: Sequence) -> list[Tensor | np.ndarray]:
        """Adds the nodes of a jaxpr for arguments that are tensors or, where they are known, arrays."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def value(atom):
            return np.asarray(atom.val) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            inputs = [value(atom) for atom in equation.invars]
            results = self._results(equation, inputs)
            values.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _results(self, equation: Any, inputs: list) -> list:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            return [np.asarray(params["platforms"].index(None), np.int32)]
        if name == "cond" and not isinstance(inputs[0], Tensor):
            branches = params["branches"]
            chosen = branches[min(max(0, int(inputs[0])), len(branches) - 1)]
            return self.run(chosen.jaxpr, chosen.consts, inputs[1:])
        if name in CALLS:
            inner = params[CALLS[name]]
            consts = getattr(inner, "consts", ())
            inner = getattr(inner, "jaxpr", inner)
            if inner.debug_info.func_name == SAMPLING and any(isinstance(x, Tensor) for x in inputs):
                return [self.deformable(*inputs)]
            return self.run(inner, consts, inputs)
        known = not any(isinstance(x, Tensor) for x in inputs)
        if known and not any(is_symbolic_dim(side) for out in equation.outvars for side in out.aval.shape):
            found = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
            return list(map(np.asarray, found if equation.primitive.multiple_results else [found]))
        inputs = [x if isinstance(x, Tensor) else np.asarray(x) for x in inputs]
        (out,) = (variable.aval for variable in equation.outvars)
        if name in UNARY or name in BINARY or name in ("integer_pow", "rsqrt", "convert_element_type"):
            return [self.elementwise(name, inputs, out, params)]
        rule = getattr(self, f"_{name}", None)
        if rule is None:
            raise NotImplementedError(f"ONNX: {name} of {[x.shape for x in inputs]} has no rule")
        return [rule(inputs, out, params)]

    # What the rules are made of.

    def node(self, kind: str, inputs: Sequence[Tensor | np.ndarray], like: Any, **attributes: Any) -> Tensor:
        """Adds a node; `like` has the shape and the type of what it computes."""
        channels_first = attributes.pop("channels_first", False)
        name = f"{kind.lower()}_{len(self.nodes)}"
        names = [self.name_of(x) for x in inputs]
        self.nodes.append(helper.make_node(kind, names, [name], **attributes))
        return Tensor(name, tuple(like.shape), np.dtype(like.dtype), channels_first)

    def name_of(self, x: Tensor | np.ndarray) -> str:
        """Of a tensor, or of an array that becomes a constant."""
        if isinstance(x, Tensor):
            return x.name
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(x), name))
        return name

    def in_order(self, x: Tensor) -> Tensor:
        """With its axes as JAX has them."""
        return self.node("Transpose", [x], x, perm=TO_NHWC) if x.channels_first else x

    def channels_first(self, x: Tensor) -> Tensor:
        """With its channels before its cells."""
        return x if x.channels_first else self.node("Transpose", [x], x, perm=TO_NCHW, channels_first=True)

    def elementwise(self, name: str, inputs: list, out: Any, params: dict) -> Tensor:
        """In the order that its inputs have."""
        first = len(out.shape) == 4 and any(isinstance(x, Tensor) and x.channels_first for x in inputs)

        def arranged(x):
            if isinstance(x, Tensor):
                return self.channels_first(x) if first else self.in_order(x)
            return x.transpose(TO_NCHW) if first and x.ndim == 4 else x

        inputs = [arranged(x) for x in inputs]
        if name == "convert_element_type":
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(out.dtype))
            return self.node("Cast", inputs, out, to=kind, channels_first=first)
        if name == "rsqrt":
            return self.node("Reciprocal", [self.node("Sqrt", inputs, out)], out, channels_first=first)
        if name == "integer_pow":
            return self.node("Pow", [*inputs, np.asarray(params["y"], out.dtype)], out, channels_first=first)
        if name == "max" and not isinstance(inputs[1], Tensor) and not inputs[1].any():
            return self.node("Relu", inputs[:1], out, channels_first=first)
        if name == "sub" and not isinstance(inputs[1], Tensor):  # Runtimes join an addition with a convolution.
            name, inputs = "add", [inputs[0], -inputs[1]]
        return self.node((UNARY | BINARY)[name], inputs, out, channels_first=first)

    def deformable(self, features: Tensor, offsets: Tensor, kernel: np.ndarray, modulation: Tensor | None = None):
        """`ops.dynamic_sampling_conv`."""
        batch, height, width, _ = features.shape
        k = kernel.shape[0]
        like = jax.ShapeDtypeStruct((batch, height, width, 2 * k * k), offsets.dtype)
        offsets = self.node("Reshape", [offsets, np.array([0, height, width, 2 * k * k])], like)
        inputs = [features, np.asarray(kernel).transpose(3, 2, 0, 1), offsets]
        if modulation is not None:
            inputs += [np.zeros(kernel.shape[-1], np.float32), modulation]
        inputs = [self.channels_first(x) if isinstance(x, Tensor) else x for x in inputs]
        out = jax.ShapeDtypeStruct((batch, height, width, kernel.shape[-1]), features.dtype)
        sides = {"kernel_shape": [k, k], "pads": [k // 2] * 4}
        return self.node("DeformConv", inputs, out, channels_first=True, **sides)

    # A rule for each primitive: its inputs, the shape and type of its output, its parameters.

    def _conv_general_dilated(self, inputs, out, params):
        x, kernel = inputs
        (top, bottom), (left, right) = params["padding"]
        attributes = {"pads": [top, left, bottom, right], "strides": params["window_strides"]}
        kernel = kernel.transpose(3, 2, 0, 1)  # From HWIO, the only order in use here.
        x = self.channels_first(x)
        return self.node("Conv", [x, kernel], out, dilations=params["rhs_dilation"], channels_first=True, **attributes)

    def _dot_general(self, inputs, out, params):
        a, b = inputs
        (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
        if len(a.shape) == 4 and isinstance(b, np.ndarray) and b.ndim == 2 and (contract_a, contract_b) == ((3,), (0,)):
            kernel = b.T[:, :, None, None]  # A 1x1 convolution.
            return self.node("Conv", [self.channels_first(a), kernel], out, channels_first=True)
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        of_a, of_b = {}, {}
        for i, j in (*zip(contract_a, contract_b, strict=True), *zip(batch_a, batch_b, strict=True)):
            of_a[i] = of_b[j] = next(letters)
        for names, x in ((of_a, a), (of_b, b)):
            names.update({i: next(letters) for i in range(len(x.shape)) if i not in names})
        free = [names[i] for names, x, used in ((of_a, a, (*contract_a, *batch_a)), (of_b, b, (*contract_b, *batch_b)))
                for i in range(len(x.shape)) if i not in used]  # fmt: skip
        result = "".join([of_a[i] for i in batch_a] + free)
        inputs, spelled = [], []
        for x, names, batch in ((a, of_a, batch_a), (b, of_b, batch_b)):
            axes = _axes(x)  # Einsum takes them in whatever order they lie.
            if not isinstance(x, Tensor):  # With an axis of 1 a constant would make the batch 1.
                once = tuple(i for i in batch if x.shape[i] == 1)
                x, axes = x.squeeze(once), [i for i in axes if i not in once]
            inputs.append(x)
            spelled.append("".join(names[i] for i in axes))
        return self.node("Einsum", inputs, out, equation=f"{spelled[0]},{spelled[1]}->{result}")

    def _reshape(self, inputs, out, params):
        (x,) = inputs
        sides = [0 if is_symbolic_dim(side) and i == 0 else side for i, side in enumerate(out.shape)]
        if any(map(is_symbolic_dim, sides)) or (0 in sides and x.shape[0] != out.shape[0]):
            raise NotImplementedError(f"ONNX: {x.shape} cannot be given the shape {out.shape}")
        return self.node("Reshape", [self.in_order(x), np.array(sides, np.int64)], out)

    def _squeeze(self, inputs, out, params):
        return self._reshape(inputs, out, params)

    def _broadcast_in_dim(self, inputs, out, params):
        (x,) = inputs
        if not isinstance(x, Tensor):  # Of a symbolic shape: ONNX repeats it where it is used.
            kept = params["broadcast_dimensions"]
            return x.reshape([x.shape[kept.index(i)] if i in kept else 1 for i in range(len(out.shape))])
        kept = params["broadcast_dimensions"]
        if len(kept) == len(out.shape) == 4:
            first = x.channels_first
            shape = [1 if is_symbolic_dim(side) else side for side in out.shape]
            shape = np.array(shape, np.int64)[list(TO_NCHW) if first else list(range(4))]
            return self.node("Expand", [x, shape], out, channels_first=first)
        x = self.in_order(x)
        added = np.array([i for i in range(len(out.shape)) if i not in kept], np.int64)
        if len(added):
            x = self.node("Unsqueeze", [x, added], out)
        shape = np.array([1 if is_symbolic_dim(side) else side for side in out.shape], np.int64)
        return self.node("Expand", [x, shape], out)

    def _transpose(self, inputs, out, params):
        (x,) = inputs
        perm, order = params["permutation"], _axes(x)
        return self.node("Transpose", inputs, out, perm=[order.index(i) for i in perm])

    def _concatenate(self, inputs, out, params):
        axis, first = params["dimension"], len(out.shape) == 4
        if any(not isinstance(x, Tensor) for x in inputs):
            raise NotImplementedError("ONNX: a constant in a concatenation has no rule")
        if first:
            inputs, axis = [self.channels_first(x) for x in inputs], TO_NCHW.index(axis)
        return self.node("Concat", inputs, out, axis=axis, channels_first=first)

    def _pad(self, inputs, out, params):
        x, value = inputs
        config = [params["padding_config"][i] for i in _axes(x)]
        if any(interior for _, _, interior in config):
            raise NotImplementedError("ONNX: padding between cells has no rule")
        pads = np.array([low for low, _, _ in config] + [high for _, high, _ in config], np.int64)
        return self.node("Pad", [x, pads, value], out, channels_first=x.channels_first)

    def _slice(self, inputs, out, params):
        (x,) = inputs
        strides = params["strides"] or (1,) * len(x.shape)
        if is_symbolic_dim(x.shape[0]) and x.shape[0] != out.shape[0]:
            raise NotImplementedError(f"ONNX: a part {out.shape} of the batch of {x.shape} has no rule")
        cut = [
            (start, limit, stride, _axes(x).index(axis))
            for axis, (start, limit, stride) in enumerate(zip(params["start_indices"], params["limit_indices"], strides,
                                                              strict=True))
            if not (is_symbolic_dim(limit) or (start == 0 and limit == x.shape[axis] and stride == 1))
        ]  # fmt: skip
        if not cut:
            return x
        starts, limits, steps, axes = (np.array(column, np.int64) for column in zip(*cut, strict=True))
        return self.node("Slice", [x, starts, limits, axes, steps], out, channels_first=x.channels_first)

    def _gather(self, inputs, out, params):
        """Of one place that is known: how JAX writes a slice of an array whose first axis is symbolic."""
        x, start = inputs
        numbers, sides = params["dimension_numbers"], params["slice_sizes"]
        if isinstance(start, Tensor) or start.ndim != 1 or numbers.operand_batching_dims:
            raise NotImplementedError(f"ONNX: gather of {x.shape} at places that are not known has no rule")
        starts = [dict(zip(numbers.start_index_map, start.tolist(), strict=True)).get(i, 0) for i in range(len(sides))]
        limits = [side if is_symbolic_dim(side) else first + side for first, side in zip(starts, sides, strict=True)]
        cut = jax.ShapeDtypeStruct(sides, out.dtype)
        x = self._slice([x], cut, {"start_indices": starts, "limit_indices": limits, "strides": None})
        return self._reshape([x], out, {}) if numbers.collapsed_slice_dims else x

    def _reduce(self, kind, inputs, out, params):
        (x,) = inputs
        if tuple(params["axes"]) != (1, 2):  # Of which the channels remain, whatever their place was.
            x = self.in_order(x)
        axes = np.array([_axes(x).index(axis) for axis in params["axes"]], np.int64)
        return self.node(kind, [x, axes], out, keepdims=0)

    def _reduce_sum(self, inputs, out, params):
        return self._reduce("ReduceSum", inputs, out, params)

    def _reduce_max(self, inputs, out, params):
        return self._reduce("ReduceMax", inputs, out, params)

    def _argmax(self, inputs, out, params):
        (x,) = inputs
        like = jax.ShapeDtypeStruct(out.shape, np.int64)
        found = self.node("ArgMax", [self.in_order(x)], like, axis=params["axes"][0], keepdims=0)
        return self.node("Cast", [found], out, to=helper.np_dtype_to_tensor_dtype(np.dtype(out.dtype)))

    def _optimization_barrier(self, inputs, out, params):
        return inputs[0]


def _axes(x: Tensor | np.ndarray) -> list[int]:
    """JAX's axes in the order in which the graph has them."""
    return list(TO_NCHW) if isinstance(x, Tensor) and x.channels_first else list(range(len(x.shape)))
