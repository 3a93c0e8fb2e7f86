"""How many images a second the input pipeline makes, beside a PyTorch DataLoader that does the same work.

The work: read, decode, scale by 0.5 to 2, crop to 512 x 512, flip, batches of 8 in uint8. The pictures: CamVid's PNG
files of 480 x 360, and JPEG files of VOC's size, 500 x 375, made from them. Images a second and core are those of a
second of processor time, whichever process spent it.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from benchmarks import harness
from ml_collections import ConfigDict

from dsnet_jax.config import default_config
from dsnet_jax.data.cache import DecodedSplit, decoded_once
from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.pipeline import train_batches
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import Split, open_split
from dsnet_jax.data.specs import CAMVID
from dsnet_jax.data.transforms import augment

ROUNDS = 5
BATCH = 8
READY_BATCHES = 8  # At most so many were made before they were asked for, and count for nothing.
PEERS = {  # By name: its flags. In its process a DataLoader pays for no transport; that is not how one trains with it.
    "DataLoader, in process": ["--workers=0"],
    "DataLoader with Pillow, in process": ["--workers=0", "--decoder=pillow"],
    "DataLoader, workers": ["--workers={workers}"],
}
OURS = {  # By name: decoded once or each time, data.worker_count, data.read_threads; None is as many as --workers.
    "1 thread": (False, 0, 1),
    "1 thread, decoded once": (True, 0, 1),
    "threads": (False, 0, None),
    "threads, decoded once": (True, 0, None),
    "workers": (False, None, 1),
}
COMPARED = [  # Ours with the peer's that has as many processes or threads.
    ("1 thread", "DataLoader, in process"),
    ("1 thread", "DataLoader with Pillow, in process"),
    ("1 thread, decoded once", "DataLoader, in process"),
    ("threads", "DataLoader, workers"),
    ("threads, decoded once", "DataLoader, workers"),
    ("workers", "DataLoader, workers"),
]


class Spent(NamedTuple):
    """What a turn took."""

    seconds: float
    processor_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, and how much of it."""
    parser.add_argument("--source", type=Path, required=True, help="CamVid, with train/ and trainannot/")
    parser.add_argument("--pictures", type=int, default=96, help="of the data set that are used")
    parser.add_argument("--batches", type=int, default=20, help="made in every round, by each")
    parser.add_argument("--workers", type=int, help="processes or threads where there are some (default: --threads)")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures."""
    options.workers = options.workers or options.threads
    tasks, figures, versions = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("camvid_png", "voc_size_jpeg"):
            source = Path(folder) / f"source-{name}"
            _write_pictures(source, options.source, options.pictures, jpeg=name.endswith("jpeg"))
            prepare("folder", str(source), folder, name=name)
            split = open_split(folder, name, "train")
            spent = harness.in_turns(_sides(split, source, options, versions), options, warm_up=0)
            images = options.batches * BATCH
            for kind, suffix in (("seconds", ""), ("processor_seconds", ", per core")):
                seconds = {side: turns and [getattr(turn, kind) for turn in turns] for side, turns in spent.items()}
                tasks.append(harness.Task(f"{name}{suffix}", seconds, COMPARED, images))
            stages = _stages(split)
            total = 1000 * statistics.median(turn.processor_seconds for turn in spent["1 thread"]) / images
            stages["batch, order, threads"] = total - sum(stages.values())
            figures[f"{name}: ms of processor time an image"] = stages
    return harness.Report(tasks, figures, versions or None)


def _write_pictures(source: Path, camvid: Path, count: int, jpeg: bool) -> None:
    """CamVid's own files, or larger JPEG images with masks that are as quickly decoded as PNG can be."""
    for kind, origin in (("images", "train"), ("masks", "trainannot")):
        folder = source / kind / "train"
        folder.mkdir(parents=True)
        for file in sorted((camvid / origin).glob("*.png"))[:count]:
            if not jpeg:
                (folder / file.name).write_bytes(file.read_bytes())
            elif kind == "images":
                image = cv2.resize(cv2.imread(str(file)), (500, 375), interpolation=cv2.INTER_CUBIC)
                cv2.imwrite(str(folder / f"{file.stem}.jpg"), image)
            else:
                mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
                mask = cv2.resize(mask, (500, 375), interpolation=cv2.INTER_NEAREST)
                unfiltered = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_COMPRESSION, 9]
                cv2.imwrite(str(folder / file.name), mask, [*unfiltered, cv2.IMWRITE_PNG_STRATEGY, 0])
    (source / "classes.txt").write_text("\n".join([*CAMVID.class_names, "ignore 11"]))


def _sides(
    split: Split, source: Path, options: argparse.Namespace, versions: dict[str, str]
) -> dict[str, harness.Side[Spent] | None]:
    """All of ours and all of PyTorch's, by name. Each starts anew in every turn: ahead of its time it makes nothing.

    `versions` is filled with the peer's.
    """
    decoded = decoded_once(split, source / "decoded", 10**9)
    sides = {}
    for title, (once, workers, threads) in OURS.items():
        config = default_config().data
        config.batch_size = BATCH
        config.worker_count = options.workers if workers is None else workers
        config.read_threads = options.workers if threads is None else threads
        sides[title] = functools.partial(_ours, decoded if once else split, config, options.batches)
    for title, flags in PEERS.items():
        flags = [source, f"--batch={BATCH}", "--threads=1", *(flag.format(workers=options.workers) for flag in flags)]
        theirs = functools.partial(_theirs, options, flags, versions)
        sides[title] = theirs if options.peer_python else None
    return sides


def _ours(split: Split | DecodedSplit, config: ConfigDict, batches: int) -> Spent:
    with contextlib.closing(train_batches(split, config, 0, 0, 10**9)) as stream:
        return _spent(lambda count: collections.deque(itertools.islice(stream, count), maxlen=0), os.getpid(), batches)


def _theirs(options: argparse.Namespace, flags: list, versions: dict[str, str]) -> Spent:
    with harness.peer(options, "pipeline_torch.py", flags) as peer:
        versions.update(peer.versions)
        return _spent(lambda count: peer.ask(str(count)), peer.pid, options.batches)


def _spent(make: Callable[[int], object], pid: int, batches: int) -> Spent:
    make(READY_BATCHES)
    processor_seconds, began = _processor_seconds(pid), time.perf_counter()
    make(batches)
    return Spent(time.perf_counter() - began, _processor_seconds(pid) - processor_seconds)


def _processor_seconds(pid: int) -> float:
    """Of a process, its ended threads included, and of its living children, to the nanosecond (Linux)."""
    total = time.clock_gettime(~pid << 3 | 2)  # The clock that clock_getcpuclockid(3) names.
    for task in Path(f"/proc/{pid}/task").iterdir():
        children = ""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # The thread has just ended.
            children = (task / "children").read_text()
        total += sum(map(_processor_seconds, map(int, children.split())))
    return total


def _stages(split: Split) -> dict[str, float]:
    """Milliseconds of processor time that an image takes in each stage, one after the other."""
    clock, ends, rng = time.thread_time, [], np.random.default_rng(0)
    for index in range(len(split)):
        times = [clock()]
        record = split[index]
        times.append(clock())
        image = decode_image(record.image, record.id)
        times.append(clock())
        label = decode_mask(record.label, record.id)
        times.append(clock())
        augment(image, label, rng, (512, 512), 1.0, (0.5, 2.0), 0.5)
        times.append(clock())
        ends.append(np.diff(times))
    names = ("read", "decode image", "decode label", "scale, crop, flip")
    return dict(zip(names, (1000 * np.mean(ends, axis=0)).tolist(), strict=True))
