"""A training run from its first step, or the one it was stopped at, to its last."""

import contextlib
import dataclasses
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsnet_jax import parallel, processes
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.config import OWN_FIELDS
from dsnet_jax.data.cache import decoded_once
from dsnet_jax.data.pipeline import records_of_step, train_batches
from dsnet_jax.data.records import Split, open_split
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.evaluate import evaluate
from dsnet_jax.evaluation.metrics import score
from dsnet_jax.experiment import build_model, steps_per_epoch
from dsnet_jax.progress import duration, tell
from dsnet_jax.stopping import Request, Stopped, deferred
from dsnet_jax.training.init_from import check_there, in_short, init_from
from dsnet_jax.training.memory import advice_for_evaluation, advice_for_step, out_of_memory_explained
from dsnet_jax.training.metrics_log import MetricsLog, describe, summarise
from dsnet_jax.training.pace import Pace
from dsnet_jax.training.program import StepFunction, check_shares, lower_step, step_of
from dsnet_jax.training.step import Batch, Metrics, TrainState
from dsnet_jax.workdir import check_workdir, claim_workdir, locked_workdir


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains to the last step of `config`, or goes on where an earlier call with the same workdir stopped.

    The state comes from the newest checkpoint of the workdir if there is one, else from the seed. The data position is
    the step, so nothing else needs to be restored: the run goes on bit for bit as if it had not stopped.

    Raises:
      InputError: the data set, the config, the workdir or its checkpoints cannot be used; the memory does not suffice;
        or too many steps in a row were not finite.
      Stopped: a process of the run was sent SIGTERM, SIGINT or SIGHUP. The state is saved.
    """
    mesh = parallel.global_mesh()
    split, held_out = _open_splits(config)
    # What can be refused at once comes first: decoding takes long, and a workdir that is claimed keeps its config.
    model = build_model(config.model, split.spec.num_classes)
    epoch = steps_per_epoch(config, len(split))
    steps = config.training.epochs * epoch
    from_seed, step_function = step_of(config, model, steps)
    check_shares(config, mesh.size)
    is_new = check_workdir(workdir, config, split.spec) is None
    if is_new and config.init_from:  # A run that goes on does without.
        check_there(config.init_from)
    if config.data.cache_decoded_gb:
        folder, limit = Path(config.data.root) / config.data.name / "decoded", int(config.data.cache_decoded_gb * 1e9)
        split, held_out = decoded_once(split, folder, limit), decoded_once(held_out, folder, limit)
    with (
        processes.main_process_first(locked_workdir(workdir)),
        deferred() as stop,
        out_of_memory_explained(advice_for_step(config, mesh.size)),
    ):
        _claim(config, workdir, [split, held_out])
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            seen = f"{checkpoints.steps()}, scored {sorted(checkpoints.scores)}"
            _all_agree(
                f"{checkpoints.folder}", f"has steps {seen}", "wait until every machine sees the same, and start again"
            )
            run = _Run(config, workdir, split, held_out, epoch, steps, model, checkpoints, stop)
            run.go(from_seed, step_function, mesh)


def _open_splits(config: ConfigDict) -> tuple[Split, Split]:
    """The split to train on, and the one that is evaluated."""
    split = open_split(config.data.root, config.data.name, config.data.train_split)
    held_out = open_split(config.data.root, config.data.name, config.data.eval_split)
    if held_out[0].label is None:
        raise InputError(
            f"split {held_out.name!r} of {held_out.spec.name} has no labels to score: choose another "
            "config.data.eval_split"
        )
    return split, held_out


def _claim(config: ConfigDict, workdir: epath.PathLike, splits: Sequence[Split]) -> None:
    """Only the main process writes; the others see whether they were given the same config, classes and data."""
    spec = splits[0].spec
    if processes.is_main_process() and (changed := claim_workdir(workdir, config, spec)):
        _say(f"{workdir}: the run goes on with other fields than it began with: {'; '.join(changed)}")
    processes.wait_for_all()
    if not processes.is_main_process():
        changed = check_workdir(workdir, config, spec)
        if changed is None:
            raise InputError(
                f"{processes.describe()}: {workdir} is not what process 0 writes into: give a folder that all share"
            )
        if other := [line for line in changed if line.partition(":")[0] not in OWN_FIELDS]:
            raise InputError(
                f"{processes.describe()}: other fields than process 0 was given: {'; '.join(other)}: give all the same"
            )
    for split in splits:
        what, advice = f"{spec.name}, split {split.name}", "prepare it once, and copy it to every machine"
        _all_agree(what, f"its fingerprint is {split.fingerprint}", advice)


def _all_agree(what: str, found: str, advice: str) -> None:
    """Raises InputError where what this process has found is not what all have."""
    own = np.array([zlib.crc32(found.encode())], np.int64)
    if processes.sum_over_processes(own) != processes.count() * own:
        raise InputError(f"{processes.describe()}: {what} is not the same in all processes, here it {found}: {advice}")


def _say(line: str) -> None:
    if processes.is_main_process():
        tell(line, sys.stdout)


@dataclasses.dataclass
class _Run:
    """A run under way.

    Attributes:
      config, workdir, split, held_out, model, checkpoints, stop: what it is made of.
      epoch: steps of one.
      steps: of the whole run.
      state: after the step that was begun last.
      under_way: steps whose metrics are still on the devices, with those metrics; the oldest first.
      unlogged: metrics of the steps since the last line of the log.
    """

    config: ConfigDict
    workdir: epath.PathLike
    split: Split
    held_out: Split
    epoch: int
    steps: int
    model: nn.Module
    checkpoints: Checkpoints
    stop: Request
    state: TrainState | None = None
    under_way: list[tuple[int, Metrics]] = dataclasses.field(default_factory=list)
    unlogged: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def go(self, from_seed: Callable[[], TrainState], step_function: StepFunction, mesh: Mesh) -> None:
        self.start(from_seed, mesh)
        start = int(self.state.step)
        # A run that was stopped in an evaluation repeats it, as it has to be known which step is the best.
        evaluated = not (start and self.evaluates_at(start)) or start in self.checkpoints.scores
        if start >= self.steps and evaluated:
            _say(f"{self.workdir}: all {self.steps} steps are done")
            return
        devices = f"{mesh.size} {jax.devices()[0].platform} device" + ("s" if mesh.size > 1 else "")
        images = f"{self.config.data.batch_size} of {len(self.split)} images each"
        _say(f"{self.workdir}: steps {start} to {self.steps}, {images}, on {devices}")
        log = MetricsLog(self.workdir, start, evaluated) if processes.is_main_process() else None
        with contextlib.closing(log) if log else contextlib.nullcontext():
            if not evaluated:
                self.evaluate(start, log)
            if start < self.steps:
                self.take_steps(start, self.compile(step_function, mesh), mesh, log)

    def start(self, from_seed: Callable[[], TrainState], mesh: Mesh) -> None:
        """Sets the state: that of the newest checkpoint, or a fresh one."""
        from_seed = jax.jit(from_seed, out_shardings=parallel.replicated(mesh))
        if not self.checkpoints.steps():
            self.state = from_seed()
            if self.config.init_from:
                self.take_weights_of(self.config.init_from)
            return
        like = jax.eval_shape(from_seed)
        like = jax.tree.map(lambda x: x.update(sharding=parallel.replicated(mesh)), like)
        trees, saved = self.checkpoints.restore(like.to_trees())
        now = self.provenance()
        different = [f"{name}: {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
        if different:
            raise InputError(
                f"{self.workdir}: the checkpoint was trained on other data ({'; '.join(different)}): give another "
                "--workdir, or prepare the old data set again"
            )
        if saved.get("held_out", self.held_out.fingerprint) != self.held_out.fingerprint:
            _say(f"{self.workdir}: split {self.held_out.name} has changed: scores before and after do not compare")
        self.state, self.unlogged = TrainState.from_trees(trees), saved["unlogged"]

    def take_weights_of(self, workdir: str) -> None:
        """Puts another run's weights into the fresh state; momentum starts at zero, and averages as the weights."""
        variables, new, unused = init_from(workdir, self.state.variables, self.split.spec)
        _say(
            f"{self.workdir}: starts from the weights of {workdir}; new are {in_short(new)}"
            + (f"; not used are {in_short(unused)}" if unused else "")
        )
        checksum = 0
        for array in jax.tree.leaves(variables):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
        _all_agree(workdir, f"holds weights of checksum {checksum:08x}", "copy those of one machine to all")

        def placed() -> Any:
            """Without asking the other processes again for each array, as `jax.device_put` does."""
            return jax.tree.map(
                lambda array, leaf: jax.make_array_from_callback(array.shape, leaf.sharding, array.__getitem__),
                variables,
                self.state.variables,
            )

        averages = self.state.averages and placed()
        self.state = self.state.replace(variables=placed(), averages=averages)

    def provenance(self) -> dict[str, Any]:
        """What a run that goes on must agree with: the records of every step follow from it."""
        return {
            "data_set": self.split.spec.name,
            "split": self.split.name,
            "fingerprint": self.split.fingerprint,
            "records": len(self.split),
            "seed": self.config.seed,
            "batch_size": self.config.data.batch_size,
        }

    def compile(self, step_function: StepFunction, mesh: Mesh) -> StepFunction:
        began = time.monotonic()
        lowered = lower_step(self.config, step_function, self.state, mesh)
        compiled = lowered.compile(compiler_options=parallel.compiler_options(mesh))
        _say(f"the step is compiled, in {duration(time.monotonic() - began)}")
        return compiled

    def take_steps(self, start: int, step_function: StepFunction, mesh: Mesh, log: MetricsLog | None) -> None:
        """From step `start` to the last."""
        pace = Pace(start, self.config.data.batch_size)
        numbers = jax.process_index(), jax.process_count()
        batches = train_batches(self.split, self.config.data, self.config.seed, start, self.steps, *numbers)
        with contextlib.closing(batches):
            for step, batch in enumerate(_on_devices(batches, mesh, pace, self.stop), start=start + 1):
                self.state, metrics = step_function(self.state, batch)
                self.under_way.append((step, metrics))
                logs = step == self.steps or step % self.config.training.log_every_steps == 0
                saves = self.evaluates_at(step) or step % self.config.training.checkpoint_every_steps == 0
                # The host stays one step ahead of the devices: the next batch is laid out while they compute.
                signal = self.fetch(leave=0 if logs or saves else 1)
                if jax.process_count() == 1:  # Otherwise all have to know it, and learn it from a step's metrics.
                    signal = self.stop.signal
                if signal:
                    self.fetch(leave=0)
                if logs:
                    scalars = summarise(self.unlogged) | pace.lap(step)
                    self.unlogged.clear()
                    if log:
                        log.write(step, scalars)
                    _say(describe(step, self.steps, self.epoch, scalars))
                    self.checkpoints.check()
                with pace.paused():
                    if saves or signal:
                        # Before the evaluation, which may take long: the state is safe by then.
                        about = {"unlogged": [*self.unlogged], "held_out": self.held_out.fingerprint}
                        about |= self.provenance()
                        self.checkpoints.save(step, self.state.to_trees(), about)
                    if signal:
                        self.end(step, signal)
                    if self.evaluates_at(step):
                        self.evaluate(step, log)

    def evaluates_at(self, step: int) -> bool:
        return step == self.steps or step % (self.config.training.evaluate_every_epochs * self.epoch) == 0

    def evaluate(self, step: int, log: MetricsLog | None) -> None:
        """Scores the state and notes what it scored; its checkpoint is there or under way."""
        try:
            with out_of_memory_explained(advice_for_evaluation(self.config, jax.local_device_count())):
                found = evaluate(self.model, self.state.for_evaluation, self.held_out, self.config, stop=self.stop)
        except Stopped as stopped:
            self.end(step, stopped.signal)
        scores = score(found.matrix)
        if log:  # First the line: should the run be killed between the two, it evaluates again.
            log.write(step, {"val_miou": scores.miou, "val_pixel_accuracy": scores.pixel_accuracy})
        self.checkpoints.record_score(step, scores.miou)
        _say(f"step {step}: mIoU {scores.miou:.4f}, pixel accuracy {scores.pixel_accuracy:.4f}")

    def end(self, step: int, signal: int) -> NoReturn:
        """Ends the run when all processes have saved it."""
        self.checkpoints.wait()
        processes.wait_for_all()
        _say(f"step {step}: saved")
        raise Stopped(signal)

    def fetch(self, leave: int) -> int:
        """Takes the metrics of all steps but the last `leave` from the devices, and waits for these steps.

        Returns:
          The signal by which a process was told to stop; 0 for none.
        """
        signal = 0
        while len(self.under_way) > leave:
            step, metrics = self.under_way.pop(0)
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            signal = max(signal, values.pop("stop_requested"))
            in_a_row = values.pop("skipped_in_a_row")
            if not values.pop("finite"):
                _say(
                    f"step {step} is not finite and was skipped, the state keeps its value: loss {values.pop('loss')}, "
                    f"gradient norm {values.pop('gradient_norm')}; {in_a_row} in a row, {values['skipped']} in all"
                )
                values = {name: value for name, value in values.items() if not name.endswith("loss")}
                if in_a_row >= self.config.training.max_skipped_in_a_row:
                    raise InputError(self.describe_skipped(step, in_a_row))
            self.unlogged.append({name: value for name, value in values.items() if np.isfinite(value)})
        return signal

    def describe_skipped(self, last: int, count: int) -> str:
        lines = [
            f"{self.workdir}: steps {last - count + 1} to {last} were not finite and were skipped: lower "
            "config.optimizer.base_lr in another --workdir, or look at the images of these steps:"
        ]
        for step in range(last - count + 1, last + 1):
            records = records_of_step(len(self.split), self.config.seed, step - 1, self.config.data.batch_size)
            lines.append(f"step {step}: " + ", ".join(self.split[index].id for index in records))
        return "\n".join(lines)


def _on_devices(batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, pace: Pace, stop: Request) -> Iterator[Batch]:
    """Batches on the devices as a step takes them; the time that the loop waits for each is noted."""
    while True:
        began = time.monotonic()
        batch = next(batches, None)
        pace.waited += time.monotonic() - began
        if batch is None:
            return
        told = np.full(jax.local_device_count(), stop.signal, np.int32)
        yield parallel.put_batch(mesh, {"image": batch["image"], "label": batch["label"], "stop_requested": told})
