"""Where the points of a network lie, by hand; and that they are those of the bare image, whatever canvas it is on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax.data.pipeline import Example
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation import sampling_points as module
from dsnet_jax.evaluation.sampling_points import SampledPoints, border_positions, figures, sampled_points
from dsnet_jax.models.layers import SegmentationOutput
from dsnet_jax.ops.normalise import normalise
from dsnet_jax.training.gradients import offset_metrics


def example(image, label_hw=None, index=0):
    return Example(index, f"image{index}", image, None, label_hw or image.shape[:2])


def zeros(height, width):
    return np.zeros((height, width, 9, 2), np.float32)


def test_points_in_pixels_are_those_of_a_case_computed_by_hand():
    """A map of stride 8: the centre of cell (1, 2) lies between pixels 11 and 12, and 19 and 20."""
    offsets = zeros(4, 5)
    offsets[1, 2, 5] = (0.25, -0.5)  # The tap to the right of the centre: 2 pixels down, 4 to the left.
    points = SampledPoints(offsets, (8.0, 8.0))
    expected = [(3.5, 11.5), (3.5, 19.5), (3.5, 27.5), (11.5, 11.5), (11.5, 19.5), (11.5, 27.5)]
    expected += [(19.5, 11.5), (19.5, 19.5), (19.5, 27.5)]
    np.testing.assert_array_equal(points.to_pixels(points.regular[1, 2]), expected)
    expected[5] = (13.5, 23.5)
    np.testing.assert_array_equal(points.to_pixels(points.predicted[1, 2]), expected)
    np.testing.assert_allclose(points.lengths[1, 2], [0, 0, 0, 0, 0, np.hypot(2, 4), 0, 0, 0])


def test_at_half_the_working_resolution_a_cell_has_twice_the_pixels():
    points = SampledPoints(zeros(3, 3), (16.0, 16.0))
    np.testing.assert_array_equal(points.to_pixels(np.array([0, 2])), [7.5, 39.5])


@pytest.mark.parametrize(
    "pixel, cell", [((0, 0), (0, 0)), ((7, 8), (0, 1)), ((7.5, 15), (1, 1)), ((30, 39), (3, 4)), ((31, 99), (3, 4))]
)
def test_a_pixel_belongs_to_the_cell_in_which_it_lies(pixel, cell):
    assert SampledPoints(zeros(4, 5), (8.0, 8.0)).cell_at(pixel) == cell


def test_a_larger_kernel_has_a_larger_grid():
    points = SampledPoints(np.zeros((6, 6, 25, 2), np.float32), (8.0, 8.0))
    assert points.regular[3, 3, 0].tolist() == [1, 1] and points.regular[3, 3, 24].tolist() == [5, 5]


def test_figures_of_two_images_are_those_counted_by_hand():
    first, second = zeros(1, 2), zeros(3, 3)
    first[0, 0, 4] = (0, 1.5)  # From the centre of the one to beyond the other.
    second[1, 1, :] = (0.3, 0.4)  # Of the nine points round the middle, five leave the map: one row and one column.
    found = figures([SampledPoints(first, (8.0, 8.0)), SampledPoints(second, (8.0, 4.0))])
    # At first 7 of 9 points of each of two cells; and of nine cells 5 at the corners, 3 at the sides.
    before = 2 * 7 + 4 * 5 + 4 * 3
    assert (found.images, found.points) == (2, 18 + 81)
    assert found.regular_outside == pytest.approx(before / 99)
    assert found.outside == pytest.approx((before + 1 + 5) / 99)
    assert found.mean_cells == pytest.approx((1.5 + 9 * 0.5) / 99)
    assert found.largest_cells == 1.5
    assert found.mean_pixels == pytest.approx((12 + 9 * np.hypot(2.4, 1.6)) / 99)
    assert found.largest_pixels == 12


def test_figures_in_cells_are_what_training_logs():
    offsets = np.random.default_rng(0).normal(0, 2, (2, 5, 7, 9, 2)).astype(np.float32)
    logged = offset_metrics(SegmentationOutput(jnp.zeros(()), offsets=jnp.asarray(offsets)))
    found = figures([SampledPoints(image, (8.0, 8.0)) for image in offsets])
    assert found.mean_cells == pytest.approx(float(logged["offset_mean"]))
    assert found.largest_cells == pytest.approx(float(logged["offset_max"]))
    assert found.outside == pytest.approx(float(logged["offset_outside"]))


def test_the_points_are_those_of_the_bare_image_in_its_own_cells(tiny_backbone, random_variables):
    from dsnet_jax.models.dsnet import DSNet

    network = DSNet(tiny_backbone(), 3, width=4, deep_supervision=False)
    variables = random_variables(network, np.zeros((1, 64, 64, 3), np.float32), train=False)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size_hw, 3), np.uint8) for size_hw in ((41, 60), (64, 64), (50, 33))]
    label_hw = (82, 120), (64, 64), (50, 33)  # The first is computed at half its resolution.
    examples = [example(image, hw, index) for index, (image, hw) in enumerate(zip(images, label_hw, strict=True))]
    found = {one.index: points for one, points in sampled_points(network, variables, examples, batch_size=2)}
    assert len(found) == 3
    for index, image in enumerate(images):
        bare = jax.jit(lambda image: network.apply(variables, normalise(image[None]), train=False).offsets[0])(image)
        assert found[index].offsets.shape == bare.shape
        np.testing.assert_allclose(found[index].offsets, bare, atol=1e-4)
    assert found[0].offsets.shape[:2] == (6, 8)
    assert found[0].pixels_per_cell == (16, 16) and found[1].pixels_per_cell == (8, 8)


def test_a_batch_is_shared_by_the_devices_on_the_canvases_that_are_given(monkeypatch):
    class OnePoint(nn.Module):
        @nn.compact
        def __call__(self, images, extent=None, *, train):
            offsets = jnp.zeros((len(images), images.shape[1] // 8, images.shape[2] // 8, 9, 2))
            return SegmentationOutput(images, offsets=offsets + images.mean())

    seen = []
    original = module._offsets
    monkeypatch.setattr(module, "_offsets", lambda *given: seen.append(given[2]) or original(*given))
    images = [np.zeros((side, 40, 3), np.uint8) for side in (20, 40) * 4]
    examples = [example(image, index=index) for index, image in enumerate(images)]
    found = list(sampled_points(OnePoint(), {}, examples, 8, lambda _: ((64, 96), (64, 96))))
    assert [points.offsets.shape[:2] for _, points in found] == [(3, 5), (5, 5)] * 4
    assert [[shard.data.shape for shard in images.addressable_shards] for images in seen] == [[(1, 64, 96, 3)] * 8]


def test_a_network_that_predicts_no_points_is_told():

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, extent=None, *, train):
            return SegmentationOutput(images[..., :2])

    with pytest.raises(InputError, match="Plain predicts no sampling points"):
        list(sampled_points(Plain(), {}, [example(np.zeros((32, 32, 3), np.uint8))], 1))


def test_positions_lie_on_borders_and_apart_from_each_other():
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    labels[:5] = 255  # No border that anybody drew.
    found = border_positions(labels, 3)
    assert found[0] == (19, 29)  # In the middle.
    assert sorted(found[1:]) == [(5, 29), (39, 29)]
    inner = border_positions(labels, 3, margin=8)
    assert sorted(inner[1:]) == [(8, 29), (31, 29)]
    assert border_positions(labels, 3, margin=100) == found  # Better near the edge than none.


def test_there_are_no_more_positions_than_pixels_on_borders():
    labels = np.zeros((9, 9), np.uint8)
    labels[0, 0] = 1
    assert sorted(border_positions(labels, 6)) == [(0, 0)]


def test_without_borders_positions_are_spread_evenly():
    assert border_positions(np.zeros((40, 60), np.uint8), 6) == [
        (10, 10),
        (10, 30),
        (10, 50),
        (30, 10),
        (30, 30),
        (30, 50),
    ]
    assert len(border_positions(np.zeros((3, 500), np.uint8), 5)) == 5
