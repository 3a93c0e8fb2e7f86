"""Padding changes nothing: images on canvases, several sizes in a batch, against the network on each bare image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.models.baseline import Baseline
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from dsnet_jax.ops import Extent

CANVAS_HW = (96, 128)
SIZES_HW = [(67, 93), (33, 40), (1, 1), (96, 128)]
RATES = (1, 2, 4)  # Small, so that they reach other cells of small maps.


def backbone(output_stride, block=BasicBlock, **arguments):
    return ResNet((1, 1, 1, 1), block, output_stride=output_stride, **arguments)


def dsnet(output_stride, low_level_stage, guide, modification_kernel=1, **arguments):
    return DSNet(
        backbone(output_stride, **arguments),
        num_classes=4,
        width=8,
        atrous_rates=[rate * max(1, output_stride // 16) for rate in RATES],  # At stride 32 they are halved.
        low_level_stage=low_level_stage,
        guide=guide,
        modification_kernel=modification_kernel,
    )


# Every guide with every stage, every stage at both output strides, both blocks, all stems.
NETWORKS = {
    "DSNet, 16, stage3, aspp": dsnet(16, 3, "aspp"),
    "DSNet, 8, stage3, stage5, v1c": dsnet(8, 3, "stage5", stem="v1c"),
    "DSNet, 8, stage4, aspp": dsnet(8, 4, "aspp", modification_kernel=3),
    "DSNet, 16, stage4, stage5, bottleneck": dsnet(16, 4, "stage5", block=Bottleneck),
    "DSNet, 16, stage5, aspp": dsnet(16, 5, "aspp"),
    "DSNet, 8, stage5, stage5, multi-grid": dsnet(8, 5, "stage5", multi_grid=(2,)),
    "DSNet, 32, stage3, aspp, v1s": dsnet(32, 3, "aspp", stem="v1s"),
    "FCN, 8": Baseline(backbone(8, Bottleneck), num_classes=4, width=8),
    "FCN, 16": Baseline(backbone(16), num_classes=4, width=8),
}


def evaluate(network, variables, images, extent=None):
    program = jax.jit(lambda variables, images, extent: network.apply(variables, images, extent, train=False))
    return jax.tree.map(np.asarray, program(variables, images, extent))


def make_images(sizes_hw):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((*size_hw, 3)).astype(np.float32) for size_hw in sizes_hw]


def on_canvas(images, canvas_hw, beyond=np.nan):
    """Each image in the top-left corner, and their extent."""
    canvas = np.full((len(images), *canvas_hw, 3), beyond, np.float32)
    for row, image in enumerate(images):
        canvas[row, : image.shape[0], : image.shape[1]] = image
    return canvas, Extent(jnp.array([image.shape[:2] for image in images]), canvas_hw)


@pytest.fixture(scope="module")
def draw_variables(random_variables):
    """Random variables of a network that samples ten pixels away, at every position elsewhere."""

    def draw(network):
        variables = random_variables(network, np.zeros((1, 64, 64, 3), np.float32), train=False)
        if isinstance(network, DSNet):
            offset = variables["params"]["cgds"]["offset"]
            offset["kernel"] *= 0.3
            offset["bias"] = np.random.default_rng(1).uniform(-12, 12, offset["bias"].shape).astype(np.float32)
        return variables

    return draw


def assert_sampling_reaches_the_padding(offsets, size_hw, feature_hw):
    """Of one image, [H, W, k * k, 2]: far, different from place to place, and often beyond the valid part `size_hw`."""
    assert np.percentile(np.abs(offsets), 75) > 8 and offsets.std(axis=(0, 1)).mean() > 0.5
    positions = np.stack(np.meshgrid(*map(np.arange, offsets.shape[:2]), indexing="ij"), axis=-1)[:, :, None]
    points = (positions + offsets)[: size_hw[0], : size_hw[1]]
    in_padding = (points > -1).all(-1) & (points < feature_hw).all(-1) & (points > np.array(size_hw) - 1).any(-1)
    assert in_padding.mean() > 0.03


def assert_logits_are_those_of_the_bare_image(network, variables, padded, row, image):
    bare = evaluate(network, variables, image[None])
    height, width = bare.logits.shape[1:3]
    tolerance = 1e-4 * bare.logits.std()
    np.testing.assert_allclose(padded.logits[row, :height, :width], bare.logits[0], rtol=0, atol=tolerance)
    if bare.offsets is not None:
        np.testing.assert_allclose(padded.offsets[row, :height, :width], bare.offsets[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_logits_on_a_canvas_are_those_of_the_bare_image(network, draw_variables):
    variables, images = draw_variables(network), make_images(SIZES_HW)
    padded = evaluate(network, variables, *on_canvas(images, CANVAS_HW))
    assert_logits_are_those_of_the_bare_image(network, variables, padded, 1, images[1])
    if padded.offsets is not None:
        feature_hw = padded.offsets.shape[1:3]
        size_hw = [
            -(-size * cells // side) for size, cells, side in zip(SIZES_HW[1], feature_hw, CANVAS_HW, strict=True)
        ]
        assert_sampling_reaches_the_padding(padded.offsets[1], size_hw, feature_hw)


def test_every_size_on_every_canvas_gives_the_bare_image(draw_variables):
    network = NETWORKS["DSNet, 16, stage3, aspp"]
    variables, images = draw_variables(network), make_images(SIZES_HW)
    padded = evaluate(network, variables, *on_canvas(images, CANVAS_HW))
    for row in (0, 2, 3):
        assert_logits_are_those_of_the_bare_image(network, variables, padded, row, images[row])
    larger = evaluate(network, variables, *on_canvas(images, (160, 192), beyond=1e6))
    for row, (height, width) in enumerate(SIZES_HW):
        valid = row, slice(-(-height // 8)), slice(-(-width // 8))
        np.testing.assert_allclose(larger.logits[valid], padded.logits[valid], atol=1e-4 * padded.logits[valid].std())
