"""The state of a run, and the function that a step compiles."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from dsnet_jax.experiment import initial_variables
from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.ops.normalise import normalise
from dsnet_jax.training.losses import cross_entropy

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: steps taken, int32.
      variables: the network's `params` and `batch_stats`, float32.
      opt_state: optax's.
    """

    step: jax.Array
    variables: dict[str, Any]
    opt_state: optax.OptState

    def to_trees(self) -> dict[str, Any]:
        """The state as a checkpoint holds it."""
        return {"variables": self.variables, "optimizer": {"step": self.step, "state": self.opt_state}}

    @classmethod
    def from_trees(cls, trees: dict[str, Any]) -> "TrainState":
        """The state that `to_trees` was called on."""
        return cls(trees["optimizer"]["step"], trees["variables"], trees["optimizer"]["state"])


def initial_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, a function of the seed alone."""
    variables = initial_variables(model, seed)
    return TrainState(jnp.zeros((), jnp.int32), variables, optimizer.init(variables["params"]))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    deep_supervision_weight: float,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics), to be jitted with the batch sharded over the devices.

    The batch holds `image`, uint8 [B, H, W, 3], and `label`, uint8 [B, H, W]. Metrics are scalars: loss (the
    whole one), main_loss, auxiliary_loss, learning_rate, gradient_norm, finite (whether the loss, all gradients and the
    whole new state are) and those of `offset_metrics`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_function(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
            output, updated = model.apply(
                {"params": params, "batch_stats": state.variables["batch_stats"]},
                normalise(batch["image"]),
                train=True,
                rngs={"dropout": dropout},
                mutable=["batch_stats"],
            )
            loss = cross_entropy(output.logits, batch["label"])
            metrics = {"main_loss": loss, **offset_metrics(output)}
            if output.auxiliary_logits is not None:
                metrics["auxiliary_loss"] = cross_entropy(output.auxiliary_logits, batch["label"])
                loss = loss + deep_supervision_weight * metrics["auxiliary_loss"]
            return loss, (updated["batch_stats"], metrics)

        (loss, (batch_stats, metrics)), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            state.variables["params"]
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.variables["params"])
        params = optax.apply_updates(state.variables["params"], updates)
        state = TrainState(state.step + 1, {"params": params, "batch_stats": batch_stats}, opt_state)
        metrics |= {
            "loss": loss,
            "learning_rate": schedule(state.step - 1),
            "gradient_norm": optax.tree.norm(gradients),
            "finite": _all_finite((loss, gradients, state)),
        }
        return state, metrics

    return train_step


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def offset_metrics(output: SegmentationOutput) -> Metrics:
    """Where the points go: mean and largest offset in pixels of the sampled map, and the share outside of it.

    Offsets are known to run away in training; nothing bounds them, so they are watched.
    """
    if output.offsets is None:
        return {}
    offsets = jax.lax.stop_gradient(output.offsets)
    height, width, taps = offsets.shape[1:4]
    side = round(taps**0.5)
    tap = jnp.arange(taps)
    y = jnp.arange(height)[:, None, None] + tap // side - side // 2 + offsets[..., 0]
    x = jnp.arange(width)[None, :, None] + tap % side - side // 2 + offsets[..., 1]
    outside = (y < 0) | (y > height - 1) | (x < 0) | (x > width - 1)
    length = jnp.linalg.norm(offsets, axis=-1)
    return {
        "offset_mean": jnp.mean(length),
        "offset_max": jnp.max(length),
        "offset_outside": jnp.mean(outside, dtype=offsets.dtype),
    }
