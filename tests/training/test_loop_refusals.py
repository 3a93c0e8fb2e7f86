"""What a training refuses before it begins, and what it says when memory does not suffice."""

import jax
import pytest

from dsnet_jax.data.records import open_split
from dsnet_jax.data.specs import SHAPES
from dsnet_jax.errors import InputError
from dsnet_jax.training import loop
from dsnet_jax.training.loop import train
from dsnet_jax.workdir import claim_workdir


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("data.batch_size", 12, "batch_size is 12, which 8 devices cannot share equally: choose a multiple of 8"),
        ("data.batch_size", 32, "batch_size is 32, split 'train' of rooms has 27 images"),
        ("data.name", "streets", "'streets' is not prepared: run `dsnet prepare folder --name=streets"),
        ("data.train_split", "training", "no split 'training'"),
        ("data.eval_split", "test", "'test' of rooms has no labels to score"),
        ("model.backbone", "resnet19", "config.model.backbone is 'resnet19'"),
        ("training.remat", "block", "config.training.remat is 'block'"),
        ("training.accumulation_steps", 2, "cannot share equally in 2 parts each"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    small_config, tmp_path, monkeypatch, field, value, message
):
    small_config.update_from_flattened_dict({field: value})
    small_config.data.cache_decoded_gb = 0.01  # Which takes long, and comes last.
    monkeypatch.setattr(loop, "decoded_once", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InputError) as raised:
        train(small_config, tmp_path / "run")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused_even_before_the_first_checkpoint(small_config, tmp_path):
    claim_workdir(tmp_path, small_config, SHAPES)
    with pytest.raises(InputError, match="other classes or colours than rooms has now"):
        train(small_config, tmp_path)


def test_other_processes_have_to_have_the_folder_the_fields_and_the_steps_of_the_main_one(
    rooms, small_config, tmp_path, monkeypatch
):
    split = open_split(small_config.data.root, "rooms", "train")
    with monkeypatch.context() as patch:
        patch.setattr(loop.processes, "is_main_process", lambda: False)
        with pytest.raises(InputError, match="is not what process 0 writes into: give a folder that all share"):
            loop._claim(small_config, tmp_path / "elsewhere", [split])
        (tmp_path / "run").mkdir()
        claim_workdir(tmp_path / "run", small_config, split.spec)
        small_config.data.worker_count = 1  # Every process may have its own.
        loop._claim(small_config, tmp_path / "run", [split])
        small_config.training.checkpoint_every_steps = 7
        with pytest.raises(InputError, match=r"other fields than process 0 was given: training\.ch.*: \d+ -> 7"):
            loop._claim(small_config, tmp_path / "run", [split])
    sums = iter([0, 0, 1])  # What others' values add to that of this process: of both splits, then of the steps.
    monkeypatch.setattr(loop.processes, "sum_over_processes", lambda own: own + next(sums))
    with pytest.raises(InputError, match=r"checkpoints is not the same .*, here it has steps \[\], scored"):
        train(small_config, tmp_path / "new")


def test_a_step_without_memory_is_told_with_what_helps(small_config, tmp_path, monkeypatch):
    def no_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.43GiB.")

    monkeypatch.setattr(loop, "lower_step", no_memory)
    with pytest.raises(InputError, match=r"out of memory: .* 12\.43GiB.*: what helps is .*config\.data\.batch_size"):
        train(small_config, tmp_path)


def test_an_evaluation_that_memory_does_not_suffice_for_is_told_its_own_fields(small_config, tmp_path, monkeypatch):
    def evaluate(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.43GiB.")

    monkeypatch.setattr(loop, "evaluate", evaluate)
    small_config.evaluation.batch_size = 16
    with pytest.raises(InputError, match=r"12\.43GiB: what helps .*config\.evaluation\.batch_size, 16 now") as raised:
        train(small_config, tmp_path)
    assert "data.batch_size" not in str(raised.value)
