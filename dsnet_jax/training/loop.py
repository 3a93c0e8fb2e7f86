"""A training run from its first step, or the one it was stopped at, to its last."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsnet_jax import parallel
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.data.pipeline import train_batches
from dsnet_jax.data.records import open_split
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.evaluate import evaluate
from dsnet_jax.evaluation.metrics import score
from dsnet_jax.experiment import build_model, claim_workdir, steps_per_epoch
from dsnet_jax.progress import duration
from dsnet_jax.training.metrics_log import MetricsLog
from dsnet_jax.training.optimizer import poly_schedule, sgd
from dsnet_jax.training.step import Batch, Metrics, TrainState, initial_state, make_train_step


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains to the last step of `config`, or goes on where an earlier call with the same workdir stopped.

    The state comes from the newest checkpoint of the workdir if there is one, else from the seed. The data position is
    the step, so nothing else needs to be restored.

    Raises:
      InputError: the data set, the config, the workdir or its checkpoints cannot be used, or the loss is not finite.
    """
    mesh = parallel.global_mesh()
    if config.data.batch_size % mesh.size:
        raise InputError(
            f"config.data.batch_size is {config.data.batch_size}, which {mesh.size} devices cannot share equally: "
            "choose a multiple of their number"
        )
    split = open_split(config.data.root, config.data.name, config.data.train_split)
    held_out = open_split(config.data.root, config.data.name, config.data.eval_split)
    if held_out[0].label is None:
        raise InputError(
            f"split {held_out.name!r} of {held_out.spec.name} has no labels to score: choose another "
            "config.data.eval_split"
        )
    epoch = steps_per_epoch(config, len(split))
    steps = config.training.epochs * epoch
    model = build_model(config.model, split.spec.num_classes)
    schedule = poly_schedule(config.optimizer.base_lr, config.optimizer.poly_power, steps)
    optimizer = sgd(schedule, **{k: v for k, v in config.optimizer.items() if k not in ("base_lr", "poly_power")})
    claim_workdir(workdir, config, split.spec)

    checkpoints = Checkpoints(workdir)
    provenance = {
        "data_set": split.spec.name,
        "split": split.name,
        "fingerprint": split.fingerprint,
        "records": len(split),
        "seed": config.seed,
        "batch_size": config.data.batch_size,
    }
    start_from_seed = jax.jit(
        partial(initial_state, model, optimizer, config.seed), out_shardings=parallel.replicated(mesh)
    )
    if checkpoints.steps():
        like = jax.eval_shape(start_from_seed)
        like = jax.tree.map(lambda x: x.update(sharding=parallel.replicated(mesh)), like)
        trees, saved_provenance = checkpoints.restore(like.to_trees())
        _check_provenance(saved_provenance, provenance, workdir)
        state = TrainState.from_trees(trees)
    else:
        state = start_from_seed()
    start = int(state.step)
    if start >= steps:
        print(f"{workdir}: all {steps} steps are done")
        checkpoints.close()
        return
    devices = f"{mesh.size} {jax.devices()[0].platform} device" + ("s" if mesh.size > 1 else "")
    print(f"{workdir}: steps {start} to {steps}, {config.data.batch_size} of {len(split)} images each, on {devices}")

    step_function = jax.jit(
        make_train_step(model, optimizer, schedule, config.seed, config.model.deep_supervision_weight),
        donate_argnums=0,
        in_shardings=(parallel.replicated(mesh), parallel.split_by_batch(mesh)),
        out_shardings=parallel.replicated(mesh),
    )
    batches = train_batches(split, config.data, config.seed, start, steps, jax.process_index(), jax.process_count())
    log = MetricsLog(workdir, start)
    pace = _Pace(start, steps, config.data.batch_size)
    not_logged: list[Metrics] = []
    try:
        for step, batch in enumerate(_on_devices(batches, mesh, pace), start=start + 1):
            state, metrics = step_function(state, batch)
            # The host stays one step ahead of the devices: the next batch is laid out while they compute.
            if not_logged:
                jax.block_until_ready(not_logged[-1])
            not_logged.append(metrics)

            last = step == steps
            evaluates = last or step % (config.training.evaluate_every_epochs * epoch) == 0
            saves = evaluates or step % config.training.checkpoint_every_steps == 0
            if saves or step % config.training.log_every_steps == 0:
                scalars = _drain(not_logged, step, workdir)
                scalars |= pace.lap(step)
                log.write(step, scalars)
                print(_line(step, steps, epoch, scalars), flush=True)
            miou = None
            if evaluates:
                scores = score(evaluate(model, state.variables, held_out, config).matrix)
                miou = scores.miou
                log.write(step, {"val_miou": miou, "val_pixel_accuracy": scores.pixel_accuracy})
                print(f"step {step}: mIoU {miou:.4f}, pixel accuracy {scores.pixel_accuracy:.4f}", flush=True)
            if saves:
                checkpoints.save(step, state.to_trees(), provenance, miou)
            if evaluates or saves:
                pace.resume()
    finally:  # Also when it is interrupted: the save under way is completed.
        batches.close()
        checkpoints.close()
        log.close()


def _on_devices(batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, pace: "_Pace") -> Iterator[Batch]:
    """Batches on the devices, images and labels only; the time that the loop waits for each is noted."""
    while True:
        began = time.monotonic()
        batch = next(batches, None)
        pace.waited += time.monotonic() - began
        if batch is None:
            return
        yield parallel.put_batch(mesh, {"image": batch["image"], "label": batch["label"]})


def _check_provenance(saved: dict[str, Any], now: dict[str, Any], workdir: epath.PathLike) -> None:
    different = [f"{name}: {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    if different:
        raise InputError(
            f"{workdir}: the checkpoint was trained on other data ({'; '.join(different)}): give another --workdir, or "
            "prepare the old data set again"
        )


def _drain(metrics: list[Metrics], step: int, workdir: epath.PathLike) -> dict[str, float]:
    """The losses' means over the steps since the last call, and the last step's other figures; empties the list."""
    fetched = jax.device_get(metrics)
    metrics.clear()
    finite = np.array([m.pop("finite") for m in fetched])
    if not finite.all():
        first = int(np.argmin(finite))
        loss, norm = fetched[first]["loss"], fetched[first]["gradient_norm"]
        raise InputError(
            f"{workdir}: step {step - len(finite) + 1 + first} is not finite any more, its loss is {loss} and its "
            f"gradient norm {norm}: nothing was saved since; lower config.optimizer.base_lr, or look at the images of "
            "that step"
        )
    averaged = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[-1] if name.endswith("loss")}
    return {name: float(value) for name, value in fetched[-1].items()} | averaged


def _line(step: int, steps: int, epoch: int, scalars: dict[str, float]) -> str:
    offsets = f"  offsets {scalars['offset_mean']:.2f} px" if "offset_mean" in scalars else ""
    return (
        f"step {step}/{steps}  epoch {step / epoch:.1f}  loss {scalars['loss']:.4f}  lr {scalars['learning_rate']:.5f}"
        f"{offsets}  {scalars['images_per_second']:.1f} images/s  waiting for data {scalars['data_wait']:.0%}"
        f"  ETA {duration((steps - step) * scalars['seconds_per_step'])}"
    )


class _Pace:
    """Time per step, and the share of it that the loop waits for data; evaluations and saves do not count."""

    def __init__(self, start: int, steps: int, batch_size: int):
        self.waited = 0.0
        self._step, self._batch_size = start, batch_size
        self._since = time.monotonic()

    def lap(self, step: int) -> dict[str, float]:
        """Figures since the last call."""
        now = time.monotonic()
        seconds, steps = now - self._since, step - self._step
        figures = {
            "images_per_second": steps * self._batch_size / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait": self.waited / seconds,
        }
        self.waited, self._step, self._since = 0.0, step, now
        return figures

    def resume(self) -> None:
        """Starts the clock again after something that is not training."""
        self._since = time.monotonic()
