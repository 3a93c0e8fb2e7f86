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

import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsnet_jax import parallel
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.data.prepare import prepare
from dsnet_jax.data.specs import SHAPES
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.evaluate import evaluate_run
from dsnet_jax.experiment import claim_workdir
from dsnet_jax.training import loop
from dsnet_jax.training.loop import train

STEPS, EPOCH = 6, 3  # 27 images make three batches of eight.


class Stopped(Exception):
    """As Ctrl-C, at a chosen batch."""


pytestmark = pytest.mark.usefixtures("compiled_quickly")


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


def stop_after(monkeypatch, batches):
    """Makes the next `train` fail when it asks for another batch after so many."""
    original = loop.train_batches

    def stopping(*arguments):
        for index, batch in enumerate(original(*arguments)):
            if index == batches:
                raise Stopped
            yield batch

    monkeypatch.setattr(loop, "train_batches", stopping)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(line):
    return {name: v for name, v in line.items() if name not in ("images_per_second", "seconds_per_step", "data_wait")}


def saved(workdir, step):
    """Every array that a checkpoint holds, by name."""
    sharding = parallel.replicated(parallel.local_mesh())
    like = {}
    for name in ("variables", "optimizer"):
        metadata = ocp.StandardCheckpointer().metadata(workdir / "checkpoints" / str(step) / name).item_metadata
        like[name] = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), metadata.tree)
    trees, _ = Checkpoints(workdir, read_only=True).restore(like, step)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


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
        with pytest.raises(Stopped):
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
jax.config.update("jax_disable_most_optimizations", True)
sys.path.insert(0, sys.argv[1])
from conftest import TinyBackbone
from dsnet_jax.config import from_json
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.training import loop

RESNETS["resnet18"] = TinyBackbone
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


def assert_equal_runs(ours, theirs):
    """Bit for bit: parameters, optimizer state, batch statistics; and losses and scores of every step, once."""
    assert list(map(without_times, lines(ours))) == list(map(without_times, lines(theirs)))
    our_arrays, their_arrays = saved(ours, STEPS), saved(theirs, STEPS)
    assert our_arrays.keys() == their_arrays.keys()
    assert [name for name in our_arrays if our_arrays[name].tobytes() != their_arrays[name].tobytes()] == []


def test_every_step_is_logged_once_and_every_evaluation_beside_it(full_run):
    logged = lines(full_run.workdir)
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged if "val_miou" in line] == [3, 6]
    assert len(logged) == 8
    assert {"loss", "learning_rate", "gradient_norm", "offset_max", "images_per_second", "data_wait"} <= set(logged[0])


def test_what_is_kept_is_the_two_newest_steps_and_the_best(full_run):
    scores = {line["step"]: line["val_miou"] for line in lines(full_run.workdir) if "val_miou" in line}
    checkpoints = Checkpoints(full_run.workdir, read_only=True)
    best = max(scores, key=scores.get)
    assert checkpoints.steps() == sorted({4, 6, best})
    assert checkpoints.best_step() == best


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
    first, *steps = full_run.printed
    assert first == f"{full_run.workdir}: steps 0 to 6, 8 of 27 images each, on 8 cpu devices"
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


def test_another_config_is_refused_in_the_same_workdir(full_run, small_config):
    small_config.optimizer.base_lr = 0.2
    small_config.training.epochs = 3
    with pytest.raises(InputError) as raised:
        train(small_config, full_run.workdir)
    assert str(raised.value).splitlines()[1:] == ["optimizer.base_lr: 0.1 -> 0.2", "training.epochs: 2 -> 3"]


def test_changed_images_are_refused_when_a_run_goes_on(rooms, small_config, tmp_path, monkeypatch):
    shutil.copytree(rooms, tmp_path / "datasets")
    small_config.data.root = str(tmp_path / "datasets")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(small_config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]  # Completed, though stopped.

    shutil.copytree(rooms.parent / "source", tmp_path / "source")
    image = tmp_path / "source" / "images" / "train" / "room00.png"
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    prepare("folder", str(tmp_path / "source"), str(tmp_path / "datasets"), name="rooms", overwrite=True)
    with pytest.raises(InputError, match=r"other data \(fingerprint: \w+ -> \w+\): give another --workdir"):
        train(small_config, tmp_path / "run")


def test_other_classes_are_refused_even_before_the_first_checkpoint(small_config, tmp_path):
    claim_workdir(tmp_path, small_config, SHAPES)
    with pytest.raises(InputError, match="other classes or colours than rooms has now"):
        train(small_config, tmp_path)


def test_a_run_that_diverges_stops_at_its_step_and_saves_nothing_of_it(small_config, tmp_path):
    small_config.model.name = "fcn"  # Quicker to compile.
    small_config.optimizer.base_lr = 1000.0
    small_config.training.update(checkpoint_every_steps=1, evaluate_every_epochs=20, epochs=20)
    with pytest.raises(InputError, match=r"step \d+ is not finite any more, .*: nothing was saved since") as raised:
        train(small_config, tmp_path)
    step = int(str(raised.value).split(": step ")[1].split()[0])
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, step))
    assert Checkpoints(tmp_path, read_only=True).steps()[-1] == step - 1
    assert all(np.isfinite(array).all() for array in saved(tmp_path, step - 1).values())


def test_the_first_step_that_is_not_finite_is_named_with_its_loss_and_gradient():
    metrics = [{"loss": 0.5, "gradient_norm": 2.0, "finite": True} for _ in range(5)]
    metrics[2] |= {"gradient_norm": np.inf, "finite": False}
    metrics[4] |= {"loss": np.nan, "finite": False}
    with pytest.raises(InputError, match=r"^run: step 12 is not finite any more, its loss is 0.5 .* norm inf"):
        loop._drain(metrics, 14, "run")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"batch_size": 12}, "batch_size is 12, which 8 devices cannot share equally"),
        ({"batch_size": 32}, "batch_size is 32, split 'train' of rooms has 27 images"),
        ({"name": "streets"}, "'streets' is not prepared: run `dsnet prepare folder --name=streets"),
        ({"train_split": "training"}, "no split 'training'"),
        ({"eval_split": "test"}, "'test' of rooms has no labels to score"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(small_config, tmp_path, fields, message):
    small_config.data.update(fields)
    with pytest.raises(InputError) as raised:
        train(small_config, tmp_path / "run")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
