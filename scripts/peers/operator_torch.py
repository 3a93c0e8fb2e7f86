"""torchvision.ops.deform_conv2d, timed beside ours: the other side of `scripts/benchmark.py operator`.

Does `forward`, or `gradient`: the forward pass and the gradients by input, offset and weight; in float32.
"""

import argparse

import torch
from answering import answer, read_options
from torchvision.ops import deform_conv2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=int, nargs=4, default=(2, 64, 64, 256), help="B H W C; as many channels come out"
    )
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--reach", type=float, default=3, help="offsets are uniform in +- so many pixels")
    options = read_options(parser)
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

    work = {"forward": forward, "gradient": gradient}
    answer(lambda word: work[word]())


if __name__ == "__main__":
    main()
