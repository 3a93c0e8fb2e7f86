"""The state of a run, and the function that a step compiles."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from dsnet_jax.experiment import initial_variables
from dsnet_jax.training.gradients import Batch, Metrics, compute_gradients


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: steps taken, skipped ones included, int32: the position in the data and in the schedule.
      variables: the network's `params` and `batch_stats`, float32.
      opt_state: optax's.
      averages: of the variables over the steps, like them; None where none are kept.
      skipped: steps that were not finite and changed nothing, int32.
      skipped_in_a_row: those since the last good step, int32.
    """

    step: jax.Array
    variables: dict[str, Any]
    opt_state: optax.OptState
    averages: dict[str, Any] | None
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def for_evaluation(self) -> dict[str, Any]:
        """The variables to score and to predict with: the averages where they are kept."""
        return self.variables if self.averages is None else self.averages

    def to_trees(self) -> dict[str, Any]:
        """The state as a checkpoint holds it; `averages` is there only if they are kept."""
        optimizer = {
            "step": self.step,
            "state": self.opt_state,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        averages = {} if self.averages is None else {"averages": self.averages}
        return {"variables": self.variables, "optimizer": optimizer, **averages}

    @classmethod
    def from_trees(cls, trees: dict[str, Any]) -> "TrainState":
        """The state that `to_trees` was called on."""
        optimizer = trees["optimizer"]
        return cls(
            step=optimizer["step"],
            variables=trees["variables"],
            opt_state=optimizer["state"],
            averages=trees.get("averages"),
            skipped=optimizer["skipped"],
            skipped_in_a_row=optimizer["skipped_in_a_row"],
        )


def initial_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, ema_decay: float = 0.0
) -> TrainState:
    """A fresh state, a function of the seed alone; with averages, which start as the variables, if `ema_decay` > 0."""
    variables = initial_variables(model, seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizer.init(variables["params"]),
        # Copies: a step that is given its state's memory cannot be given the same array twice.
        averages=jax.tree.map(jnp.copy, variables) if ema_decay else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    deep_supervision_weight: float,
    accumulation_steps: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics), to be jitted with the batch sharded over the devices.

    The batch holds `image`, uint8 [B, H, W, 3], `label`, uint8 [B, H, W], and `stop_requested`, int32 [devices], the
    number of the signal by which a process was told to stop, 0 where none was.

    A step is skipped if its loss, a gradient or anything of the state after it is not finite: everything keeps its
    value, bit for bit, but `step` and the two counts of skipped steps. So the next one has other images, and the
    learning rate that it would have had.

    Averages follow the variables, batch statistics included, as averages = d * averages + (1 - d) * variables, where d
    is the smaller of `ema_decay` and (1 + step) / (10 + step), the rule of TensorFlow's ExponentialMovingAverage: the
    values of the start are forgotten soon. `step` is the number of steps before this one.

    Metrics are scalars: those of `compute_gradients`; learning_rate, gradient_norm, finite (whether the step was
    taken), skipped and skipped_in_a_row as in the new state, and stop_requested (the largest of the batch's: all
    processes learn of it in the same step).

    Args:
      model: a segmentation network.
      optimizer: the direction to go, against which the step goes by the learning rate; it has no rate of its own.
      schedule: learning rate by `state.step`.
      seed: of dropout, together with `state.step`.
      deep_supervision_weight: of the auxiliary loss.
      accumulation_steps: micro-batches that a batch is split into, see `compute_gradients`; B has to be divisible by
        them times the number of devices.
      ema_decay: in [0, 1), 0 where the state has no averages.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, batch_stats, metrics = compute_gradients(
            model, state.variables, batch, dropout_key, deep_supervision_weight, accumulation_steps
        )
        learning_rate = schedule(state.step)
        params = state.variables["params"]
        direction, opt_state = optimizer.update(gradients, state.opt_state, params)
        params = optax.apply_updates(params, optax.tree.scale(-learning_rate, direction))
        variables = {"params": params, "batch_stats": batch_stats}
        averages = None
        if ema_decay:
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            averages = optax.incremental_update(variables, state.averages, step_size=1 - decay)

        updated = state.replace(variables=variables, opt_state=opt_state, averages=averages)
        finite = _all_finite((metrics["loss"], gradients, updated))
        state = jax.tree.map(partial(jnp.where, finite), updated, state)
        state = state.replace(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "learning_rate": learning_rate,
            "gradient_norm": optax.tree.norm(gradients),
            "finite": finite,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
            "stop_requested": jnp.max(batch["stop_requested"]),
        }
        return state, metrics

    return train_step


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
