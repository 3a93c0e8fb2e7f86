"""Networks as .safetensors: ours, which can be read back bit for bit, and a backbone by torchvision's names."""

import json
import re
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

from dsnet_jax.checkpoints import leaf_name, named_leaves
from dsnet_jax.config import from_json, to_json
from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.weights.description import FORMAT
from dsnet_jax.weights.torchvision import BLOCKS, LEAVES, STEMS


def to_safetensors(
    config: ConfigDict, spec: DatasetSpec, variables: dict[str, Any], step: int, description: dict[str, Any]
) -> bytes:
    """All arrays by their paths, as `params/backbone/stem/conv/kernel`; the file's metadata has the rest, as JSON.

    Args:
      config: of the experiment, under "config".
      spec: its classes, under "dataset".
      variables: params and batch_stats.
      step: of the checkpoint.
      description: under "description".
    """
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(variables)}
    metadata = {
        "format": FORMAT,
        "config": to_json(config),
        "dataset": json.dumps(spec.to_json()),
        "step": str(step),
        "description": json.dumps(description),
    }
    return safetensors.numpy.save(arrays, metadata)


def read_safetensors(
    file: epath.PathLike, to_train: bool = False
) -> tuple[ConfigDict, DatasetSpec, dict[str, Any], int]:
    """Config, classes, variables and step of what `to_safetensors` made.

    Args:
      file: its path.
      to_train: refuse what has no batch normalisation left to train.

    Raises:
      InputError: it cannot be read, is none, or the arrays are not those of the network of its config.
    """
    try:
        data = epath.Path(file).read_bytes()
        arrays = safetensors.numpy.load(data)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a .safetensors file, or damaged ({error})") from error
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{file}: its metadata does not say {FORMAT!r}: give a file of `dsnet export --format=safetensors`"
        )
    if to_train and json.loads(metadata["description"]).get("batch_norm_folded"):
        raise InputError(f"{file}: its batch normalisation is folded: export it again without --fold-batch-norm")
    config = from_json(metadata["config"], str(file))
    spec = DatasetSpec.from_json(json.loads(metadata["dataset"]))
    model = build_model(config.model, spec.num_classes)
    shapes = jax.eval_shape(lambda: initial_variables(model))
    wanted = dict(named_leaves(shapes))
    for name in sorted(wanted.keys() | arrays.keys()):
        expected, found = (
            f"{of[name].dtype}{list(of[name].shape)}" if name in of else "nothing" for of in (wanted, arrays)
        )
        if expected != found:
            raise InputError(f"{file}: {name} is {found}, its config makes it {expected}: the file was changed")
    variables = jax.tree_util.tree_map_with_path(lambda path, _: arrays[leaf_name(path)], shapes)
    return config, spec, variables, int(metadata["step"])


def backbone_to_safetensors(variables: dict[str, Any], description: dict[str, Any]) -> bytes:
    """The backbone alone, by torchvision's names and in PyTorch's order of axes, for `load_state_dict(strict=False)`.

    torchvision's has a last layer `fc` and counters besides, which ours has not.

    Raises:
      InputError: the stem is not torchvision's.
    """
    table = (*STEMS["torchvision, timm"], *BLOCKS)
    arrays = {}
    for tree in variables.values():
        for name, leaf in named_leaves(tree["backbone"]):
            module, _, kind = name.rpartition("/")
            names = [found.expand(theirs) for ours, theirs in table if (found := re.fullmatch(ours, module))]
            if not names:
                raise InputError(f"backbone/{module}: torchvision's ResNet has no such part (config.model.stem is v1?)")
            array = np.asarray(leaf)
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
            arrays[f"{names[0]}.{LEAVES[kind]}"] = np.ascontiguousarray(array)
    return safetensors.numpy.save(arrays, {"format": "pt", "description": json.dumps(description)})
