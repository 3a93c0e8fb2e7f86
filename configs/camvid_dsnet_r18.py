"""DSNet-R18 on CamVid at half resolution, from scratch: a comparison with PyTorch stacks that a CPU can run.

    dsnet prepare camvid --source=/data/CamVid
    dsnet train --config=configs/camvid_dsnet_r18.py --workdir=runs/camvid_dsnet_r18
    dsnet evaluate --workdir=runs/camvid_dsnet_r18

Protocol: images halved, in evaluation; in training resampled once, by a half times a random factor in [0.5, 2], then
cropped to 176x240 and flipped at random; 40 epochs of 45 batches of 8; SGD, one learning rate of 0.05 for all parts,
poly schedule. Scores are taken at 360x480 on the 101 validation images, 11 classes. The result and those of the PyTorch
stacks stand in docs/results.md.
"""

from dsnet_jax.config import default_config


def get_config():
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
    return config
