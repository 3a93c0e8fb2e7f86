"""DSNet-R101 on ADE20K: the paper's Table 4, from ImageNet weights. Not run.

    dsnet prepare ade20k --source=/data/archives
    dsnet port resnet101-63fe2227.pth --workdir=weights/resnet101
    dsnet train --config=configs/ade20k_dsnet_r101.py --workdir=runs/ade20k_dsnet_r101-seed0
    dsnet evaluate --workdir=runs/ade20k_dsnet_r101-seed0 --protocol=ms_flip

The paper: 46.37 mIoU on val, with flips and scales, as we read "when evaluating our model". The table's other rows are
figures of other papers (PSPNet 44.94, EncNet 44.65, OCNet 45.08, APCNet 45.38, CFNet 44.89). Networks that we have,
under the protocol of this file, with names of `dsnet_jax/variants.py`:

    dsnet train --config=configs/ade20k_dsnet_r101.py:aspp --workdir=runs/ade20k_dsnet_r101-aspp-seed0
    dsnet train --config=configs/ade20k_dsnet_r101.py:pspnet --workdir=runs/ade20k_dsnet_r101-pspnet-seed0
    dsnet evaluate --workdir=runs/ade20k_dsnet_r101-pspnet-seed0 --protocol=ms_flip
    dsnet train --config=configs/ade20k_dsnet_r101.py:deeplabv3plus --workdir=runs/ade20k_dsnet_r101-deeplabv3plus-seed0
"""

from dsnet_jax.config import default_config
from dsnet_jax.variants import vary


def get_config(name: str = "cgds"):
    config = default_config()
    config.init_from = "weights/resnet101"
    config.data.name = "ade20k"
    config.data.crop_size_hw = (576, 576)
    config.data.batch_size = 24
    config.model.backbone = "resnet101"
    config.model.dtype = "bfloat16"
    config.training.epochs = 150
    return vary(config, name)
