"""The experiments in configs/: every command that a docstring holds is read, and its network built."""

import argparse
import importlib
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from dsnet_jax.cli import _parser
from dsnet_jax.config import differences, load_config
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.submissions import FORMATS
from dsnet_jax.experiment import build_model
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.parallel import global_mesh
from dsnet_jax.variants import VARIANTS
from dsnet_jax.weights.torchvision import RELEASES

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))


@cache
def commands(file: Path) -> list[list[str]]:
    """The words of every `dsnet` command in a file's docstring, without comments."""
    text = runpy.run_path(str(file))["__doc__"].replace("\\\n", " ")
    return [re.sub(r"\s#.*", "", line).split()[1:] for line in text.splitlines() if line.startswith("    dsnet ")]


@cache
def parsed(file: Path) -> list[tuple[argparse.Namespace, ConfigDict | None]]:
    """The same as `dsnet` reads them: flags, and where it trains the config."""
    found = []
    for words in commands(file):
        options, fields = _parser().parse_known_args(words)
        trains = options.command == "train"
        assert trains or not fields, f"{fields} mean nothing to dsnet {options.command}"
        fields = [field.replace("--config=configs", f"--config={FOLDER}") for field in fields]
        found.append((options, load_config(fields) if trains else None))
    return found


def trained(file: Path) -> dict[str, ConfigDict]:
    """Every experiment that a file's docstring trains, by its workdir."""
    runs = [(options.workdir, config) for options, config in parsed(file) if options.command == "train"]
    assert len(dict(runs)) == len(runs), "a workdir twice"
    return dict(runs)


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
def test_other_commands_are_of_what_is_trained(file):
    experiments = trained(file)
    data_sets = {config.data.name for config in experiments.values()}
    for options, _ in parsed(file):
        if options.command == "evaluate":
            assert options.workdir in experiments and options.split in (None, "val")
        elif options.command == "predict":
            form = FORMATS[experiments[options.workdir].data.name]
            assert options.split == "test" and Path(options.submission).suffix == form.archive
        elif options.command == "prepare":
            assert options.data_set in data_sets
        else:
            assert options.command in ("train", "port")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_an_experiment_starts_from_is_made_before_it(file):
    """And where that is of others, it is torchvision's ResNet of the config; only the quick ones start from noise."""
    made = {"": "nothing"} if file.stem in ("camvid_comparison", "camvid_dsnet_r18", "shapes_quickstart") else {}
    for options, config in parsed(file):
        if options.command == "port":
            made[options.workdir] = RELEASES[re.search(r"-([0-9a-f]{8})\.pth", options.file)[1]]
        elif options.command == "train":
            release = f"torchvision's ResNet-{config.model.backbone.removeprefix('resnet')}, IMAGENET1K_V1"
            assert made[config.init_from] in ("nothing", "a run", release) and config.model.stem == "v1"
            made[options.workdir] = "a run"


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
    for split in ("train", "trainval"):
        tuned = experiments[f"runs/voc2012_dsnet_r101-finetune_{split}-seed0"]
        first = experiments[tuned.init_from]
        assert first.init_from == "weights/resnet101" and first.data.train_split == "train_aug"
        assert set(differences(first, tuned)) == {"init_from", "data.train_split", "optimizer.base_lr"}
        assert tuned.data.train_split == split
        assert tuned.optimizer.base_lr == pytest.approx(first.optimizer.base_lr / 10)


@pytest.mark.parametrize(("stage", "field"), [("baseline", "deep_supervision"), ("deeplabv3plus", "name")])
def test_what_table_2_compares_differs_from_dsnet_in_one_field(stage, field):
    experiments = trained(FOLDER / "voc2012_dsnet_r101.py")
    dsnet, other = (experiments[f"runs/voc2012_dsnet_r101{name}-seed0"] for name in ("", f"-{stage}"))
    assert set(differences(dsnet, other)) == {f"model.{field}"}


@pytest.mark.parametrize(
    ("file", "crop", "batch", "epochs", "base_lr", "supervised"),
    [
        ("voc2012_dsnet_r101.py", 512, 32, 80, 0.01, True),
        ("voc2012_dsnet_r101.py:baseline", 512, 32, 80, 0.01, False),
        ("voc2012_dsnet_r101.py:deeplabv3plus", 512, 32, 80, 0.01, True),
        ("voc2012_dsnet_r50.py", 512, 32, 80, 0.01, False),
        ("voc2012_comparison.py", 512, 32, 80, 0.01, False),
        ("ade20k_dsnet_r101.py", 576, 24, 150, 0.01, True),
        ("pascal_context_dsnet_r101.py", 512, 32, 80, 0.005, True),
    ],
)
def test_protocols_are_the_papers(file, crop, batch, epochs, base_lr, supervised):
    config = load_config([f"--config={FOLDER / file}"])
    assert config.data.crop_size_hw == (crop, crop) and config.data.batch_size == batch
    assert config.training.epochs == epochs and config.optimizer.base_lr == base_lr
    optimizer = config.optimizer
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.poly_power) == (0.9, 1e-4, 0.9)
    # Not to the letter: docs/architecture.md, "Where we deviate".
    assert (optimizer.backbone_lr_multiplier, optimizer.head_lr_multiplier) == (0.1, 1.0)
    assert optimizer.offset_lr_multiplier == 1 and optimizer.decay_norm_and_bias
    model = config.model
    assert (model.deep_supervision, model.deep_supervision_weight) == (supervised, 0.4)
    assert (model.dropout, model.aspp_dropout, model.output_stride) == (0.1, 0.0, 16)
    assert config.data.scale_range == (0.5, 2.0) and config.data.flip_probability == 0.5


@pytest.mark.parametrize("file", ["camvid_comparison", "voc2012_dsnet_r101", "ade20k_dsnet_r101"])
def test_an_argument_that_there_is_not_is_refused_with_those_that_are(file):
    with pytest.raises(InputError, match="there is no 'nothing' here: one of ") as raised:
        load_config([f"--config={FOLDER / file}.py:nothing"])
    assert raised.value.exit_code == 2


@pytest.fixture
def script(monkeypatch):
    """Called with a name, imports that file of scripts/."""
    monkeypatch.syspath_prepend(FOLDER.parent / "scripts")
    imported = []

    def load(name):
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in imported:
        sys.modules.pop(name)


@pytest.fixture
def tables_runs(script):
    return script("tables_runs")


def test_the_tables_find_what_a_docstring_trains_and_scores(tables_runs):
    for run in tables_runs.planned("cpu", seeds=1) + tables_runs.planned("paper", seeds=1):
        file, workdir = FOLDER / run.config.partition(":")[0], f"runs/{run.name}"
        assert trained(file)[workdir] == run.load(), run.name
        done = {(options.workdir, options.protocol) for options, _ in parsed(file) if "protocol" in options}
        if f"`dsnet evaluate --workdir=runs/{file.stem}-NAME-seed0`" in runpy.run_path(str(file))["__doc__"]:
            done.add((workdir, "ss"))  # "For each."
        assert {(workdir, protocol) for protocol in run.protocols} <= done, run.name


@pytest.fixture
def compile_configs(script):
    return script("compile_configs")


def test_every_experiment_that_is_trained_is_compiled(compile_configs):
    assert list(compile_configs.experiments("").values()) == [
        config for file in FILES for config in trained(file).values()
    ]
    assert len(compile_configs.experiments("pascal_context")) == len(trained(FOLDER / "pascal_context_dsnet_r101.py"))


def test_a_program_is_compiled_once_whatever_its_rates_and_anew_for_other_fields(
    compile_configs, monkeypatch, four_convolutions
):
    monkeypatch.setitem(RESNETS, "resnet18", four_convolutions)
    base = ["--config.model.name=fcn", "--config.model.width=8", "--config.data.crop_size_hw=(32,32)"]

    def key(*fields):
        config = load_config([f"--config={FOLDER / 'shapes_quickstart.py'}", *base, *fields])
        return compile_configs.key_of(compile_configs.training_step(config, global_mesh()))

    first = key()
    assert key("--config.optimizer.base_lr=0.3", "--config.training.epochs=7") == first
    assert key("--config.training.ema_decay=0.5") != first
