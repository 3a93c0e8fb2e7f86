"""Figures of speed, by a clock that tests put forward."""

from types import SimpleNamespace

import pytest

from dsnet_jax.training import pace
from dsnet_jax.training.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """`now` is the time in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_what_is_not_training_does_not_count_though_steps_before_it_do(clock):
    timed = Pace(start=10, batch_size=4)
    clock.now += 40  # Twenty steps.
    timed.waited += 15
    with timed.paused():
        clock.now += 1000
    clock.now += 20  # Ten more.
    timed.waited += 3
    assert timed.lap(40) == {"images_per_second": 2, "seconds_per_step": 2, "data_wait": 0.3}


def test_a_lap_begins_where_the_one_before_ended(clock):
    timed = Pace(start=0, batch_size=4)
    clock.now += 7
    timed.waited += 7
    timed.lap(1)
    with timed.paused():
        clock.now += 1000
    clock.now += 6
    assert timed.lap(3) == {"images_per_second": 4 / 3, "seconds_per_step": 3, "data_wait": 0}
