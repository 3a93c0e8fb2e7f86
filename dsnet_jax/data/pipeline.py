"""From a split to training batches and to evaluation examples.

The position in the training data *is* the step: which records a step holds, in which order, and how they are augmented
follows from the seed and the step alone, however many processes, workers and threads share the work. So there is
nothing to save: to resume is to start at a later step.
"""

import functools
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dsnet_jax.data.cache import DecodedSplit, Picture, decode_picture, name_of
from dsnet_jax.data.records import Split
from dsnet_jax.data.threads import threads_for
from dsnet_jax.data.transforms import augment, resize_image
from dsnet_jax.errors import InputError


@dataclass(frozen=True)
class Example:
    """One picture to evaluate.

    Attributes:
      index: position in the split.
      id: the record's name.
      image: uint8 RGB [h, w, 3], at working resolution.
      label: uint8 [H, W], at its own size; None where the split has no labels.
      label_hw: H and W, at which the picture is scored, with or without a label.
    """

    index: int
    id: str
    image: np.ndarray
    label: np.ndarray | None
    label_hw: tuple[int, int]


def train_batches(
    split: Split | DecodedSplit,
    data_config: ConfigDict,
    seed: int,
    start_step: int,
    steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps `start_step` to `steps` - 1, decoded and augmented ahead of their use.

    Records are shuffled anew in every epoch; an epoch that does not end with a batch goes on in the same batch with the
    next one. Every process gets a contiguous block of each global batch, which is the same for any number of processes.

    Args:
      split: a split with labels; decoded once, by `cache.decoded_once`, it gives the same batches.
      data_config: `config.data` of an experiment. `batch_size` counts all processes. With `worker_count` 0 the threads
        of this process do the work, `read_threads` of them; otherwise so many processes, each with as many threads.
      seed: of the order and of the augmentation, 0 to 2**32 - 1.
      start_step: the first step wanted, from 0.
      steps: where the training ends.
      process_index: of this process, among `process_count`.
      process_count: processes that share every batch.

    Returns:
      An iterator of dicts: `image` uint8 RGB [b, *crop_size_hw, 3], `label` uint8 [b, *crop_size_hw], and `record`
      int64 [b], positions in the split; b is `batch_size` / `process_count`. Close it if it is not used up.

    Raises:
      InputError: `batch_size` does not divide by `process_count`; while iterating, a record without a label, or one
        that cannot be decoded.
    """
    local_batch_size, rest = divmod(data_config.batch_size, process_count)
    if rest:
        raise InputError(
            f"data.batch_size is {data_config.batch_size}, which {process_count} processes cannot share equally: "
            "choose a multiple of their number"
        )
    load = functools.partial(
        _load_batch,
        split=split,
        crop_size_hw=data_config.crop_size_hw,
        image_scale=data_config.image_scale,
        scale_range=data_config.scale_range,
        flip_probability=data_config.flip_probability,
        scale_box=tuple(data_config.scale_box),
    )
    # Drawn by position, so before the slices; batched before them too, so that what crosses from workers are batches.
    order = _record_order(len(split), seed).random_map(_with_state)
    batches = order.batch(local_batch_size, drop_remainder=True, batch_fn=load)
    batches = batches[process_index::process_count][start_step:steps]
    threads = threads_for(data_config.read_threads, data_config.worker_count)
    return _iterate(batches, threads, data_config.worker_count)


def records_of_step(record_count: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Positions in a split of `record_count` records of what `train_batches` yields at a step, int64 [batch_size]."""
    return _record_order(record_count, seed).batch(batch_size, drop_remainder=True)[step]


def evaluation_examples(
    split: Split | DecodedSplit,
    image_scale: float,
    positions: Sequence[int] | None = None,
    read_threads: int = 0,
) -> Iterator[Example]:
    """Examples of a split, decoded ahead by threads.

    Args:
      split: with or without labels.
      image_scale: working resolution, a factor on both sides of the image.
      positions: in the split, of those that are wanted, in the order in which they are; None: of all.
      read_threads: threads that decode, and examples that are kept ready; 0: see `threads_for`.

    Returns:
      An iterator of `Example`. Close it if it is not used up.

    Raises:
      InputError: while iterating, a record that cannot be decoded.
    """
    load = functools.partial(load_example, split=split, image_scale=image_scale)
    wanted = range(len(split)) if positions is None else positions
    return _iterate(grain.MapDataset.source(wanted).map(load), threads_for(read_threads))


def _record_order(record_count: int, seed: int) -> grain.MapDataset[int]:
    """Positions in the split in training order, without end."""
    return grain.MapDataset.range(record_count).seed(seed).shuffle().repeat()


def _with_state(index: int, rng: np.random.Generator) -> tuple[int, dict[str, Any]]:
    """Grain's generator is used again for the next element: what it would draw for this one is kept."""
    return index, rng.bit_generator.state


def _load_batch(
    elements: Sequence[tuple[int, dict[str, Any]]],
    *,
    split: Split | DecodedSplit,
    crop_size_hw: tuple[int, int],
    **augmentation,
) -> dict[str, np.ndarray]:
    """Every picture is written once: warped to its place in the batch."""
    images = np.empty((len(elements), *crop_size_hw, 3), np.uint8)
    labels = np.empty((len(elements), *crop_size_hw), np.uint8)
    rng = np.random.Generator(np.random.Philox(0))
    for (index, state), *out in zip(elements, images, labels, strict=True):
        picture = _picture(split, index)
        if picture.label is None:
            raise InputError(
                f"{name_of(split, index, picture.id)} has no label: choose a split with labels to train on"
            )
        rng.bit_generator.state = state
        augment(picture.image, picture.label, rng, crop_size_hw, **augmentation, out=tuple(out))
    return {"image": images, "label": labels, "record": np.array([index for index, _ in elements], np.int64)}


def load_example(index: int, *, split: Split | DecodedSplit, image_scale: float) -> Example:
    """Reads and decodes a record to evaluate.

    Raises:
      InputError: it cannot be decoded; the message names it.
    """
    picture = _picture(split, index)
    return example_of(index, picture.id, picture.image, picture.label, image_scale)


def example_of(index: int, id_: str, image: np.ndarray, label: np.ndarray | None, image_scale: float) -> Example:
    """An example of a picture as it was decoded, RGB, uint8 [H, W, 3]: its image comes to working resolution."""
    return Example(index, id_, resize_image(image, image_scale), label, image.shape[:2])


def _picture(split: Split | DecodedSplit, index: int) -> Picture:
    return split[index] if isinstance(split, DecodedSplit) else decode_picture(split, index)


def _iterate(dataset: grain.MapDataset, read_threads: int, worker_count: int = 0) -> Iterator:
    """Elements of `dataset` in order, made ahead of their use; threads and workers end with the iterator."""
    cv2.setNumThreads(0)  # Threads and workers here are the parallelism: OpenCV's own would only be in their way.
    # Grain's default keeps 500 elements ready, which suits kilobytes: ours are pictures, or batches of them.
    elements = dataset.to_iter_dataset(grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=read_threads))
    if worker_count:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain asks for its own flags when it starts a worker.
        elements = elements.mp_prefetch(grain.MultiprocessingOptions(worker_count), worker_init_fn=_start_worker)
    yield from elements


def _start_worker(worker_index: int, worker_count: int):
    """Runs first in every worker process: it is the training process that decides when a worker ends."""
    cv2.setNumThreads(0)
    # They may be sent to the whole group: the training process still finishes its step and saves.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Ends this process when its parent is gone: killed, it could not say so, and the worker would wait forever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
