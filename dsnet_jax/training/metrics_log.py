"""What a run writes about itself: `metrics.jsonl` and TensorBoard events."""

import json
import math

import tensorboardX
from etils import epath


class MetricsLog:
    """Appends scalars by step; a resumed run first takes back what came after the step it resumes from."""

    def __init__(self, workdir: epath.PathLike, start_step: int):
        self._file = epath.Path(workdir) / "metrics.jsonl"
        if self._file.exists():
            lines = self._file.read_text().splitlines(keepends=True)
            self._file.write_text("".join(line for line in lines if _step_of(line) <= start_step))
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start_step + 1, flush_secs=30)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds one line {"step": step, ...} and one event a scalar; a value that is not finite is written as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still held back."""
        self._events.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for one that a killed run left half-written, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf
