"""A trained network as StableHLO: one file that JAX alone runs, on CPU, CUDA and TPU."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsnet_jax.weights.program import LEAST_SYMBOLIC_SIDE, MOST_SYMBOLIC_SIDE

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, DESCRIPTION = "program.bin", "description.json"


def to_stablehlo(
    program: Callable[[jax.Array], jax.Array],
    description: dict[str, Any],
    size_hw: tuple[int, int] | None = None,
    batch_size: int | None = None,
) -> bytes:
    """A zip file, not compressed, of `program.bin`, which `jax.export.deserialize` reads, and `description.json`.

    Args:
      program: of images, uint8 [B, H, W, 3], to labels, uint8 [B, H, W]; its weights inside.
      description: what travels with it.
      size_hw: H and W; None: any, from 32 to 65535 pixels.
      batch_size: B; None: any.
    """
    constraints, limits = [], {}
    if size_hw is None:
        limits = {"least_side": LEAST_SYMBOLIC_SIDE, "greatest_side": MOST_SYMBOLIC_SIDE}
        constraints = [f"{side} >= {LEAST_SYMBOLIC_SIDE}" for side in "hw"]
        constraints += [f"{side} <= {MOST_SYMBOLIC_SIDE}" for side in "hw"]
    height, width = ("h", "w") if size_hw is None else size_hw
    shape = jax.export.symbolic_shape(f"{batch_size or 'b'}, {height}, {width}, 3", constraints=constraints)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(images)
    shape = [batch_size, *(size_hw or (None, None)), 3]
    description = description | {"platforms": list(PLATFORMS)}
    description["input"] = description["input"] | {"shape": shape} | limits
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(PROGRAM, bytes(exported.serialize()))
        file.writestr(DESCRIPTION, json.dumps(description, indent=2) + "\n")
    return data.getvalue()
