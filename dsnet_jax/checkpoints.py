"""Checkpoints of a run: what is kept, what is restored, into what, and how damage is noticed."""

import functools
import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from dsnet_jax.errors import InputError, listed
from dsnet_jax.integrity import checksum, damaged_file, first_line, report_errors_once, sealed, unsealed

MANIFEST = "manifest"  # The item beside the trees: what they hold, and the provenance.


@functools.cache
def _write_whole_arrays() -> None:
    """Has Orbax write a replicated array from one device.

    By its default every device writes a part of each. To cut them it compiles a program for each shape, place and
    device: of DSNet-R50 on eight devices 256, before the first save of a process, which may be that of a preemption.
    """
    handler, told = ocp.type_handlers.ArrayHandler(use_replica_parallel=False), logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # It warns of what is meant.
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    logging.set_verbosity(told)


class Checkpoints:
    """The folder `checkpoints/` of a workdir: the two newest steps, and the best one that was evaluated.

    A checkpoint holds trees of arrays, each in a folder of its own, and a manifest: provenance (what the data position
    depends on), and every array's shape, dtype and checksum, since Orbax reads flipped bits without a word. It is
    written beside the run, asynchronously, and committed by renaming a folder: a killed save is never taken for a
    checkpoint. A state is saved before it is evaluated, so its score is recorded later, in `scores.json`.
    """

    def __init__(self, workdir: epath.PathLike, read_only: bool = False):
        """Opens the folder.

        Args:
          workdir: of the run.
          read_only: to evaluate, while the run may go on. Otherwise the folder is made; what a killed save left is
            removed (a save under way looks the same); and the scores of steps that are gone are dropped: a run that
            goes on from an earlier step comes by the later ones again, with other weights.

        Raises:
          InputError: the scores are damaged.
        """
        report_errors_once()
        _write_whole_arrays()
        self.folder = epath.Path(workdir) / "checkpoints"
        self._read_only = read_only
        self._scores: dict[int, float | None] = {}
        self._saving = (0, 0)  # Step and bytes of the last save.
        self._manager = ocp.CheckpointManager(
            # Orbax refuses relative paths, and gs:// paths have no working directory.
            self.folder.resolve() if self._is_local else self.folder,
            # Orbax's own read_only does no more, and warns.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_TwoNewestAndBest(self.best_step),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
        )
        saved = self._read_scores()
        self._scores = {step: saved[step] for step in self._manager.all_steps() if step in saved}
        if self._scores != saved and not read_only:
            self._write_scores()

    def steps(self) -> list[int]:
        """Steps, oldest first, one whose save is under way included.

        Raises:
          InputError: there are none, though folders are there that look like some: nobody is to start afresh over them.
        """
        if not self._manager.all_steps():
            self._manager.reload()  # Another process may have saved.
        steps = sorted(self._manager.all_steps())
        if not steps and self.folder.exists():
            # On gs://, a killed save leaves such a folder, without the file that commits it; opening removes it.
            looks = sorted(path.name for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())
            if looks and (self._is_local or self._read_only):
                raise InputError(
                    f"{self.folder}: {', '.join(listed(looks))} look like checkpoints, but none is complete or "
                    "has the name it was saved by: move them away to start afresh"
                )
        return steps

    @property
    def scores(self) -> dict[int, float]:
        """mIoU by step, of those that are here and were evaluated; NaN where it was not finite."""
        known = set(self._manager.all_steps())
        return {step: math.nan if miou is None else miou for step, miou in self._scores.items() if step in known}

    def best_step(self) -> int | None:
        """The evaluated step with the highest mIoU; what is not finite is the lowest. None where none was evaluated."""
        scores = self.scores
        return max(scores, key=lambda step: scores[step] if math.isfinite(scores[step]) else -math.inf, default=None)

    def record_score(self, step: int, miou: float) -> None:
        """Records what a step's evaluation came to; on disk when this returns. Every process calls it, one writes."""
        self._scores[step] = float(miou) if math.isfinite(miou) else None
        self._write_scores()

    def save(self, step: int, trees: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Starts saving a step; returns once the arrays have been copied, before the files are complete.

        Args:
          step: steps taken.
          trees: by name, trees of `jax.Array`, replicated on all devices.
          provenance: what a resumed run must agree with, JSON.

        Raises:
          InputError: the save before failed, or there is no room for this one.
        """
        self.wait()
        leaves = dict(named_leaves(trees))
        self._saving = step, sum(leaf.nbytes for leaf in leaves.values())
        if self._is_local and shutil.disk_usage(self.folder).free < self._saving[1]:
            raise self._failed_save("no space left")
        described = {name: _described(leaf) | {"crc32": checksum(leaf)} for name, leaf in leaves.items()}
        manifest = {"provenance": provenance, "leaves": described}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items[MANIFEST] = ocp.args.JsonSave(sealed(manifest))
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # As in `wait`.
            raise self._failed_save(first_line(error)) from error

    def check(self) -> None:
        """Raises InputError if a save has failed; does not wait for one that is under way."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; raises InputError if it failed. A failure is raised once."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Whatever the file system makes Orbax or TensorStore raise.
            self._manager.reload()  # Orbax has forgotten those that would have been deleted after the save.
            raise self._failed_save(first_line(error)) from error

    def close(self) -> None:
        """Waits for the save under way; raises InputError if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, like: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint, or the trees of it that are wanted.

        Args:
          like: for each tree wanted, by name, one of `jax.ShapeDtypeStruct` with replicated shardings, on any devices.
          step: which one; None: the newest.

        Returns:
          The trees, with the shardings of `like`, and the provenance that they were saved with.

        Raises:
          InputError: there is no such step; or it holds other arrays than `like`; or it is damaged.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            found = f"steps {', '.join(map(str, steps))}" if steps else "none"
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise InputError(
                f"{self.folder}: {wanted} is needed, {found} found: train first, or choose one with --step"
            )
        step = steps[-1] if step is None else step
        manifest = unsealed(self._read(step, {MANIFEST: ocp.args.JsonRestore()})[MANIFEST])
        if manifest is None:
            raise self._damaged(step, f"{MANIFEST}/metadata is not what was saved")
        self._compare(step, manifest["leaves"], like)
        trees = self._read(step, {name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
        leaves = list(named_leaves(trees))
        wrong = [name for name, leaf in leaves if checksum(leaf) != manifest["leaves"][name]["crc32"]]
        if wrong:
            raise self._damaged(step, f"{len(wrong)} of {len(leaves)} arrays are not what was saved", wrong)
        return trees, manifest["provenance"]

    def _compare(self, step: int, saved: dict[str, Any], like: dict[str, Any]) -> None:
        """Raises InputError if a step's arrays have other names, shapes or dtypes than `like`."""
        saved = {name: _text(leaf) for name, leaf in saved.items() if name.split("/")[0] in like}
        wanted = {name: _text(_described(leaf)) for name, leaf in named_leaves(like)}
        different = [
            f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
            for name in sorted(saved | wanted)
            if saved.get(name) != wanted.get(name)
        ]
        if different:
            raise InputError(
                f"{self.folder / str(step)}: saved by another network or optimizer, arrays that differ: "
                f"{len(different)}: use the config that it was trained with, or another --workdir\n"
                + "\n".join(listed(different))
            )

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises what the files make it trip over, in many lines.
            file = damaged_file(self._manager.directory / str(step), sorted({*items} - {MANIFEST}), error)
            raise self._damaged(step, file or f"cannot be read ({first_line(error)})") from error
        return {name: restored[name] for name in items}

    def _damaged(self, step: int, what: str, names: Sequence[str] = ()) -> InputError:
        """What is damaged, and what to do: never is another step taken instead without being asked for."""
        path, others = self.folder / str(step), [other for other in self.steps() if other != step]
        if not others:
            advice = "no other step is there, train in another --workdir"
        elif step < others[-1]:
            advice = f"choose another with --step ({', '.join(map(str, others))})"
        else:
            move = "mv" if self._is_local else "gcloud storage mv"
            paths = shlex.join([str(path), str(self.folder.parent / f"damaged-{step}")])
            advice = f"to go on from step {others[-1]}, `{move} {paths}` and give the same command again"
        return InputError(f"{path}: damaged, {what}: {advice}" + ("\n" + "\n".join(listed(names)) if names else ""))

    def _failed_save(self, reason: str) -> InputError:
        step, need = self._saving
        room = f"{_size(need)} are needed"
        if self._is_local:
            room = f"{_size(shutil.disk_usage(self.folder).free)} are free, {room}"
        left = [other for other in self.steps() if other != step]
        again = f"goes on from step {left[-1]}" if left else "starts anew"
        return InputError(
            f"{self.folder}: step {step} could not be saved ({reason}): {room}: mend that, and the same command {again}"
        )

    @property
    def _is_local(self) -> bool:
        return "://" not in str(self.folder)

    def _read_scores(self) -> dict[int, float | None]:
        file = self.folder / "scores.json"
        if not file.exists():
            return {}
        try:
            scores = unsealed(json.loads(file.read_bytes()))
        except ValueError:
            scores = None
        if scores is None:
            raise InputError(f"{file}: damaged: remove it to go on, without the scores of earlier steps")
        return {int(step): miou for step, miou in scores.items()}

    def _write_scores(self) -> None:
        if jax.process_index() != 0:
            return
        file, text = self.folder / "scores.json", json.dumps(sealed(self._scores))
        try:
            if self._is_local:
                unfinished = self.folder / "scores.json.tmp"
                unfinished.write_text(text)
                unfinished.replace(file)
            else:  # An object appears whole or not at all; there is no renaming.
                file.write_text(text)
        except OSError as error:
            raise InputError(
                f"{file}: could not be written ({error}): mend that, and the same command goes on"
            ) from error


class _TwoNewestAndBest:
    """Which steps stay when one is saved; a `PreservationPolicy` of Orbax, whose own know scores only at the save."""

    def __init__(self, best_step: Callable[[], int | None]):
        self._best_step = best_step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of Orbax's descriptions of a checkpoint, oldest first."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in {*steps[-2:], self._best_step()} for step in steps]


def leaf_name(path: tuple) -> str:
    """What a leaf of a tree is called, as `params/backbone/stem/conv/kernel`, by its path as JAX gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their names."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield leaf_name(path), leaf


def _described(leaf: jax.Array | jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _text(described: dict[str, Any]) -> str:
    return f"{described['dtype']} [{','.join(map(str, described['shape']))}]"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
