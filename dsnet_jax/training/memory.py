"""What to do about a program that does not fit the devices."""

import contextlib
import re
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from dsnet_jax.errors import InputError

# How compilers and allocators say how much they wanted: TPU's, then XLA's allocators on GPU and CPU.
_FIGURES = (
    r"Used [\d.]+\w? of [\d.]+\w? \w+(?:\. Exceeded \w+ capacity by [\d.]+\w?)?",
    r"(?:Out of memory )?(?:while trying to allocate|allocating) [\d.]+ ?\w*",
)


@contextlib.contextmanager
def out_of_memory_explained(config: ConfigDict, devices: int) -> Iterator[None]:
    """Turns what XLA raises when memory does not suffice, in compilation or later, into one line.

    Args:
      config: of the experiment.
      devices: how many share a batch.

    Raises:
      InputError: in place of XLA's error; it names the compiler's figure and the fields that would lower it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = " ".join(str(error).split())
        figure = next((found[0] for pattern in _FIGURES if (found := re.search(pattern, text))), text[:200])
        parts = config.training.accumulation_steps
        images = config.data.batch_size // (devices * parts)
        height, width = config.data.crop_size_hw
        advice = [f"fewer images at a time ({images} a device now: a smaller config.data.batch_size, or a larger"]
        advice[0] += f" config.training.accumulation_steps, {parts} now)"
        advice.append(f"smaller crops (config.data.crop_size_hw, {height}x{width} now)")
        if config.training.remat != "blocks":
            advice.append("config.training.remat=blocks")
        if config.model.dtype == "float32":
            advice.append("config.model.dtype=bfloat16")
        raise InputError(f"out of memory: {figure}: what helps is {', '.join(advice)}") from error
