"""Whole training runs of a few steps: what is logged and saved, and how they go on, refuse and stop."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsnet_jax import parallel
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.data.prepare import prepare
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import evaluate as evaluation
from dsnet_jax.evaluation.evaluate import evaluate_run
from dsnet_jax.stopping import Stopped
from dsnet_jax.training import loop, pace
from dsnet_jax.training.loop import train
from dsnet_jax.training.metrics_log import TIMES
from dsnet_jax.workdir import locked_workdir

STEPS, EPOCH = 6, 3  # 27 images make three batches of eight.


class Broken(Exception):
    """What nobody expects, at a chosen batch."""


def watch_records(monkeypatch):
    """Positions of the records of every batch that the loop draws, as it draws them."""
    seen = []
    original = loop.train_batches

    def watched(*arguments):
        for batch in original(*arguments):
            seen.append(batch["record"].tolist())
            yield batch

    monkeypatch.setattr(loop, "train_batches", watched)
    return seen


def send_signal_at(monkeypatch, number, batch_index):
    """Sends this process a signal as the next `train` draws a batch."""
    original = loop.train_batches

    def signalling(*arguments):
        for index, batch in enumerate(original(*arguments)):
            if index == batch_index:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(loop, "train_batches", signalling)


def stop_after(monkeypatch, batches):
    """Makes the next `train` fail when it asks for another batch after so many."""
    original = loop.train_batches

    def stopping(*arguments):
        for index, batch in enumerate(original(*arguments)):
            if index == batches:
                raise Broken
            yield batch

    monkeypatch.setattr(loop, "train_batches", stopping)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(line):
    return {name: value for name, value in line.items() if name not in TIMES}


def saved(workdir, step):
    """Every array that a checkpoint holds, by name."""
    sharding = parallel.replicated(parallel.local_mesh())
    like = {}
    for name in ("variables", "optimizer"):
        metadata = ocp.StandardCheckpointer().metadata(workdir / "checkpoints" / str(step) / name).item_metadata
        like[name] = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), metadata.tree)
    trees, _ = Checkpoints(workdir, read_only=True).restore(like, step)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


def trees_of(workdir, step, name):
    """The leaves of one tree of a checkpoint, in order."""
    metadata = ocp.StandardCheckpointer().metadata(workdir / "checkpoints" / str(step) / name).item_metadata
    sharding = parallel.replicated(parallel.local_mesh())
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), metadata.tree)
    trees, _ = Checkpoints(workdir, read_only=True).restore({name: like}, step)
    return jax.tree.leaves(trees)


@dataclasses.dataclass
class Run:
    """A run from its first step to its last.

    Attributes:
      records: of every step.
      printed: lines.
    """

    workdir: Path
    records: list[list[int]]
    printed: list[str]


@pytest.fixture(scope="module")
def full_run(small_config_for, tmp_path_factory):
    """Shared, so not to be written to, except for what tests do not look at."""
    workdir = tmp_path_factory.mktemp("full") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        records = watch_records(patch)
        train(small_config_for(patch), workdir)
    return Run(workdir, records, printed.getvalue().splitlines())


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(full_run, small_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Broken):
            train(small_config, tmp_path)
    assert Checkpoints(tmp_path, read_only=True).steps()[-1] == 4
    assert lines(tmp_path)[-1]["step"] == 5
    # As if it had been killed: in a save, and in the middle of a line.
    shutil.copytree(tmp_path / "checkpoints" / "4", tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')

    records = watch_records(monkeypatch)
    train(small_config, tmp_path)
    assert records == full_run.records[4:]
    assert_equal_runs(tmp_path, full_run.workdir)


KILLED_RUN = """
import sys
import time
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, sys.argv[1])
from conftest import FourConvolutions
from dsnet_jax.config import from_json
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.training import loop

RESNETS["resnet18"] = FourConvolutions
original = loop.train_batches

def slowly(*arguments):
    for batch in original(*arguments):
        time.sleep(0.2)
        yield batch

loop.train_batches = slowly
loop.train(from_json(Path(sys.argv[2]).read_text(), "config"), sys.argv[3])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(full_run, small_config, tmp_path):
    """Killed between its fifth step and its sixth, or in the save of either."""
    arguments = [Path(__file__).parents[1], full_run.workdir / "config.json", tmp_path / "run"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, *map(str, arguments)], stdout=subprocess.PIPE, env=environment
    )
    for line in process.stdout:
        if line.startswith(b"step 5/"):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train(small_config, tmp_path / "run")
    assert_equal_runs(tmp_path / "run", full_run.workdir)


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on_as_if_it_had_not(
    number, exit_code, full_run, small_config, tmp_path, monkeypatch, capsys
):
    small_config.training.checkpoint_every_steps = 100
    with monkeypatch.context() as patch:
        send_signal_at(patch, number, batch_index=4)
        with pytest.raises(Stopped) as raised:
            train(small_config, tmp_path)
    assert raised.value.exit_code == exit_code
    assert Checkpoints(tmp_path, read_only=True).steps()[-1] == 5  # The step that the batch was drawn for.
    assert "step 5: saved" in capsys.readouterr().out
    records = watch_records(monkeypatch)
    train(small_config, tmp_path)
    assert records == full_run.records[5:]
    assert_equal_runs(tmp_path, full_run.workdir)


def test_a_run_stopped_between_two_lines_of_its_log_writes_the_lines_of_one_that_was_not(
    small_config, tmp_path, monkeypatch
):
    small_config.training.update(log_every_steps=4, evaluate_every_epochs=2)
    train(small_config, tmp_path / "alone")
    with monkeypatch.context() as patch:
        send_signal_at(patch, signal.SIGTERM, batch_index=2)
        with pytest.raises(Stopped):
            train(small_config, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()
    train(small_config, tmp_path / "stopped")
    assert [line["step"] for line in lines(tmp_path / "alone")] == [4, 6, 6]
    assert_equal_runs(tmp_path / "stopped", tmp_path / "alone")


def test_a_run_stopped_in_an_evaluation_has_saved_its_step_and_evaluates_it_when_it_goes_on(
    full_run, small_config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        original = evaluation.evaluation_examples

        def signalling(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            yield from original(*arguments)

        patch.setattr(evaluation, "evaluation_examples", signalling)
        with pytest.raises(Stopped):
            train(small_config, tmp_path)
    assert Checkpoints(tmp_path, read_only=True).steps()[-1] == 3
    assert Checkpoints(tmp_path, read_only=True).scores == {}
    train(small_config, tmp_path)
    assert_equal_runs(tmp_path, full_run.workdir)


def test_a_run_killed_between_the_line_of_a_score_and_the_score_has_the_line_once(
    full_run, small_config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:

        def broken(*arguments):
            raise Broken

        patch.setattr(Checkpoints, "record_score", broken)
        with pytest.raises(Broken):
            train(small_config, tmp_path)
    assert "val_miou" in lines(tmp_path)[-1]
    train(small_config, tmp_path)
    assert_equal_runs(tmp_path, full_run.workdir)


def test_a_run_on_one_device_goes_on_from_a_checkpoint_of_eight(full_run, small_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        send_signal_at(patch, signal.SIGTERM, batch_index=2)
        with pytest.raises(Stopped):
            train(small_config, tmp_path)
    one = parallel.mesh_over(jax.devices()[:1])
    monkeypatch.setattr(parallel, "global_mesh", lambda: one)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    train(small_config, tmp_path)
    for ours, theirs in zip(lines(tmp_path), lines(full_run.workdir), strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def assert_equal_runs(ours, theirs):
    """Bit for bit: parameters, optimizer state, batch statistics; and losses and scores of every step, once."""
    assert list(map(without_times, lines(ours))) == list(map(without_times, lines(theirs)))
    our_arrays, their_arrays = saved(ours, STEPS), saved(theirs, STEPS)
    assert our_arrays.keys() == their_arrays.keys()
    assert [name for name in our_arrays if our_arrays[name].tobytes() != their_arrays[name].tobytes()] == []
    assert Checkpoints(ours, read_only=True).scores == Checkpoints(theirs, read_only=True).scores
    assert Checkpoints(ours, read_only=True).best_step() == Checkpoints(theirs, read_only=True).best_step()


def test_every_step_is_logged_once_and_every_evaluation_beside_it(full_run):
    logged = lines(full_run.workdir)
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged if "val_miou" in line] == [3, 6]
    assert len(logged) == 8
    assert {"loss", "learning_rate", "gradient_norm", "offset_max", "images_per_second", "data_wait"} <= set(logged[0])


def test_what_is_kept_is_the_two_newest_steps_and_the_best_when_they_were_saved(full_run):
    scores = {line["step"]: line["val_miou"] for line in lines(full_run.workdir) if "val_miou" in line}
    checkpoints = Checkpoints(full_run.workdir, read_only=True)
    assert checkpoints.steps() == [3, 4, 6]
    assert checkpoints.scores == scores
    assert checkpoints.best_step() == max(scores, key=scores.get)


def test_scores_of_the_run_are_those_of_an_evaluation_of_its_checkpoint(full_run, small_config):
    evaluate_run(full_run.workdir)
    results = json.loads((full_run.workdir / "evaluation" / "val" / "results.json").read_text())
    last = lines(full_run.workdir)[-1]
    assert (results["checkpoint_step"], results["images"]) == (6, 11)
    assert results["miou"] == last["val_miou"] and results["pixel_accuracy"] == last["val_pixel_accuracy"]


def test_the_points_move_and_everything_stays_finite(full_run):
    state = saved(full_run.workdir, STEPS)
    assert state["['optimizer']['step']"] == STEPS
    assert all(np.isfinite(array).all() for array in state.values())
    assert np.abs(state["['variables']['params']['cgds']['offset']['kernel']"]).max() > 0


def test_the_records_of_an_epoch_are_each_drawn_once_at_most(full_run):
    epoch = [record for batch in full_run.records[:EPOCH] for record in batch]
    assert len(epoch) == len(set(epoch)) == 24


def test_a_finished_run_says_so_and_does_nothing(full_run, small_config, capsys, monkeypatch):
    def files():
        return {path: path.stat().st_mtime_ns for path in full_run.workdir.rglob("*") if path.is_file()}

    before, records = files(), watch_records(monkeypatch)
    train(small_config, full_run.workdir)
    assert capsys.readouterr().out == f"{full_run.workdir}: all 6 steps are done\n"
    assert files() == before and records == []


def test_lines_for_people_say_where_the_run_is(full_run):
    first, second, *steps = full_run.printed
    assert first == f"{full_run.workdir}: steps 0 to 6, 8 of 27 images each, on 8 cpu devices"
    assert second.startswith("the step is compiled, in 0:0")
    trained = [line for line in steps if "loss" in line]
    for step, line in enumerate(trained, start=1):
        words = (f"step {step}/6", f"epoch {step / EPOCH:.1f}", "lr 0.", "offsets", "images/s", "data", "ETA 0:")
        assert all(word in line for word in words), line
    assert len(trained) == STEPS
    assert [line.split(":")[0] for line in steps if "mIoU 0." in line] == ["step 3", "step 6"]


def test_the_mean_loss_is_logged_where_not_every_step_is(full_run, small_config, tmp_path):
    small_config.training.log_every_steps = 2
    small_config.training.evaluate_every_epochs = 2
    train(small_config, tmp_path / "seldom")
    of_step = {line["step"]: line for line in lines(full_run.workdir) if "loss" in line}
    seldom = {line["step"]: line for line in lines(tmp_path / "seldom") if "loss" in line}
    assert list(seldom) == [2, 4, 6]
    for step, line in seldom.items():
        assert line["loss"] == pytest.approx((of_step[step - 1]["loss"] + of_step[step]["loss"]) / 2, rel=1e-6)
        assert line["learning_rate"] == of_step[step]["learning_rate"]


def test_an_evaluation_between_two_lines_of_the_log_is_not_in_their_figures(small_config, tmp_path, monkeypatch):
    """By a clock that a batch puts forward by a second, and an evaluation by a thousand."""
    clock = SimpleNamespace(now=0)
    original = loop.train_batches

    def batches(*arguments):
        for batch in original(*arguments):
            clock.now += 1
            yield batch

    def evaluate(*_, **__):
        clock.now += 1000
        return SimpleNamespace(matrix=np.ones((3, 3), int))

    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(loop, "train_batches", batches)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    small_config.training.log_every_steps = 2
    train(small_config, tmp_path)
    assert [line["seconds_per_step"] for line in lines(tmp_path) if "loss" in line] == [1, 1, 1]


def test_another_config_is_refused_in_the_same_workdir(full_run, small_config, monkeypatch):
    monkeypatch.delattr(loop, "decoded_once")  # Takes long, and comes last.
    small_config.data.cache_decoded_gb = 0.01
    small_config.optimizer.base_lr = 0.2
    small_config.training.epochs = 3
    with pytest.raises(InputError) as raised:
        train(small_config, full_run.workdir)
    assert str(raised.value).splitlines()[1:] == ["optimizer.base_lr: 0.1 -> 0.2", "training.epochs: 2 -> 3"]


def begin_on_a_copy_of(rooms, small_config, tmp_path, monkeypatch):
    """Two steps, which are saved."""
    shutil.copytree(rooms, tmp_path / "datasets")
    small_config.data.root = str(tmp_path / "datasets")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Broken):
            train(small_config, tmp_path / "run")


def test_changed_images_are_refused_when_a_run_goes_on(rooms, small_config, tmp_path, monkeypatch):
    begin_on_a_copy_of(rooms, small_config, tmp_path, monkeypatch)
    assert Checkpoints(tmp_path / "run", read_only=True).steps() == [2]  # Completed, though stopped.

    shutil.copytree(rooms.parent / "source", tmp_path / "source")
    image = tmp_path / "source" / "images" / "train" / "room00.png"
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    prepare("folder", str(tmp_path / "source"), str(tmp_path / "datasets"), name="rooms", overwrite=True)
    with pytest.raises(InputError, match=r"other data \(fingerprint: \w+ -> \w+\): give another --workdir"):
        train(small_config, tmp_path / "run")


def test_a_changed_validation_split_is_told_when_a_run_goes_on(rooms, small_config, tmp_path, monkeypatch, capsys):
    begin_on_a_copy_of(rooms, small_config, tmp_path, monkeypatch)
    shutil.copytree(rooms.parent / "source", tmp_path / "source")
    image = sorted((tmp_path / "source" / "images" / "val").iterdir())[0]
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    prepare("folder", str(tmp_path / "source"), str(tmp_path / "datasets"), name="rooms", overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        stop_after(patch, 0)
        train(small_config, tmp_path / "run")
    assert "split val has changed: scores before and after do not compare" in capsys.readouterr().out


def test_a_training_goes_on_when_nobody_reads_what_it_says(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        loop._say("step 1")
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))  # What comes later goes nowhere.
        monkeypatch.undo()


def test_fields_that_do_not_change_what_is_trained_may_change_on_the_way(
    full_run, small_config, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        send_signal_at(patch, signal.SIGTERM, batch_index=3)
        with pytest.raises(Stopped):
            train(small_config, tmp_path)
    small_config.data.read_threads = 1
    records = watch_records(monkeypatch)
    train(small_config, tmp_path)
    assert "goes on with other fields than it began with: data.read_threads: 2 -> 1" in capsys.readouterr().out
    assert records == full_run.records[4:]
    assert_equal_runs(tmp_path, full_run.workdir)


def test_a_run_that_diverges_stops_after_so_many_skipped_steps_and_names_their_images(
    small_config, tmp_path, monkeypatch, capsys
):
    small_config.model.name = "fcn"  # Quicker to compile.
    small_config.optimizer.base_lr = 1000.0
    small_config.training.update(checkpoint_every_steps=1, evaluate_every_epochs=20, epochs=20, max_skipped_in_a_row=3)
    records = watch_records(monkeypatch)
    with pytest.raises(InputError, match=r"steps \d+ to \d+ were not finite and were skipped: lower") as raised:
        train(small_config, tmp_path)
    first, *named = str(raised.value).splitlines()
    last = int(first.split(" to ")[1].split()[0])
    assert [line.split(":")[0] for line in named] == [f"step {step}" for step in range(last - 2, last + 1)]
    for step, line in zip(range(last - 2, last + 1), named, strict=True):
        assert line.split(": ")[1].split(", ") == [f"room{record:02}" for record in records[step - 1]]
    assert f"step {last - 2} is not finite and was skipped" in capsys.readouterr().out
    state = saved(tmp_path, Checkpoints(tmp_path, read_only=True).steps()[-1])
    assert all(np.isfinite(array).all() for array in state.values())


def test_averages_are_what_is_scored_and_a_batch_in_parts_is_trained(small_config, tmp_path):
    small_config.data.batch_size = 16
    small_config.training.update(ema_decay=0.5, accumulation_steps=2)
    train(small_config, tmp_path)
    (last,) = [line for line in lines(tmp_path) if "val_miou" in line and line["step"] == 2]
    evaluate_run(tmp_path)
    results = json.loads((tmp_path / "evaluation" / "val" / "results.json").read_text())
    assert results["miou"] == last["val_miou"]
    weights, averages = (trees_of(tmp_path, 2, name) for name in ("variables", "averages"))
    different = [not np.array_equal(a, b) for a, b in zip(weights, averages, strict=True)]
    assert any(different)


def test_a_second_run_in_the_workdir_is_refused_before_anything_is_compiled(full_run, small_config, monkeypatch):
    monkeypatch.setattr(loop, "_Run", None)
    with locked_workdir(full_run.workdir), pytest.raises(InputError, match="another run is writing to it"):
        train(small_config, full_run.workdir)


def test_pictures_that_are_decoded_once_give_the_run_of_those_decoded_each_time(
    full_run, small_config, rooms, tmp_path, capsys
):
    shutil.copytree(rooms, tmp_path / "datasets")
    small_config.data.root = str(tmp_path / "datasets")
    small_config.data.cache_decoded_gb = 0.01
    train(small_config, tmp_path / "run")
    assert_equal_runs(tmp_path / "run", full_run.workdir)
    assert "27 pictures" in capsys.readouterr().out
    small_config.data.cache_decoded_gb = 1e-5
    shutil.rmtree(tmp_path / "datasets" / "rooms" / "decoded")
    with pytest.raises(InputError, match=r"config\.data\.cache_decoded_gb"):
        train(small_config, tmp_path / "run")
