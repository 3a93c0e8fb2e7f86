"""A DataLoader that decodes and augments as `dsnet train` does: the other side of `scripts/benchmark.py pipeline`.

Reads a folder `images/train/*` and `masks/train/*.png`. Makes as many batches as it is told.
"""

import argparse
from pathlib import Path

import torch
from answering import answer, read_options
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

MEAN_COLOUR, IGNORE_LABEL = (124, 116, 104), 255


class Pictures(Dataset):
    """Image uint8 [3, crop, crop] and label uint8 [crop, crop] by position, scaled by 0.5 to 2, cropped and flipped."""

    def __init__(self, folder: Path, crop: int, decoder: str):
        self.images = sorted((folder / "images" / "train").iterdir())
        self.masks = [folder / "masks" / "train" / f"{image.stem}.png" for image in self.images]
        self.crop, self.decoder = crop, decoder

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.decode(index)
        height, width = F.get_size(image)
        scale, *draws = (0.5 + 1.5 * torch.rand(1)).tolist() + torch.rand(3).tolist()
        size_hw = [round(height * scale), round(width * scale)]
        image = F.resize(image, size_hw, F.InterpolationMode.BILINEAR, antialias=False)
        label = F.resize(label, size_hw, F.InterpolationMode.NEAREST_EXACT)
        top, left = (int(draw * (max(side - self.crop, 0) + 1)) for draw, side in zip(draws, size_hw, strict=False))
        height, width = (min(side, self.crop) for side in size_hw)
        image, label = (F.crop(picture, top, left, height, width) for picture in (image, label))
        if height < self.crop or width < self.crop:
            padding = [0, 0, self.crop - width, self.crop - height]
            image, label = F.pad(image, padding, list(MEAN_COLOUR)), F.pad(label, padding, [IGNORE_LABEL])
        if draws[2] < 0.5:
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        return F.to_image(image), F.to_image(label)[0]

    def decode(self, index: int):
        """Both files as tensors, by torchvision's decoder, or as Pillow's images."""
        if self.decoder == "pillow":
            from PIL import Image

            return Image.open(self.images[index]).convert("RGB"), Image.open(self.masks[index])
        return decode_image(str(self.images[index]), ImageReadMode.RGB), decode_image(str(self.masks[index]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--decoder", choices=("torchvision", "pillow"), default="torchvision")
    options = read_options(parser)
    pictures = Pictures(options.folder, options.crop, options.decoder)
    endless = torch.utils.data.RandomSampler(pictures, replacement=True, num_samples=10**9)
    batches = iter(DataLoader(pictures, options.batch, sampler=endless, num_workers=options.workers))

    def make(count: str) -> None:
        for _ in range(int(count)):
            image, label = next(batches)
        assert image.dtype == label.dtype == torch.uint8
        assert (*image.shape[:2], *image.shape[2:]) == (options.batch, 3, *label.shape[1:])

    answer(make)


if __name__ == "__main__":
    main()
