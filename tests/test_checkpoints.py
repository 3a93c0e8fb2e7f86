"""Checkpoints on disk: which are kept, which is the best, what is read back, and what is said of damage."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax import parallel
from dsnet_jax.checkpoints import Checkpoints, _write_whole_arrays
from dsnet_jax.errors import InputError


def trees(value):
    """A small state, of every type that a real one has; only the kernel is too large to be stored inside a node."""
    params = {
        "kernel": np.random.default_rng(0).random((20, 30), np.float32) + np.float32(value),
        "bias": np.array([value, -0.0], np.float32),
    }
    return {
        "variables": jax.device_put({"params": params, "batch_stats": {"mean": np.float32(value)}}),
        "optimizer": jax.device_put(
            {"step": np.int32(value), "state": (np.ones(3, np.float32), {"count": np.int32(7)})}
        ),
    }


def like(names=("variables", "optimizer"), sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), trees(0))
    return {name: shapes[name] for name in names}


def save_all(workdir, *mious):
    """Saves steps 1, 2, ... and records these scores; None: it was not evaluated."""
    checkpoints = Checkpoints(workdir)
    for step, miou in enumerate(mious, start=1):
        checkpoints.save(step, trees(step), {"seed": 3})
        if miou is not None:
            checkpoints.record_score(step, miou)
    checkpoints.close()


def reopened(workdir):
    return Checkpoints(workdir, read_only=True)


def assert_bit_equal(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


# What comes back.


def test_what_is_saved_is_restored_bit_for_bit_with_its_provenance(tmp_path):
    save_all(tmp_path, None)
    restored, provenance = reopened(tmp_path).restore(like())
    assert provenance == {"seed": 3}
    assert_bit_equal(restored, trees(1))


def test_a_state_is_saved_as_it_was_when_asked_although_its_buffers_are_used_again(tmp_path):
    """The loop donates the state to the next step while the files are still being written."""
    checkpoints = Checkpoints(tmp_path)
    state = {"variables": {"a": jnp.zeros((256, 1024))}, "optimizer": {"step": jnp.int32(0)}}
    add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = add_one(state)
    jax.block_until_ready(state)
    checkpoints.close()
    shape = jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    restored, _ = reopened(tmp_path).restore({"variables": {"a": shape}})
    np.testing.assert_array_equal(restored["variables"]["a"], 0)


def test_the_newest_is_restored_unless_a_step_is_asked_for(tmp_path):
    save_all(tmp_path, None, None)
    checkpoints = reopened(tmp_path)
    assert [int(checkpoints.restore(like(), step)[0]["optimizer"]["step"]) for step in (None, 1, 2)] == [2, 1, 2]


def test_variables_are_restored_alone_for_evaluation(tmp_path):
    save_all(tmp_path, None)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "optimizer")  # Whoever reads it fails.
    restored, _ = reopened(tmp_path).restore(like(["variables"]))
    assert_bit_equal(restored, {"variables": trees(1)["variables"]})


def test_trees_of_any_name_are_kept_beside_the_others(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    averages = jax.tree.map(lambda x: 2 * x, trees(1)["variables"])
    checkpoints.save(1, trees(1) | {"averages": averages}, {})
    checkpoints.close()
    checkpoints = reopened(tmp_path)
    assert_bit_equal(checkpoints.restore({"averages": like()["variables"]})[0], {"averages": averages})
    assert_bit_equal(checkpoints.restore(like())[0], trees(1))


def test_arrays_come_with_the_sharding_asked_for_whatever_the_number_of_devices(tmp_path):
    """Saved on eight devices, restored on four and saved again, restored on one."""
    state = trees(1)
    for step, devices in enumerate((8, 4, 1)):
        replicated = parallel.replicated(parallel.mesh_over(jax.devices()[:devices]))
        if step:
            state, _ = reopened(tmp_path).restore(like(sharding=replicated))
            assert state["variables"]["params"]["kernel"].sharding == replicated
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(step, jax.device_put(state, replicated), {})
        checkpoints.close()
        assert_bit_equal(state, trees(1))


def test_saving_from_eight_devices_compiles_nothing(tmp_path, compilations):
    """A program for each shape and device took a minute, out of the half that a preemption gives."""
    checkpoints = Checkpoints(tmp_path)
    state = {"variables": {"kernel": np.ones((8, 7, 11), np.float32), "bias": np.ones(88, np.float32)}}
    state = jax.device_put(state, parallel.replicated(parallel.global_mesh()))
    compilations.clear()
    checkpoints.save(1, state, {})
    checkpoints.close()
    assert compilations == []


def test_how_arrays_are_written_is_set_without_a_warning(caplog):
    _write_whole_arrays.cache_clear()
    with caplog.at_level(logging.WARNING):
        _write_whole_arrays()
    assert caplog.records == []


def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path):
    save_all(tmp_path, None, None)
    with pytest.raises(InputError) as raised:
        reopened(tmp_path).restore(like(), 5)
    assert "step 5 is needed, steps 1, 2 found" in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_without_any_checkpoint_is_told(tmp_path):
    with pytest.raises(InputError, match="a checkpoint is needed, none found"):
        reopened(tmp_path).restore(like())


# What is kept, and which is the best.


def test_the_two_newest_are_kept(tmp_path):
    save_all(tmp_path, None, None, None, None)
    assert reopened(tmp_path).steps() == [3, 4]


def test_the_best_is_kept_beside_the_two_newest(tmp_path):
    save_all(tmp_path, 0.2, 0.5, 0.3, None, 0.4)
    checkpoints = reopened(tmp_path)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    assert checkpoints.scores == {2: 0.5, 5: 0.4}


@pytest.mark.parametrize("infinite", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_the_worst(tmp_path, infinite):
    save_all(tmp_path, infinite, 0.1, infinite, infinite, infinite)
    checkpoints = reopened(tmp_path)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    assert np.isnan(checkpoints.scores[4])


def test_the_best_is_still_kept_by_a_run_that_goes_on(tmp_path):
    save_all(tmp_path, 0.5, 0.3, 0.4)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, trees(4), {})
    checkpoints.record_score(4, 0.2)
    checkpoints.save(5, trees(5), {})
    checkpoints.close()
    assert reopened(tmp_path).steps() == [1, 4, 5]


def test_a_step_that_was_not_evaluated_is_never_the_best(tmp_path):
    save_all(tmp_path, None, None)
    assert reopened(tmp_path).best_step() is None
    save_all(tmp_path / "evaluated", None, 0.0)
    assert reopened(tmp_path / "evaluated").best_step() == 2


def test_a_score_is_on_disk_before_its_save_is_complete(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, trees(1), {})
    checkpoints.record_score(1, 0.25)
    assert json.loads((tmp_path / "checkpoints" / "scores.json").read_text())["content"] == {"1": 0.25}
    checkpoints.close()
    assert reopened(tmp_path).scores == {1: 0.25}


def test_a_killed_write_of_scores_leaves_those_before(tmp_path, monkeypatch):
    save_all(tmp_path, 0.25)
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(type(checkpoints.folder), "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.record_score(1, 0.5)
    assert reopened(tmp_path).scores == {1: 0.25}


def test_the_score_of_a_step_that_is_gone_does_not_come_back_with_its_number(tmp_path):
    """The newest is moved away, and the run goes on from the one before."""
    save_all(tmp_path, 0.2, 0.9)
    shutil.move(tmp_path / "checkpoints" / "2", tmp_path / "damaged-2")
    assert reopened(tmp_path).best_step() == 1
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, trees(3), {})
    checkpoints.close()
    assert reopened(tmp_path).scores == {1: 0.2}


def test_reading_drops_no_score(tmp_path):
    """A run beside it may have just recorded that of a step whose save is under way."""
    save_all(tmp_path, 0.2, 0.9)
    shutil.move(tmp_path / "checkpoints" / "2", tmp_path / "elsewhere")
    reopened(tmp_path)
    shutil.move(tmp_path / "elsewhere", tmp_path / "checkpoints" / "2")
    assert reopened(tmp_path).best_step() == 2


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("0.25", "0.75"), lambda text: text[:9], lambda text: "[]"]
)
def test_changed_scores_are_noticed(tmp_path, change):
    save_all(tmp_path, 0.25)
    file = tmp_path / "checkpoints" / "scores.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=r"scores\.json: damaged: remove it") as raised:
        reopened(tmp_path)
    assert "\n" not in str(raised.value)
    file.unlink()
    assert reopened(tmp_path).scores == {}


# What is damaged.


def flip_bit(file, position, bit=0):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_a_flipped_bit_of_an_array_is_noticed_and_the_array_named(tmp_path):
    save_all(tmp_path, None, None)
    (file,) = (file for file in (tmp_path / "checkpoints" / "2").rglob("d/*") if file.stat().st_size > 2000)
    flip_bit(file, 1500)
    assert_bit_equal(reopened(tmp_path).restore(like(["optimizer"]))[0], {"optimizer": trees(2)["optimizer"]})
    with pytest.raises(InputError) as raised:
        reopened(tmp_path).restore(like())
    first, *names = str(raised.value).splitlines()
    assert first.startswith(f"{tmp_path}/checkpoints/2: damaged, 1 of 6 arrays are not what was saved: to go on from")
    assert names == ["variables/params/kernel"]


@pytest.mark.parametrize("found", [b'"seed": 3', b"float32", b"crc32", b'"crc32": ', b"[20, 30]"])
def test_a_flipped_bit_of_the_manifest_is_noticed(tmp_path, found):
    save_all(tmp_path, None)
    file = tmp_path / "checkpoints" / "1" / "manifest" / "metadata"
    flip_bit(file, file.read_bytes().index(found) + len(found) - 1, bit=1)
    with pytest.raises(InputError, match=r"1: damaged, manifest/metadata is (not what was saved|no JSON): ") as raised:
        reopened(tmp_path).restore(like())
    assert "\n" not in str(raised.value)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, empty, os.unlink])
def test_any_damaged_file_is_named_in_one_line_with_what_goes_on_from_the_step_before(tmp_path, damage, capfd):
    """Every file of a checkpoint in turn; what is not read may be damaged."""
    save_all(tmp_path, None, None)
    step = tmp_path / "checkpoints" / "2"
    shutil.copytree(step, tmp_path / "intact")
    named = set()
    for file in sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file()):
        damage(step / file)
        checkpoints = reopened(tmp_path)
        try:
            assert_bit_equal(checkpoints.restore(like())[0], trees(2))
        except InputError as error:
            message = str(error)
            assert message.startswith(f"{step}: damaged, {file} ") and "\n" not in message
            assert "to go on from step 1, `mv " in message
            command = shlex.split(message.split("`")[1])
            assert command[0] == "mv" and command[1] == str(step) and not os.path.exists(command[2])
            subprocess.run(command, check=True)
            assert_bit_equal(reopened(tmp_path).restore(like())[0], trees(1))
            shutil.rmtree(command[2])
            named.add(re.sub(r"[0-9a-f]{32}", "*", str(file)))
        else:
            shutil.rmtree(step)
        shutil.copytree(tmp_path / "intact", step)
    read = {"manifest/metadata", "variables/ocdbt.process_0/d/*", "optimizer/_METADATA"}
    read |= {f"{name}/{file}" for name in ("variables", "optimizer") for file in ("manifest.ocdbt", "d/*")}
    assert named >= read
    assert "Traceback" not in capfd.readouterr().err


def test_of_a_damaged_step_that_is_not_the_newest_the_others_are_named(tmp_path):
    save_all(tmp_path, 0.5, None, None)
    (tmp_path / "checkpoints" / "1" / "manifest" / "metadata").unlink()
    with pytest.raises(InputError, match=r"choose another with --step \(2, 3\)$"):
        reopened(tmp_path).restore(like(), 1)
    save_all(tmp_path / "single", None)
    (tmp_path / "single" / "checkpoints" / "1" / "manifest" / "metadata").unlink()
    with pytest.raises(InputError, match=r"no other step is there, train in another --workdir$"):
        reopened(tmp_path / "single").restore(like())


# What is restored into what.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda params: params | {"kernel": params["kernel"].update(shape=(20, 31))},
            "variables/params/kernel: saved float32 [20,30], wanted float32 [20,31]",
        ),
        (
            lambda params: params | {"kernel": params["kernel"].update(dtype=jnp.bfloat16)},
            "variables/params/kernel: saved float32 [20,30], wanted bfloat16 [20,30]",
        ),
        (
            lambda params: params | {"another": params["bias"]},
            "variables/params/another: saved nothing, wanted float32 [2]",
        ),
        (
            lambda params: {"kernel": params["kernel"]},
            "variables/params/bias: saved float32 [2], wanted nothing",
        ),
    ],
    ids=["another shape", "another dtype", "one more", "one less"],
)
def test_a_checkpoint_of_another_network_is_refused_with_what_differs(tmp_path, change, said):
    save_all(tmp_path, None)
    wanted = like()
    wanted["variables"]["params"] = change(wanted["variables"]["params"])
    with pytest.raises(InputError) as raised:
        reopened(tmp_path).restore(wanted)
    first, *names = str(raised.value).splitlines()
    assert first.startswith(
        f"{tmp_path}/checkpoints/1: saved by another network or optimizer, arrays that differ: 1: use"
    )
    assert names == [said]


def test_ten_of_the_arrays_that_differ_are_named(tmp_path):
    save_all(tmp_path, None)
    wanted = like()
    bias = wanted["variables"]["params"]["bias"]
    wanted["variables"]["params"] |= {f"new{index:02}": bias for index in range(13)}
    with pytest.raises(InputError, match="arrays that differ: 13: ") as raised:
        reopened(tmp_path).restore(wanted)
    names = str(raised.value).splitlines()[1:]
    assert names[9].startswith("variables/params/new09:") and names[10:] == ["and 3 more"]


def test_a_tree_that_was_not_saved_is_told(tmp_path):
    save_all(tmp_path, None)
    with pytest.raises(InputError, match="averages/bias: saved nothing, wanted float32"):
        reopened(tmp_path).restore({"averages": {"bias": like()["variables"]["params"]["bias"]}})


# What a killed save, and one without room, leave.


def leave_unfinished_save(workdir):
    """As one looks that was killed, or that another process is at."""
    folder = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    (folder / "variables.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "variables.orbax-checkpoint-tmp" / "manifest.ocdbt").write_bytes(b"half")
    return folder


def test_a_killed_save_is_no_checkpoint_and_is_removed_by_the_next_run(tmp_path):
    save_all(tmp_path, 0.5)
    unfinished = leave_unfinished_save(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, trees(2), {})  # Waits for the removal.
    checkpoints.close()
    assert not unfinished.exists()
    assert reopened(tmp_path).scores == {1: 0.5}


def test_reading_leaves_a_save_under_way_alone(tmp_path):
    """An evaluation beside a training run: the folder that it writes to must not go away."""
    save_all(tmp_path, None)
    unfinished = leave_unfinished_save(tmp_path)
    threads = set(threading.enumerate())
    checkpoints = reopened(tmp_path)
    for thread in set(threading.enumerate()) - threads:  # Orbax would remove it in one of these.
        thread.join(1)
    assert checkpoints.steps() == [1]
    checkpoints.close()
    assert (unfinished / "variables.orbax-checkpoint-tmp" / "manifest.ocdbt").exists()


def test_reading_makes_no_folder(tmp_path):
    assert reopened(tmp_path / "run").steps() == []
    assert not (tmp_path / "run").exists()


def test_there_are_no_steps_only_where_nothing_looks_like_one(tmp_path):
    save_all(tmp_path, None)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "0001")  # Orbax finds it no more.
    for read_only in (True, False):
        with pytest.raises(InputError, match="checkpoints: 0001 look like checkpoints, but none is complete"):
            Checkpoints(tmp_path, read_only).steps()


def test_a_step_that_another_process_saved_since_is_found(tmp_path):
    checkpoints = reopened(tmp_path)
    save_all(tmp_path, None)
    assert checkpoints.steps() == [1]


def large_trees():
    """2.8 MB that cannot be compressed."""
    return {"variables": {"a": jnp.asarray(np.random.default_rng(0).random(700_000, np.float32))}}


def test_a_save_is_refused_when_there_is_no_room_for_it(tmp_path, monkeypatch):
    save_all(tmp_path, None)
    checkpoints = Checkpoints(tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2_799_999))
    with pytest.raises(InputError) as raised:
        checkpoints.save(2, large_trees(), {})
    assert str(raised.value) == (
        f"{tmp_path}/checkpoints: step 2 could not be saved (no space left): 2.8 MB are free, 2.8 MB are needed: "
        "mend that, and the same command goes on from step 1"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2_800_000))
    checkpoints.save(2, large_trees(), {})
    checkpoints.close()
    assert reopened(tmp_path).steps() == [1, 2]


def check_until_it_raises(checkpoints):
    for _ in range(1000):
        checkpoints.check()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "look",
    [
        check_until_it_raises,
        lambda checkpoints: checkpoints.save(5, trees(5), {}),
        lambda checkpoints: checkpoints.wait(),
        lambda checkpoints: checkpoints.close(),
    ],
    ids=["check", "save", "wait", "close"],
)
def test_a_save_that_failed_is_said_at_the_next_look_and_leaves_the_steps_before(
    tmp_path, look, caplog, files_of_at_most
):
    save_all(tmp_path, 0.5, None, None)
    checkpoints = Checkpoints(tmp_path)
    with files_of_at_most(1_000_000):
        checkpoints.save(4, large_trees(), {})  # The second would be deleted after it.
        with pytest.raises(InputError) as raised:
            look(checkpoints)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/checkpoints: step 4 could not be saved (") and "\n" not in message
    assert "File too large" in message and re.search(r"\d [MG]B are free, 2\.8 MB are needed: mend that", message)
    assert message.endswith("the same command goes on from step 3")
    assert checkpoints.steps() == [1, 2, 3]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    checkpoints.close()  # It is said once.

    checkpoints = Checkpoints(tmp_path)
    assert_bit_equal(checkpoints.restore(like())[0], trees(3))
    assert checkpoints.best_step() == 1
    checkpoints.save(4, large_trees(), {})
    checkpoints.close()
    assert reopened(tmp_path).steps() == [1, 3, 4]


def test_a_score_that_cannot_be_written_is_told_in_one_line(tmp_path, files_of_at_most):
    save_all(tmp_path, 0.5)
    checkpoints = Checkpoints(tmp_path)
    with files_of_at_most(10), pytest.raises(InputError, match=r"scores\.json: could not be written .*File too large"):
        checkpoints.record_score(1, 0.6)
    assert reopened(tmp_path).scores == {1: 0.5}
