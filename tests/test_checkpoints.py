"""Checkpoints on disk: which are kept, which is the best, and what is read back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax import parallel
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.errors import InputError


def trees(value):
    """A small state, of every type that a real one has."""
    params = {"kernel": np.full((2, 3), value, np.float32), "bias": np.array([value, -0.0], np.float32)}
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
    """Saves steps 1, 2, ... with these scores."""
    checkpoints = Checkpoints(workdir)
    for step, miou in enumerate(mious, start=1):
        checkpoints.save(step, trees(step), {"seed": 3}, miou)
    checkpoints.close()


def reopened(workdir):
    return Checkpoints(workdir, read_only=True)


def test_what_is_saved_is_restored_bit_for_bit_with_its_provenance(tmp_path):
    save_all(tmp_path, None)
    restored, provenance = reopened(tmp_path).restore(like())
    assert provenance == {"seed": 3}
    saved = trees(1)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


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


def test_the_two_newest_are_kept(tmp_path):
    save_all(tmp_path, None, None, None, None)
    assert reopened(tmp_path).steps() == [3, 4]


def test_the_best_is_kept_beside_the_two_newest(tmp_path):
    save_all(tmp_path, 0.2, 0.5, 0.3, None, 0.4)
    checkpoints = reopened(tmp_path)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2


@pytest.mark.parametrize("nan", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_the_worst(tmp_path, nan):
    save_all(tmp_path, 0.1, nan, nan, nan)
    checkpoints = reopened(tmp_path)
    assert checkpoints.steps() == [1, 3, 4]
    assert checkpoints.best_step() == 1


def test_the_best_is_still_kept_by_a_run_that_goes_on(tmp_path):
    save_all(tmp_path, 0.5, 0.3, 0.4)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, trees(4), {}, 0.2)
    checkpoints.save(5, trees(5), {})
    checkpoints.close()
    assert reopened(tmp_path).steps() == [1, 4, 5]


def test_a_step_that_was_not_evaluated_is_never_the_best(tmp_path):
    save_all(tmp_path, None, None)
    assert reopened(tmp_path).best_step() is None
    save_all(tmp_path / "evaluated", None, 0.0)
    assert reopened(tmp_path / "evaluated").best_step() == 2


def test_the_newest_is_restored_unless_a_step_is_asked_for(tmp_path):
    save_all(tmp_path, None, None)
    checkpoints = reopened(tmp_path)
    assert [int(checkpoints.restore(like(), step)[0]["optimizer"]["step"]) for step in (None, 1, 2)] == [2, 1, 2]


def test_variables_are_restored_alone_for_evaluation(tmp_path):
    save_all(tmp_path, None)
    for file in (tmp_path / "checkpoints" / "1" / "optimizer").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")  # Whoever reads it fails.
    restored, _ = reopened(tmp_path).restore(like(["variables"]))
    assert list(restored) == ["variables"]
    np.testing.assert_array_equal(restored["variables"]["params"]["kernel"], np.full((2, 3), 1))


def test_arrays_come_with_the_sharding_asked_for_on_any_number_of_devices(tmp_path):
    save_all(tmp_path, None)
    replicated = parallel.replicated(parallel.global_mesh())
    restored, _ = reopened(tmp_path).restore(like(sharding=replicated))
    kernel = restored["variables"]["params"]["kernel"]
    assert kernel.sharding == replicated and len(kernel.addressable_shards) == 8


def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path):
    save_all(tmp_path, None, None)
    with pytest.raises(InputError) as raised:
        reopened(tmp_path).restore(like(), 5)
    assert "step 5 is needed, steps 1, 2 found" in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_without_any_checkpoint_is_told(tmp_path):
    with pytest.raises(InputError, match="a checkpoint is needed, none found"):
        reopened(tmp_path).restore(like())


def damage(folder):
    """Cuts every file with arrays in half."""
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_file(folder):
    (folder / "manifest.ocdbt").unlink()


# TensorStore answers the other reads of a failed restore after Orbax has closed the loop that asked.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("change", [damage, remove_file])
def test_a_damaged_checkpoint_is_one_line_with_the_step_to_go_on_from(tmp_path, change):
    save_all(tmp_path, None, None)
    change(tmp_path / "checkpoints" / "2" / "variables")
    with pytest.raises(InputError) as raised:
        reopened(tmp_path).restore(like())
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/checkpoints/2: damaged, or of another network (")
    assert message.endswith("move it away to go on from step 1") and "\n" not in message
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert int(reopened(tmp_path).restore(like())[0]["optimizer"]["step"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda params: params | {"kernel": params["kernel"].update(shape=(2, 4))},
        lambda params: params | {"another": params["bias"]},
        lambda params: {"kernel": params["kernel"]},
    ],
    ids=["another shape", "one more", "one less"],
)
def test_a_checkpoint_of_another_network_is_refused_in_one_line(tmp_path, change):
    save_all(tmp_path, None)
    wanted = like()
    wanted["variables"]["params"] = change(wanted["variables"]["params"])
    with pytest.raises(InputError, match="1: damaged, or of another network") as raised:
        reopened(tmp_path).restore(wanted)
    assert "\n" not in str(raised.value)


def leave_unfinished_save(workdir):
    """As one looks that was killed, or that another process is at."""
    folder = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    (folder / "variables.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "variables.orbax-checkpoint-tmp" / "manifest.ocdbt").write_bytes(b"half")
    return folder


def test_a_killed_save_is_no_checkpoint_and_is_removed_by_the_next_run(tmp_path):
    save_all(tmp_path, None)
    unfinished = leave_unfinished_save(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, trees(2), {})  # Waits for the removal.
    checkpoints.close()
    assert not unfinished.exists()


def test_reading_leaves_a_save_under_way_alone(tmp_path):
    """An evaluation beside a training run: the folder that it writes to must not go away."""
    save_all(tmp_path, None)
    unfinished = leave_unfinished_save(tmp_path)
    checkpoints = reopened(tmp_path)
    assert checkpoints.steps() == [1]
    checkpoints.close()
    assert (unfinished / "variables.orbax-checkpoint-tmp" / "manifest.ocdbt").exists()


def test_reading_makes_no_folder(tmp_path):
    assert reopened(tmp_path / "run").steps() == []
    assert not (tmp_path / "run").exists()
