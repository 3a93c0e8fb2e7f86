"""How fast the parts of dsnet_jax are, beside what others offer for the same.

    python scripts/benchmark.py operator --peer-python=/venv/bin/python

All sides run in turns within one run, on the same processors, and a ratio is the median of the rounds' ratios: what
else the machine does then falls on all of them. Without --peer-python (a Python with torch and torchvision) PyTorch is
left out.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsnet_jax.ops import dynamic_sampling_conv

PEERS = Path(__file__).parent / "peers"
Timer = Callable[[str], float]  # Given what is to be done once, the seconds that it took.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--peer-python", help="a Python with torch and torchvision")
    common.add_argument("--rounds", type=int, default=11)
    common.add_argument("--threads", type=int, default=2, help="processors, for every side")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("operator", parents=[common], help="dynamic_sampling_conv and its gradient")
    command.add_argument("--shape", type=int, nargs=4, default=(2, 64, 64, 256), help="B H W C; as many come out")
    command.add_argument("--kernel", type=int, default=3)
    command.add_argument("--reach", type=float, default=3, help="offsets are uniform in +- so many pixels")
    command.set_defaults(run=operator)

    options = parser.parse_args()
    # Before JAX starts its threads, one for each processor that it may use; the peer's process inherits it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    options.run(options)


def operator(options: argparse.Namespace) -> None:
    """Ours against torchvision's deform_conv2d and XLA's dense convolution, and the memory of the gradient by k."""
    ours, taking = _operator_program(dynamic_sampling_conv, options, options.kernel, gathering=True)
    dense, _ = _operator_program(_dense_convolution, options, options.kernel, gathering=False)
    flags = [f"--kernel={options.kernel}", f"--reach={options.reach}", "--shape", *map(str, options.shape)]
    with _peer(options, "operator_torch.py", flags) as peer:
        sides = {"ours": ours, "dense convolution, XLA": dense} | ({"deform_conv2d, PyTorch": peer} if peer else {})
        for what in ("forward", "gradient"):
            _report(what, _in_turns(sides, what, options.rounds))
    print(f"temporaries of the gradient, k = {options.kernel}: {taking / 1e6:.1f} MB")
    for side in sorted({3, 5, 7} - {options.kernel}):
        taking = _operator_program(dynamic_sampling_conv, options, side, gathering=True)[1]
        print(f"temporaries of the gradient, k = {side}: {taking / 1e6:.1f} MB")


def _operator_program(function: Callable, options: argparse.Namespace, side: int, gathering: bool) -> tuple[Timer, int]:
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

    def timer(what: str) -> float:
        began = time.perf_counter()
        jax.block_until_ready(programs[what]())
        return time.perf_counter() - began

    return timer, gradient.memory_analysis().temp_size_in_bytes


def _dense_convolution(features: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(features, kernel, (1, 1), "SAME", dimension_numbers=numbers)


@contextlib.contextmanager
def _peer(options: argparse.Namespace, script: str, flags: list[str]) -> Iterator[Timer | None]:
    """Runs scripts/peers/`script` with the flags and as many threads as we have; None without --peer-python."""
    if not options.peer_python:
        yield None
        return
    command = [options.peer_python, PEERS / script, f"--threads={options.threads}", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def timer(what: str) -> float:
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield timer  # Afterwards its input is closed, and so it ends.


def _in_turns(sides: dict[str, Timer], what: str, rounds: int) -> list[dict[str, float]]:
    """The seconds of each side, round by round. A turn is two calls: the first one fetches what the other sides threw
    out of the caches, the second one counts."""

    def take(timer: Timer) -> float:
        time.sleep(0.3)  # The threads of the side before wait for more work, some of them spinning.
        timer(what)
        return timer(what)

    return [{name: take(timer) for name, timer in sides.items()} for _ in range(rounds)]


def _report(what: str, rounds: list[dict[str, float]]) -> None:
    """Prints medians, and each side's time over the first side's, the median of the rounds'."""
    first = next(iter(rounds[0]))
    for name in rounds[0]:
        milliseconds = 1e3 * statistics.median(seconds[name] for seconds in rounds)
        ratio = statistics.median(seconds[name] / seconds[first] for seconds in rounds)
        print(f"{what:10} {name:24} {milliseconds:8.1f} ms {ratio:6.2f} times {first}", flush=True)


if __name__ == "__main__":
    main()
