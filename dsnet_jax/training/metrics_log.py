"""What a run writes about itself: `metrics.jsonl` and TensorBoard events."""

import contextlib
import itertools
import json
import math
import os
import time
from collections import defaultdict

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dsnet_jax.errors import writing_into
from dsnet_jax.progress import duration
from dsnet_jax.writing import is_remote, write_text

MAKE_ROOM = "make room, then the same command goes on"
TIMES = ("images_per_second", "seconds_per_step", "data_wait")  # Figures that differ from one time to the next.


class MetricsLog:
    """Adds scalars by step; a resumed run first takes back what came after the step it resumes from.

    In an object store (`gs://`), where nothing can be appended, the whole file is written each time, and there are no
    TensorBoard events.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int, evaluated: bool = True):
        """Opens the files.

        Args:
          workdir: of the run.
          start_step: the step that it goes on from.
          evaluated: False where the evaluation at that step is to be done again: its line is taken back too.

        Raises:
          InputError: they cannot be written.
        """
        self._file = epath.Path(workdir) / "metrics.jsonl"
        with writing_into(self._file, MAKE_ROOM):
            self._open(epath.Path(workdir), start_step, evaluated)

    def _open(self, workdir: epath.Path, start_step: int, evaluated: bool) -> None:
        self._lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
        kept = [line for line in self._lines if _stays(line, start_step, evaluated)]
        if kept != self._lines:
            self._lines = kept
            write_text(self._file, "".join(kept))
        self._events = None
        if not is_remote(self._file):
            # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and its queue then blocks for ever.
            self._events = EventsWriter(str(workdir / "events"), f".{os.getpid()}")
            restart = SessionLog(status=SessionLog.START)
            self._add_event(Event(step=start_step + 1, file_version="brain.Event:2", session_log=restart))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds one line {"step": step, ...} and one event a scalar; a value that is not finite is written as null.

        Raises:
          InputError: the file cannot be written.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._lines.append(json.dumps({"step": step, **finite}) + "\n")
        with writing_into(self._file, MAKE_ROOM):
            if self._events is None:
                write_text(self._file, "".join(self._lines))
                return
            with self._file.open("a") as file:
                file.write(self._lines[-1])
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._add_event(Event(step=step, summary=Summary(value=values)))
            self._events.flush()

    def _add_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def close(self) -> None:
        """Closes the files; all that was written is in them already."""
        if self._events is not None:
            with contextlib.suppress(OSError):  # What could not be written was told by `write`; it is tried again here.
                self._events.close()


def _stays(line: str, start_step: int, evaluated: bool) -> bool:
    """Whether a resumed run keeps a line; not one that a killed run left half-written."""
    try:
        found = json.loads(line)
        return found["step"] < start_step or (found["step"] == start_step and (evaluated or "val_miou" not in found))
    except (json.JSONDecodeError, KeyError):
        return False


def summarise(steps: list[dict[str, float]]) -> dict[str, float]:
    """The losses' means over steps, the largest `offset_max`, and the last step's other figures.

    What was finite in no step is left out.
    """
    found = defaultdict(list)
    for name, value in itertools.chain.from_iterable(values.items() for values in steps):
        found[name].append(value)
    means = {name: float(np.mean(values)) for name, values in found.items() if name.endswith("loss")}
    largest = {name: max(values) for name, values in found.items() if name == "offset_max"}
    return steps[-1] | means | largest


def describe(step: int, steps: int, epoch: int, scalars: dict[str, float]) -> str:
    """The line for people: step `step` of `steps`, `epoch` of them in an epoch, and the figures of that line."""
    loss = f"loss {scalars['loss']:.4f}  " if "loss" in scalars else ""
    offsets = f"offsets {scalars['offset_mean']:.2f} px  " if "offset_mean" in scalars else ""
    skipped = f"skipped {scalars['skipped']:.0f}  " if scalars["skipped"] else ""
    return (
        f"step {step}/{steps}  epoch {step / epoch:.1f}  {loss}lr {scalars['learning_rate']:.5f}  {offsets}{skipped}"
        f"{scalars['images_per_second']:.1f} images/s  waiting for data {scalars['data_wait']:.0%}  "
        f"ETA {duration((steps - step) * scalars['seconds_per_step'])}"
    )
