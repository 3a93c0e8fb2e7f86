"""A config made into its parts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dsnet_jax.config import OUTPUT_STRIDES, default_config
from dsnet_jax.errors import InputError
from dsnet_jax.models.aspp import ASPP
from dsnet_jax.models.baseline import Baseline
from dsnet_jax.models.cgds import SAMPLINGS, DynamicSamplingConv
from dsnet_jax.models.deeplabv3plus import DeepLabV3Plus
from dsnet_jax.models.dsnet import GUIDES, DSNet
from dsnet_jax.models.dynamic_filter import DynamicFilter
from dsnet_jax.models.pyramid import PyramidPooling
from dsnet_jax.models.resnet import RESNETS, STEM_WIDTHS
from dsnet_jax.ops.dynamic_sampling import FORMULATIONS

# Of config.model, the fields that not every network has, by the networks that there are.
FIELDS_OF_ASPP = {"atrous_rates", "aspp_dropout"}
FIELDS_OF_SAMPLING = {"sampling_kernel", "sampling_formulation"}
FIELDS_OF = {
    "dsnet": {"low_level_stage", "guide", "sampling", "modification_kernel"} | FIELDS_OF_SAMPLING | FIELDS_OF_ASPP,
    "fcn": set(),
    "aspp": FIELDS_OF_ASPP,
    "pspnet": set(),
    "deeplabv3plus": FIELDS_OF_ASPP,
    "dcnv1": FIELDS_OF_SAMPLING | FIELDS_OF_ASPP,
    "dcnv2": FIELDS_OF_SAMPLING | FIELDS_OF_ASPP,
    "dynamic_filter": {"sampling_kernel"} | FIELDS_OF_ASPP,
}
FIELDS_OF_DEEP_SUPERVISION = {"deep_supervision_weight", "auxiliary_width"}

CHOICES = {  # Of fields of config.model.
    "name": tuple(FIELDS_OF),
    "backbone": tuple(RESNETS),
    "stem": ("v1", *STEM_WIDTHS),
    "output_stride": OUTPUT_STRIDES,
    "low_level_stage": (3, 4, 5),
    "guide": GUIDES,
    "sampling": SAMPLINGS,
    "sampling_formulation": ("platform", *FORMULATIONS),
    "dtype": ("float32", "bfloat16"),
}


def build_model(config: ConfigDict, num_classes: int) -> nn.Module:
    """The network of `config.model`.

    Raises:
      InputError: a field has a value that it cannot have, the message names the choices; or the network does not have
        what the field is of, and it is not at its default.
    """
    for field, choices in CHOICES.items():
        if config[field] not in choices:
            raise InputError(
                f"config.model.{field} is {config[field]!r}: one of {', '.join(map(str, choices))} is needed",
                exit_code=2,
            )
    _refuse_fields_without_use(config)
    for field in ("sampling_kernel", "modification_kernel"):
        if config[field] < 1 or config[field] % 2 == 0:
            raise InputError(f"config.model.{field} is {config[field]}: a positive odd number is needed", exit_code=2)
    for field in ("dropout", "aspp_dropout"):
        if not 0 <= config[field] < 1:
            raise InputError(f"config.model.{field} is {config[field]}: 0 or more, less than 1 is needed", exit_code=2)
    if config.width < 1 or config.auxiliary_width < 0:
        raise InputError("config.model: width of 1 or more, auxiliary_width of 0 or more are needed", exit_code=2)
    for field in ("atrous_rates", "multi_grid"):
        if not all(isinstance(number, int) and number >= 1 for number in config[field]):
            raise InputError(
                f"config.model.{field} is {config[field]}: whole numbers of 1 or more are needed", exit_code=2
            )
    if any(rate * 16 % config.output_stride for rate in config.atrous_rates):
        raise InputError(
            f"config.model.atrous_rates is {config.atrous_rates}: even numbers are needed, output_stride "
            f"{config.output_stride} halves them",
            exit_code=2,
        )
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
        "auxiliary_width": config.auxiliary_width,
        "dtype": dtype,
    }
    formulation = None if config.sampling_formulation == "platform" else config.sampling_formulation
    fields_of_aspp = {"atrous_rates": tuple(config.atrous_rates), "aspp_dropout": config.aspp_dropout}
    if config.name == "dsnet":
        return DSNet(
            low_level_stage=config.low_level_stage,
            guide=config.guide,
            sampling=config.sampling,
            sampling_kernel=config.sampling_kernel,
            sampling_formulation=formulation,
            modification_kernel=config.modification_kernel,
            **fields_of_aspp,
            **shared,
        )
    if config.name == "deeplabv3plus":
        return DeepLabV3Plus(**fields_of_aspp, **shared)
    k, parts = config.sampling_kernel, {}
    if config.name == "pspnet":
        parts["pyramid"] = PyramidPooling(dtype=dtype)
    elif config.name != "fcn":
        parts["aspp"] = ASPP(
            config.width, tuple(config.atrous_rates), config.output_stride, config.aspp_dropout, dtype=dtype
        )
    if config.name == "dynamic_filter":
        parts["dynamic_filter"] = DynamicFilter(k, dtype=dtype)
    elif config.name in ("dcnv1", "dcnv2"):
        modulated = config.name == "dcnv2"
        parts["deformable"] = DynamicSamplingConv(config.width, k, modulated, formulation, dtype=dtype)
    return Baseline(**parts, **shared)


def _refuse_fields_without_use(config: ConfigDict) -> None:
    used, network = FIELDS_OF[config.name], config.name
    if "guide" in used and config.guide != "aspp":
        used, network = used - FIELDS_OF_ASPP, f"{network} with guide {config.guide!r}"
    unused = dict.fromkeys(set().union(*FIELDS_OF.values()) - used, network)
    if not config.deep_supervision:
        unused |= dict.fromkeys(FIELDS_OF_DEEP_SUPERVISION, "a network without deep supervision")
    if config.sampling == "regular":
        unused["sampling_formulation"] = "the regular grid"
    default = default_config().model
    for field, whose in sorted(unused.items()):
        if config[field] != default[field]:
            raise InputError(
                f"config.model.{field} is {config[field]!r}, which {whose} does not use: leave it at "
                f"{default[field]!r}",
                exit_code=2,
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
