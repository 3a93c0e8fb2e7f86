"""What torchvision's files hold, by their names alone; and what its segmenters compute."""

from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsnet_jax import cli
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.models.classifier import Classifier
from dsnet_jax.models.resnet import RESNETS, Bottleneck, ResNet
from dsnet_jax.ops.resize import resize_bilinear
from dsnet_jax.weights.port import arrays_ported
from dsnet_jax.weights.torchvision import RELEASES, SAVED_AGAIN, STEMS, recognise

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "fcn_resnet50", "deeplabv3_resnet101")


@pytest.fixture(scope="module")
def shapes_of(make_torch_fixtures):
    """Called with the name of a network of torchvision, gives the shapes of its arrays by name."""
    with np.load(make_torch_fixtures.TESTS / "weights" / "state_dicts.npz") as file:
        texts = {key.split("/")[0]: str(array) for key, array in file.items()}

    def shapes(name):
        lines = (line.split() for line in texts[name].splitlines())
        return {array: tuple(map(int, sides)) for array, *sides in lines}

    return shapes


def blank(shapes):
    """Arrays of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}


def deep(arrays, names, widths):
    """A ResNet's arrays with three 3x3 convolutions for a stem, called by `names`."""
    others = {name: array for name, array in arrays.items() if not name.startswith(("conv1.", "bn1."))}
    stem, inputs = {}, 3
    for i, outputs in enumerate(widths):
        stem[f"{names[2 * i]}.weight"] = (outputs, inputs, 3, 3)
        inputs = outputs
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            stem[f"{names[2 * i + 1]}.{leaf}"] = (outputs,)
    others["layer1.0.conv1.weight"] = np.ones((64, inputs, 1, 1), np.float32)
    others["layer1.0.downsample.0.weight"] = np.ones((256, inputs, 1, 1), np.float32)
    return others | blank(stem)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_array_of_torchvisions_networks_has_a_place_or_is_left_out_knowingly(name, shapes_of):
    arrays = blank(shapes_of(name))
    layout, conversion = arrays_ported(arrays, name)
    head, _, backbone = name.rpartition("_")
    assert (layout.backbone, layout.stem) == (backbone, "v1")
    assert layout.head == {"": None, "fcn": "fcn", "deeplabv3": "aspp"}[head] and layout.auxiliary == bool(head)
    assert all(name.startswith("fc.") or name.endswith("num_batches_tracked") for name in conversion.left_out)
    assert len(jax.tree.leaves(conversion.variables)) + len(conversion.left_out) == len(arrays)


@pytest.mark.parametrize(
    ("release", "stem", "widths", "prefix"),
    [
        ("timm, PyTorch-Encoding", "v1s", (64, 64, 128), ""),
        ("timm, PyTorch-Encoding", "v1c", (32, 32, 64), "module."),
        ("mmsegmentation", "v1c", (32, 32, 64), "backbone."),
        ("semseg", "v1s", (64, 64, 128), "module."),
    ],
)
def test_deep_stems_are_known_by_the_names_of_their_releases(release, stem, widths, prefix, shapes_of):
    names = [theirs for _, theirs in STEMS[release]]
    arrays = deep(blank(shapes_of("resnet50")), names, widths)
    layout, conversion = arrays_ported({prefix + name: array for name, array in arrays.items()}, "x")
    assert (layout.backbone, layout.stem) == ("resnet50", stem)
    assert conversion.variables["params"]["stem2"]["conv"]["kernel"].shape == (3, 3, *widths[1:])
    assert {name.split(".")[-1] for name in conversion.left_out} <= {"num_batches_tracked", "weight", "bias"}


def test_the_backbone_of_another_network_is_taken_alone_and_the_rest_is_told(shapes_of):
    arrays = {f"backbone.{name}": array for name, array in blank(shapes_of("resnet18")).items() if "fc" not in name}
    arrays["decode_head.conv_seg.weight"] = np.ones((19, 128, 1, 1), np.float32)
    layout, conversion = arrays_ported(arrays, "x")
    assert layout.head is None and "decode_head.conv_seg.weight" in conversion.left_out
    layout, conversion = arrays_ported(blank(shapes_of("fcn_resnet50")), "x", backbone_only=True)
    assert layout.head is None
    assert {"classifier.0.weight", "aux_classifier.4.bias"} <= set(conversion.left_out)
    assert "stem" in conversion.variables["params"]


def test_without_deep_supervision_there_is_none(shapes_of):
    arrays = {name: array for name, array in blank(shapes_of("fcn_resnet50")).items() if not name.startswith("aux_")}
    layout, conversion = arrays_ported(arrays, "x")
    assert not layout.auxiliary and "auxiliary" not in conversion.variables["params"]


def test_all_that_does_not_fit_is_told_at_once(shapes_of):
    arrays = blank(shapes_of("resnet50"))
    del arrays["layer3.5.conv2.weight"], arrays["bn1.running_var"]
    arrays["layer1.0.conv1.weight"] = np.ones((64, 64, 3, 3), np.float32)
    arrays["layer9.weight"] = np.ones(3, np.float32)
    arrays["layer1.0.bn1.bias"] = np.ones(64, np.int32)
    arrays["layer1.0.bn2.bias"] = np.full(64, np.nan, np.float32)
    arrays["layer1.0.bn2.running_var"] = np.full(64, -1, np.float32)
    arrays["layer1.0.bn1.weight"] = np.full(64, 1e300)
    with pytest.raises(InputError) as raised:
        arrays_ported(arrays, "x.pth")
    first, *lines = str(raised.value).splitlines()
    assert "x.pth: nearest is resnet50 with stem v1, but 8 of its arrays do not fit" in first
    assert set(lines) == {
        "layer3.5.conv2.weight: missing",
        "bn1.running_var: missing",
        "layer1.0.conv1.weight: shape (64, 64, 3, 3), (64, 64, 1, 1) wanted",
        "layer9.weight: unknown",
        "layer1.0.bn1.bias: int32, floating-point numbers wanted",
        "layer1.0.bn2.bias: holds values that are not finite",
        "layer1.0.bn2.running_var: holds negative variances",
        "layer1.0.bn1.weight: holds values that are not finite",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("layer4.1.bn2.bias"), "(1 missing)"),
        (lambda arrays: [arrays.pop(name) for name in list(arrays) if "layer4" in name], "25 of its arrays do not fit"),
        (lambda arrays: arrays.clear(), "holds no ResNet, the names of its 0 arrays"),
        (lambda arrays: arrays.update(blank({"layer2.0.downsample.2.weight": (9,)})), "(1 unknown)"),
        (lambda arrays: arrays.update(blank({"conv1.weight": (64, 1, 7, 7)})), "(64, 3, 7, 7) wanted"),
    ],
)
def test_a_file_that_is_partial_or_another_network_is_refused(change, message, shapes_of):
    arrays = blank(shapes_of("resnet18"))
    change(arrays)
    with pytest.raises(InputError) as raised:
        arrays_ported(arrays, "x.pth")
    assert message in str(raised.value) and len(str(raised.value).splitlines()) <= 12


def test_a_stem_that_is_no_kernel_is_told(shapes_of):
    names = [theirs for _, theirs in STEMS["semseg"]]
    arrays = deep(blank(shapes_of("resnet50")), names, (64, 64, 128)) | blank({"conv1.weight": ()})
    with pytest.raises(InputError, match=r"conv1\.weight: shape \(\), "):
        arrays_ported(arrays, "x")


def test_the_files_that_were_saved_again_have_the_weights_of_the_old_ones():
    for old, later in SAVED_AGAIN.items():
        name, digits = later.removesuffix(".pth").split("-")
        assert RELEASES[old] == f"{RELEASES[digits]}, as released before 2021"
        assert name == RELEASES[digits].split()[1].strip(",").replace("-", "").lower()


def test_names_of_another_kind_of_network_are_shown():
    with pytest.raises(InputError, match=r"holds no ResNet, the names of its 1 arrays are others: features\.0\.weight"):
        arrays_ported({"features.0.weight": np.ones(3)}, "vgg.pth")
    assert recognise({}) is None


def test_a_whole_network_with_classes_without_names_is_refused_unless_its_backbone_is_wanted(shapes_of):
    shapes = shapes_of("fcn_resnet50")
    shapes |= {"classifier.4.weight": (5, 512, 1, 1), "classifier.4.bias": (5,)}
    shapes |= {"aux_classifier.4.weight": (5, 256, 1, 1), "aux_classifier.4.bias": (5,)}
    with pytest.raises(InputError, match=r"has 5 classes.*--backbone-only"):
        arrays_ported(blank(shapes), "x")
    assert arrays_ported(blank(shapes), "x", backbone_only=True)[0].backbone == "resnet50"


def test_numbers_of_other_types_are_cast_and_counted(shapes_of):
    arrays = blank(shapes_of("resnet18"))
    arrays["bn1.bias"] = np.full(64, 0.5, np.float16)
    arrays["bn1.weight"] = np.full(64, 0.25, np.float64)
    _, conversion = arrays_ported(arrays, "x")
    assert conversion.cast == {"float16": 1, "float64": 1}
    norm = conversion.variables["params"]["stem"]["norm"]
    assert norm["bias"].dtype == norm["scale"].dtype == np.float32 and norm["bias"][0] == 0.5


@pytest.mark.parametrize("head", ["fcn", "deeplabv3"])
def test_a_ported_segmenter_gives_torchvisions_logits(
    head, torch_cases, make_torch_fixtures, monkeypatch, tmp_path, capsys
):
    """Through a file, the command and the folder that it makes; at a size that is a multiple of the stride."""
    monkeypatch.setitem(RESNETS, "resnet50", partial(ResNet, (1, 1, 1, 1), Bottleneck))
    case = torch_cases("weights", "segmenters")[head]
    arrays = {}
    for line in str(case["arrays"]).splitlines():
        name, *sides = line.split()
        arrays[name] = make_torch_fixtures.resnet_parameter(name, tuple(map(int, sides)))
    save_file(arrays, tmp_path / "x.safetensors")
    assert cli.main(["port", str(tmp_path / "x.safetensors"), f"--workdir={tmp_path / 'ported'}"]) == 0
    assert "left out: num_batches_tracked" in capsys.readouterr().out
    trained = load_trained(tmp_path / "ported")
    assert (trained.config.model.width, trained.step, trained.spec.class_names[20]) == (
        {"fcn": 512, "deeplabv3": 256}[head],
        0,
        "tvmonitor",
    )
    image = case["image"].transpose(0, 2, 3, 1)

    @jax.jit
    def logits(variables):
        stage4 = trained.model.backbone.apply(of("backbone", variables), image, train=False)[4]
        auxiliary = Classifier(21, 256).apply(of("auxiliary", variables), stage4, train=False)
        found = trained.model.apply(variables, image, train=False).logits, auxiliary
        return [resize_bilinear(map_, image.shape[1:3])[:, ::7, ::7].transpose(0, 3, 1, 2) for map_ in found]

    def of(name, variables):
        return {kind: tree[name] for kind, tree in variables.items()}

    for found, expected in zip(logits(trained.variables), (case["out"], case["aux"]), strict=True):
        assert expected.std() > 0.5
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
