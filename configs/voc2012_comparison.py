"""What the paper compares on PASCAL VOC 2012 with ResNet-50: Table 1, sampling operations and related works.

All rows have the protocol of voc2012_dsnet_r50.py: 80 epochs of the augmented training set, batches of 32 crops of
512 x 512, no deep supervision, single scale, from ImageNet weights; they differ as `dsnet_jax/variants.py` says. The
paper's figures are mIoU in percent on val. None of these was run by us. The data and the weights first:

    dsnet prepare voc2012 --source=/data/archives
    dsnet port resnet50-0676ba61.pth --workdir=weights/resnet50

and `dsnet evaluate --workdir=runs/voc2012_comparison-NAME-seed0` after each.

Table 1, the low-level feature and the guide. The paper: 77.4, 79.0, 76.7, 78.1; x3_aspp is DSNet itself. Not run.

    dsnet train --config=configs/voc2012_comparison.py:x3_x5 --workdir=runs/voc2012_comparison-x3_x5-seed0
    dsnet train --config=configs/voc2012_comparison.py:x3_aspp --workdir=runs/voc2012_comparison-x3_aspp-seed0
    dsnet train --config=configs/voc2012_comparison.py:x4_aspp --workdir=runs/voc2012_comparison-x4_aspp-seed0
    dsnet train --config=configs/voc2012_comparison.py:x5_aspp --workdir=runs/voc2012_comparison-x5_aspp-seed0

The sampling operation: a non-local sub-network in place of the convolution. The paper: 76.6. Not run.

    dsnet train --config=configs/voc2012_comparison.py:nonlocal --workdir=runs/voc2012_comparison-nonlocal-seed0

Related works, on top of ASPP: deformable convolution v2 and dynamic filter. The paper: 75.4 and 74.6; it has no figure
for version 1. Not run.

    dsnet train --config=configs/voc2012_comparison.py:dcnv2 --workdir=runs/voc2012_comparison-dcnv2-seed0
    dsnet train --config=configs/voc2012_comparison.py:dynamic_filter \
        --workdir=runs/voc2012_comparison-dynamic_filter-seed0
    dsnet train --config=configs/voc2012_comparison.py:dcnv1 --workdir=runs/voc2012_comparison-dcnv1-seed0

What the paper has no figure for: CGDS left out, on the regular grid (its skip connection without its points), and with
points that the sampled map predicts itself, which is deformable convolution in its place. Not run.

    dsnet train --config=configs/voc2012_comparison.py:cgds --workdir=runs/voc2012_comparison-cgds-seed0
    dsnet train --config=configs/voc2012_comparison.py:aspp --workdir=runs/voc2012_comparison-aspp-seed0
    dsnet train --config=configs/voc2012_comparison.py:regular --workdir=runs/voc2012_comparison-regular-seed0
    dsnet train --config=configs/voc2012_comparison.py:self --workdir=runs/voc2012_comparison-self-seed0

Other networks, and CGDS plugged into them ("plug-and-play"); fcn_cgds is x3_x5. No figures of the paper with ResNet-50;
with ResNet-101 it puts DeepLabv3+ 1.14 below DSNet. Not run.

    dsnet train --config=configs/voc2012_comparison.py:fcn --workdir=runs/voc2012_comparison-fcn-seed0
    dsnet train --config=configs/voc2012_comparison.py:fcn_cgds --workdir=runs/voc2012_comparison-fcn_cgds-seed0
    dsnet train --config=configs/voc2012_comparison.py:pspnet --workdir=runs/voc2012_comparison-pspnet-seed0
    dsnet train --config=configs/voc2012_comparison.py:pspnet_cgds --workdir=runs/voc2012_comparison-pspnet_cgds-seed0
    dsnet train --config=configs/voc2012_comparison.py:deeplabv3plus \
        --workdir=runs/voc2012_comparison-deeplabv3plus-seed0

Where the paper is doubtful or silent: its learning rates to the letter; dropout where torchvision has it; the random
scale as mmsegmentation and as PyTorch-Encoding draw it. No figures. Not run.

    dsnet train --config=configs/voc2012_comparison.py:literal_lr --workdir=runs/voc2012_comparison-literal_lr-seed0
    dsnet train --config=configs/voc2012_comparison.py:torchvision_dropout \
        --workdir=runs/voc2012_comparison-torchvision_dropout-seed0
    dsnet train --config=configs/voc2012_comparison.py:mmsegmentation_scale \
        --workdir=runs/voc2012_comparison-mmsegmentation_scale-seed0
    dsnet train --config=configs/voc2012_comparison.py:long_edge_scale \
        --workdir=runs/voc2012_comparison-long_edge_scale-seed0
"""

from dsnet_jax.config import default_config
from dsnet_jax.variants import vary


def get_config(name: str = "cgds"):
    config = default_config()
    config.init_from = "weights/resnet50"
    config.data.name = "voc2012"
    config.data.train_split = "train_aug"
    config.model.backbone = "resnet50"
    config.model.deep_supervision = False
    config.model.dtype = "bfloat16"
    return vary(config, name)
