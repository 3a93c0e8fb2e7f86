"""dynamic_sampling_conv and its gradient, beside torchvision's deform_conv2d and XLA's dense convolution.

Also beside its own formulation without gather and scatter, which a CPU does not take. All in float32. The gradient is
the value and its gradients by features, offsets and kernel; the dense convolution has no offsets. The memory of the
gradient is shown by the side of the kernel.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import harness

from dsnet_jax.errors import InputError
from dsnet_jax.ops import dynamic_sampling_conv

ROUNDS = 11
OURS, DENSE, THEIRS = "dynamic_sampling_conv", "dense convolution, XLA", "deform_conv2d, PyTorch"
HAT = "dynamic_sampling_conv by hat matrices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is computed."""
    parser.add_argument("--shape", type=int, nargs=4, default=(2, 64, 64, 256), help="B H W C; as many come out")
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--reach", type=float, default=3, help="offsets are uniform in +- so many pixels")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures.

    Raises:
      InputError: an even kernel, which has no centre.
    """
    if options.kernel < 1 or options.kernel % 2 == 0:
        raise InputError(f"--kernel is {options.kernel}: a positive odd number is needed", exit_code=2)
    ours, taking = _program(dynamic_sampling_conv, options, options.kernel, gathering=True)
    dense, _ = _program(_dense_convolution, options, options.kernel, gathering=False)
    hat, _ = _program(partial(dynamic_sampling_conv, formulation="hat"), options, options.kernel, gathering=True)
    flags = [f"--kernel={options.kernel}", f"--reach={options.reach}", "--shape", *options.shape]
    with harness.peer(options, "operator_torch.py", [f"--threads={options.threads}", *flags]) as peer:
        tasks = []
        for what in ("forward", "gradient"):
            sides = {
                OURS: partial(ours, what),
                DENSE: partial(dense, what),
                THEIRS: peer and partial(peer.seconds, what),
                HAT: partial(hat, what),
            }
            seconds = harness.in_turns(sides, options, calls=2)
            tasks.append(harness.Task(what, seconds, [(OURS, THEIRS), (OURS, DENSE), (OURS, HAT)]))
        versions = peer and peer.versions
    megabytes = {options.kernel: taking / 1e6}
    for side in {3, 5, 7} - {options.kernel}:
        megabytes[side] = _program(dynamic_sampling_conv, options, side, gathering=True)[1] / 1e6
    figures = {f"k = {side}": megabytes[side] for side in sorted(megabytes)}
    return harness.Report(tasks, {"temporaries of the gradient, MB": figures}, versions)


def _program(
    function: Callable, options: argparse.Namespace, side: int, gathering: bool
) -> tuple[Callable[[str], float], int]:
    """Times `function` of features, offsets (if `gathering`) and kernel; bytes of its gradient's temporaries.

    `forward` is its value, `gradient` its value and its gradients by all arguments.
    """
    rng = np.random.default_rng(0)
    *grid, channels = options.shape
    offsets = rng.uniform(-options.reach, options.reach, (*grid, side * side, 2))
    features, cotangent = rng.standard_normal((2, *options.shape))
    arguments = [features, offsets, rng.standard_normal((side, side, channels, channels))]
    arguments = [jnp.asarray(x, jnp.float32) for x in (arguments if gathering else arguments[::2])]
    cotangent = jnp.asarray(cotangent, jnp.float32)

    def value_and_gradients(cotangent: jax.Array, *arguments: jax.Array) -> tuple:
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(cotangent)

    gradient = jax.jit(value_and_gradients).lower(cotangent, *arguments).compile()
    programs = {
        "forward": partial(jax.jit(function).lower(*arguments).compile(), *arguments),
        "gradient": partial(gradient, cotangent, *arguments),
    }

    def seconds(what: str) -> float:
        began = time.perf_counter()
        jax.block_until_ready(programs[what]())
        return time.perf_counter() - began

    return seconds, gradient.memory_analysis().temp_size_in_bytes


def _dense_convolution(features: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(features, kernel, (1, 1), "SAME", dimension_numbers=numbers)
