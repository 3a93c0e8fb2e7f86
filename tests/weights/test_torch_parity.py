"""Ours against torchvision's, with random weights and statistics ported from one to the other; where PyTorch is there.

Features are computed operation by operation, not as one program: to compile ResNet-152 takes longer than all of this.
Sizes that are no multiple of the stride are left to the backbone: a head's maps are resized by the ratio of their
strides here, by that of their sizes in PyTorch's `interpolate`.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from dsnet_jax.config import default_config
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.ops.normalise import normalise
from dsnet_jax.ops.resize import resize_bilinear
from dsnet_jax.weights.port import arrays_ported, config_of
from dsnet_jax.weights.torchvision import BLOCKS, STEMS, convert

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
PEERS = Path(__file__).parents[2] / "scripts" / "peers"

# Modules of the DSNet of scripts/peers/network_torch.py, by ours.
DSNET = (
    ("backbone/stem/conv", "stem.0"),
    ("backbone/stem/norm", "stem.1"),
    *((f"backbone/{ours}", theirs) for ours, theirs in BLOCKS),
    ("aspp/point/conv", "aspp.convs.0.0"),
    ("aspp/point/norm", "aspp.convs.0.1"),
    *((f"aspp/atrous{i}/conv", f"aspp.convs.{i + 1}.0") for i in range(3)),
    *((f"aspp/atrous{i}/norm", f"aspp.convs.{i + 1}.1") for i in range(3)),
    ("aspp/pool/conv", "aspp.convs.4.1"),
    ("aspp/pool/norm", "aspp.convs.4.2"),
    ("aspp/project/conv", "aspp.project.0"),
    ("aspp/project/norm", "aspp.project.1"),
    ("cgds/modification/conv", "modify.0"),
    ("cgds/modification/norm", "modify.1"),
    ("cgds/offset", "offset"),
    ("cgds", "kernel"),
    ("cgds/norm", "normalise.0"),
    ("classifier/conv/conv", "classify.0"),
    ("classifier/conv/norm", "classify.1"),
    ("classifier/logits", "classify.4"),
)


@pytest.fixture(scope="module")
def peer():
    """scripts/peers/network_torch.py."""
    sys.path.insert(0, str(PEERS))
    try:
        spec = importlib.util.spec_from_file_location("network_torch", PEERS / "network_torch.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(PEERS))
    return module


def randomised(network, seed=0):
    """The network with kernels that keep the size of what they are given, and statistics unlike those at the start."""
    rng = np.random.default_rng(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            shape = tuple(tensor.shape)
            if len(shape) == 4:
                values = rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5
            else:
                values = rng.uniform(0.5, 1.5, shape) if name.endswith(("weight", "var")) else rng.normal(0, 0.3, shape)
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))
    return network.eval()


def arrays_of(network):
    return {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}


def dilated(name, output_stride, peer):
    """torchvision's ResNet at an output stride; basic blocks as in the peer, since torchvision does not dilate them."""
    strides = [False, output_stride == 8, output_stride < 32]
    if name not in ("resnet18", "resnet34"):
        return getattr(torchvision.models, name)(replace_stride_with_dilation=strides)
    network = getattr(torchvision.models, name)()
    peer.dilate_basic_blocks([network.layer2, network.layer3, network.layer4], strides)
    return network


def features_of(network, images):
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    features = {}
    for stage in (2, 3, 4, 5):
        x = features[stage] = getattr(network, f"layer{stage - 1}")(x)
    return features


def as_ours(maps):
    return np.asarray(maps.detach()).transpose(0, 2, 3, 1)


def largest_difference(found, expected):
    """Relative to the largest value."""
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", list(RESNETS))
def test_every_stage_of_every_resnet_is_torchvisions(name, output_stride, peer):
    network = randomised(dilated(name, output_stride, peer))
    layout, conversion = arrays_ported(arrays_of(network), name)
    assert (layout.backbone, layout.stem, layout.head) == (name, "v1", None)
    images = np.random.default_rng(1).standard_normal((1, 91, 67, 3)).astype(np.float32)
    found = RESNETS[name](output_stride=output_stride).apply(conversion.variables, images, train=False)
    with torch.no_grad():
        expected = features_of(network, torch.tensor(images.transpose(0, 3, 1, 2)))
    for stage, feature in found.items():
        assert expected[stage].std() > 0.1
        assert largest_difference(feature, as_ours(expected[stage])) < 1e-4, stage


@pytest.mark.parametrize("name", list(RESNETS))
def test_a_training_step_moves_the_statistics_as_torchvisions_once_its_variances_are_made_biased(name):
    """PyTorch adds the batch's variance times n / (n - 1), for n values a channel, Flax the variance itself."""
    network = randomised(getattr(torchvision.models, name)())
    before = arrays_ported({k: v.copy() for k, v in arrays_of(network).items()}, name)[1].variables
    counts = {}
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, inputs, __, path=path: counts.update({path: inputs[0][:, 0].numel()})
            )
    images = np.random.default_rng(1).standard_normal((4, 97, 65, 3)).astype(np.float32)
    with torch.no_grad():
        features_of(network.train(), torch.tensor(images.transpose(0, 3, 1, 2)))
    arrays = arrays_of(network)
    for path, count in counts.items():
        old = before_of(network, path, before)
        moved = arrays[f"{path}.running_var"] - 0.9 * old
        arrays[f"{path}.running_var"] = (0.9 * old + moved * (count - 1) / count).astype(np.float32)
    expected = arrays_ported(arrays, name)[1].variables["batch_stats"]
    _, updated = RESNETS[name](output_stride=32).apply(before, images, train=True, mutable=["batch_stats"])
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(updated["batch_stats"]), jax.tree.leaves(expected), strict=True
    ):
        assert largest_difference(found, wanted) < 5e-4, path  # 1e-4 but for ResNet-152.


def before_of(network, path, variables):
    """The running variance that ours starts from, of torchvision's module at `path`."""
    if path == "bn1":
        return variables["batch_stats"]["stem"]["norm"]["var"]
    layer, block, *rest = path.split(".")
    name = "downsample_norm" if rest[0] == "downsample" else rest[0].replace("bn", "norm")
    return variables["batch_stats"][f"stage{int(layer[-1]) + 1}_block{block}"][name]["var"]


@pytest.mark.parametrize(("backbone", "output_stride"), [("resnet18", 16), ("resnet50", 16), ("resnet50", 8)])
def test_the_whole_dsnet_is_the_peers(backbone, output_stride, peer):
    """At multiples of the largest stride, 16."""
    network = randomised(peer.DSNet(backbone, 21, 256, output_stride))
    arrays = {name.replace("stages.", "layer_"): array for name, array in arrays_of(network).items()}
    arrays = {renamed(name): array for name, array in arrays.items()}
    arrays["offset.weight"] = arrays["offset.weight"] * 3  # Points up to several cells away.
    network.offset.weight.data *= 3
    config = default_config()
    config.model.update(backbone=backbone, output_stride=output_stride, deep_supervision=False)
    model = build_model(config.model, 21)
    conversion = convert(arrays, jax.eval_shape(partial(initial_variables, model)), DSNET)
    assert conversion.faults == []
    images = np.random.default_rng(1).standard_normal((1, 112, 144, 3)).astype(np.float32)
    found = jax.jit(partial(model.apply, train=False))(conversion.variables, images)
    logits = resize_bilinear(found.logits, images.shape[1:3])
    with torch.no_grad():
        expected = as_ours(network(torch.tensor(images.transpose(0, 3, 1, 2))))
    assert np.abs(found.offsets).max() > 2 and expected.std() > 0.1
    assert largest_difference(logits, expected) < 1e-4


def renamed(name):
    """The peer's stages are a list from 0, its kernel a parameter of its own."""
    if name == "kernel":
        return "kernel.weight"
    prefix, dot, rest = name.removeprefix("layer_").partition(".")
    return f"layer{int(prefix) + 1}.{rest}" if name.startswith("layer_") and dot else name


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_torchvisions_segmenters_label_a_photo_alike(name):
    """The photo comes with matplotlib; its sides are made multiples of 8."""
    options = {"weights": None, "weights_backbone": None, "aux_loss": True}
    network = randomised(getattr(torchvision.models.segmentation, name)(**options))
    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as photo:
        images = normalise(np.asarray(photo.convert("RGB").resize((256, 304)))[None])
    of_torch = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))
    with torch.no_grad():
        network.classifier[-1].bias -= network(of_torch)["out"].mean((0, 2, 3))  # No class outdoes all others.
        expected = as_ours(network(of_torch)["out"])
    layout, conversion = arrays_ported(arrays_of(network), name)
    model = build_model(config_of(layout).model, 21)
    found = jax.jit(partial(model.apply, train=False))(conversion.variables, images).logits
    found = np.asarray(resize_bilinear(found, images.shape[1:3]))
    assert len(np.unique(expected.argmax(-1))) > 10
    assert largest_difference(found, expected) < 1e-4
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.999


def test_the_stem_of_torchvision_has_the_two_modules_that_the_table_names():
    names = {name.rpartition(".")[0] for name in torchvision.models.resnet18().state_dict() if "layer" not in name}
    assert names == {theirs for _, theirs in STEMS["torchvision, timm"]} | {"fc"}
