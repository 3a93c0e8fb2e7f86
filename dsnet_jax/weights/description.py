"""What travels with every exported network: how images are to be given to it, and what its labels mean."""

from importlib.metadata import version
from typing import Any

from ml_collections import ConfigDict

from dsnet_jax.data.specs import IGNORE_LABEL, DatasetSpec
from dsnet_jax.ops.normalise import MEAN, STANDARD_DEVIATION

FORMAT = "dsnet_jax/1"


def describe(config: ConfigDict, spec: DatasetSpec, step: int, folded: bool, is_program: bool) -> dict[str, Any]:
    """As JSON types.

    Only a program has an input and an output. Of weights alone, the preprocessing is what is to be done before them.

    Args:
      config: of the experiment.
      spec: its classes.
      step: of the checkpoint.
      folded: whether batch normalisation was folded into the convolutions.
      is_program: whether it takes images as they are, and gives labels.
    """
    of_program = {
        "input": {"colours": "RGB", "dtype": "uint8", "layout": "NHWC"},
        "output": {"dtype": "uint8", "layout": "NHW", "size": "the input's", "meaning": "position in class_names"},
    }
    return {
        "format": FORMAT,
        "network": config.model.name,
        "backbone": config.model.backbone,
        "step": step,
        "batch_norm_folded": folded,
        **(of_program if is_program else {}),
        "preprocessing_is_inside": is_program,
        "preprocessing": {
            "image_scale": config.data.image_scale,
            "size_rule": "max(1, round(side * image_scale)) in float64, halves to even; bilinear, half-pixel centres, "
            "no antialiasing, rounded to uint8",
            "mean": list(MEAN),
            "standard_deviation": list(STANDARD_DEVIATION),
            "normalised": "(x / 255 - mean) / standard_deviation",
        },
        "data_set": spec.name,
        "class_names": list(spec.class_names),
        "palette": [list(colour) for colour in spec.palette],
        "ignore_label": IGNORE_LABEL,
        "versions": {name: version(name) for name in ("dsnet_jax", "jax", "flax")},
    }
