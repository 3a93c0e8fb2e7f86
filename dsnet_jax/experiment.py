"""A config made into its parts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dsnet_jax.errors import InputError
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.models.fcn import FCN
from dsnet_jax.models.resnet import RESNETS, STEM_WIDTHS

CHOICES = {  # Of fields of config.model.
    "name": ("dsnet", "fcn"),
    "backbone": tuple(RESNETS),
    "stem": ("v1", *STEM_WIDTHS),
    "output_stride": (8, 16, 32),
    "low_level_stage": (3, 4, 5),
    "guide": ("aspp", "stage5"),
    "dtype": ("float32", "bfloat16"),
}


def build_model(config: ConfigDict, num_classes: int) -> nn.Module:
    """The network of `config.model`.

    Raises:
      InputError: a field has a value that it cannot have; the message names the choices.
    """
    for field, choices in CHOICES.items():
        if config[field] not in choices:
            raise InputError(
                f"config.model.{field} is {config[field]!r}: one of {', '.join(map(str, choices))} is needed",
                exit_code=2,
            )
    for field in ("sampling_kernel", "modification_kernel"):
        if config[field] < 1 or config[field] % 2 == 0:
            raise InputError(f"config.model.{field} is {config[field]}: a positive odd number is needed", exit_code=2)
    if not 0 <= config.dropout < 1 or config.width < 1 or min(config.atrous_rates, default=1) < 1:
        raise InputError("config.model: dropout in [0, 1), width and atrous_rates of 1 or more are needed", exit_code=2)
    dtype = jnp.dtype(config.dtype)
    backbone = RESNETS[config.backbone](
        stem=config.stem, output_stride=config.output_stride, multi_grid=tuple(config.multi_grid), dtype=dtype
    )
    if config.multi_grid and len(config.multi_grid) != backbone.depth[-1]:
        raise InputError(
            f"config.model.multi_grid is {config.multi_grid}: {config.backbone} has {backbone.depth[-1]} blocks in its "
            "last stage, one factor each is needed",
            exit_code=2,
        )
    shared = {
        "backbone": backbone,
        "num_classes": num_classes,
        "width": config.width,
        "dropout": config.dropout,
        "deep_supervision": config.deep_supervision,
        "dtype": dtype,
    }
    if config.name == "fcn":
        return FCN(**shared)
    return DSNet(
        atrous_rates=tuple(config.atrous_rates),
        low_level_stage=config.low_level_stage,
        guide=config.guide,
        sampling_kernel=config.sampling_kernel,
        modification_kernel=config.modification_kernel,
        **shared,
    )


def initial_variables(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """A network's fresh `params` and `batch_stats`, float32, a function of the seed alone; deep supervision included.

    Under `jax.eval_shape` they are shapes, which no seed changes.
    """
    images = jnp.zeros((1, 64, 64, 3))  # Any size will do: no parameter's shape depends on it.
    return model.init({"params": jax.random.key(seed), "dropout": jax.random.key(0)}, images, train=True)


def steps_per_epoch(config: ConfigDict, records: int) -> int:
    """Whole batches in a split of `records` images.

    Raises:
      InputError: the split has less than a batch, or a batch is a single image.
    """
    batch_size = config.data.batch_size
    if batch_size < 2:
        raise InputError(
            f"config.data.batch_size is {batch_size}: image pooling is normalised over the batch, 2 or more are needed",
            exit_code=2,
        )
    if records < batch_size:
        raise InputError(
            f"config.data.batch_size is {batch_size}, split {config.data.train_split!r} of {config.data.name} has "
            f"{records} images: choose a smaller batch"
        )
    return records // batch_size
