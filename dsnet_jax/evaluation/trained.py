"""A trained network, from the folder of its run."""

import ast
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
from etils import epath
from ml_collections import ConfigDict

from dsnet_jax import parallel
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.config import check_values
from dsnet_jax.data.records import Split, open_split
from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.workdir import open_workdir


@dataclasses.dataclass(frozen=True)
class Trained:
    """What evaluation and prediction need of a run.

    Attributes:
      config: of the experiment.
      spec: the classes that it was trained on.
      model: the network.
      variables: its params and batch_stats; their moving averages where the run has them.
      step: of the checkpoint.
    """

    config: ConfigDict
    spec: DatasetSpec
    model: nn.Module
    variables: Any
    step: int


def load_trained(
    workdir: epath.PathLike,
    step: int | str | None = None,
    config_flags: Sequence[str] = (),
    fields: Collection[str] = (),
) -> Trained:
    """Reads the weights of a run.

    Args:
      workdir: of the run.
      step: of the checkpoint; "best": the one with the highest mIoU among those kept; None: the last.
      config_flags: fields of config.evaluation in place of the run's, as "--config.evaluation.scales=0.5,1.0".
      fields: those that the caller reads; a flag for another is refused.

    Raises:
      InputError: there is no such run or checkpoint, or a flag is wrong.
    """
    config, spec = open_workdir(workdir)
    if config_flags:
        config = _with_flags(config, config_flags, fields)
    model = build_model(config.model, spec.num_classes)
    checkpoints = Checkpoints(workdir, read_only=True)
    if step == "best":
        step = checkpoints.best_step()
        if step is None:
            raise InputError(f"{checkpoints.folder}: no checkpoint was evaluated: leave --step out to take the last")
    like = jax.eval_shape(lambda: initial_variables(model))
    sharding = parallel.replicated(parallel.local_mesh())
    like = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), like)
    tree = "averages" if config.training.ema_decay else "variables"
    trees, _ = checkpoints.restore({tree: like}, step)
    step = checkpoints.steps()[-1] if step is None else step
    checkpoints.close()
    return Trained(config, spec, model, trees[tree], step)


def _with_flags(config: ConfigDict, config_flags: Sequence[str], fields: Collection[str]) -> ConfigDict:
    for flag in config_flags:
        name, _, text = flag.removeprefix("--config.evaluation.").partition("=")
        if name not in config.evaluation:
            raise InputError(
                f"{flag!r}: config.evaluation has the fields {', '.join(sorted(config.evaluation))}", exit_code=2
            )
        if name not in fields:
            read = f"only {', '.join(sorted(fields))}" if fields else "nothing"
            raise InputError(
                f"{flag!r} is not read here, {read} of config.evaluation is: leave it out, or give another --protocol",
                exit_code=2,
            )
        try:
            config.evaluation[name] = ast.literal_eval(text)
        except (SyntaxError, TypeError, ValueError) as error:
            before = config.evaluation[name]
            raise InputError(f"{flag!r}: a value of the kind of {before!r} is needed", exit_code=2) from error
    check_values(config)
    return config


def open_split_of(
    trained: Trained, workdir: epath.PathLike, split: str | None = None, root: str | None = None
) -> Split:
    """A split of the data set that a run was trained on.

    Args:
      trained: the run.
      workdir: its folder, as errors call it.
      split: None: `config.data.eval_split`.
      root: where prepared data sets lie; None: `config.data.root`.

    Raises:
      InputError: the split is not there, or has other classes now.
    """
    config = trained.config.data
    data = open_split(root or config.root, config.name, split or config.eval_split)
    check_classes(trained, workdir, data.spec)
    return data


def check_classes(trained: Trained, workdir: epath.PathLike, spec: DatasetSpec) -> None:
    """Raises InputError if a run was not trained on the classes that a data set has now."""
    if trained.spec.class_names != spec.class_names:
        raise InputError(
            f"{workdir} was trained on other classes than {spec.name} has now, {trained.spec.num_classes} and "
            f"{spec.num_classes} of them: prepare the data set as it was, or give another run"
        )
