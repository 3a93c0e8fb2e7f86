"""metrics.jsonl and TensorBoard events: what is written, and what a resumed run takes back."""

import contextlib
import json
import math

import pytest
from tensorboardX.proto.event_pb2 import Event

from dsnet_jax.errors import InputError
from dsnet_jax.training.metrics_log import MetricsLog, summarise


def write(workdir, start, *steps):
    log = MetricsLog(workdir, start)
    for step in steps:
        log.write(step, {"loss": step / 10})
    log.close()


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """Those of the one file, which is a sequence of length, checksum, event, checksum."""
    (file,) = workdir.glob("events.out.tfevents.*")
    data, found = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_every_call_is_a_line_and_an_event_a_scalar(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 0.5, "learning_rate": 0.25})
    log.write(2, {"loss": 0.125})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "learning_rate": 0.25}, {"step": 2, "loss": 0.125}]
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(1, "loss", 0.5), (1, "learning_rate", 0.25), (2, "loss", 0.125)]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    log.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorboardX leaves its file open.
def test_a_full_disk_is_told_in_one_line_when_a_line_is_written_and_when_a_run_begins(tmp_path, files_of_at_most):
    log = MetricsLog(tmp_path, 0)
    with (
        files_of_at_most(300),
        pytest.raises(InputError, match=r"metrics\.jsonl cannot be written \(File too large\): make room, then"),
        contextlib.closing(log),
    ):
        for step in range(1000):
            log.write(step, {"loss": 0.5})
    with (
        files_of_at_most(10),
        pytest.raises(InputError, match=r"metrics\.jsonl cannot be written \(File too large\): make room, then"),
    ):
        MetricsLog(tmp_path, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null_so_that_every_line_is_json(tmp_path, value):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": value})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"step": 1, "loss": None}


def test_a_run_that_goes_on_takes_back_what_came_after_its_step(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4, 5)
    write(tmp_path, 3, 4, 5, 6)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_line_left_half_written_by_a_killed_run_is_dropped(tmp_path):
    write(tmp_path, 0, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    write(tmp_path, 2, 3)
    assert lines(tmp_path) == [{"step": step, "loss": step / 10} for step in (1, 2, 3)]


def test_tensorboard_is_told_to_forget_what_came_after_the_step(tmp_path):
    write(tmp_path, 4, 5, 6)
    assert [event.step for event in events(tmp_path) if event.session_log.status == 1] == [5]


def test_skipped_steps_are_left_out_of_the_mean_loss_and_counted():
    steps = [{"loss": 1.0, "skipped": 0}, {"learning_rate": 0.5, "skipped": 1}, {"loss": 2.0, "skipped": 1}]
    assert summarise(steps) == {"loss": 1.5, "skipped": 1}
    assert summarise(steps[1:2]) == {"learning_rate": 0.5, "skipped": 1}


def test_the_largest_offset_of_all_steps_is_logged():
    steps = [{"offset_max": 2.0, "offset_mean": 1.0}, {"offset_max": 9.0, "offset_mean": 2.0}, {"skipped": 1}]
    assert summarise(steps) == {"skipped": 1, "offset_max": 9.0}
