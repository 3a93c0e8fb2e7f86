"""Starting a run from the weights of another one, or of others."""

from collections import Counter
from typing import Any

import jax
import numpy as np
from etils import epath

from dsnet_jax import parallel
from dsnet_jax.checkpoints import leaf_name, named_leaves
from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError, reaching
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.weights.port import is_ported_backbone, load_backbone
from dsnet_jax.weights.safetensors import read_safetensors

HEAD = "logits"  # The module that gives classes, in classifiers and in deep supervision.


def init_from(workdir: str, fresh: dict[str, Any], spec: DatasetSpec) -> tuple[dict[str, Any], list[str], list[str]]:
    """Weights from elsewhere, as far as they fit, in place of fresh ones.

    Of a run it is the last step, of what `dsnet port` or `dsnet export` made what there is. With the same classes
    everything is taken. With others the last convolution starts anew: its outputs mean other things. What the other
    network does not have (deep supervision; all but the backbone, where that was ported alone) starts anew too.

    Args:
      workdir: of the other run, or ported, or a .safetensors of ours; a run's moving averages are taken where it has
        them.
      fresh: params and batch_stats of the network to be trained.
      spec: the classes that it will be trained on.

    Returns:
      Variables like `fresh`, on the host; the names of the arrays that start anew; and of those that are not used.

    Raises:
      InputError: there is no such run, or its network is another one: arrays of one name differ in shape, or the
        backbone has others.
    """
    check_there(workdir)
    if is_ported_backbone(workdir):
        ported = load_backbone(workdir, parallel.replicated(parallel.local_mesh()))
        given = dict(named_leaves({kind: {"backbone": tree} for kind, tree in ported.items()}))
        same_classes, advice = True, "choose config.model.backbone and .stem as they are there"
    else:
        if workdir.endswith(".safetensors"):
            _, classes, trained, _ = read_safetensors(workdir, to_train=True)
        else:
            run = load_trained(workdir)
            classes, trained = run.spec, run.variables
        given = dict(named_leaves(trained))
        same_classes = classes.class_names == spec.class_names
        advice = "choose a run with the same config.model"
    new, different = [], []

    def choose(path: tuple, leaf: Any) -> np.ndarray:
        name = leaf_name(path)
        if _of_backbone(name) and name not in given:
            different.append(f"{name}: none there, {leaf.shape} wanted")
        if name not in given or (not same_classes and HEAD in name.split("/")):
            new.append(name)
            return np.asarray(leaf)
        if given[name].shape != leaf.shape:
            different.append(f"{name}: {given[name].shape} there, {leaf.shape} wanted")
        return np.asarray(given[name])

    variables = jax.tree_util.tree_map_with_path(choose, fresh)
    unused = sorted(given.keys() - {name for name, _ in named_leaves(fresh)})
    # Otherwise a backbone of another depth or stem would be part trained, part random.
    different += [f"{name}: {given[name].shape} there, none wanted" for name in filter(_of_backbone, unused)]
    if different:
        raise InputError(
            f"config.init_from: the network of {workdir} is another one, {len(different)} arrays differ: {advice}\n"
            + "\n".join(different[:10])
        )
    return variables, new, unused


def _of_backbone(name: str) -> bool:
    return name.split("/")[1] == "backbone"


def check_there(workdir: str) -> None:
    """Raises InputError, which says what to do, where there is nothing to start from."""
    with reaching(workdir, "give another config.init_from"):
        there = epath.Path(workdir).exists()
    if not there:
        raise InputError(
            f"config.init_from: {workdir} is not there: make it with `dsnet port` (docs/porting.md) or `dsnet train`, "
            "or give --config.init_from= for weights drawn from the seed"
        )


def in_short(names: list[str]) -> str:
    """Names of arrays for one line: those of a few, of many the modules that they are in, with their number."""
    if len(names) <= 4:
        return ", ".join(names) or "none"
    counts = Counter(name.split("/")[1] for name in names)
    return ", ".join(f"{module} ({count} arrays)" for module, count in counts.items())
