"""DSNet-R101 on PASCAL Context: the paper's Table 5, from ImageNet weights. Not run.

    dsnet prepare pascal_context --source=/data/archives
    dsnet port resnet101-63fe2227.pth --workdir=weights/resnet101
    dsnet train --config=configs/pascal_context_dsnet_r101.py --workdir=runs/pascal_context_dsnet_r101-seed0
    dsnet evaluate --workdir=runs/pascal_context_dsnet_r101-seed0 --protocol=ms_flip

The paper: 54.2 mIoU, without saying of how many classes. Papers mix three figures: of the 59 classes, which this file
trains; of 60, with background as a class; and that of the 59 times 59/60. For the second:

    dsnet prepare pascal_context_60 --source=/data/archives
    dsnet train --config=configs/pascal_context_dsnet_r101.py --config.data.name=pascal_context_60 \
        --workdir=runs/pascal_context_dsnet_r101-pascal_context_60-seed0
    dsnet evaluate --workdir=runs/pascal_context_dsnet_r101-pascal_context_60-seed0 --protocol=ms_flip

The table's other rows are figures of other papers. Other networks under the protocol of this file, with names of
`dsnet_jax/variants.py`:

    dsnet train --config=configs/pascal_context_dsnet_r101.py:aspp --workdir=runs/pascal_context_dsnet_r101-aspp-seed0
    dsnet train --config=configs/pascal_context_dsnet_r101.py:pspnet \
        --workdir=runs/pascal_context_dsnet_r101-pspnet-seed0
"""

from dsnet_jax.config import default_config
from dsnet_jax.variants import vary


def get_config(name: str = "cgds"):
    config = default_config()
    config.init_from = "weights/resnet101"
    config.data.name = "pascal_context"
    config.model.backbone = "resnet101"
    config.model.dtype = "bfloat16"
    config.optimizer.base_lr = 0.005
    return vary(config, name)
