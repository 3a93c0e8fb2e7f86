"""What the network sees on canvases, and what is made of it, against a plain loop over bare images."""

import re
from functools import partial

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.evaluation.passes import (
    Passes,
    _windows_at_once,
    mean_probabilities,
    merged_labels,
    mirror,
    passes_over,
    tile_by_tile,
)
from dsnet_jax.evaluation.protocols import SINGLE_SCALE, Protocol
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.ops import Extent, resize_bilinear

CANVAS_HW = (96, 128)
SIZES_HW = [(53, 61), (1, 1), (96, 128), (64, 127)]
PROTOCOLS = {
    "ss": SINGLE_SCALE,
    "flip": Protocol("flip", flip=True),
    "ms_flip": Protocol("ms_flip", (0.6, 1.0, 1.4), flip=True),
    "scales whose canvas is the image's": Protocol("ms_flip", (0.99,), flip=True),
    "slide": Protocol("slide", crop_hw=(40, 64), stride_hw=(27, 64)),
    "slide, larger than the images": Protocol("slide", crop_hw=(512, 90), stride_hw=(200, 30)),
}


class OneConvolution(nn.Module):
    """Logits at stride 8 from one convolution that reads beyond the image's border, and does not mask its input."""

    classes: int = 5

    @nn.compact
    def __call__(self, images):
        kernel_init = nn.initializers.normal(0.2)
        return nn.Conv(self.classes, (9, 9), (8, 8), padding=((4, 4), (4, 4)), kernel_init=kernel_init)(images)


def plain_probabilities(network, image, label_hw, protocol):
    """Image by image, window by window, in NumPy; scaled by OpenCV."""
    height, width = image.shape[:2]
    ys, xs = ((np.arange(n) + 0.5) * size / n for n, size in zip(label_hw, (height, width), strict=True))
    total, times = 0, np.zeros(label_hw)

    def see(image, ys, xs):
        nonlocal total, times
        values = np.asarray(network(image[None]), np.float64)[0]
        for axis, places in enumerate((ys, xs)):
            centre = np.clip(places / 8 - 0.5, 0, values.shape[axis] - 1)
            low = np.floor(centre).astype(int)
            high = np.minimum(low + 1, values.shape[axis] - 1)
            share = np.expand_dims(centre - low, (1 - axis, 2))
            values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
        inside = ((ys > 0) & (ys < image.shape[0]))[:, None] & ((xs > 0) & (xs < image.shape[1]))
        total += inside[..., None] * exponentials / exponentials.sum(axis=-1, keepdims=True)
        times += inside

    for scale in protocol.scales if not protocol.crop_hw else ():
        scaled_hw = [max(1, round(side * scale)) for side in (height, width)]
        scaled = cv2.resize(image, scaled_hw[::-1], interpolation=cv2.INTER_LINEAR)
        rows, columns = ys * scaled_hw[0] / height, xs * scaled_hw[1] / width
        see(scaled, rows, columns)
        if protocol.flip:
            see(scaled[:, ::-1], rows, scaled_hw[1] - columns)
    if protocol.crop_hw:
        (crop_y, crop_x), (stride_y, stride_x) = protocol.crop_hw, protocol.stride_hw
        for top in sorted({min(y, max(0, height - crop_y)) for y in range(0, height, stride_y)}):
            for left in sorted({min(x, max(0, width - crop_x)) for x in range(0, width, stride_x)}):
                see(image[top : top + crop_y, left : left + crop_x], ys - top, xs - left)
    assert times.min() >= 1
    return total / times[..., None]


@partial(jax.jit, static_argnums=(0, 6, 7))
def probabilities_on_a_canvas(network, variables, images, size_hw, scaled_hw, label_hw, label_canvas_hw, protocol):
    extent = Extent(size_hw, images.shape[1:3])
    network = partial(network, variables)
    passes = passes_over(network, extent.zero_outside(images), extent, scaled_hw, label_hw, label_canvas_hw, protocol)
    return tile_by_tile(mean_probabilities, passes), merged_labels(passes, label_hw)


def assert_equal_to_the_plain_loop(network, variables, sizes_hw, protocol, label_scale=1):
    """`network` takes variables, images and an extent or None."""
    rng = np.random.default_rng(0)
    canvas = np.full((len(sizes_hw), *CANVAS_HW, 3), 1e6, np.float32)
    images = [rng.standard_normal((*size_hw, 3)).astype(np.float32) for size_hw in sizes_hw]
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    size_hw = np.array(sizes_hw, np.int32)
    label_hw, label_canvas_hw = label_scale * size_hw, tuple(label_scale * side for side in CANVAS_HW)
    arrays = canvas, size_hw, protocol.scaled_hw(size_hw), label_hw
    found, labels = probabilities_on_a_canvas(network, variables, *arrays, label_canvas_hw, protocol)
    found, labels = np.asarray(found), np.asarray(labels)
    bare = jax.jit(lambda image: network(variables, image, None))
    for row, (image, (height, width)) in enumerate(zip(images, label_hw.tolist(), strict=True)):
        expected = plain_probabilities(bare, image, (height, width), protocol)
        np.testing.assert_allclose(found[row, :height, :width], expected, rtol=0, atol=1e-4)
        same = labels[row, :height, :width] == expected.argmax(axis=-1)
        assert same.mean() > 0.999
        assert height < 10 or expected.std(axis=(0, 1)).max() > 0.03  # Not the same everywhere.
        assert (labels[row, height:] == 255).all() and (labels[row, :, width:] == 255).all()


@pytest.fixture(scope="module")
def one_convolution():
    model = OneConvolution()
    variables = model.init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))
    return lambda variables, images, extent: model.apply(variables, images), variables


@pytest.mark.parametrize("label_scale", [1, 2])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_probabilities_are_those_of_a_plain_loop_over_bare_images(one_convolution, name, label_scale):
    assert_equal_to_the_plain_loop(*one_convolution, SIZES_HW, PROTOCOLS[name], label_scale)


@pytest.mark.parametrize("canvas_hw, most", [((512, 512), 1), ((544, 544), 2), ((1024, 1024), 7), ((3072, 4096), 7)])
def test_few_windows_are_seen_at_a_time_however_large_the_image(canvas_hw, most):
    counts = range(1, 200)
    found = [_windows_at_once(count, (512, 512), canvas_hw) for count in counts]
    assert max(found) == most and all(count % together == 0 for count, together in zip(counts, found, strict=True))


@pytest.mark.parametrize(
    "count, together", [(2, 2), (5, 5), (6, 3), (7, 7), (8, 4), (11, 1), (15, 5), (25, 5), (49, 7)]
)
def test_one_window_at_a_time_is_seen_only_if_their_number_has_no_small_divisor(count, together):
    assert _windows_at_once(count, (512, 512), (3072, 4096)) == together


@pytest.mark.parametrize("name", ["ms_flip", "slide"])
def test_a_network_with_every_kind_of_layer_gives_the_same_on_a_canvas(tiny_backbone, random_variables, name):
    model = DSNet(tiny_backbone(), num_classes=5, width=8, atrous_rates=(1, 2))
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32), train=False)

    def network(variables, images, extent):
        return model.apply(variables, images, extent, train=False).logits

    protocol = {"ms_flip": Protocol("ms_flip", (1.25,), flip=True), "slide": PROTOCOLS["slide"]}[name]
    assert_equal_to_the_plain_loop(network, variables, [(53, 61)], protocol)


def test_a_window_is_read_for_the_tiles_that_it_shows_and_for_no_others():
    """Windows elsewhere cost nothing. One whose logits are no numbers spoils its own tiles alone."""
    side_h, side_w, window = 96, 288, 64  # Tiles are 32 x 128, the third of a row is 32 wide.
    tops, lefts = (0, 32), (0, 64, 128, 192, 224)
    corners = np.array([(top, left) for top in tops for left in lefts], np.float32)
    logits = np.random.default_rng(0).standard_normal((len(corners), 1, 8, 8, 3)).astype(np.float32)
    spoilt = 4  # At row 0, column 224: in the upper two tiles of the second and of the third column.
    places = ((np.arange(side) + 0.5 - corners[:, axis, None])[:, None] for axis, side in enumerate((side_h, side_w)))
    rows, columns = (jnp.array(axis, jnp.float32) for axis in places)
    extent = Extent(jnp.array([[window, window]]), (window, window))

    def probabilities(logits):
        return np.asarray(tile_by_tile(mean_probabilities, [Passes(logits, rows, columns, extent, in_part=True)]))[0]

    sound = probabilities(jnp.array(logits))
    assert np.isfinite(sound).all() and sound.shape == (side_h, side_w, 3)
    logits[spoilt] = np.nan
    expected = np.zeros((side_h, side_w), bool)
    expected[:64, 128:] = True
    found = probabilities(jnp.array(logits))
    np.testing.assert_array_equal(np.isnan(found).any(axis=-1), expected)
    np.testing.assert_array_equal(found[~expected], sound[~expected])


def test_images_are_mirrored_within_their_width():
    images = np.random.default_rng(0).random((3, 4, 7, 2), np.float32)
    mirrored = np.asarray(jax.jit(mirror)(images, jnp.array([7, 3, 1])))
    for row, width in enumerate((7, 3, 1)):
        np.testing.assert_array_equal(mirrored[row, :, :width], images[row, :, :width][:, ::-1])
        assert not mirrored[row, :, width:].any()


@pytest.mark.parametrize("valid_in, valid_out", [((104, 72), (100, 70)), ((1, 1), (1, 1)), ((128, 96), (5, 3))])
def test_labels_of_one_pass_are_the_argmax_of_its_resized_logits(valid_in, valid_out):
    logits = jax.random.normal(jax.random.key(0), (2, 16, 12, 5))
    size_hw, label_hw = jnp.array([valid_in, (128, 40)]), jnp.array([valid_out, (127, 33)])
    extent, ratio_hw = Extent(size_hw, (128, 96)), size_hw / label_hw
    rows, columns = ((jnp.arange(side) + 0.5) * ratio_hw[:, axis, None] for axis, side in enumerate((128, 96)))
    passes = [Passes(logits[None], rows[None], columns[None], extent, in_part=False)]
    labels = np.asarray(jax.jit(merged_labels)(passes, label_hw))
    resized = np.asarray(resize_bilinear(logits, (128, 96), ratio_hw / 8, extent.valid_hw((16, 12))))
    for row, (height, width) in enumerate([valid_out, (127, 33)]):
        inside = row, slice(height), slice(width)
        chosen = np.take_along_axis(resized[inside], labels[inside][..., None].astype(int), axis=-1)[..., 0]
        np.testing.assert_allclose(chosen, resized[inside].max(axis=-1), rtol=0, atol=1e-4)
        assert (labels[row, height:] == 255).all() and (labels[row, :, width:] == 255).all()


@pytest.mark.parametrize("name", ["ss", "ms_flip", "slide"])
def test_resized_logits_are_never_held_as_a_whole(name):
    """150 classes on 512x512 pixels. At stride 8 the logits of the paper's twelve passes take 0.39 of that."""
    protocol = {
        "ss": SINGLE_SCALE,
        "ms_flip": Protocol("ms_flip", (0.75, 1.0, 1.25, 1.5, 1.75, 2.0), flip=True),
        "slide": Protocol("slide", crop_hw=(256, 256), stride_hw=(171, 171)),
    }[name]
    model, side = OneConvolution(150), 512
    whole = 150 * side * side

    def labels(variables, images, size_hw, scaled_hw):
        network = partial(model.apply, variables)
        extent = Extent(size_hw, (side, side))
        passes = passes_over(
            lambda images, extent: network(images), images, extent, scaled_hw, size_hw, (side, side), protocol
        )
        return merged_labels(passes, size_hw)

    def shaped(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    sizes = shaped(1, 2, dtype=jnp.int32), shaped(1, len(protocol.scales), 2, dtype=jnp.int32)
    compiled = jax.jit(labels).lower(variables, shaped(1, side, side, 3), *sizes).compile()
    arrays = re.findall(r"\bf\d+\[([\d,]+)\]", compiled.as_text())
    largest = max(np.prod([int(size) for size in shape.split(",")]) for shape in arrays)
    assert whole / 500 < largest < whole / 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * whole * 4
