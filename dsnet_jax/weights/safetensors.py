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
from dsnet_jax.errors import InputError, listed
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
      InputError: it cannot be read, is none, or the arrays are not those of the network of its config; of these the
        first ten are listed.
    """
    try:
        data = epath.Path(file).read_bytes()
        entries = dict(safetensors.deserialize(data))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a .safetensors file, or damaged ({error})") from error
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{file}: its metadata does not say {FORMAT!r}: give a file of `dsnet export --format=safetensors`, and "
            "weights of others to `dsnet port`"
        )
    try:
        config = from_json(metadata["config"], str(file))
        spec = DatasetSpec.from_json(json.loads(metadata["dataset"]))
        folded, step = json.loads(metadata["description"]).get("batch_norm_folded"), int(metadata["step"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: its metadata is damaged ({error!r}): export it again") from error
    if to_train and folded:
        raise InputError(f"{file}: its batch normalisation is folded: export it again without --fold-batch-norm")
    model = build_model(config.model, spec.num_classes)
    shapes = jax.eval_shape(lambda: initial_variables(model))
    wanted = {name: f"F32{list(leaf.shape)}" for name, leaf in named_leaves(shapes)}
    found = {name: f"{entry['dtype']}{list(entry['shape'])}" for name, entry in entries.items()}
    different = [
        f"{name}: {found.get(name, 'nothing')}, its config makes it {wanted.get(name, 'nothing')}"
        for name in sorted(wanted | found)
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise InputError(
            f"{file}: {len(different)} arrays are not those of its config: the file was changed, export it again\n"
            + "\n".join(listed(different))
        )

    def array(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.frombuffer(entries[leaf_name(path)]["data"], np.float32).reshape(leaf.shape)

    return config, spec, jax.tree_util.tree_map_with_path(array, shapes), step


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
