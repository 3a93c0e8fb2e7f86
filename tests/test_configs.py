"""The experiments in configs/: every command that a docstring holds is read, and its network built."""

import re
import runpy
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from dsnet_jax.config import differences, load_config
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.variants import VARIANTS

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))


@cache
def commands(file: Path) -> list[list[str]]:
    """The words of every `dsnet` command in a file's docstring, without comments."""
    text = runpy.run_path(str(file))["__doc__"].replace("\\\n", " ")
    return [re.sub(r"\s#.*", "", line).split()[1:] for line in text.splitlines() if line.startswith("    dsnet ")]


def read(words: list[str]) -> ConfigDict:
    return load_config([word.replace("--config=configs", f"--config={FOLDER}") for word in words])


def trained(file: Path) -> dict[str, ConfigDict]:
    """Every experiment that a file's docstring trains, by its workdir."""
    found = {}
    for name, *words in commands(file):
        if name == "train":
            (workdir,) = (word.removeprefix("--workdir=") for word in words if word.startswith("--workdir="))
            assert workdir not in found, f"{workdir} twice"
            found[workdir] = read([word for word in words if word.startswith("--config")])
    return found


def built(config: ConfigDict):
    """Shapes of the output of its network for images of 64 x 96."""
    network = build_model(config.model, num_classes=5)
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    output, _ = jax.eval_shape(lambda images: network.init_with_output(keys, images, train=True), images)
    return output


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_that_trains_is_read_and_its_network_built(file, monkeypatch, four_convolutions):
    for name in RESNETS:
        monkeypatch.setitem(RESNETS, name, four_convolutions)
    experiments = trained(file)
    assert experiments
    for config in {str(config.model): config for config in experiments.values()}.values():
        output = built(config)
        assert output.logits.dtype == jnp.float32
        assert (output.auxiliary_logits is not None) == config.model.deep_supervision


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_without_argument_every_file_builds_its_real_network(file):
    config = load_config([f"--config={file}"])
    assert config in trained(file).values()
    assert built(config).logits.shape == (2, 8, 12, 5)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_other_commands_are_of_workdirs_that_are_trained(file):
    for name, *words in commands(file):
        if name in ("evaluate", "predict"):
            (workdir,) = (word.removeprefix("--workdir=") for word in words if word.startswith("--workdir="))
            assert workdir in trained(file)
        else:
            assert name in ("train", "prepare")


@pytest.mark.parametrize(
    ("comparison", "dsnet", "left_out"),
    [
        ("voc2012_comparison", "voc2012_dsnet_r50", set()),
        # A scale's box does not go with a working resolution, and the quick protocol has no row for dropout.
        ("camvid_comparison", "camvid_dsnet_r18", {"mmsegmentation_scale", "long_edge_scale", "torchvision_dropout"}),
    ],
)
def test_every_row_of_a_comparison_differs_from_dsnet_by_what_its_variant_says(comparison, dsnet, left_out):
    base, file = load_config([f"--config={FOLDER / dsnet}.py"]), FOLDER / f"{comparison}.py"
    names = [word.rpartition(":")[2] for _, *words in commands(file) for word in words if word.startswith("--config=")]
    experiments = list(trained(file).values())
    assert len(names) == len(experiments) and set(names) == VARIANTS.keys() - left_out
    for name, config in zip(names, experiments, strict=True):
        changed = {field for field, value in VARIANTS[name].items() if base[field] != value}
        assert set(differences(base, config)) == changed, name


def test_fine_tuning_starts_from_the_run_of_the_same_file_at_a_tenth_of_its_rate():
    experiments = trained(FOLDER / "voc2012_dsnet_r101.py")
    for split, workdir in (("train", "finetune_train"), ("trainval", "trainval")):
        tuned = experiments[f"runs/voc2012_dsnet_r101/{workdir}"]
        first = experiments[tuned.init_from]
        assert first.init_from == "" and first.data.train_split == "train_aug"
        assert set(differences(first, tuned)) == {"init_from", "data.train_split", "optimizer.base_lr"}
        assert tuned.data.train_split == split
        assert tuned.optimizer.base_lr == pytest.approx(first.optimizer.base_lr / 10)


@pytest.mark.parametrize(
    ("file", "crop", "batch", "epochs", "base_lr"),
    [
        ("voc2012_dsnet_r101", 512, 32, 80, 0.01),
        ("voc2012_dsnet_r50", 512, 32, 80, 0.01),
        ("ade20k_dsnet_r101", 576, 24, 150, 0.01),
        ("pascal_context_dsnet_r101", 512, 32, 80, 0.005),
    ],
)
def test_protocols_are_the_papers(file, crop, batch, epochs, base_lr):
    config = load_config([f"--config={FOLDER / file}.py"])
    assert config.data.crop_size_hw == (crop, crop) and config.data.batch_size == batch
    assert config.training.epochs == epochs and config.optimizer.base_lr == base_lr
    optimizer = config.optimizer
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.poly_power) == (0.9, 1e-4, 0.9)
    assert config.data.scale_range == (0.5, 2.0) and config.model.output_stride == 16


@pytest.mark.parametrize("file", ["camvid_comparison", "voc2012_dsnet_r101", "ade20k_dsnet_r101"])
def test_an_argument_that_there_is_not_is_refused_with_those_that_are(file):
    with pytest.raises(InputError, match="there is no 'nothing' here: one of ") as raised:
        load_config([f"--config={FOLDER / file}.py:nothing"])
    assert raised.value.exit_code == 2
