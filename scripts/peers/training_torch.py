"""Trains a network in plain PyTorch: the other side of `scripts/benchmark.py training`.

Reads a folder train/images/*, train/labels/* and val/images/*, val/labels/* of files of the same names. All of them are
decoded when it starts; `train` trains a fresh network and scores it on val as often as ours is, and gives the last
mIoU and pixel accuracy. What it does otherwise than ours is in ours' favour or against it as it comes: it decodes once,
squeezes validation images to the crop's size, and writes no checkpoints.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from answering import answer, read_options
from evaluation_torch import DEVIATION, MEAN, confusion
from network_torch import add_network_arguments, dsnet_of
from torch import nn
from torchvision.io import ImageReadMode, decode_image

IGNORE_LABEL = 255
Picture = tuple[torch.Tensor, torch.Tensor]  # uint8 [3, H, W] and labels, uint8 [H, W].


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=("dsnet", "smp_deeplabv3plus"), default="dsnet")
    add_network_arguments(parser)
    parser.add_argument("--image-scale", type=float, default=1.0)
    parser.add_argument("--crop-size-hw", type=int, nargs=2, default=(512, 512))
    parser.add_argument("--scale-range", type=float, nargs=2, default=(0.5, 2.0))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--evaluate-every-epochs", type=int, default=10)
    parser.add_argument("--base-lr", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    options = read_options(parser)
    pictures = {split: read_pictures(options.folder / split) for split in ("train", "val")}
    answer(lambda word: {"train": lambda: train(options, pictures)}[word]())


def read_pictures(folder: Path) -> list[Picture]:
    files = sorted((folder / "images").iterdir())
    label_of = folder / "labels"
    return [(decode_image(str(file), ImageReadMode.RGB), decode_image(str(label_of / file.name))[0]) for file in files]


def build(options: argparse.Namespace) -> nn.Module:
    if options.network == "smp_deeplabv3plus":
        import segmentation_models_pytorch as smp

        stride = options.output_stride
        return smp.DeepLabV3Plus(
            options.backbone, encoder_weights=None, classes=options.classes, encoder_output_stride=stride
        )
    return dsnet_of(options)


def train(options: argparse.Namespace, pictures: dict[str, list[Picture]]) -> dict[str, float]:
    torch.manual_seed(0)
    network = build(options).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), options.base_lr, momentum=0.9, weight_decay=options.weight_decay)
    size, scores = options.batch_size, {}
    batches = len(pictures["train"]) // size
    steps = options.epochs * batches
    for epoch in range(options.epochs):
        network.train()
        order = torch.randperm(len(pictures["train"])).tolist()
        for batch in range(batches):
            for group in optimizer.param_groups:
                group["lr"] = options.base_lr * (1 - (epoch * batches + batch) / steps) ** 0.9
            chosen = [pictures["train"][index] for index in order[batch * size : (batch + 1) * size]]
            images, labels = zip(*(augment(picture, options) for picture in chosen), strict=True)
            logits = network(normalise(torch.stack(images)))
            loss = F.cross_entropy(logits, torch.stack(labels).long(), ignore_index=IGNORE_LABEL)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % options.evaluate_every_epochs == 0 or epoch + 1 == options.epochs:
            scores = evaluate(network, pictures["val"], options)
    return scores


def augment(picture: Picture, options: argparse.Namespace) -> Picture:
    """A crop after a random scale and a random flip; what it has beyond the image is the mean colour, and ignored."""
    image, label = picture
    scale = options.image_scale * torch.empty(()).uniform_(*options.scale_range).item()
    size_hw = [max(1, round(side * scale)) for side in label.shape]
    image = F.interpolate(image[None].float(), size_hw, mode="bilinear", align_corners=False)[0]
    label = F.interpolate(label[None, None].float(), size_hw, mode="nearest")[0, 0].to(torch.uint8)
    image = image / 255 - MEAN
    crop_hw = options.crop_size_hw
    missing_y, missing_x = (max(0, crop - side) for crop, side in zip(crop_hw, size_hw, strict=True))
    image = F.pad(image, (0, missing_x, 0, missing_y))
    label = F.pad(label, (0, missing_x, 0, missing_y), value=IGNORE_LABEL)
    y, x = (int(torch.randint(side - crop + 1, ())) for side, crop in zip(label.shape, crop_hw, strict=True))
    image, label = image[:, y : y + crop_hw[0], x : x + crop_hw[1]], label[y : y + crop_hw[0], x : x + crop_hw[1]]
    return (image.flip(-1), label.flip(-1)) if torch.rand(()) < 0.5 else (image, label)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] from which the mean was taken."""
    return (images / DEVIATION).to(memory_format=torch.channels_last)


@torch.inference_mode()
def evaluate(network: nn.Module, pictures: list[Picture], options: argparse.Namespace) -> dict[str, float]:
    """mIoU over all classes and pixel accuracy, at the labels' own size. Images are squeezed to the crop's size."""
    network.eval()
    classes = options.classes
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for image, label in pictures:
        seen = F.interpolate(image[None] / 255 - MEAN, options.crop_size_hw, mode="bilinear", align_corners=False)
        logits = F.interpolate(network(normalise(seen)), label.shape, mode="bilinear", align_corners=False)
        matrix += confusion(label.long(), logits.argmax(1)[0], classes)
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    present = union > 0
    return {
        "mIoU": float((right[present] / union[present]).mean()),
        "pixel accuracy": float(right.sum() / matrix.sum()),
    }


if __name__ == "__main__":
    main()
