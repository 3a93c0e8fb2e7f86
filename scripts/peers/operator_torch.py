"""torchvision.ops.deform_conv2d, timed beside ours: the other side of `scripts/benchmark.py operator`.

Reads one word a line, `forward` or `gradient` (the forward pass and the gradients by input, offset and weight), does
that once in float32 and answers with the seconds that it took.
"""

import argparse
import sys
import time

import torch
from torchvision.ops import deform_conv2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=int, nargs=4, default=(2, 64, 64, 256), help="B H W C; as many channels come out"
    )
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--reach", type=float, default=3, help="offsets are uniform in +- so many pixels")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch, height, width, channels = options.shape
    size = options.kernel
    features = torch.randn(batch, channels, height, width)
    offsets = options.reach * (2 * torch.rand(batch, 2 * size * size, height, width) - 1)
    weight = torch.randn(channels, channels, size, size)
    cotangent = torch.randn(batch, channels, height, width)

    def forward() -> None:
        with torch.inference_mode():
            deform_conv2d(features, offsets, weight, padding=size // 2)

    def gradient() -> None:
        arguments = [x.detach().requires_grad_() for x in (features, offsets, weight)]
        torch.autograd.grad(deform_conv2d(*arguments, padding=size // 2), arguments, cotangent)

    for line in sys.stdin:
        began = time.perf_counter()
        {"forward": forward, "gradient": gradient}[line.strip()]()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
