import itertools
import os
import sys

import pytest

from dsnet_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until told otherwise."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def consume(clock, items, seconds_each, **kwargs):
    out = []
    for item in progress.track(items, "reading", **kwargs):
        out.append(item)
        clock.now += seconds_each
    return out


def test_what_nobody_reads_any_more_is_told_to_nobody_and_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        progress.tell("one", stream)
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))
        progress.tell("two", stream)


def test_what_is_read_is_told():
    reader, writer = os.pipe()
    with open(reader) as read, open(writer, "w") as stream:
        progress.tell("one", stream)
        assert read.readline() == "one\n"


def test_every_item_passes_through_in_order(clock):
    assert consume(clock, range(25), 1.0) == list(range(25))


def test_a_log_gets_one_line_every_ten_seconds_with_count_rate_and_time_left(clock, capsys):
    consume(clock, list(range(25)), 1.0)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["reading: 10/25, 1.0/s, 0:00:15 left", "reading: 20/25, 1.0/s, 0:00:05 left"]
    assert captured.out == ""


def test_a_log_gets_nothing_for_what_is_quick(clock, capsys):
    consume(clock, range(1000), 0.001)
    assert capsys.readouterr().err == ""


def test_slow_items_are_told_in_seconds_each(clock, capsys):
    consume(clock, range(200), 40.0)
    assert capsys.readouterr().err.splitlines()[0] == "reading: 1/200, 40.0 s each, 2:12:40 left"


def test_an_unknown_total_gives_no_time_left(clock, capsys):
    consume(clock, (i for i in range(11)), 1.0)
    assert capsys.readouterr().err.splitlines() == ["reading: 10, 1.0/s"]


def test_a_total_can_be_given_for_an_iterator(clock, capsys):
    consume(clock, iter(range(11)), 1.0, total=11)
    assert capsys.readouterr().err.splitlines() == ["reading: 10/11, 1.0/s, 0:00:01 left"]


@pytest.mark.parametrize("terminal", [False, True])
def test_items_are_not_read_ahead_of_their_use(terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    source = iter(range(10))
    assert list(itertools.islice(progress.track(source, "reading"), 3)) == [0, 1, 2]
    assert next(source) == 3


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track(range(3), "reading")) == [0, 1, 2]
    err = capsys.readouterr().err
    assert "reading" in err and "3/3" in err and "\x1b" in err
