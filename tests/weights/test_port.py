"""`dsnet port`: the folder that it makes, and runs that start from it."""

import json
import sys
import tarfile
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsnet_jax import cli
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.data.records import open_split
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.models.resnet import RESNETS, BasicBlock, ResNet
from dsnet_jax.training.init_from import check_there, in_short, init_from
from dsnet_jax.training.loop import train
from dsnet_jax.weights import port as port_module


@pytest.fixture
def config(small_config, monkeypatch):
    """`small_config` with a ResNet that torchvision could have: one basic block a stage."""
    monkeypatch.setitem(RESNETS, "resnet18", partial(ResNet, (1, 1, 1, 1), BasicBlock))
    return small_config


@pytest.fixture
def file(config, make_torch_fixtures, tmp_path):
    """A .safetensors of that ResNet by torchvision's names, with ImageNet's classifier."""
    arrays = {"fc.weight": np.zeros((1000, 512), np.float32), "fc.bias": np.zeros(1000, np.float32)}

    def give(name, shape):
        arrays[name] = make_torch_fixtures.resnet_parameter(name, shape)

    give("conv1.weight", (64, 3, 7, 7))
    norms = {"bn1": 64}
    for layer, (inputs, width) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
        give(f"layer{layer}.0.conv1.weight", (width, inputs, 3, 3))
        give(f"layer{layer}.0.conv2.weight", (width, width, 3, 3))
        norms |= {f"layer{layer}.0.bn1": width, f"layer{layer}.0.bn2": width}
        if inputs != width:
            give(f"layer{layer}.0.downsample.0.weight", (width, inputs, 1, 1))
            norms[f"layer{layer}.0.downsample.1"] = width
    for name, width in norms.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            give(f"{name}.{leaf}", (width,))
        arrays[f"{name}.num_batches_tracked"] = np.array(7)
    save_file(arrays, tmp_path / "resnet.safetensors")
    return tmp_path / "resnet.safetensors"


@pytest.fixture
def ported(file, tmp_path, capsys):
    """The folder that `dsnet port` makes of it."""
    assert cli.main(["port", str(file), f"--workdir={tmp_path / 'ported'}"]) == 0
    capsys.readouterr()
    return tmp_path / "ported"


@pytest.fixture
def spec(rooms):
    return open_split(str(rooms), "rooms", "val").spec


def fresh_variables(config, num_classes):
    return jax.jit(lambda: initial_variables(build_model(config.model, num_classes), 5))()


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_command_tells_what_it_took_and_left_and_how_to_go_on(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "ported"
    checksum = port_module.sha256_of(file)
    monkeypatch.setitem(port_module.RELEASES, checksum[:8], "somebody's ResNet")
    assert cli.main(["port", str(file), f"--workdir={out}"]) == 0
    printed = capsys.readouterr().out
    assert f"somebody's ResNet (sha256 {checksum})" in printed
    assert "resnet18, stem v1: 60 arrays, 4.9 M parameters" in printed
    assert "left out: fc (2), num_batches_tracked (12)" in printed
    assert f"--config.init_from={out} --config.model.backbone=resnet18" in printed
    about = json.loads((out / "port.json").read_text())
    assert about["source"] == "resnet.safetensors" and about["sha256"] == checksum and about["head"] is None


def test_of_a_network_with_another_head_the_backbone_is_taken_on_demand(file, tmp_path, capsys):
    arrays = {f"backbone.{name}": array for name, array in load_file(file).items()}
    arrays["classifier.0.weight"] = np.zeros((4, 4, 3, 3), np.float32)
    save_file(arrays, tmp_path / "x.safetensors")
    command = ["port", str(tmp_path / "x.safetensors"), f"--workdir={tmp_path / 'out'}"]
    assert cli.main(command) == 1 and "resnet18 with stem v1 and head fcn, but" in capsys.readouterr().err
    assert cli.main([*command, "--backbone-only"]) == 0
    assert "left out: classifier (1), fc (2), num_batches_tracked (12)" in capsys.readouterr().out


def test_a_folder_that_holds_something_is_left_alone(file, ported, capsys):
    before = sorted(ported.rglob("*"))
    assert cli.main(["port", str(file), f"--workdir={ported}"]) == 1
    assert capsys.readouterr().err == f"dsnet: {ported} holds something: give a new --workdir\n"
    assert sorted(ported.rglob("*")) == before


def test_a_file_in_the_place_of_the_folder_is_told(file, capsys):
    assert cli.main(["port", str(file), f"--workdir={file}"]) == 1
    assert capsys.readouterr().err == f"dsnet: {file} is a file: give a new --workdir\n"


def test_storage_whose_package_is_missing_is_told(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # An import raises.
    assert cli.main(["port", str(file), "--workdir=gs://bucket/w"]) == 1
    assert capsys.readouterr().err.startswith("dsnet: gs://bucket/w cannot be reached (")
    with pytest.raises(InputError, match=r"^gs://bucket/w cannot be reached .* or give another config\.init_from$"):
        check_there("gs://bucket/w")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_could_not_be_written_can_be_asked_for_again(error, file, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    command = ["port", str(file), f"--workdir={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(port_module, "write_text", fail)
        if isinstance(error, OSError):
            assert cli.main(command) == 1
            assert "out cannot be written (No space left on device)" in capsys.readouterr().err
        else:
            with pytest.raises(KeyboardInterrupt):
                cli.main(command)
    assert not (tmp_path / "out").exists()
    assert cli.main(command) == 0


def test_what_another_process_has_just_written_is_left_alone(file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def read_arrays(file):
        out.mkdir()
        (out / "port.json").touch()
        return load_file(file)

    monkeypatch.setattr(port_module, "read_arrays", read_arrays)
    assert cli.main(["port", str(file), f"--workdir={out}"]) == 1
    assert "holds something" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [".lock", "port.json"]


def test_a_release_in_the_first_format_is_refused_and_the_later_file_is_named(tmp_path, monkeypatch, capsys):
    file = tmp_path / "resnet50.pth"
    with tarfile.open(file, "w") as tar:
        tar.addfile(tarfile.TarInfo("sys_info"))
    monkeypatch.setattr(port_module, "sha256_of", lambda _: "19c8e357")
    assert cli.main(["port", str(file), f"--workdir={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert "ResNet-50, IMAGENET1K_V1, as released before 2021, is in PyTorch's first format, a tar file" in error
    assert "download resnet50-0676ba61.pth" in error and error.count("\n") == 1


def test_a_file_that_cannot_be_used_leaves_no_folder(tmp_path, capsys):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    assert cli.main(["port", str(tmp_path / "x.safetensors"), f"--workdir={tmp_path / 'out'}"]) == 1
    assert "holds no ResNet" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_ported_backbone_is_taken_and_all_else_is_new(ported, config, spec, make_torch_fixtures):
    fresh = fresh_variables(config, 3)
    variables, new, unused = init_from(str(ported), fresh, spec)
    taken, started = leaves(variables), leaves(fresh)
    assert new and unused == [] and not any("/backbone/" in name for name in new)
    assert all(np.array_equal(taken[name], started[name]) for name in new)
    expected = make_torch_fixtures.resnet_parameter("layer2.0.conv1.weight", (128, 64, 3, 3))
    kernel = taken["params/backbone/stage3_block0/conv1/kernel"]
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))
    expected = make_torch_fixtures.resnet_parameter("layer3.0.downsample.1.running_var", (256,))
    np.testing.assert_array_equal(taken["batch_stats/backbone/stage4_block0/downsample_norm/var"], expected)


@pytest.mark.parametrize(
    ("fields", "message"), [({"stem": "v1c"}, "none there"), ({"backbone": "resnet34"}, "none there")]
)
def test_a_ported_backbone_of_another_network_is_refused(fields, message, ported, config, spec):
    config.model.update(fields)
    fresh = jax.eval_shape(lambda: initial_variables(build_model(config.model, 3)))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), fresh)
    with pytest.raises(InputError, match=r"choose config.model.backbone and .stem as they are there") as raised:
        init_from(str(ported), fresh, spec)
    assert message in str(raised.value) and len(str(raised.value).splitlines()) <= 11


def test_a_run_starts_from_a_ported_backbone(small_config, random_variables, tmp_path, capsys):
    """A folder as of a port, with a backbone that no file has; the programs are those of test_init_from.py."""
    ported = tmp_path / "ported"
    backbone = random_variables(RESNETS["resnet18"](), np.zeros((1, 32, 32, 3), np.float32), train=False, seed=3)
    checkpoints = Checkpoints(ported)
    checkpoints.save(0, {"backbone": jax.device_put(backbone)}, {})
    checkpoints.close()
    (ported / "port.json").write_text(json.dumps({"backbone": "resnet18", "stem": "v1", "head": None}))
    small_config.init_from = str(ported)
    small_config.optimizer.base_lr = 0.0
    small_config.training.update(epochs=1, ema_decay=0.5)
    train(small_config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"starts from the weights of {ported}; new are aspp (" in printed and "not used" not in printed
    trained = leaves(load_trained(tmp_path / "run").variables["params"]["backbone"])
    given = leaves(backbone["params"])
    assert trained.keys() == given.keys()
    assert all(np.allclose(trained[name], array, rtol=1e-6) for name, array in given.items())


def test_what_another_network_has_besides_is_not_used_and_said(random_run, small_config, spec):
    fresh = fresh_variables(small_config, 3)
    other = {kind: {name: part for name, part in tree.items() if name != "aspp"} for kind, tree in fresh.items()}
    _, new, unused = init_from(str(random_run), other, spec)
    assert new == [] and unused and all("/aspp/" in name for name in unused)
    assert in_short(unused) == f"aspp ({len(unused)} arrays)"
    assert in_short([]) == "none" and in_short(["params/a/b"]) == "params/a/b"


def test_a_damaged_folder_is_told(ported, config, spec):
    for data in (ported / "checkpoints" / "0" / "backbone").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        init_from(str(ported), {}, spec)


@pytest.mark.parametrize("kept", [0, 30])
def test_a_note_that_is_cut_short_is_told(kept, ported, spec):
    note = ported / "port.json"
    note.write_bytes(note.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"port\.json: damaged: port the weights again"):
        init_from(str(ported), {}, spec)


def test_a_ported_backbone_is_no_run(ported):
    with pytest.raises(InputError, match="holds no run"):
        load_trained(ported)
    assert Checkpoints(ported, read_only=True).steps() == [0]
