"""Scores a network on a split, during training or from the folder of a run."""

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from dsnet_jax import parallel, processes
from dsnet_jax.data.drawing import write_picture
from dsnet_jax.data.pipeline import Example, evaluation_examples
from dsnet_jax.data.records import Split, spread_evenly
from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.data.threads import threads_for
from dsnet_jax.errors import InputError, writing_into
from dsnet_jax.evaluation import pictures, reports
from dsnet_jax.evaluation.boundary import boundary_counts
from dsnet_jax.evaluation.folders import picture_names
from dsnet_jax.evaluation.inference import Segmenter
from dsnet_jax.evaluation.protocols import FIELDS, SINGLE_SCALE, Protocol, protocol_named
from dsnet_jax.evaluation.trained import load_trained, open_split_of
from dsnet_jax.ops.extent import CANVAS_MULTIPLE
from dsnet_jax.progress import track
from dsnet_jax.stopping import Request, Stopped
from dsnet_jax.writing import check_writable


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation counted.

    Attributes:
      matrix: confusion matrix of the whole split, int64 [K, K], rows are the truth.
      boundary: pixels near outlines, by class, of the whole split, int64 [3, K], see `boundary_counts`.
      images: how many were scored: the split's number.
      padding_images: how many were computed only to fill batches.
      padded_share: pixels that the network saw over pixels that the bare images would have shown it, at least 1.
      programs: how many this process compiled, or had compiled before: one for each pair of canvases.
      shown: examples spread evenly over those of this process, each with its predicted labels, uint8 [H, W].
    """

    matrix: np.ndarray
    boundary: np.ndarray
    images: int
    padding_images: int
    padded_share: float
    programs: int
    shown: list[tuple[Example, np.ndarray]]


def evaluate(
    model: nn.Module,
    variables: Any,
    split: Split,
    config: ConfigDict,
    show: int = 0,
    stop: Request | None = None,
    protocol: Protocol = SINGLE_SCALE,
) -> Evaluation:
    """Predicts every image of a split and counts its labelled pixels in one confusion matrix.

    Every process takes its share of the images; the counts are the same in all of them, `shown` is each one's own.

    Args:
      model: a segmentation network.
      variables: its params and batch_stats.
      split: a split with labels.
      config: of the experiment: data.image_scale, data.read_threads, evaluation.padded_share, evaluation.batch_size
        (divided by how much the protocol enlarges an image).
      show: how many examples to keep for looking at.
      stop: looked at after every batch; None: nobody asks.
      protocol: what the network is given of an image.

    Raises:
      InputError: the split has no labels.
      Stopped: this process, or another, was told to stop. All processes raise it, soon.
      RuntimeError: the number of images scored is not the split's.
    """
    if split[0].label is None:
        raise InputError(f"split {split.name!r} of {split.spec.name} has no labels to score: choose another --split")
    index, count = jax.process_index(), jax.process_count()
    segmenter = Segmenter(model, variables, parallel.local_mesh(), protocol)
    own = range(index, len(split), count)
    wanted = {own[position] for position in spread_evenly(show, len(own))}
    images, padding, computed, true = 0, 0, 0, 0
    programs = set()
    num_classes = split.spec.num_classes
    matrix, boundary = np.zeros((num_classes, num_classes), np.int64), np.zeros((3, num_classes), np.int64)
    shown = []

    def examples_at(positions: Sequence[int]) -> Iterator[Example]:
        records = [own[position] for position in positions]
        examples = evaluation_examples(split, image_scale, records, config.data.read_threads)
        if processes.is_main_process():
            return track(examples, f"evaluating {split.spec.name} {split.name}", len(own))
        return examples

    told = 0
    image_scale = config.data.image_scale
    for batch, labels, counts in segmenter.run_known(examples_at, split.sizes_hw[own], config):
        matrix += np.asarray(counts, np.int64)
        pairs = ((example.label, part) for example, part in batch.cropped(labels))
        boundary += boundary_counts(pairs, num_classes, threads_for(config.data.read_threads))
        images += len(batch.examples)
        padding += batch.padding
        programs.add((batch.images.shape[1:3], batch.label_canvas_hw))
        computed += len(batch.images) * int(protocol.pixels(batch.images.shape[1:3], CANVAS_MULTIPLE))
        true += int(protocol.pixels(batch.size_hw[: len(batch.examples)]).sum())
        if any(example.index in wanted for example in batch.examples):
            shown += [(example, part) for example, part in batch.cropped(labels) if example.index in wanted]
        if told := _asked_to_stop(stop):
            break
    # Those that were not stopped wait here for those that were.
    sums = processes.sum_over_processes(np.array([images, padding, computed, true, told], np.int64))
    images, padding, computed, true, signals = sums.tolist()
    if signals:
        raise Stopped(told or signal.SIGTERM)
    if images != len(split):
        raise RuntimeError(f"{images} images were scored, split {split.name} of {split.spec.name} has {len(split)}")
    shown.sort(key=lambda pair: pair[0].index)
    matrix, boundary = processes.sum_over_processes(matrix), processes.sum_over_processes(boundary)
    return Evaluation(matrix, boundary, images, padding, computed / true, len(programs), shown)


def _asked_to_stop(stop: Request | None) -> int:
    """The signal that asked this process to stop, or SIGTERM where another was asked; 0 if none was."""
    if stop is None:
        return 0
    if stop.signal:
        processes.request_stop()
        return stop.signal
    return signal.SIGTERM if processes.stop_requested_elsewhere() else 0


def evaluate_run(
    workdir: epath.PathLike,
    step: int | str | None = None,
    split: str | None = None,
    root: str | None = None,
    protocol: str = "ss",
    config_flags: Sequence[str] = (),
) -> None:
    """Scores the network of a run, prints a table and writes `evaluation/<split>/` in its workdir.

    Other protocols than `ss` have folders of their own, `evaluation/<split>-<protocol>/`.

    Written are results.json, table.md, confusion_matrix.csv and .png, and overlays/, which loses its old pictures.

    Args:
      workdir: of the run.
      step: of the checkpoint; "best"; None: the last.
      split: of the data set; None: `config.data.eval_split`.
      root: where prepared data sets lie; None: `config.data.root`.
      protocol: one of `protocols.NAMES`.
      config_flags: see `load_trained`; results.json holds the config with them.

    Raises:
      InputError: the run, its checkpoint or the split cannot be used, there is no such protocol, or the workdir cannot
        be written.
    """
    trained = load_trained(
        workdir, step, config_flags, {"batch_size", "padded_share", "overlays", *FIELDS.get(protocol, ())}
    )
    config = trained.config
    data = open_split_of(trained, workdir, split, root)
    seen = protocol_named(protocol, config)
    folder = epath.Path(workdir) / "evaluation" / (data.name if protocol == "ss" else f"{data.name}-{protocol}")
    otherwise = "make room or give yourself the right to write there"
    if processes.is_main_process():
        check_writable(folder, otherwise)
    found = evaluate(trained.model, trained.variables, data, config, config.evaluation.overlays, protocol=seen)
    if not processes.is_main_process():
        return
    results = reports.summarise(
        found.matrix,
        found.boundary,
        data.spec,
        split=data.name,
        images=found.images,
        padding=found.padding_images,
        checkpoint_step=trained.step,
        config=config.to_dict(),
        protocol=seen,
    ) | {
        "padded_share": found.padded_share,
        "programs": found.programs,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    Console().print(reports.console_table(results))  # Before anything is written: a full disk shall not hide it.
    print(f"pixels computed over pixels of the images: {found.padded_share:.3f}, on {found.programs} canvases")
    with writing_into(folder, otherwise):
        reports.write_results(folder, results, found.matrix)
        pictures.write_confusion_matrix(folder / "confusion_matrix.png", found.matrix, data.spec)
        _write_overlays(folder / "overlays", found.shown, data.spec)
    print(
        f"written to {folder}: results.json, table.md, confusion_matrix.csv, confusion_matrix.png, overlays/ "
        f"({len(found.shown)} pictures)"
    )


def _write_overlays(folder: epath.Path, shown: list[tuple[Example, np.ndarray]], spec: DatasetSpec) -> None:
    """In the place of those that an earlier evaluation left."""
    folder.mkdir(exist_ok=True)
    names = [f"{name}.png" for name in picture_names([example for example, _ in shown])]
    for name, (example, prediction) in zip(names, shown, strict=True):
        write_picture(folder / name, pictures.comparison(example.image, example.label, prediction, spec))
    # Not by a pattern: the workdir's own name may look like one, as voc[1]. Object stores have no empty folders.
    for old in list(folder.iterdir()) if folder.exists() else []:
        if old.suffix == ".png" and old.name not in names:
            old.unlink()
