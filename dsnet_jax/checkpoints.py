"""Checkpoints of a run: what is kept, what is restored, and into what."""

import math
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from dsnet_jax.errors import InputError

TREES = ("variables", "optimizer")  # Apart: evaluation reads the first alone.
METRIC = "miou"  # Of the checkpoint's evaluation; the best one is kept.


def _score(metrics: dict[str, float | None]) -> float:
    """What was not evaluated, or not to a finite number, is the worst there is: NaN must not displace the best."""
    miou = metrics[METRIC]
    return -math.inf if miou is None or not math.isfinite(miou) else miou


class Checkpoints:
    """The folder `checkpoints/` of a workdir: the two newest steps, and the best one that was evaluated.

    A checkpoint holds variables, optimizer state and provenance: what the data position depends on. It is written
    beside the run, asynchronously, and committed by renaming a folder: a killed save is never taken for a checkpoint.
    """

    def __init__(self, workdir: epath.PathLike, read_only: bool = False):
        """Opens the folder.

        Args:
          workdir: of the run.
          read_only: to evaluate, while the run may go on. Otherwise the folder is made, and what a killed save left is
            removed: a save under way looks the same.
        """
        self.folder = epath.Path(workdir) / "checkpoints"
        keep = preservation.AnyPreservationPolicy(
            [
                preservation.LatestN(2),
                preservation.BestN(n=1, get_metric_fn=_score, keep_checkpoints_without_metrics=False),
            ]
        )
        self._manager = ocp.CheckpointManager(
            # Orbax refuses relative paths, and gs:// paths have no working directory.
            self.folder if "://" in str(self.folder) else self.folder.resolve(),
            item_names=(*TREES, "provenance"),
            # Orbax's own read_only does no more, and warns.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                best_fn=_score,  # The policy decides, but without it Orbax does not write the metrics.
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The evaluated step with the highest mIoU among those kept; None where none was evaluated."""
        scores = {step: self._manager.metrics(step) for step in self.steps()}
        evaluated = {
            step: _score(metrics) for step, metrics in scores.items() if metrics and metrics[METRIC] is not None
        }
        return max(evaluated, key=evaluated.get) if evaluated else None

    def save(self, step: int, trees: dict[str, Any], provenance: dict[str, Any], miou: float | None = None) -> None:
        """Starts saving a step; returns once the arrays have been copied, before the files are complete.

        Args:
          step: steps taken.
          trees: trees of arrays, by the names in `TREES`.
          provenance: what a resumed run must agree with, JSON.
          miou: of the evaluation at this step; None when it was not evaluated.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(**items, provenance=ocp.args.JsonSave(provenance)),
            metrics={METRIC: miou},
            force=True,
        )

    def restore(self, like: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint, or the trees of it that are wanted.

        Args:
          like: for each tree wanted, by name, one of `jax.ShapeDtypeStruct` with shardings.
          step: which one; None: the newest.

        Returns:
          The trees, with the shardings of `like`, and the provenance that they were saved with.

        Raises:
          InputError: there is no such step; or it is damaged, or holds other arrays than `like`.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            found = f"steps {', '.join(map(str, steps))}" if steps else "none"
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise InputError(
                f"{self.folder}: {wanted} is needed, {found} found: train first, or choose one with --step"
            )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        step = steps[-1] if step is None else step
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items, provenance=ocp.args.JsonRestore()))
        except Exception as error:  # Orbax raises what the files make it trip over, in many lines.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            others = [other for other in steps if other != step]
            raise InputError(
                f"{self.folder / str(step)}: damaged, or of another network ({reason}): "
                + (f"move it away to go on from step {others[-1]}" if others else "give another --workdir")
            ) from error
        return {name: restored[name] for name in like}, restored["provenance"]

    def close(self) -> None:
        """Waits for the save under way and raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.close()
