"""What the PyTorch sides share. They do what a line of their input asks for, once, and answer when it is done."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the flags, --threads among them, and sets the number of threads and the seed."""
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def answer(do: Callable[[str], Any]) -> None:
    """Says which versions these are, then answers each line with the seconds and the result of `do(line)`."""
    print(json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        result = do(line.strip())
        print(json.dumps({"seconds": time.perf_counter() - began, "result": result}), flush=True)
