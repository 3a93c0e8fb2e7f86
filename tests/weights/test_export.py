"""Exported networks, as other programs use them: in a process that cannot import dsnet_jax."""

import json
import subprocess
import sys
import textwrap
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import safetensors

import dsnet_jax
from dsnet_jax.cli import main
from dsnet_jax.cli_export import FORMATS
from dsnet_jax.config import default_config
from dsnet_jax.data.specs import SHAPES
from dsnet_jax.data.transforms import scaled_size_hw
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.weights.export import export
from dsnet_jax.weights.program import _on_canvas

WITHOUT_US = """
    import io, json, sys, zipfile
    import numpy as np

    sys.modules["dsnet_jax"] = None  # Whoever imports it fails.
    folder = sys.argv[1]
    images = np.load(f"{folder}/images.npz")

    import jax
    with zipfile.ZipFile(f"{folder}/any.stablehlo") as file:
        program = jax.export.deserialize(bytearray(file.read("program.bin")))
        description = json.loads(file.read("description.json"))
    assert program.platforms == ("cpu", "cuda", "tpu")
    found = {f"stablehlo_{name}": np.asarray(program.call(images[name])) for name in images}

    import onnxruntime
    for name in images:
        session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
        found[f"onnx_{name}"] = session.run(["labels"], {"image": images[name]})[0]
        same = session.get_modelmeta().custom_metadata_map
        assert json.loads(same["description"])["class_names"] == description["class_names"]
    np.savez(f"{folder}/found.npz", **found)
    print(json.dumps(description))
"""


def smooth_images(size_hw, seed):
    """Random images of blocks, so that labels have areas: uint8 [2, H, W, 3]."""
    blocks = np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), np.uint8)
    return blocks.repeat(16, axis=1).repeat(16, axis=2)[:, : size_hw[0], : size_hw[1]]


# Halved, a side is even: of others OpenCV computes in fixed point, and a pixel may differ by one step.
@pytest.mark.parametrize(
    ("image_scale", "flags", "sizes_hw"), [(1.0, (), ((64, 96), (45, 77))), (0.5, ("--fold-batch-norm",), ((90, 124),))]
)
def test_exported_programs_give_our_labels_in_a_process_without_us(
    image_scale, flags, sizes_hw, small_config, random_run, tmp_path, capsys
):
    if image_scale != 1:
        file = random_run / "config.json"
        config = json.loads(file.read_text())
        config["data"]["image_scale"] = image_scale
        file.write_text(json.dumps(config))
    images = {f"{h}x{w}": smooth_images((h, w), seed=h) for h, w in sizes_hw}
    np.savez(tmp_path / "images.npz", **images)
    command = ["export", f"--workdir={random_run}", *flags]
    assert main([*command, "--format=stablehlo", f"--output={tmp_path}/any.stablehlo"]) == 0
    for height, width in sizes_hw:
        size = ["--size-hw", str(height), str(width), f"--output={tmp_path}/{height}x{width}.onnx"]
        assert main([*command, "--format=onnx", *size]) == 0
    assert "step 7" in capsys.readouterr().out

    arguments = [sys.executable, "-c", textwrap.dedent(WITHOUT_US), str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    network = dsnet_jax.load(random_run)
    with np.load(tmp_path / "found.npz") as found:
        for name, ours in images.items():
            expected = np.stack(network.predict(ours))
            assert len(np.unique(expected)) == 3
            for kind in ("stablehlo", "onnx"):
                assert found[f"{kind}_{name}"].dtype == np.uint8
                assert np.mean(found[f"{kind}_{name}"] == expected) > 0.9999, (kind, name)

    description = json.loads(result.stdout)
    assert description["class_names"] == ["wall", "floor", "lamp"]
    assert description["palette"] == [[200, 60, 60], [60, 200, 60], [60, 60, 200]]
    assert description["preprocessing"]["image_scale"] == image_scale
    assert description["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert description["batch_norm_folded"] == bool(flags)
    assert description["input"]["shape"] == [None, None, None, 3]
    assert (description["input"]["least_side"], description["input"]["greatest_side"]) == (32, 65535)


@pytest.fixture
def described(small_config, four_convolutions, random_variables, tmp_path, monkeypatch):
    """Called with a format and a size, gives what the file of a small FCN says of itself."""
    monkeypatch.setitem(RESNETS, "resnet18", four_convolutions)
    small_config.model.name = "fcn"
    network = build_model(small_config.model, SHAPES.num_classes)
    variables = random_variables(network, np.zeros((1, 64, 64, 3), np.float32), train=False)
    stem = {"conv": {"kernel": np.zeros((7, 7, 3, 4), np.float32)}}

    def export_and_read(file_format, size_hw=None):
        if file_format == "torchvision":
            variables["params"]["backbone"], variables["batch_stats"]["backbone"] = {"stem": stem}, {}
        export(small_config, SHAPES, variables, 7, tmp_path / "x", file_format, size_hw)
        if file_format == "stablehlo":
            with zipfile.ZipFile(tmp_path / "x") as file:
                return json.loads(file.read("description.json"))
        if file_format == "onnx":
            model = onnx.load(tmp_path / "x")
            return json.loads(next(entry.value for entry in model.metadata_props if entry.key == "description"))
        with safetensors.safe_open(tmp_path / "x", "np") as file:
            return json.loads(file.metadata()["description"])

    return export_and_read


@pytest.mark.parametrize("file_format", FORMATS)
def test_only_of_a_program_inputs_and_outputs_are_described(file_format, described):
    size_hw = (20, 20) if file_format in ("stablehlo", "onnx") else None
    description = described(file_format, size_hw)
    assert description["preprocessing_is_inside"] == bool(size_hw)
    assert ("input" in description, "output" in description) == (bool(size_hw), bool(size_hw))
    if size_hw:
        assert description["input"]["shape"] == [None, 20, 20, 3]
        assert not description["input"].keys() & {"least_side", "greatest_side"}
    assert description["preprocessing"]["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(("side", "scaled"), [(45, 31), (645, 451)])
def test_a_program_of_any_size_scales_images_to_the_size_that_the_host_does(side, scaled):
    """By 0.7, which float32 rounds up: 45 * 0.7 is less than 31.5, and 645 * 0.7 less than 451.5."""
    assert scaled_size_hw((side, 64), 0.7) == (scaled, 45)
    height = jax.export.symbolic_shape("h", constraints=["h >= 32", "h <= 65535"])[0]

    def sizes(images):
        return jnp.stack(_on_canvas(images, 0.7)[1])

    program = jax.export.export(jax.jit(sizes))(jax.ShapeDtypeStruct((1, height, 64, 3), jnp.uint8))
    assert program.call(np.zeros((1, side, 64, 3), np.uint8)).tolist() == [scaled, 45]


def test_what_cannot_be_written_is_told_in_one_line(small_config, random_run, tmp_path, capsys):
    output = tmp_path / "no_folder" / "x"
    assert main(["export", f"--workdir={random_run}", f"--output={output}", "--format=safetensors"]) == 1
    assert f"{output} cannot be written (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", r"^\. cannot be written \(Is a directory\): give another --output$"),
        ("models", r"^models cannot be written \(Is a directory\)"),
        ("none/x", r"^none/x cannot be written \(No such file or directory\)"),
        ("file/x", r"^file cannot be written \(Not a directory\)"),
        ("gs://bucket/x", r"^gs://bucket cannot be reached .*pip install -e '\.\[gcs\]'"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_computed(output, message, tmp_path, monkeypatch):
    def unwanted(*arguments):
        raise AssertionError("computed")

    monkeypatch.setitem(sys.modules, "gcsfs", None)  # An import raises.
    monkeypatch.setattr("dsnet_jax.weights.export.describe", unwanted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=message):
        export(default_config(), SHAPES, {}, 0, output, "safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "models"]


def test_a_program_of_any_size_samples_without_bands_whatever_the_run_did(random_run, tmp_path):
    file = random_run / "config.json"
    config = json.loads(file.read_text())
    config["model"]["sampling_formulation"] = "hat"
    file.write_text(json.dumps(config))
    command = ["export", f"--workdir={random_run}", "--format=stablehlo", f"--output={tmp_path}/any.stablehlo"]
    assert main(command) == 0


def test_a_network_of_any_size_cannot_have_a_non_local_block(random_run, tmp_path):
    config = default_config()
    config.model.sampling = "nonlocal"
    with pytest.raises(InputError, match="a non-local block works in bands"):
        export(config, SHAPES, {}, 0, tmp_path / "x", "stablehlo")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onnx"], "ONNX files have one size: give --size-hw"),
        (["--format=safetensors", "--size-hw", "32", "32"], "safetensors has weights alone"),
        (["--format=onnx", "--size-hw", "0", "32"], "'0' is not a whole number of 1 or more"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, small_config, random_run, tmp_path, capsys):
    assert main(["export", f"--workdir={random_run}", f"--output={tmp_path}/x", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
