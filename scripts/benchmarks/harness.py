"""What all benchmarks share: sides that take turns, the process that PyTorch has for itself, the table and the file.

A side is a function without arguments that does a benchmark's work once and returns what it took; None in its place is
a side that cannot be run here, and is shown as such.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dsnet_jax.errors import InputError
from dsnet_jax.progress import track

PEERS = Path(__file__).parents[1] / "peers"
PACKAGES = ("dsnet_jax", "jax", "jaxlib", "flax", "numpy", "opencv-python-headless", "imagecodecs", "grain")
PAUSE_SECONDS = 0.3  # Before each turn: the threads of the side before wait for more work, some of them spinning.
T = TypeVar("T")
Side = Callable[[], T]


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work, and what each side took for it.

    Attributes:
      name: of the work.
      seconds: by side, one number a round, all sides in the same rounds; None: the side was not run.
      pairs: which side of ours is compared with which other.
      images: how many a turn has, and speeds are shown in images a second; None: times are shown in milliseconds.
    """

    name: str
    seconds: Mapping[str, list[float] | None]
    pairs: list[tuple[str, str]]
    images: int | None = None

    def ratios(self, ours: str, other: str) -> tuple[float, float] | None:
        """How many times as fast as the other ours is: the ratio of medians and the median of the rounds' ratios."""
        mine, theirs = self.seconds[ours], self.seconds[other]
        if mine is None or theirs is None:
            return None
        by_round = [b / a for a, b in zip(mine, theirs, strict=True)]
        return statistics.median(theirs) / statistics.median(mine), statistics.median(by_round)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
      tasks: what was timed.
      figures: what else is worth knowing: by title, numbers by name.
      peer_versions: of the packages of the other side's Python; None: it was not run.
    """

    tasks: list[Task]
    figures: dict[str, dict[str, float]]
    peer_versions: dict[str, str] | None


class Peer:
    """A process that runs one of scripts/peers/: it does what a word asks for, and answers with the seconds it took.

    Attributes:
      pid: of the process.
      versions: of its packages.
    """

    def __init__(self, process: subprocess.Popen, script: str):
        self.pid, self._process, self._script = process.pid, process, script
        self.versions: dict[str, str] = self._answer()

    def ask(self, word: str) -> dict[str, Any]:
        """Does it once: `seconds`, and `result`, which the script defines."""
        with contextlib.suppress(BrokenPipeError):  # It has ended, as the missing answer will tell.
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        return self._answer()

    def seconds(self, word: str) -> float:
        """Does it once."""
        return self.ask(word)["seconds"]

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise InputError(f"{self._script} ended with exit code {self._process.wait()}: it said why above")
        return json.loads(line)


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags of all benchmarks."""
    parser.add_argument(
        "--rounds", type=_at_least_one, default=rounds, help="of which medians are taken (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="processors, for every side (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where everything measured is written")


def add_peer_argument(parser: argparse.ArgumentParser) -> None:
    """The flag of those that have a side of PyTorch."""
    parser.add_argument("--peer-python", help="a Python with torch and torchvision; without it PyTorch is not run")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def pin(threads: int) -> None:
    """Keeps this process and those that it starts on so many processors. Before JAX starts its threads, one for each.

    Raises:
      InputError: there are fewer.
    """
    processors = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(processors):
        raise InputError(f"--threads is {threads}: 1 to {len(processors)}, the processors here, is needed", exit_code=2)
    os.sched_setaffinity(0, processors[:threads])


@contextlib.contextmanager
def peer(options: argparse.Namespace, script: str, flags: list[Any]) -> Iterator[Peer | None]:
    """Starts scripts/peers/`script` with these flags; it ends with the context. None without --peer-python.

    Raises:
      InputError: it does not start, or ends before its time.
    """
    if not options.peer_python:
        yield None
        return
    command = [options.peer_python, PEERS / script, *map(str, flags)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise InputError(f"--peer-python={options.peer_python} cannot be run ({error.strerror})") from error
    with process:  # In the end its input is closed, and so it ends.
        yield Peer(process, script)


def in_turns(
    sides: Mapping[str, Side[T] | None], options: argparse.Namespace, *, calls: int = 1, warm_up: int = 1
) -> dict[str, list[T] | None]:
    """What each side returned, round by round; None for those that are None.

    Args:
      sides: by name.
      options: rounds.
      calls: in a turn, of which the last one counts: the first fetches what the others threw out of the caches.
      warm_up: rounds before those that count.
    """
    found = {name: None if side is None else [] for name, side in sides.items()}
    for number in track(range(warm_up + options.rounds), "rounds"):
        for name, side in sides.items():
            if side is None:
                continue
            time.sleep(PAUSE_SECONDS)
            for _ in range(calls):
                result = side()
            if number >= warm_up:
                found[name].append(result)
    return found


def table(report: Report) -> str:
    """The report in Markdown: a row for each compared pair, then the figures."""
    lines = [
        "| | ours | | compared with | | ratio of medians | median of ratios |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in report.tasks:
        for ours, other in task.pairs:
            ratios = task.ratios(ours, other)
            cells = [task.name, ours, _median(task, ours), other, _median(task, other)]
            cells += ["not run"] * 2 if ratios is None else [f"{ratio:.2f}" for ratio in ratios]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "A ratio says how many times as fast ours is."]
    for title, figures in report.figures.items():
        lines += ["", f"| {title} | |", "|---|---|"]
        lines += [f"| {name} | {round(value, 3):,} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def _median(task: Task, side: str) -> str:
    if task.seconds[side] is None:
        return "not run"
    median = statistics.median(task.seconds[side])
    return f"{1e3 * median:,.1f} ms" if task.images is None else f"{task.images / median:,.1f} images/s"


def to_json(report: Report, benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, and on what, for `json.dumps(..., default=str)`."""
    tasks = []
    for task in report.tasks:
        comparisons = []
        for ours, other in task.pairs:
            of_medians, of_rounds = task.ratios(ours, other) or (None, None)
            ratios = {"ratio_of_medians": of_medians, "median_of_ratios": of_rounds}
            comparisons.append({"ours": ours, "compared_with": other, **ratios})
        medians = {side: times and statistics.median(times) for side, times in task.seconds.items()}
        tasks.append(
            {
                "task": task.name,
                "images": task.images,
                "median_seconds": medians,
                "seconds": dict(task.seconds),
                "comparisons": comparisons,
            }
        )
    found = {"tasks": tasks, "figures": report.figures, "peer_versions": report.peer_versions}
    return {"benchmark": benchmark, **environment(options), **found}


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """When, on what and with what this runs."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": options.threads,
        "versions": {"python": platform.python_version(), **versions},
        "options": vars(options),
    }


def processor() -> str:
    """What the system calls the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
