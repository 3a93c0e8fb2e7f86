"""Inference on canvases: nothing lost, nothing changed by padding, as many programs as pairs of canvases."""

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from dsnet_jax import parallel
from dsnet_jax.data.pipeline import Example
from dsnet_jax.evaluation.inference import Segmenter, batches, canvas_hw, resized_argmax, segment
from dsnet_jax.models.dsnet import DSNet
from dsnet_jax.models.resnet import BasicBlock, ResNet
from dsnet_jax.ops import resize_bilinear
from dsnet_jax.ops.normalise import normalise

NUM_CLASSES = 4


class OneConvolution(nn.Module):
    """Logits at stride 8 from one convolution that reads beyond the image's border, and does not mask its input."""

    @nn.compact
    def __call__(self, images, extent=None, *, train):
        convolution = nn.Conv(
            NUM_CLASSES, (9, 9), (8, 8), padding=((4, 4), (4, 4)), kernel_init=nn.initializers.normal()
        )
        return SimpleNamespace(logits=convolution(images))


def small_dsnet():
    return DSNet(ResNet(depth=(1, 1, 1, 1), block=BasicBlock), num_classes=NUM_CLASSES, width=8)


def mesh_of(device_count):
    devices = jax.devices()[:device_count]
    assert len(devices) == device_count, "run with more CPU devices: tests/conftest.py sees to it"
    return jax.make_mesh((device_count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def random_variables(model):
    """Not the model's own start, where batch norm does nothing and offsets are zero."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(scale=0.1, size=leaf.shape)
        return np.float32(1 + np.abs(values) if path[-1].key in ("var", "scale") else values)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_examples(sizes_hw, label_sizes_hw=None, labelled=True, seed=0):
    rng = np.random.default_rng(seed)
    for index, (size_hw, label_hw) in enumerate(zip(sizes_hw, label_sizes_hw or sizes_hw, strict=True)):
        image = rng.integers(0, 256, (*size_hw, 3), np.uint8)
        label = rng.integers(0, NUM_CLASSES, label_hw, np.uint8) if labelled else None
        if labelled:
            label[rng.random(label_hw) < 0.1] = 255
        yield Example(index, f"picture{index}", image, label, tuple(label_hw))


@partial(jax.jit, static_argnames=("model", "label_hw"))
def logits_of_the_bare_image(model, variables, image, label_hw):
    """At the label's size, by the network on the image alone, without a canvas; float32 [H, W, K]."""
    logits = model.apply(variables, normalise(image[None]), train=False).logits
    return resize_bilinear(logits, label_hw, np.array(image.shape[:2]) / np.array(label_hw) / 8)[0]  # At stride 8.


def assert_labels_are_best(labels, logits):
    """The labels' own logits are the largest, to rounding."""
    chosen = np.take_along_axis(logits, labels[..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, logits.max(axis=-1), rtol=0, atol=1e-4 * np.ptp(logits))


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


@pytest.mark.parametrize("valid_in, valid_out", [((13, 9), (100, 70)), ((1, 1), (1, 1)), ((16, 12), (5, 3))])
def test_resized_argmax_is_the_argmax_of_the_resized_logits(valid_in, valid_out):
    logits = jax.random.normal(jax.random.key(0), (2, 16, 12, 5))
    valid_in_hw, valid_out_hw = jnp.array([valid_in, (16, 5)]), jnp.array([valid_out, (127, 33)])
    where = valid_in_hw / valid_out_hw, valid_in_hw
    labels = np.asarray(jax.jit(resized_argmax, static_argnums=4)(logits, *where, valid_out_hw, (128, 96)))
    resized = np.asarray(resize_bilinear(logits, (128, 96), *where))
    for row, (height, width) in enumerate([valid_out, (127, 33)]):
        assert_labels_are_best(labels[row, :height, :width], resized[row, :height, :width])
        assert (labels[row, height:] == 255).all() and (labels[row, :, width:] == 255).all()


def test_resized_logits_are_never_held_as_a_whole():
    shapes = [
        jax.ShapeDtypeStruct(*spec)
        for spec in (((1, 64, 64, 150), "float32"), ((1, 2), "float32"), *[((1, 2), "int32")] * 2)
    ]
    compiled = jax.jit(resized_argmax, static_argnums=4).lower(*shapes, (1024, 1024)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 1024 * 1024 * 150 * 4


@pytest.mark.parametrize(
    "make_model, label_scale, sizes_hw",
    [(OneConvolution, 2, [(53, 61), (1, 1), (37, 50), (33, 64)]), (small_dsnet, 1, [(37, 50)])],
)
def test_labels_equal_the_network_on_the_bare_image(make_model, label_scale, sizes_hw):
    model = make_model()
    label_sizes_hw = [(label_scale * h, label_scale * w) for h, w in sizes_hw]
    variables = random_variables(model)
    seen = 0
    for batch, labels, _ in Segmenter(model, variables, mesh_of(1)).run(make_examples(sizes_hw, label_sizes_hw), 3):
        for example, predicted in batch.cropped(labels):
            assert predicted.dtype == np.uint8 and predicted.shape == example.label_hw
            expected = logits_of_the_bare_image(model, variables, example.image, example.label_hw)
            assert_labels_are_best(predicted, np.asarray(expected))
            seen += 1
    assert seen == len(sizes_hw)


def test_the_confusion_matrix_is_the_same_for_any_batch_size_and_number_of_devices():
    model, sizes_hw = OneConvolution(), [(40, 90), (61, 33), (40, 90), (64, 40), (61, 33), (64, 40), (64, 40)]
    variables = random_variables(model)
    matrices = []
    for batch_size, devices in ((1, 1), (3, 1), (4, 4)):
        results = list(Segmenter(model, variables, mesh_of(devices)).run(make_examples(sizes_hw), batch_size))
        matrices.append(sum(np.asarray(counts, np.int64) for _, _, counts in results))
        assert sum(len(batch.examples) for batch, _, _ in results) == len(sizes_hw)
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for example in make_examples(sizes_hw):
        logits = logits_of_the_bare_image(model, variables, example.image, example.label_hw)
        predicted = np.argmax(logits, axis=-1)
        valid = example.label != 255
        np.add.at(expected, (example.label[valid], predicted[valid]), 1)
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, expected)


def test_examples_without_labels_are_predicted_but_not_counted():
    model = OneConvolution()
    stream = Segmenter(model, random_variables(model), mesh_of(1)).run(make_examples([(30, 20)] * 3, labelled=False), 2)
    results = [(len(batch.examples), batch.padding, counts) for batch, _, counts in stream]
    assert results == [(2, 0, None), (1, 1, None)]


def test_there_are_as_many_programs_as_pairs_of_canvases():
    model = OneConvolution()
    variables = random_variables(model)
    sizes_hw = [(30, 20), (31, 32), (32, 32), (33, 20), (60, 1), (30, 20), (20, 64)] * 3
    label_sizes_hw = [(h, w) for h, w in sizes_hw]
    label_sizes_hw[0] = (70, 20)  # Same canvas for the image, another one for the label.
    before = segment._cache_size()
    for seed in (0, 1):
        segmenter = Segmenter(OneConvolution(), variables, mesh_of(1))  # An equal model compiles nothing anew.
        canvases = {
            (batch.images.shape, batch.labels.shape)
            for batch, _, _ in segmenter.run(make_examples(sizes_hw, label_sizes_hw, seed=seed), 2)
        }
    assert segment._cache_size() - before == len(canvases) == 4


def test_a_batch_on_several_devices_needs_only_sums_between_them():
    model = OneConvolution()
    segmenter = Segmenter(model, random_variables(model), mesh_of(4))
    (batch,) = batches(make_examples([(60, 60)] * 4), 4)
    split = parallel.split_by_batch(segmenter.mesh)
    arrays = jax.device_put((batch.images, batch.size_hw, batch.labels, batch.label_hw), split)
    program = segment.lower(model, segmenter._variables, *arrays, label_canvas_hw=batch.label_canvas_hw).compile()
    labels, counts = program.output_shardings
    assert counts.is_fully_replicated and labels.is_equivalent_to(split, 3)
    assert "all-reduce" in program.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program.as_text()


def test_a_batch_size_that_the_devices_do_not_divide_is_rounded_up_and_said(caplog):
    model = OneConvolution()
    segmenter = Segmenter(model, random_variables(model), mesh_of(4))
    with caplog.at_level("WARNING", "absl"):
        ((batch, labels, _),) = segmenter.run(make_examples([(20, 20)] * 3), 3)
    assert batch.padding == 1 and [len(shard.data) for shard in labels.addressable_shards] == [1] * 4
    assert "4 images at a time, not 3" in caplog.text


def test_the_next_batch_is_started_before_a_result_is_handed_out():
    model, taken = OneConvolution(), []

    def examples():
        for example in make_examples([(20, 20)] * 3):
            taken.append(example.index)
            yield example

    stream = Segmenter(model, random_variables(model), mesh_of(1)).run(examples(), 1)
    batch, _, _ = next(stream)
    assert batch.examples[0].index == 0 and taken == [0, 1]
    assert len(list(stream)) == 2
