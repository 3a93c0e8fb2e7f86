"""The programs that are compiled, and what their compiler says of them."""

import dataclasses
import math
import re
from collections import defaultdict
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsnet_jax import parallel
from dsnet_jax.evaluation.canvases import up_to_multiple
from dsnet_jax.evaluation.inference import segment
from dsnet_jax.evaluation.metrics import MOST_PIXELS
from dsnet_jax.evaluation.protocols import SINGLE_SCALE
from dsnet_jax.experiment import initial_variables
from dsnet_jax.plan.targets import COMPILER_OPTIONS
from dsnet_jax.training.program import lower_step, step_of

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
_COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ((?:ragged-)?(?:{'|'.join(KINDS)}))(-start)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, in bytes of one device.

    Attributes:
      arguments: the state and the device's share of the batch.
      outputs: the new state and the metrics.
      aliased: of the outputs, what takes the place of arguments.
      temporaries: everything in between.
      code: the program itself.
      accessed: read and written in memory by one call, loops counted once; None: the compiler does not say.
      collectives: number and bytes of the results by kind; those in a loop counted once.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    accessed: float | None
    collectives: dict[str, tuple[int, int]]

    @property
    def memory(self) -> int:
        """What the program needs while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """What the compiler of TPUs says of a program that does not fit.

    Attributes:
      memory: bytes that the program would need; None: it does not say.
    """

    memory: float | None


def lower_training(config: ConfigDict, model: nn.Module, mesh: Mesh) -> jax.stages.Lowered:
    """The step that `dsnet train` compiles."""
    fresh_state, step_function = step_of(config, model, steps=config.training.epochs)  # No shape depends on how many.
    return lower_step(config, step_function, jax.eval_shape(fresh_state), mesh)


def lower_evaluation(config: ConfigDict, model: nn.Module, mesh: Mesh) -> jax.stages.Lowered:
    """The program that `dsnet evaluate` compiles for labelled images of the size of a training crop."""
    size, canvas = config.evaluation.batch_size, _canvas_hw(config)
    whole, split = parallel.replicated(mesh), parallel.split_by_batch(mesh)
    variables = jax.eval_shape(partial(initial_variables, model))
    variables = jax.tree.map(lambda leaf: leaf.update(sharding=whole), variables)
    sizes = ((size, 2), np.int32), ((size, 1, 2), np.int32)  # Of images, and of images at the one scale.
    shapes = ((size, *canvas, 3), np.uint8), *sizes, ((size, *canvas), np.uint8), sizes[0]
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=split) for shape in shapes]
    return segment.lower(model, variables, *arrays, protocol=SINGLE_SCALE, label_canvas_hw=canvas)


def most_images(config: ConfigDict, devices: int) -> int:
    """Images a device, of the size of a training crop, whose pixels an evaluation can count in one batch."""
    return MOST_PIXELS // (math.prod(_canvas_hw(config)) * devices)


def _canvas_hw(config: ConfigDict) -> tuple[int, int]:
    height, width = (up_to_multiple(side) for side in config.data.crop_size_hw)
    return height, width


def compile_for(platform: str, lowered: jax.stages.Lowered) -> Compiled | TooLarge:
    """Compiles, which may take minutes, and reads what the compiler found."""
    try:
        program = lowered.compile(COMPILER_OPTIONS[platform])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _USED.search(str(error))
        return TooLarge(float(used[1]) * 1024 ** (" KMGT".index(used[2])) if used else None)
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        accessed=cost.get("bytes accessed"),
        collectives=collectives_in(program.as_text()),
    )


def collectives_in(text: str) -> dict[str, tuple[int, int]]:
    """How many operations between devices a compiled program has, and how many bytes they result in, by kind.

    An asynchronous one is counted where it starts. Where that has operands and results in its type, as all but
    all-reduce have, the results are what counts.

    Args:
      text: of `jax.stages.Compiled.as_text`.
    """
    found = defaultdict(lambda: (0, 0))
    for kind_of_result, kind, start in _COLLECTIVE.findall(text):
        if start and kind != "all-reduce":
            kind_of_result = _second_of(kind_of_result)
        count, size = found[kind]
        found[kind] = count + 1, size + _bytes_of(kind_of_result)
    return dict(found)


def _second_of(tuple_type: str) -> str:
    """`(a, (b, c), d)` -> `(b, c)`: commas inside of brackets do not part."""
    depth, parts = 0, [""]
    for character in tuple_type.removeprefix("(").removesuffix(")"):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1]


def _bytes_of(kind_of_result: str) -> int:
    bits = 0
    for name, width, shape in _ARRAY.findall(kind_of_result):
        bits += (8 if name == "pred" else int(width)) * math.prod(int(side) for side in shape.split(",") if side)
    return bits // 8
