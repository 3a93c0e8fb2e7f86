"""The training step of a config as one program for the devices of a mesh."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsnet_jax import parallel
from dsnet_jax.errors import InputError
from dsnet_jax.models.resnet import REMAT
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.step import Batch, Metrics, TrainState, initial_state, make_train_step

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def step_of(config: ConfigDict, model: nn.Module, steps: int) -> tuple[Callable[[], TrainState], StepFunction]:
    """What makes the fresh state of a run, and the function of its step.

    Args:
      config: of the experiment.
      model: its network.
      steps: of the whole run, after which the learning rate is 0.

    Raises:
      InputError: there is no such `config.training.remat`.
    """
    options = {name: value for name, value in config.optimizer.items() if name not in ("base_lr", "poly_power")}
    optimizer = sgd(**options)
    schedule = poly_schedule(config.optimizer.base_lr, config.optimizer.poly_power, steps)
    training = config.training
    if training.remat not in REMAT:
        raise InputError(
            f"config.training.remat is {training.remat!r}: one of {', '.join(REMAT)} is needed", exit_code=2
        )
    if training.remat != "none":
        model = model.clone(backbone=model.backbone.clone(remat=training.remat))
    step_function = make_train_step(
        model,
        optimizer,
        schedule,
        config.seed,
        config.model.deep_supervision_weight,
        training.accumulation_steps,
        training.ema_decay,
    )
    return partial(initial_state, model, optimizer, config.seed, training.ema_decay), step_function


def check_shares(config: ConfigDict, devices: int) -> None:
    """Refuses a batch that the devices cannot share equally, in `accumulation_steps` parts of two images or more.

    Raises:
      InputError: `config.data.batch_size` is such a batch; exit code 2.
    """
    size, parts = config.data.batch_size, config.training.accumulation_steps
    if size % (devices * parts):
        raise InputError(
            f"config.data.batch_size is {size}, which {devices} devices cannot share equally"
            + (f" in {parts} parts each (config.training.accumulation_steps)" if parts > 1 else "")
            + f": choose a multiple of {devices * parts}",
            exit_code=2,
        )
    if size == parts:
        raise InputError(
            f"config.data.batch_size is {size} and config.training.accumulation_steps {parts}, which leaves a single "
            "image at a time: image pooling is normalised over the images, 2 or more are needed",
            exit_code=2,
        )


def lower_step(config: ConfigDict, step_function: StepFunction, state: TrainState, mesh: Mesh) -> jax.stages.Lowered:
    """The step for batches of `config.data.batch_size` crops over the devices of `mesh`, ready to be compiled.

    The state is whole on every device and its memory is used again for the new one; batches are split.

    Args:
      config: of the experiment.
      step_function: from `step_of`.
      state: arrays, or their shapes.
      mesh: devices, attached ones or only described.
    """
    size, (height, width) = config.data.batch_size, config.data.crop_size_hw
    shapes = {"image": ((size, height, width, 3), np.uint8), "label": ((size, height, width), np.uint8)}
    shapes["stop_requested"] = ((mesh.size,), np.int32)
    whole, split = parallel.replicated(mesh), parallel.split_by_batch(mesh)
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=split) for name, shape in shapes.items()}
    step = jax.jit(step_function, donate_argnums=0, in_shardings=(whole, split), out_shardings=whole)
    return step.lower(state, batch)
