"""DSNet-R50 on PASCAL VOC 2012, trained on the augmented set: the base of the paper's Table 1.

    dsnet prepare voc2012 --source=/data/archives
    dsnet port resnet50-0676ba61.pth --workdir=weights/resnet50
    dsnet train --config=configs/voc2012_dsnet_r50.py --workdir=runs/voc2012_comparison-cgds-seed0
    dsnet evaluate --workdir=runs/voc2012_comparison-cgds-seed0

The paper: 79.0 mIoU on val with X(3) and X(ASPP), from ImageNet weights. Its text brings deep supervision in later, so
we read Table 1 as without. It is the row `cgds` of voc2012_comparison.py, in whose workdir it is trained. Not run.
"""

from dsnet_jax.config import default_config


def get_config():
    config = default_config()
    config.init_from = "weights/resnet50"
    config.data.name = "voc2012"
    config.data.train_split = "train_aug"
    config.model.backbone = "resnet50"
    config.model.deep_supervision = False
    config.model.dtype = "bfloat16"
    return config
