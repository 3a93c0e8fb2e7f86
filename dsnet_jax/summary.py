"""What a network is made of: shapes, parameters and multiply-adds of its parts, without computing anything."""

import dataclasses
import math
from collections import Counter
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from dsnet_jax.data.records import open_split
from dsnet_jax.data.specs import ADE20K, CAMVID, IGNORE_LABEL, PASCAL_CONTEXT, PASCAL_CONTEXT_60, SHAPES, VOC2012
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a network.

    Attributes:
      name: of the module, `backbone` for instance.
      parameters: how many.
      multiply_adds: of the convolutions and matrix products that it computes for one image.
    """

    name: str
    parameters: int
    multiply_adds: int


def parts_of(model: nn.Module, image_hw: tuple[int, int], train: bool = False) -> list[Part]:
    """The top-level parts of a network, in the order of computation.

    Multiply-adds are counted in the traced program: those of every convolution and matrix product, also inside loops,
    as many times as the loop runs. What is not a product is not counted: normalisation, bilinear weights, gathers.

    Args:
      model: called with images and `train`.
      image_hw: height and width of one image.
      train: count what training computes, forward: deep supervision is then one of the parts.
    """
    images = jax.ShapeDtypeStruct((1, *image_hw, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    variables = jax.eval_shape(partial(model.init, train=train), keys, images)

    def forward(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])

    work = Counter()
    _count(jax.make_jaxpr(forward)(variables, images).jaxpr, 1, "", type(model).__name__, work)
    sizes = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in variables["params"].items()
    }
    names = list(dict.fromkeys([*work, *sizes]))
    return [Part(name, sizes.get(name, 0), work[name]) for name in names if name]


def _count(jaxpr: Any, times: int, scope: str, network: str, work: Counter) -> None:
    """Adds the multiply-adds of a program to `work`, by the part of `network` that an operation stands in."""
    for equation in jaxpr.eqns:
        inner = f"{scope}/{equation.source_info.name_stack}"
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            path = inner.split(f"{network}/")[-1] if f"{network}/" in inner else ""
            work[path.split("/")[0]] += times * _multiply_adds(equation)
        repeats = equation.params["length"] if name == "scan" else 1
        programs = list(jaxprs_in_params(equation.params))
        if name == "cond":  # A choice by platform, the last for those that are not named: the plain formulation.
            programs = programs[-1:]
        for program in programs:
            _count(program, times * repeats, inner, network, work)


def _multiply_adds(equation: Any) -> int:
    left, right = (variable.aval.shape for variable in equation.invars)
    result = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return result * math.prod(left[axis] for axis in contracted)
    out_channels = equation.params["dimension_numbers"].rhs_spec[0]
    return result * math.prod(right) // right[out_channels]


def classes_of(config: ConfigDict, num_classes: int | None = None) -> int:
    """K: the number given, or that of the config's data set, which is prepared or one of those that we know.

    Raises:
      InputError: fewer than one or more than 255 are given, or the data set is neither known nor prepared.
    """
    if num_classes is not None:
        if not 1 <= num_classes <= IGNORE_LABEL:
            raise InputError(f"--classes is {num_classes}: 1 to {IGNORE_LABEL} are needed", exit_code=2)
        return num_classes
    specs = (SHAPES, CAMVID, VOC2012, ADE20K, PASCAL_CONTEXT, PASCAL_CONTEXT_60)
    known = {spec.name: spec.num_classes for spec in specs}
    if config.data.name in known:
        return known[config.data.name]
    try:
        return open_split(config.data.root, config.data.name, config.data.train_split).spec.num_classes
    except InputError as error:
        raise InputError(f"{error}; or give --classes") from error


def print_summary(config: ConfigDict, num_classes: int | None = None) -> None:
    """Prints the network of a config as a table.

    Args:
      config: of an experiment.
      num_classes: K; None: that of the config's data set.

    Raises:
      InputError: the config cannot be built, or its data set is neither known nor prepared.
    """
    num_classes = classes_of(config, num_classes)
    model = build_model(config.model, num_classes)
    image_hw = config.data.crop_size_hw
    parts = parts_of(model, image_hw, train=config.model.deep_supervision)
    images = jax.ShapeDtypeStruct((1, *image_hw, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    output, _ = jax.eval_shape(partial(model.init_with_output, train=True), keys, images)

    table = Table(title=f"{config.model.name}, {config.model.backbone}, output stride {config.model.output_stride}")
    for column in ("part", "parameters (M)", "GMAC an image"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in parts:
        table.add_row(part.name, f"{part.parameters / 1e6:.2f}", f"{part.multiply_adds / 1e9:.2f}")
    table.add_section()
    parameters, work = sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts)
    table.add_row("together", f"{parameters / 1e6:.2f}", f"{work / 1e9:.2f}")
    console = Console()
    console.print(table)
    console.print(f"image {_shape((1, *image_hw, 3))}, {num_classes} classes")
    for name in ("logits", "auxiliary_logits", "offsets"):
        value = getattr(output, name)
        if value is not None:
            console.print(f"{name} {_shape(value.shape)}")
    console.print("GMAC: 10^9 multiply-adds of convolutions and matrix products, forward; auxiliary only in training")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
