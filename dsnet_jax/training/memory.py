"""What to do about a program that does not fit the devices."""

import contextlib
import re
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from dsnet_jax.errors import InputError

# How compilers and allocators say how much they wanted: TPU's, then XLA's allocators on GPU and CPU.
_FIGURES = (
    r"Used [\d.]+\w? of [\d.]+\w? \w+(?:\. Exceeded \w+ capacity by [\d.]+\w?)?",
    r"(?:Out of memory )?(?:while trying to allocate|allocating) [\d.]+ ?\w*",
)

ELSEWHERE = "in another --workdir "  # Before fields that a run keeps, whether it has taken a step or not.


@contextlib.contextmanager
def out_of_memory_explained(advice: Sequence[str]) -> Iterator[None]:
    """Turns what XLA raises when memory does not suffice, in compilation or later, into one line.

    Args:
      advice: what would lower the need, each a field or a flag.

    Raises:
      InputError: in place of XLA's error; it has the compiler's figure and the advice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = " ".join(str(error).split())
        figure = next((found[0] for pattern in _FIGURES if (found := re.search(pattern, text))), text[:200])
        raise InputError(f"out of memory: {figure}: what helps is {', '.join(advice)}") from error


def advice_for_step(config: ConfigDict, devices: int) -> list[str]:
    """The fields that lower what a training step needs, whose batch so many devices share."""
    parts = config.training.accumulation_steps
    images = config.data.batch_size // (devices * parts)
    height, width = config.data.crop_size_hw
    advice = ["config.training.remat=blocks"] if config.training.remat != "blocks" else []
    return [
        *advice,
        f"{ELSEWHERE}fewer images at a time ({images} a device now: a smaller config.data.batch_size, or a larger "
        f"config.training.accumulation_steps, {parts} now)",
        f"smaller crops (config.data.crop_size_hw, {height}x{width} now)",
        *_narrower(config),
    ]


def advice_for_evaluation(config: ConfigDict, devices: int) -> list[str]:
    """The fields that lower what the evaluations of a run need, by so many devices of a process."""
    images, narrower = config.evaluation.batch_size, _narrower(config)
    # Each device labels one image at least.
    advice = [f"fewer images at a time (config.evaluation.batch_size, {images} now)"] if images > devices else []
    if narrower:
        advice.append(ELSEWHERE + narrower[0])
    return advice or ["devices with more memory, or a smaller network"]


def _narrower(config: ConfigDict) -> list[str]:
    return ["config.model.dtype=bfloat16"] if config.model.dtype == "float32" else []
