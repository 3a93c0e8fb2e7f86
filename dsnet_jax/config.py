"""Every field of an experiment: its default, unit and meaning, once.

An experiment is a file in `configs/` whose `get_config` starts from `default_config()` and changes what differs. The
result is locked: a misspelt field anywhere, in a file or on the command line, is an error.
"""

import json
import re
from numbers import Real
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dsnet_jax.errors import InputError


def default_config() -> ConfigDict:
    """The whole experiment with its defaults: DSNet-R50 by the paper's protocol for PASCAL VOC 2012."""
    config = ConfigDict()
    config.seed = 0  # Of initialisation, augmentation, record order and dropout.
    config.init_from = ""  # Workdir of a run, or of `dsnet port`, or a .safetensors of `dsnet export`, whose weights
    #                        this one starts from; with other classes the last convolution starts anew. Empty: all
    #                        weights are drawn from the seed.

    config.data = data = ConfigDict()
    data.name = "shapes"  # A data set made by `dsnet prepare`: shapes, camvid, voc2012, ade20k, pascal_context,
    #                       pascal_context_60, or the --name given to `folder`.
    data.root = "datasets"  # The folder given to `dsnet prepare --root`.
    data.train_split = "train"
    data.eval_split = "val"
    data.image_scale = 1.0  # Working resolution: a factor on the size of images. Evaluation and prediction resize by it
    #                         before everything else; training resizes once, by it times the random factor. Scores are
    #                         still taken at the labels' own size.
    data.crop_size_hw = (512, 512)  # Training crop, pixels: multiples of model.output_stride.
    data.scale_range = (0.5, 2.0)  # Random scale: a factor on the image, or on the box, drawn uniformly.
    data.scale_box = ()  # Long and short edge, pixels: images are scaled to fit into so many times this box, whatever
    #                      their size. (2048, 512): mmsegmentation's; (520, 520): the long edge alone, as
    #                      PyTorch-Encoding draws it. Empty: the image's own size. Training only.
    data.flip_probability = 0.5  # Of a horizontal flip.
    data.batch_size = 32  # Images a step, over all devices and processes.
    data.cache_decoded_gb = 0.0  # Decode once, into a file of at most so many GB (10^9 bytes) beside the prepared data;
    #                              0: decode each time.
    data.worker_count = 0  # Processes that decode and augment; 0: threads of the training process.
    data.read_threads = (
        0  # Threads that read and decode, per process or worker; order does not depend on them. 0: one for
    )
    #                        each of the process's processors, 4 to 32; workers share them.

    config.model = model = ConfigDict()
    model.name = "dsnet"  # Or what it is compared with: fcn, aspp (DeepLabv3), pspnet, deeplabv3plus; dcnv1, dcnv2,
    #                       dynamic_filter (one such convolution behind ASPP). A field that a network does not have is
    #                       to be left at its default: setting it is an error.
    model.backbone = "resnet50"  # resnet18, resnet34, resnet50, resnet101, resnet152.
    model.stem = "v1"  # v1: torchvision's 7x7; v1c, v1s: three 3x3, 32-32-64 and 64-64-128 wide.
    model.output_stride = 16  # Input pixels per cell of the last stage: 8, 16 or 32.
    model.multi_grid = ()  # Factors on the dilation of the last stage's blocks, for instance (1, 2, 4); empty: off.
    model.width = 256  # Channels of ASPP, of the CGDS module, of a decoder and of the classifier.
    model.atrous_rates = (6, 12, 18)  # ASPP's, at output stride 16; scaled to other output strides. Networks with ASPP.
    model.aspp_dropout = 0.0  # Behind ASPP, training only; torchvision has 0.5 there. Networks with ASPP.
    model.low_level_stage = 3  # X(i) that is sampled, dsnet: 3, 4 or 5 (Table 1).
    model.guide = "aspp"  # What predicts the points, dsnet: aspp, stage5 (Table 1; FCN with CGDS), pyramid (PSPNet's).
    model.sampling = "predicted"  # How, dsnet: by a convolution of the guide; nonlocal: by a sub-network; self: by a
    #                               convolution of the sampled map itself; regular: not at all, on the regular grid.
    model.modification_kernel = 1  # Side of the feature modification's convolution, dsnet.
    model.sampling_kernel = 3  # k: k*k points are sampled at each position, or are a dynamic filter's; not fcn, aspp,
    #                            pspnet, deeplabv3plus.
    model.sampling_formulation = "platform"  # How dsnet, dcnv1, dcnv2 sample: gather; hat, by matrix products, for GPU
    #                                          runs that are the same each time; platform: what suits the devices.
    model.dropout = 0.1  # Before the classifier, training only.
    model.deep_supervision = True  # An FCN head on stage4, training only.
    model.deep_supervision_weight = 0.4  # Of its loss.
    model.auxiliary_width = 0  # Channels of that head; 0: model.width. torchvision's FCN has 256 there, 512 in front.
    model.dtype = "float32"  # Of computation and of the gradients that devices sum: bfloat16 on accelerators.
    #                          Parameters, statistics and loss stay float32.

    config.optimizer = optimizer = ConfigDict()  # SGD with momentum, poly schedule to zero.
    optimizer.base_lr = 0.01  # At step 0, for batches of 32; the multipliers below come on top.
    optimizer.poly_power = 0.9  # lr = base_lr * (1 - step / steps) ** poly_power
    optimizer.momentum = 0.9  # Share of the last update that stays in the next, PyTorch's form.
    optimizer.weight_decay = 1e-4  # Times the parameter, added to its gradient.
    optimizer.decay_norm_and_bias = True  # False leaves batch norm's parameters and biases out of weight decay.
    optimizer.backbone_lr_multiplier = 0.1  # The paper's text says 1 here ...
    optimizer.head_lr_multiplier = 1.0  # ... and 0.1 here; see docs/architecture.md, "Where we deviate".
    optimizer.offset_lr_multiplier = 1.0  # On top of head_lr_multiplier, for the convolution that predicts offsets,
    #                                        in networks that have one.

    config.training = training = ConfigDict()
    training.epochs = 80  # Each of as many steps as the training split fills whole batches.
    training.accumulation_steps = 1  # Parts in which a batch goes through the network, one after another; the gradient
    #                                  is that of the whole batch, batch norm's statistics are those of each part.
    training.remat = "none"  # What the gradient computes anew rather than keep. none: normalisation and ReLU of its
    #                          first parts; stem: the stem, which is cheap; blocks: also what is inside of the
    #                          backbone's blocks (docs/planning.md).
    training.ema_decay = 0.0  # Of an exponential moving average of the weights, per step, which is then what is
    #                           evaluated; 0: none.
    training.max_skipped_in_a_row = 5  # Steps that are not finite are skipped; after so many in a row the run stops.
    training.log_every_steps = 50  # In metrics.jsonl, TensorBoard and on the terminal: the losses' means over these
    #                                 steps, the largest offset of all, the rest of the last one.
    training.checkpoint_every_steps = 500  # And after the last, and when the run is told to stop.
    training.evaluate_every_epochs = 10  # And after the last.

    config.evaluation = evaluation = ConfigDict()
    evaluation.batch_size = 8  # Images of one canvas a step, per process; fewer where a protocol enlarges them.
    evaluation.padded_share = (
        1.2  # Images lie on as few canvases, each a program to compile, as make the network see at
    )
    #                                most so many times their pixels. More where compiling takes long, as on a TPU.
    evaluation.scales = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # Of protocol ms_flip: factors on the sides of the images.
    evaluation.slide_crop_hw = ()  # Windows of protocol slide, height and width in pixels; empty: data.crop_size_hw.
    evaluation.slide_stride_hw = ()  # From one window to the next; empty: two thirds of the window, rounded up.
    evaluation.overlays = 8  # Pictures written for looking at: image, truth, prediction.
    return config.lock()


LIMITS = {  # The least and the largest value of a number, or of each in a tuple. `experiment` checks the model's.
    "seed": (0, 2**32 - 1),
    "data.image_scale": (0.01, 100),
    "data.crop_size_hw": (1, 2**15),
    "data.scale_range": (0.01, 100),
    "data.scale_box": (1, 2**15),
    "data.flip_probability": (0, 1),
    "data.cache_decoded_gb": (0, 10**5),
    "data.worker_count": (0, 1024),
    "data.read_threads": (0, 1024),
    "model.deep_supervision_weight": (0, 1000),
    "optimizer.base_lr": (0, 1000),
    "optimizer.poly_power": (0, 1000),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, 1000),
    "optimizer.backbone_lr_multiplier": (0, 1000),
    "optimizer.head_lr_multiplier": (0, 1000),
    "optimizer.offset_lr_multiplier": (0, 1000),
    "training.epochs": (1, 10**9),
    "training.accumulation_steps": (1, 10**6),
    "training.ema_decay": (0, 0.999999),
    "training.max_skipped_in_a_row": (1, 10**9),
    "training.log_every_steps": (1, 10**9),
    "training.checkpoint_every_steps": (1, 10**9),
    "training.evaluate_every_epochs": (1, 10**9),
    "evaluation.batch_size": (1, 10**6),
    "evaluation.padded_share": (1, 1000),
    "evaluation.scales": (0.1, 10),
    "evaluation.slide_crop_hw": (1, 2**15),
    "evaluation.slide_stride_hw": (1, 2**15),
    "evaluation.overlays": (0, 10**6),
}

OUTPUT_STRIDES = (8, 16, 32)

SCORE_FIELDS = (  # Change how a network is scored, not which weights a run ends with.
    "evaluation.scales",
    "evaluation.slide_crop_hw",
    "evaluation.slide_stride_hw",
)

OWN_FIELDS = (  # Each of several processes may have its own.
    "data.root",
    "data.cache_decoded_gb",
    "data.worker_count",
    "data.read_threads",
)

FREE_FIELDS = (  # May change while a run is under way: they do not change which weights it ends with.
    *OWN_FIELDS,
    "model.sampling_formulation",  # Only how sums are rounded, as another number of devices does.
    "training.remat",  # The same.
    "training.max_skipped_in_a_row",
    "training.log_every_steps",
    "training.checkpoint_every_steps",
    "training.evaluate_every_epochs",
    "evaluation.batch_size",
    "evaluation.padded_share",
    *SCORE_FIELDS,
    "evaluation.overlays",
)


def load_config(arguments: list[str]) -> ConfigDict:
    """Reads `--config=configs/x.py` and overrides such as `--config.optimizer.base_lr=0.02`.

    Raises:
      InputError: no such file, a file that fails, an unknown field (the message names the nearest) or a wrong value;
        exit code 2.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["dsnet", *arguments])
    try:
        rest = values(["dsnet", *arguments])[1:]
        if rest:
            raise InputError(f"{rest[0]!r} is not a flag: fields are set as --config.field=value", exit_code=2)
        if values.config is None:
            raise InputError("--config is missing: give one of the files in configs/", exit_code=2)
        config = values.config.lock()
        _check_given_once(config, arguments)
        check_values(config)
        return config
    except (flags.Error, AttributeError, ImportError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"config: {_one_line(error)}", exit_code=2) from error
    except OSError as error:
        reason = str(error).splitlines()[-1].rpartition("failure to load:")[2].strip()
        raise InputError(f"config: {reason}: give one of the files in configs/", exit_code=2) from error
    except InputError:
        raise
    except Exception as error:  # A config file is a program, and may raise anything.
        found = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise InputError(f"config: the file raises {found} (--debug shows where)", exit_code=2) from error


def _check_given_once(config: ConfigDict, arguments: list[str]) -> None:
    """Of other fields the last value is taken; ml_collections adds tuples up."""
    names = [match[1] for match in map(re.compile(r"--?config\.([\w.]+)").match, arguments) if match]
    fields = _flat(config.to_dict())
    if twice := [name for name in names if names.count(name) > 1 and isinstance(fields.get(name), tuple)]:
        raise InputError(
            f"--config.{twice[0]} is given twice, and its values would be added up: give it once", exit_code=2
        )


def check_values(config: ConfigDict) -> None:
    """Raises InputError, exit code 2, where a value is out of its limits or does not fit to the others."""
    fields = _flat(config.to_dict())
    if missing := _flat(default_config().to_dict()).keys() - fields.keys():
        raise InputError(
            f"config: field {min(missing)!r} is missing: get_config() has to start from default_config()", exit_code=2
        )
    for name, (least, largest) in LIMITS.items():
        numbers = fields[name] if isinstance(fields[name], tuple) else (fields[name],)
        if not all(isinstance(number, Real) and least <= number <= largest for number in numbers):
            raise InputError(f"config.{name} is {fields[name]}: {least} to {largest} is needed", exit_code=2)
    crop_size_hw, scale_range = fields["data.crop_size_hw"], fields["data.scale_range"]
    if len(crop_size_hw) != 2 or not all(isinstance(side, int) for side in crop_size_hw):
        raise InputError(f"config.data.crop_size_hw is {crop_size_hw}: height and width are needed", exit_code=2)
    stride = fields["model.output_stride"]
    if stride not in OUTPUT_STRIDES:
        raise InputError(
            f"config.model.output_stride is {stride}: one of {', '.join(map(str, OUTPUT_STRIDES))} is needed",
            exit_code=2,
        )
    if any(side % stride for side in crop_size_hw):
        raise InputError(
            f"config.data.crop_size_hw is {crop_size_hw}: multiples of config.model.output_stride ({stride}) are "
            "needed, so that feature maps lie on crops as on whole images",
            exit_code=2,
        )
    if len(scale_range) != 2 or scale_range[0] > scale_range[1]:
        raise InputError(f"config.data.scale_range is {scale_range}: the least and the largest are needed", exit_code=2)
    if not fields["evaluation.scales"]:
        raise InputError("config.evaluation.scales is empty: at least one is needed", exit_code=2)
    for name in ("evaluation.slide_crop_hw", "evaluation.slide_stride_hw"):
        sides = fields[name]
        if sides and (len(sides) != 2 or not all(isinstance(side, int) for side in sides)):
            raise InputError(
                f"config.{name} is {sides}: height and width are needed, in whole pixels, or none", exit_code=2
            )
    scale_box = fields["data.scale_box"]
    if scale_box and (len(scale_box) != 2 or scale_box[0] < scale_box[1]):
        raise InputError(f"config.data.scale_box is {scale_box}: the long and the short edge are needed", exit_code=2)
    if scale_box and fields["data.image_scale"] != 1:
        raise InputError(
            f"config.data.scale_box is {scale_box} and config.data.image_scale is {fields['data.image_scale']}: only "
            "one of them can say how large images are in training",
            exit_code=2,
        )


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, fields sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str, file: str) -> ConfigDict:
    """The config that `to_json` wrote; `file` is what errors call it.

    Raises:
      InputError: a field is unknown to this version, has another type, or a value that is out of its limits.
    """
    config = default_config()
    try:
        config.update(_with_tuples(json.loads(text)))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{file}: {_one_line(error)}") from error
    try:
        check_values(config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return config


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, str]:
    """By name, a line for each field that differs: `model.width: 256 -> 128`."""
    old_fields, new_fields = _flat(old.to_dict()), _flat(new.to_dict())
    return {
        name: f"{name}: {old_fields[name]} -> {new_fields[name]}"
        for name in old_fields
        if old_fields[name] != new_fields[name]
    }


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted name."""
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _with_tuples(field) for name, field in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _one_line(error: Exception) -> str:
    """What is wrong and the nearest known name, without the fields and the traceback that ml_collections prints."""
    nearest = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
    if nearest:
        return f"unknown field {nearest[2]!r}, did you mean {nearest[1]!r}?"
    unknown = re.search(r'Key \\*"(\w+)\\*" does not exist|^["\']*(\w+)["\']*$', str(error))
    if unknown:
        return f"unknown field {unknown[1] or unknown[2]!r}"
    file, traceback, cause = str(error).partition("Error whilst parsing config file:")
    return " ".join((file.replace("flag --config=", "") + cause.splitlines()[-1] if traceback else file).split())
