"""The experiments that the paper compares, by name: in what they differ from DSNet under the same protocol."""

from typing import Any

from ml_collections import ConfigDict

from dsnet_jax.errors import InputError

VARIANTS: dict[str, dict[str, Any]] = {
    "cgds": {},
    # Table 1: the low-level feature and the guide.
    "x3_x5": {"model.guide": "stage5"},
    "x3_aspp": {},
    "x4_aspp": {"model.low_level_stage": 4},
    "x5_aspp": {"model.low_level_stage": 5},
    # How points come about.
    "nonlocal": {"model.sampling": "nonlocal"},
    "self": {"model.sampling": "self"},
    "regular": {"model.sampling": "regular"},
    # CGDS plugged into other networks. FCN has no context module: X(5) itself guides, which is Table 1's x3_x5.
    "fcn_cgds": {"model.guide": "stage5"},
    "pspnet_cgds": {"model.guide": "pyramid"},
    # Networks without CGDS.
    "fcn": {"model.name": "fcn"},
    "aspp": {"model.name": "aspp"},
    "pspnet": {"model.name": "pspnet"},
    "deeplabv3plus": {"model.name": "deeplabv3plus"},
    "dcnv1": {"model.name": "dcnv1"},
    "dcnv2": {"model.name": "dcnv2"},
    "dynamic_filter": {"model.name": "dynamic_filter"},
    # The paper's learning rates to the letter: see docs/architecture.md, "Where we deviate".
    "literal_lr": {"optimizer.backbone_lr_multiplier": 1.0, "optimizer.head_lr_multiplier": 0.1},
    # Other readings of what the paper leaves open.
    "torchvision_dropout": {"model.dropout": 0.0, "model.aspp_dropout": 0.5},
    "mmsegmentation_scale": {"data.scale_box": (2048, 512)},
    "long_edge_scale": {"data.scale_box": (520, 520)},
}


def vary(config: ConfigDict, name: str) -> ConfigDict:
    """Sets in a config of DSNet what makes it the experiment `name` of `VARIANTS`, and returns it.

    Raises:
      InputError: there is no such experiment.
    """
    if name not in VARIANTS:
        raise InputError(f"config: there is no {name!r} here: one of {', '.join(VARIANTS)} is needed", exit_code=2)
    config.update_from_flattened_dict(VARIANTS[name])
    return config
