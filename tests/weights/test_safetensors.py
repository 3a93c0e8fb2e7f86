import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dsnet_jax.config import default_config, to_json
from dsnet_jax.data.specs import SHAPES
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.models.resnet import RESNETS, BasicBlock, ResNet
from dsnet_jax.weights.safetensors import backbone_to_safetensors, read_safetensors, to_safetensors
from dsnet_jax.weights.torchvision import BLOCKS, STEMS, convert


@pytest.fixture
def trained(monkeypatch):
    """Config and variables of a small DSNet, as of a run: the second head is among them."""
    monkeypatch.setitem(RESNETS, "resnet18", lambda **options: ResNet((1, 1, 1, 1), BasicBlock, **options))
    config = default_config()
    config.model.update(backbone="resnet18", width=8, atrous_rates=(2, 4))
    shapes = jax.eval_shape(lambda: initial_variables(build_model(config.model, SHAPES.num_classes)))
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_what_is_written_is_read_back_bit_for_bit(trained, tmp_path):
    config, variables = trained
    kernel = variables["params"]["backbone"]["stem"]["conv"]["kernel"]
    kernel.flat[:4] = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)  # NaN, -inf, -0 ...
    (tmp_path / "a.safetensors").write_bytes(to_safetensors(config, SHAPES, variables, 7, {}))
    found_config, spec, found, step = read_safetensors(tmp_path / "a.safetensors")
    assert (to_json(found_config), spec, step) == (to_json(config), SHAPES, 7)
    assert_same_bits(found, variables)


def test_others_read_it_by_its_names_and_metadata(trained, tmp_path):
    config, variables = trained
    (tmp_path / "a.safetensors").write_bytes(to_safetensors(config, SHAPES, variables, 7, {"class_names": ["x"]}))
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["description"]) == {"class_names": ["x"]}
        assert json.loads(file.metadata()["config"])["model"]["width"] == 8
        kernel = file.get_tensor("params/cgds/kernel")
    np.testing.assert_array_equal(kernel, variables["params"]["cgds"]["kernel"])


def test_a_backbone_of_torchvision_s_names_is_what_the_port_takes_back(trained):
    _, variables = trained
    arrays = safetensors.numpy.load(backbone_to_safetensors(variables, {}))
    assert arrays["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    backbone = {name: tree["backbone"] for name, tree in variables.items()}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), backbone)
    absolute = {name: np.abs(array) if "var" in name else array for name, array in arrays.items()}
    back = convert(absolute, shapes, (*STEMS["torchvision, timm"], *BLOCKS))
    assert back.faults == []
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone):
        if path[-1].key == "var":
            leaf[:] = np.abs(leaf)
    assert_same_bits(back.variables, backbone)


def test_a_stem_that_torchvision_does_not_have_is_refused(trained):
    _, variables = trained
    variables["params"]["backbone"]["stem1"] = variables["params"]["backbone"].pop("stem")
    with pytest.raises(InputError, match="backbone/stem1/conv: torchvision's ResNet has no such part"):
        backbone_to_safetensors(variables, {})


def test_files_that_are_not_ours_are_refused_in_one_line(trained, tmp_path):
    config, variables = trained
    file = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_safetensors(file)
    data = to_safetensors(config, SHAPES, variables, 7, {})
    file.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"not a \.safetensors file, or damaged"):
        read_safetensors(file)
    file.write_bytes(safetensors.numpy.save({"x": np.ones(1)}))
    with pytest.raises(InputError, match=r"its metadata does not say 'dsnet_jax/1'.* to `dsnet port`"):
        read_safetensors(file)
    file.write_bytes(safetensors.numpy.save({"x": np.ones(1, ml_dtypes.bfloat16)}))  # Which its reader may not know.
    with pytest.raises(InputError, match="its metadata does not say 'dsnet_jax/1'"):
        read_safetensors(file)
    file.write_bytes(data.replace(b'"step":"7"', b'"step":"x"'))
    with pytest.raises(InputError, match="its metadata is damaged"):
        read_safetensors(file)


def test_all_arrays_that_are_not_those_of_the_config_are_told_the_first_ten_by_name(trained, tmp_path):
    config, variables = trained
    file = tmp_path / "a.safetensors"
    cgds = variables["params"]["cgds"]
    cgds["more"] = cgds["kernel"].astype(np.float16)
    del cgds["kernel"]
    file.write_bytes(to_safetensors(config, SHAPES, variables, 7, {}))
    with pytest.raises(InputError, match="2 arrays are not those of its config") as raised:
        read_safetensors(file)
    kernel, more = str(raised.value).splitlines()[1:]
    assert kernel.startswith("params/cgds/kernel: nothing, its config makes it F32[3, 3, ")
    assert more.startswith("params/cgds/more: F16[3, 3, ") and more.endswith("its config makes it nothing")
    del variables["params"]["backbone"]
    file.write_bytes(to_safetensors(config, SHAPES, variables, 7, {}))
    with pytest.raises(InputError, match=r"\nand \d+ more$") as raised:
        read_safetensors(file)
    assert len(str(raised.value).splitlines()) == 12


def test_a_folded_network_is_not_trained_further(trained, tmp_path):
    config, variables = trained
    file = tmp_path / "a.safetensors"
    file.write_bytes(to_safetensors(config, SHAPES, variables, 7, {"batch_norm_folded": True}))
    read_safetensors(file)
    with pytest.raises(InputError, match="export it again without --fold-batch-norm"):
        read_safetensors(file, to_train=True)
