"""Progress of whatever takes long: a bar on a terminal, a line now and then in a log."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def tell(line: str, stream: TextIO) -> None:
    """Prints a line; where nobody reads it any more, or the disk is full, this one and all later ones go nowhere.

    For what is worth more than being told about it: a training is not to end because `tee` has.
    """
    try:
        print(line, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Lets what is written to a stream from now on, or waits in it, go nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields `items` and reports on stderr how far they are.

    On a terminal this is a bar with the time left. Elsewhere it is a plain line every `SECONDS_BETWEEN_LINES` at most,
    and nothing for what is finished sooner.

    Args:
      items: what is gone through; it is read only as fast as it is consumed.
      description: a few words that stand before the count.
      total: how many items there are; by default `len(items)` if it has one, else unknown.
    """
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None
    return _bar(items, description, total) if sys.stderr.isatty() else _lines(items, description, total)


def _bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    # Here, since every command imports this file and few draw a bar.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=description)


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and done:
            said = now
            tell(_line(description, done, total, now - start), sys.stderr)
        yield item


def _line(description: str, done: int, total: int | None, seconds: float) -> str:
    rate = done / seconds
    pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    if total is None:
        return f"{description}: {done}, {pace}"
    return f"{description}: {done}/{total}, {pace}, {duration(max(total - done, 0) / rate)} left"


def duration(seconds: float) -> str:
    """A time in seconds as hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
