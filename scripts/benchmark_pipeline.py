"""How many images a second the input pipeline makes, beside a PyTorch DataLoader that does the same work.

    python scripts/benchmark_pipeline.py --source=camvid --peer-python=/venv/bin/python

The work: read, decode, scale by 0.5 to 2, crop to 512 x 512, flip, batches of 8 in uint8. The pictures: CamVid's PNG
files of 480 x 360, and JPEG files of VOC's size, 500 x 375, made from them. Both sides run in turns, and a ratio is the
median of the rounds' ratios; images per second of processor time are those of one core.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ml_collections import ConfigDict

from dsnet_jax.config import default_config
from dsnet_jax.data.cache import DecodedSplit, decoded_once
from dsnet_jax.data.decoding import decode_image, decode_mask
from dsnet_jax.data.pipeline import train_batches
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.records import Split, open_split
from dsnet_jax.data.specs import CAMVID
from dsnet_jax.data.transforms import augment
from dsnet_jax.progress import track

PEER = Path(__file__).parent / "peers" / "pipeline_torch.py"
BATCH = 8
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


def add_arguments(parser: argparse.ArgumentParser):
    """The flags that `run` reads."""
    parser.add_argument("--source", type=Path, required=True, help="CamVid, with train/ and trainannot/")
    parser.add_argument("--peer-python", help="a Python with torch and torchvision; without it only our side runs")
    parser.add_argument("--pictures", type=int, default=96, help="of the data set that are used")
    parser.add_argument("--batches", type=int, default=20, help="made in every round, by each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes or threads where there are some")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder of pipeline.json, pipeline.md")


def run(options: argparse.Namespace):
    """Measures, prints a table, and writes it and the figures to `options.output`."""
    results: dict[str, Any] = {"opencv": cv2.__version__, "cores": os.cpu_count(), "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("camvid_png", "voc_size_jpeg"):
            source = Path(folder) / f"source-{name}"
            _write_pictures(source, options.source, options.pictures, jpeg=name.endswith("jpeg"))
            prepare("folder", str(source), folder, name=name)
            results["sets"][name] = _measure(folder, source, name, options)
    table = _table(results)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pipeline.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "pipeline.md").write_text(table)
    print(table)


def _write_pictures(source: Path, camvid: Path, count: int, jpeg: bool):
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


def _measure(root: str, source: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    split = open_split(root, name, "train")
    decoded = decoded_once(split, Path(root) / name / "decoded", 10**9)
    config = default_config().data
    config.batch_size = BATCH
    makers = {}  # By name: a context that gives what makes so many batches, and the process that does it.
    for title, (once, workers, threads) in OURS.items():
        config.worker_count = options.workers if workers is None else workers
        config.read_threads = options.workers if threads is None else threads
        makers[title] = functools.partial(_ours, decoded if once else split, config.copy_and_resolve_references())
    for title, flags in PEERS.items() if options.peer_python else ():
        flags = [flag.format(workers=options.workers) for flag in flags]
        makers[title] = functools.partial(_peer, [options.peer_python, PEER, source, f"--batch={BATCH}", *flags])
    rounds = []
    for _ in track(range(options.rounds), f"measuring {name}"):
        rounds.append({title: _rates(maker, options.batches) for title, maker in makers.items()})
    rates = {
        title: {kind: statistics.median(one[title][kind] for one in rounds) for kind in ("per_second", "per_core")}
        for title in makers
    }
    ratios = {
        f"{ours} / {peer}": {
            kind: statistics.median(one[ours][kind] / one[peer][kind] for one in rounds)
            for kind in ("per_second", "per_core")
        }
        for ours, peer in COMPARED
        if peer in makers
    }
    stages = _stages(split)
    stages["batch, order, threads"] = 1000 / rates["1 thread"]["per_core"] - sum(stages.values())
    return {"rates": rates, "ratios": ratios, "stages_ms": stages, "rounds": rounds}


@contextlib.contextmanager
def _ours(split: Split | DecodedSplit, config: ConfigDict) -> Iterator[tuple[Callable[[int], None], int]]:
    with contextlib.closing(train_batches(split, config, 0, 0, 10**9)) as stream:
        yield lambda batches: collections.deque(itertools.islice(stream, batches), maxlen=0), os.getpid()


@contextlib.contextmanager
def _peer(command: list) -> Iterator[tuple[Callable[[int], None], int]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:

        def make(batches: int):
            peer.stdin.write(f"{batches}\n")
            peer.stdin.flush()
            if peer.stdout.readline() != "made\n":
                raise RuntimeError(f"{PEER.name} failed")

        yield make, peer.pid  # Afterwards its input is closed, and so it ends.


def _rates(maker: Callable[[], contextlib.AbstractContextManager], batches: int) -> dict[str, float]:
    """Images per second, and per second of all processors that were busy with them."""
    with maker() as (make, pid):
        make(8)  # What lies ready is used up.
        cpu, start = _cpu_seconds(pid), time.perf_counter()
        make(batches)
        seconds, cpu = time.perf_counter() - start, _cpu_seconds(pid) - cpu
    return {"per_second": batches * BATCH / seconds, "per_core": batches * BATCH / cpu}


def _cpu_seconds(pid: int) -> float:
    """Processor time of the living threads of a process and of its children, to the nanosecond (Linux)."""
    total = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0]) / 1e9
        total += sum(_cpu_seconds(int(child)) for child in (task / "children").read_text().split())
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


def _table(results: dict[str, Any]) -> str:
    lines = []
    for name, result in results["sets"].items():
        lines += [f"| {name} | images/s | images/s and core |", "|---|---|---|"]
        rows = [(title, rate, ".0f") for title, rate in result["rates"].items()]
        rows += [(f"ratio {title}", ratio, ".2f") for title, ratio in result["ratios"].items()]
        lines += [f"| {title} | {row['per_second']:{form}} | {row['per_core']:{form}} |" for title, row, form in rows]
        lines += ["", f"| {name}, stage | ms an image |", "|---|---|"]
        lines += [f"| {stage} | {milliseconds:.2f} |" for stage, milliseconds in result["stages_ms"].items()]
        lines += [""]
    return "\n".join(lines)


def main():
    """Reads the flags and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
