"""DSNet-R18 on the built-in data set, from scratch, in 5 to 13 minutes on two CPU cores.

    dsnet prepare shapes
    dsnet train --config=configs/shapes_quickstart.py --workdir=runs/shapes_quickstart
    dsnet evaluate --workdir=runs/shapes_quickstart

Expected: validation mIoU of 0.80 or more on two CPU cores.
"""

from dsnet_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "shapes"
    config.data.crop_size_hw = (160, 160)
    config.data.scale_range = (0.75, 1.33)
    config.data.batch_size = 8
    config.model.backbone = "resnet18"
    config.model.width = 128
    config.model.deep_supervision = False
    config.optimizer.base_lr = 0.05
    config.optimizer.backbone_lr_multiplier = 1.0  # Nothing is pretrained.
    config.optimizer.offset_lr_multiplier = 0.1  # At the full rate the first steps throw the points about.
    config.training.epochs = 8
    config.training.evaluate_every_epochs = 4
    return config
