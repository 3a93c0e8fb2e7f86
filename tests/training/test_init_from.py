"""Weights of another run: taken where they fit, new where classes differ, refused where the network does."""

import dataclasses
import zlib

import jax
import numpy as np
import pytest

from dsnet_jax import processes
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.data.records import open_split
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.training import loop
from dsnet_jax.training.init_from import init_from
from dsnet_jax.training.loop import train
from dsnet_jax.weights.safetensors import to_safetensors


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture
def spec(rooms):
    return open_split(str(rooms), "rooms", "val").spec


def fresh_variables(config, num_classes):
    return jax.jit(lambda: initial_variables(build_model(config.model, num_classes), 5))()


def test_with_the_same_classes_every_array_is_taken(random_run, small_config, spec):
    variables, new, unused = init_from(str(random_run), fresh_variables(small_config, 3), spec)
    assert new == [] and unused == []
    trained = leaves(load_trained(random_run).variables)
    assert all(np.array_equal(array, trained[name]) for name, array in leaves(variables).items())


def test_a_safetensors_that_was_exported_is_taken_like_the_run(random_run, small_config, spec, tmp_path):
    run = load_trained(random_run)
    exported = tmp_path / "run.safetensors"
    exported.write_bytes(to_safetensors(run.config, run.spec, run.variables, run.step, {}))
    variables, new, unused = init_from(str(exported), fresh_variables(small_config, 3), spec)
    assert new == [] and unused == []
    trained = leaves(run.variables)
    assert all(np.array_equal(array, trained[name]) for name, array in leaves(variables).items())


@pytest.mark.parametrize("names", [("wall", "floor"), ("floor", "lamp", "wall")])
def test_with_other_classes_the_last_convolution_is_new_even_if_they_are_as_many(random_run, small_config, spec, names):
    other = dataclasses.replace(spec, class_names=names, palette=spec.palette[: len(names)])
    fresh = fresh_variables(small_config, len(names))
    variables, new, unused = init_from(str(random_run), fresh, other)
    assert new == ["params/classifier/logits/bias", "params/classifier/logits/kernel"] and unused == []
    trained, started = leaves(load_trained(random_run).variables), leaves(fresh)
    for name, array in leaves(variables).items():
        assert np.array_equal(array, (started if name in new else trained)[name]), name


def test_deep_supervision_that_the_other_run_has_not_is_new(random_run, small_config, spec):
    small_config.model.deep_supervision = True
    _, new, _ = init_from(str(random_run), fresh_variables(small_config, 3), spec)
    assert new and all("auxiliary" in name for name in new)


def test_what_is_not_there_is_told_with_what_to_do(tmp_path, spec):
    message = r"/none is not there: make it with `dsnet port` .* or give --config.init_from= for weights drawn"
    with pytest.raises(InputError, match=message):
        init_from(str(tmp_path / "none"), {}, spec)


def test_weights_that_are_not_there_are_told_before_the_workdir_is_claimed(small_config, tmp_path):
    small_config.init_from = str(tmp_path / "none")
    with pytest.raises(InputError, match="/none is not there"):
        train(small_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_network_is_refused_and_its_arrays_are_named(random_run, small_config, spec):
    small_config.model.width = 16
    with pytest.raises(InputError, match=r"network of .* is another one, \d+ arrays differ") as raised:
        init_from(str(random_run), fresh_variables(small_config, 3), spec)
    assert 2 <= len(str(raised.value).splitlines()) <= 11


@pytest.mark.parametrize("there", ["more blocks", "fewer blocks"])
def test_a_run_with_another_backbone_is_refused(there, random_run, small_config, spec):
    """Otherwise some of its blocks would be trained, and others random."""
    fresh = fresh_variables(small_config, 3)
    for tree in fresh.values():
        backbone = tree["backbone"]
        if there == "more blocks":
            del backbone["stage5_block0"]
        else:
            backbone["stage5_block1"] = backbone["stage5_block0"]
    with pytest.raises(InputError, match=r"choose a run with the same config\.model") as raised:
        init_from(str(random_run), fresh, spec)
    block, what = {"more blocks": ("block0", "none wanted"), "fewer blocks": ("block1", "none there")}[there]
    lines = str(raised.value).splitlines()[1:]
    assert lines and all(f"backbone/stage5_{block}/" in line and what in line for line in lines)


def test_a_run_starts_from_the_weights_of_another_and_goes_on_from_its_own(random_run, small_config, tmp_path, capsys):
    small_config.init_from = str(random_run)
    small_config.optimizer.base_lr = 0.0
    small_config.training.update(epochs=1, ema_decay=0.5)
    train(small_config, tmp_path / "tuned")
    assert f"starts from the weights of {random_run}; new are none" in capsys.readouterr().out
    given = leaves(load_trained(random_run).variables["params"])
    averages = leaves(load_trained(tmp_path / "tuned").variables["params"])  # Of weights that did not move.
    assert all(np.allclose(averages[name], array, rtol=1e-6) for name, array in given.items())
    assert Checkpoints(tmp_path / "tuned", read_only=True).steps()[-1] == 3
    train(small_config, tmp_path / "tuned")
    assert "all 3 steps are done" in capsys.readouterr().out


def test_processes_agree_on_the_weights_that_they_start_from(random_run, small_config, tmp_path, monkeypatch):
    """Each reads its machine's own copy."""
    asked, all_agree = {}, loop._all_agree

    def ask(what, found, advice):
        asked[what] = found
        if what == str(random_run):  # What follows where another process has found something else.
            monkeypatch.setattr(processes, "sum_over_processes", lambda own: own + 1)
        all_agree(what, found, advice)

    monkeypatch.setattr(loop, "_all_agree", ask)
    small_config.init_from = str(random_run)
    with pytest.raises(InputError, match="is not the same in all processes, here it holds weights of checksum "):
        train(small_config, tmp_path / "tuned")
    weights = b"".join(array.tobytes() for array in leaves(load_trained(random_run).variables).values())
    assert asked[str(random_run)] == f"holds weights of checksum {zlib.crc32(weights):08x}"
