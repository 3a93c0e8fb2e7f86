"""DSNet-R101 on PASCAL VOC 2012, trained on the augmented set: the paper's Table 2, row "DSNet" with deep supervision.

    dsnet train --config=configs/voc2012_dsnet_r101.py --workdir=runs/voc2012_dsnet_r101

The paper: 80.98 mIoU on val at single scale, from ImageNet weights. Not run.
"""

from dsnet_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "voc2012"
    config.data.train_split = "train_aug"
    config.model.backbone = "resnet101"
    config.model.dtype = "bfloat16"
    return config
