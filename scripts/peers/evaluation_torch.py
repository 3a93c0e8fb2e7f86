"""A plain PyTorch loop that scores a network on a split: the other side of `scripts/benchmark.py evaluation`.

Reads a folder images/* and labels/* of the same names. `evaluate` reads, decodes, labels and counts all of them, one
after the other at its own size; `pixels` is how many the confusion matrix of the last evaluation has.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from answering import answer, read_options
from network_torch import add_network_arguments, dsnet_of
from torchvision.io import ImageReadMode, decode_image

MEAN, DEVIATION = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def confusion(label: torch.Tensor, predicted: torch.Tensor, classes: int) -> torch.Tensor:
    """How often each class was labelled as each, int64 [classes, classes]; values from `classes` on are ignored."""
    valid = label < classes
    pairs = label[valid] * classes + predicted[valid]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    add_network_arguments(parser)
    parser.add_argument("--image-scale", type=float, default=1.0)
    options = read_options(parser)
    classes = options.classes
    network = dsnet_of(options).to(memory_format=torch.channels_last).eval()
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
            matrix.add_(confusion(label, predicted, classes))

    def pixels() -> int:
        return int(matrix.sum())

    work = {"evaluate": evaluate, "pixels": pixels}
    answer(lambda word: work[word]())


if __name__ == "__main__":
    main()
