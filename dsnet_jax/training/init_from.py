"""Starting a run from the weights of another one."""

from typing import Any

import jax
import numpy as np

from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.trained import load_trained

HEAD = "logits"  # The module that gives classes, in classifiers and in deep supervision.


def init_from(workdir: str, fresh: dict[str, Any], spec: DatasetSpec) -> tuple[dict[str, Any], list[str]]:
    """Variables of another run's last step, as far as they fit, in place of fresh ones.

    With the same classes everything is taken. With others the last convolution starts anew: its outputs mean other
    things. What the other network does not have (deep supervision) starts anew too.

    Args:
      workdir: of the other run; its moving averages are taken where it has them.
      fresh: params and batch_stats of the network to be trained.
      spec: the classes that it will be trained on.

    Returns:
      Variables like `fresh`, on the host; and the names of the arrays that start anew.

    Raises:
      InputError: there is no such run, or its network is another one: arrays of one name differ in shape.
    """
    trained = load_trained(workdir)
    given = dict(_named(trained.variables))
    same_classes = trained.spec.class_names == spec.class_names
    new, different = [], []

    def choose(path: tuple, leaf: Any) -> np.ndarray:
        name = _name(path)
        if name not in given or (not same_classes and HEAD in name.split("/")):
            new.append(name)
            return np.asarray(leaf)
        if given[name].shape != leaf.shape:
            different.append(f"{name}: {given[name].shape} there, {leaf.shape} wanted")
        return np.asarray(given[name])

    variables = jax.tree_util.tree_map_with_path(choose, fresh)
    if different:
        raise InputError(
            f"config.init_from: the network of {workdir} is another one, {len(different)} arrays differ: choose a run "
            "with the same config.model\n" + "\n".join(different[:10])
        )
    return variables, new


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
