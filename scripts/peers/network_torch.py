"""DSNet put together from torchvision's parts, timed beside ours: the other side of `scripts/benchmark.py network`.

What somebody without dsnet_jax would write: torchvision's ResNet, its ASPP, and deform_conv2d fed with offsets that a
convolution predicts from the resized ASPP feature; channels_last, which is its fastest layout here.

Does `inference` (from normalised images to labels) or `training` (a step), or gives the number of `parameters`.
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from answering import answer, read_options
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import deform_conv2d


class DSNet(nn.Module):
    """Normalised images [B, 3, H, W] to logits [B, K, H, W], or of another size."""

    def __init__(self, backbone: str, classes: int, width: int, output_stride: int = 16, kernel: int = 3):
        super().__init__()
        bottleneck = backbone not in ("resnet18", "resnet34")
        dilated = [False, output_stride < 16, output_stride < 32]
        resnet = getattr(torchvision.models, backbone)(replace_stride_with_dilation=dilated if bottleneck else None)
        if not bottleneck:  # torchvision does not dilate basic blocks.
            dilate_basic_blocks([resnet.layer2, resnet.layer3, resnet.layer4], dilated)
        low, high = (512, 2048) if bottleneck else (128, 512)
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])
        self.aspp = ASPP(high, [rate * 16 // output_stride for rate in (6, 12, 18)], width)
        self.modify = nn.Sequential(nn.Conv2d(low, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.offset = nn.Conv2d(width, 2 * kernel * kernel, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(width, width, kernel, kernel) * 0.02)
        self.normalise = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.classify = nn.Sequential(
            nn.Conv2d(3 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(width, classes, 1),
        )

    def forward(self, images: torch.Tensor, size_hw: tuple[int, int] | None = None) -> torch.Tensor:
        low = self.stages[1](self.stages[0](self.stem(images)))
        guide = self.aspp(self.stages[3](self.stages[2](low)))
        modified = self.modify(low)
        guide = F.interpolate(guide, modified.shape[-2:], mode="bilinear", align_corners=False)
        sampled = self.normalise(
            deform_conv2d(modified, self.offset(guide), self.kernel, padding=self.kernel.shape[-1] // 2)
        )
        logits = self.classify(torch.cat([modified, sampled, guide], 1))
        return F.interpolate(logits, size_hw or images.shape[-2:], mode="bilinear", align_corners=False)


def dilate_basic_blocks(layers: list[nn.Sequential], dilated: list[bool]) -> None:
    """Puts dilation in the place of stride in some layers, in order, as torchvision does with bottlenecks."""
    dilation = 1
    for layer, is_dilated in zip(layers, dilated, strict=True):
        if not is_dilated:
            continue
        before, dilation = dilation, 2 * dilation
        for index, block in enumerate(layer):
            for conv in (block.conv1, block.conv2):
                rate = before if index == 0 and conv is block.conv1 else dilation
                conv.stride, conv.dilation, conv.padding = (1, 1), (rate,) * 2, (rate,) * 2
            if block.downsample is not None:
                block.downsample[0].stride = (1, 1)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which DSNet."""
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--sampling-kernel", type=int, default=3)
    parser.add_argument("--classes", type=int, default=21)


def dsnet_of(options: argparse.Namespace) -> DSNet:
    """The network that these flags ask for."""
    return DSNet(options.backbone, options.classes, options.width, options.output_stride, options.sampling_kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    parser.add_argument("--size-hw", type=int, nargs=2, default=(512, 512))
    parser.add_argument("--batch", type=int, default=2)
    options = read_options(parser)
    network = dsnet_of(options).to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, *options.size_hw).to(memory_format=torch.channels_last)
    labels = torch.randint(0, options.classes, (options.batch, *options.size_hw))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

    def inference() -> None:
        network.eval()
        with torch.inference_mode():
            network(images).argmax(1)

    def training() -> None:
        network.train()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels, ignore_index=255).backward()
        optimizer.step()

    def parameters() -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    work = {"inference": inference, "training": training, "parameters": parameters}
    answer(lambda word: work[word]())


if __name__ == "__main__":
    main()
