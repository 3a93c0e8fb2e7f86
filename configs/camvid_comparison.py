"""What the paper compares, on CamVid: DSNet-R18, its ablations and the networks it is compared with, on a CPU.

All rows have the protocol of camvid_dsnet_r18.py, backbone, training and classifier included; they differ as
`dsnet_jax/variants.py` says. Scores are mIoU on the 101 validation images at single scale; they stand in
docs/results.md. The paper has no figures for CamVid.

    dsnet prepare camvid --source=/data/CamVid

DSNet, and CGDS in place of nothing, on the regular grid, and with points that the sampled map predicts itself:

    dsnet train --config=configs/camvid_comparison.py:cgds --workdir=runs/camvid_comparison-cgds-seed0
    dsnet train --config=configs/camvid_comparison.py:aspp --workdir=runs/camvid_comparison-aspp-seed0
    dsnet train --config=configs/camvid_comparison.py:regular --workdir=runs/camvid_comparison-regular-seed0
    dsnet train --config=configs/camvid_comparison.py:self --workdir=runs/camvid_comparison-self-seed0

Table 1, the low-level feature and the guide; x3_aspp is cgds, one run is enough:

    dsnet train --config=configs/camvid_comparison.py:x3_x5 --workdir=runs/camvid_comparison-x3_x5-seed0
    dsnet train --config=configs/camvid_comparison.py:x3_aspp --workdir=runs/camvid_comparison-x3_aspp-seed0
    dsnet train --config=configs/camvid_comparison.py:x4_aspp --workdir=runs/camvid_comparison-x4_aspp-seed0
    dsnet train --config=configs/camvid_comparison.py:x5_aspp --workdir=runs/camvid_comparison-x5_aspp-seed0

The other sampling operation, and related works:

    dsnet train --config=configs/camvid_comparison.py:nonlocal --workdir=runs/camvid_comparison-nonlocal-seed0
    dsnet train --config=configs/camvid_comparison.py:dcnv1 --workdir=runs/camvid_comparison-dcnv1-seed0
    dsnet train --config=configs/camvid_comparison.py:dcnv2 --workdir=runs/camvid_comparison-dcnv2-seed0
    dsnet train --config=configs/camvid_comparison.py:dynamic_filter \
        --workdir=runs/camvid_comparison-dynamic_filter-seed0

Other networks, and CGDS plugged into them; fcn_cgds is x3_x5, one run is enough:

    dsnet train --config=configs/camvid_comparison.py:fcn --workdir=runs/camvid_comparison-fcn-seed0
    dsnet train --config=configs/camvid_comparison.py:fcn_cgds --workdir=runs/camvid_comparison-fcn_cgds-seed0
    dsnet train --config=configs/camvid_comparison.py:pspnet --workdir=runs/camvid_comparison-pspnet-seed0
    dsnet train --config=configs/camvid_comparison.py:pspnet_cgds --workdir=runs/camvid_comparison-pspnet_cgds-seed0
    dsnet train --config=configs/camvid_comparison.py:deeplabv3plus --workdir=runs/camvid_comparison-deeplabv3plus-seed0

The paper's learning rates to the letter; here they say that the head learns at a tenth of the backbone's rate:

    dsnet train --config=configs/camvid_comparison.py:literal_lr --workdir=runs/camvid_comparison-literal_lr-seed0

and `dsnet evaluate --workdir=runs/camvid_comparison-NAME-seed0` for each.
"""

from dsnet_jax.config import default_config
from dsnet_jax.variants import vary


def get_config(name: str = "cgds"):
    config = default_config()
    config.data.name = "camvid"
    config.data.image_scale = 0.5
    config.data.crop_size_hw = (176, 240)
    config.data.batch_size = 8
    config.model.backbone = "resnet18"
    config.model.width = 128
    config.model.deep_supervision = False
    config.optimizer.base_lr = 0.05
    config.optimizer.backbone_lr_multiplier = 1.0  # Nothing is pretrained.
    config.training.epochs = 40
    return vary(config, name)
