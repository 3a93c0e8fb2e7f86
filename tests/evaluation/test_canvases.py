"""Canvases: nothing lost, little padding, few programs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_jax.config import default_config
from dsnet_jax.data.pipeline import Example
from dsnet_jax.data.transforms import scaled_size_hw
from dsnet_jax.evaluation.canvases import LARGEST, PADDED_SHARE, batches, canvas_hw, choose_canvases
from dsnet_jax.evaluation.protocols import SINGLE_SCALE, Protocol

NUM_CLASSES = 4
MS_FLIP = Protocol("ms_flip", (0.75, 1.0, 1.25, 1.5, 1.75, 2.0), flip=True)
SLIDE = Protocol("slide", crop_hw=(96, 128), stride_hw=(64, 86))


def make_examples(sizes_hw, label_sizes_hw=None, labelled=True, seed=0):
    rng = np.random.default_rng(seed)
    for index, (size_hw, label_hw) in enumerate(zip(sizes_hw, label_sizes_hw or sizes_hw, strict=True)):
        image = rng.integers(0, 256, (*size_hw, 3), np.uint8)
        label = rng.integers(0, NUM_CLASSES, label_hw, np.uint8) if labelled else None
        if labelled:
            label[rng.random(label_hw) < 0.1] = 255
        yield Example(index, f"picture{index}", image, label, tuple(label_hw))


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_a_canvas_holds_its_image_in_multiples_of_32_and_wastes_little(height, width):
    for side, canvas in zip((height, width), canvas_hw((height, width)), strict=True):
        assert canvas % 32 == 0 and side <= canvas < max(side + 32, side * 9 / 8)
        assert canvas_hw((canvas, canvas)) == (canvas, canvas)


def test_canvases_are_few_and_padding_is_small_over_usual_sizes():
    assert len({canvas_hw((side, side)) for side in range(1, 2048)}) == 32
    sides = np.arange(100, 2001)
    canvases = np.array([canvas_hw((side, side))[0] for side in sides.tolist()])
    assert (canvases.sum() / sides.sum()) ** 2 < 1.095  # All pairs of sides: the sum of products is a product of sums.
    assert np.mean(canvases / sides) ** 2 < 1.15


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), max_size=25),
    st.integers(1, 4),
    st.sampled_from([0, 5_000, 10**9]),
)
def test_batches_hold_every_example_once_and_say_what_is_padding(sizes_hw, batch_size, waiting_pixels):
    examples = list(make_examples(sizes_hw, [(2 * h, 3 * w) for h, w in sizes_hw]))
    made = list(batches(iter(examples), batch_size, waiting_pixels))
    assert sorted(example.index for batch in made for example in batch.examples) == list(range(len(examples)))
    for batch in made:
        assert 1 <= len(batch.examples) <= batch_size
        assert len(batch.images) == len(batch.labels) == batch_size == len(batch.examples) + batch.padding
        for row, example in enumerate(batch.examples):
            height, width = batch.size_hw[row]
            np.testing.assert_array_equal(batch.images[row, :height, :width], example.image)
            assert not batch.images[row, height:].any() and not batch.images[row, :, width:].any()
            assert np.sum(batch.labels[row] != 255) == np.sum(example.label != 255)
        for (example, label), same in zip(batch.cropped(batch.labels), batch.examples, strict=True):
            assert example is same
            np.testing.assert_array_equal(label, example.label)
        assert (batch.labels[len(batch.examples) :] == 255).all()
        assert (batch.size_hw[len(batch.examples) :] == 1).all() and (batch.label_hw[len(batch.examples) :] == 1).all()


def test_only_so_many_pixels_wait_and_the_fullest_group_goes_first():
    sizes_hw = [(32, 32), (64, 64), (32, 32), (96, 96), (32, 64)]
    taken = []

    def examples():
        for example in make_examples(sizes_hw):
            taken.append(example.index)
            yield example

    stream = batches(examples(), 4, waiting_pixels=2 * (2 * 32**2 + 64**2))  # Image and label of the first three.
    first = next(stream)
    assert taken == [0, 1, 2, 3] and [example.index for example in first.examples] == [0, 2]
    assert [[example.index for example in batch.examples] for batch in stream] == [[1], [3], [4]]


def test_a_label_that_is_not_as_large_as_its_example_says_is_refused():
    wrong = Example(0, "holiday", np.zeros((9, 9, 3), np.uint8), np.zeros((8, 9), np.uint8), (9, 9))
    with pytest.raises(ValueError, match="holiday"):
        list(batches([wrong], 1))


def computed_share(sizes_hw, chosen, protocol, batch_size, image_scale=1.0):
    """Pixels that all passes see, padding images included, over those of the bare images; and the canvases."""
    canvases = [chosen[size_hw] for size_hw in sizes_hw]
    computed = 0
    for canvas in set(canvases):
        rows = -(-canvases.count(canvas) // batch_size) * batch_size
        computed += rows * protocol.pixels(np.array(canvas[0]), 32)
    images = np.array([scaled_size_hw(size_hw, image_scale) for size_hw in sizes_hw])
    return computed / protocol.pixels(images).sum(), set(canvases)


SIZES = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 8), st.sampled_from([1.0, 0.5, 1.7]), st.sampled_from([SINGLE_SCALE, MS_FLIP, SLIDE]))
def test_chosen_canvases_hold_their_images_and_compute_no_more_than_the_smallest_or_the_share(
    sizes_hw, batch_size, image_scale, protocol
):
    chosen = choose_canvases(np.array(sizes_hw), image_scale, protocol, batch_size)
    for size_hw in sizes_hw:
        image_canvas, label_canvas = chosen[size_hw]
        assert all(side % 32 == 0 for side in image_canvas + label_canvas)
        assert all(side <= canvas for side, canvas in zip(size_hw, label_canvas, strict=True))
        image_hw = scaled_size_hw(size_hw, image_scale)
        assert all(side <= canvas for side, canvas in zip(image_hw, image_canvas, strict=True))
    smallest = {
        size_hw: (tuple(-(-side // 32) * 32 for side in scaled_size_hw(size_hw, image_scale)), None)
        for size_hw in sizes_hw
    }
    share, canvases = computed_share(sizes_hw, chosen, protocol, batch_size, image_scale)
    least, more = computed_share(sizes_hw, smallest, protocol, batch_size, image_scale)
    assert share <= max(PADDED_SHARE, least) * (1 + 1e-12) and len(canvases) <= len(more)
    assert max(np.prod(canvas) for canvas, _ in canvases) <= LARGEST * max(np.prod(canvas) for canvas, _ in more)


def test_fifty_sizes_need_far_fewer_canvases_at_multi_scale_and_no_more_than_a_quarter_of_padding():
    sizes_hw = [tuple(size) for size in np.random.default_rng(0).integers(160, 416, (50, 2)).tolist()]
    assert len(set(sizes_hw)) == 50
    share, canvases = computed_share(sizes_hw, choose_canvases(np.array(sizes_hw), 1.0, MS_FLIP, 1), MS_FLIP, 1)
    assert share <= PADDED_SHARE <= 1.25 and len(canvases) < 25


def test_with_a_larger_share_there_are_fewer_canvases():
    sizes_hw = [tuple(size) for size in np.random.default_rng(0).integers(160, 416, (50, 2)).tolist()]
    few = [
        computed_share(sizes_hw, choose_canvases(np.array(sizes_hw), 1.0, MS_FLIP, 1, most), MS_FLIP, 1)
        for most in (1.5, 9)
    ]
    assert few[0][0] <= 1.5 and few[1][0] <= 9
    assert len(few[0][1]) < 18 and len(few[1][1]) == 1


def test_the_share_of_an_evaluation_is_that_of_the_field():
    assert default_config().evaluation.padded_share == PADDED_SHARE


def test_canvases_are_shared_where_that_saves_a_batch():
    sizes_hw = np.array([(64, 64)] * 5 + [(64, 32)] * 3)
    assert set(choose_canvases(sizes_hw, 1.0, SINGLE_SCALE, 8).values()) == {((64, 64), (64, 64))}
    assert len(set(choose_canvases(sizes_hw, 1.0, SINGLE_SCALE, 1).values())) == 2


def test_a_high_and_a_wide_image_do_not_share_a_canvas_that_is_much_larger_than_either():
    sizes_hw = np.array([(500, 600)] * 2000 + [(400, 3000), (3000, 400)])
    chosen = choose_canvases(sizes_hw, 1.0, SINGLE_SCALE, 8)
    assert (chosen[400, 3000][0], chosen[3000, 400][0]) == ((416, 3008), (3008, 416))


def test_no_images_need_no_canvas():
    assert choose_canvases(np.zeros((0, 2), np.int32), 1.0, SINGLE_SCALE, 8) == {}


def test_batches_lie_on_the_canvases_that_they_are_given():
    examples = list(make_examples([(40, 30), (90, 20), (33, 64)]))
    made = list(batches(iter(examples), 2, canvases_of=lambda example: ((96, 64), (128, 96))))
    assert [batch.images.shape[1:3] for batch in made] == [(96, 64)] * 2
    assert [batch.labels.shape[1:] for batch in made] == [(128, 96)] * 2
    found = itertools.chain.from_iterable(batch.cropped(batch.labels) for batch in made)
    for (example, label), same in zip(found, examples, strict=True):
        assert example is same
        np.testing.assert_array_equal(label, example.label)
