"""A plain PyTorch loop that scores a network on a split: the other side of `scripts/benchmark.py evaluation`.

Reads a folder images/* and labels/* of the same names. `evaluate` reads, decodes, labels and counts all of them, one
after the other at its own size; `pixels` is how many the confusion matrix of the last evaluation has.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from answering import answer, read_options
from network_torch import DSNet
from torchvision.io import ImageReadMode, decode_image

MEAN, DEVIATION = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--sampling-kernel", type=int, default=3)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--image-scale", type=float, default=1.0)
    options = read_options(parser)
    classes = options.classes
    network = DSNet(options.backbone, classes, options.width, options.output_stride, options.sampling_kernel)
    network = network.to(memory_format=torch.channels_last).eval()
    files = sorted((options.folder / "images").iterdir())
    matrix = torch.zeros(classes, classes, dtype=torch.int64)

    @torch.inference_mode()
    def evaluate() -> None:
        matrix.zero_()
        for file in files:
            image = decode_image(str(file), ImageReadMode.RGB)
            label = decode_image(str(options.folder / "labels" / file.name))[0].long()
            image = ((image / 255 - MEAN) / DEVIATION)[None].to(memory_format=torch.channels_last)
            if options.image_scale != 1:
                size_hw = [round(side * options.image_scale) for side in label.shape]
                image = F.interpolate(image, size_hw, mode="bilinear", align_corners=False)
            predicted = network(image, label.shape).argmax(1)[0]
            valid = label < classes
            pairs = label[valid] * classes + predicted[valid]
            matrix.add_(torch.bincount(pairs, minlength=classes**2).view(classes, classes))

    def pixels() -> int:
        return int(matrix.sum())

    work = {"evaluate": evaluate, "pixels": pixels}
    answer(lambda word: work[word]())


if __name__ == "__main__":
    main()
