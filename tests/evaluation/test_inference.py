"""Inference on canvases: nothing changed by padding, as many programs as pairs of canvases, on any devices."""

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsnet_jax import parallel
from dsnet_jax.config import default_config
from dsnet_jax.data.pipeline import Example
from dsnet_jax.evaluation import inference
from dsnet_jax.evaluation.canvases import batches
from dsnet_jax.evaluation.inference import Segmenter, segment
from dsnet_jax.evaluation.protocols import SINGLE_SCALE, Protocol
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


def in_batches_of(batch_size):
    """A config."""
    config = default_config()
    config.evaluation.batch_size = batch_size
    return config


def mesh_of(device_count):
    devices = jax.devices()[:device_count]
    assert len(devices) == device_count, "run with more CPU devices: tests/conftest.py sees to it"
    return parallel.mesh_over(devices)


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


SLIDE = Protocol("slide", crop_hw=(32, 40), stride_hw=(20, 30))
FLIP = Protocol("ms_flip", (0.5, 1.0), flip=True)


@pytest.mark.parametrize("protocol", [FLIP, SLIDE], ids=["ms_flip", "slide"])
def test_other_protocols_count_the_same_for_any_batch_size_and_number_of_devices(protocol):
    model, sizes_hw = OneConvolution(), [(40, 90), (61, 33), (40, 90), (64, 40), (61, 33), (64, 40), (64, 40)]
    variables = random_variables(model)
    matrices = []
    for batch_size, devices in ((1, 1), (4, 4)):
        results = Segmenter(model, variables, mesh_of(devices), protocol).run(make_examples(sizes_hw), batch_size)
        matrices.append(sum(np.asarray(counts, np.int64) for _, _, counts in results))
    single = Segmenter(model, variables, mesh_of(1)).run(make_examples(sizes_hw), 4)
    assert np.abs(matrices[0] - sum(np.asarray(counts, np.int64) for _, _, counts in single)).sum() > 20
    # Rounding may decide between two classes whose probabilities are equal but for it, here and there.
    assert np.abs(matrices[0] - matrices[1]).sum() <= 4


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


@pytest.mark.parametrize("protocol", [SINGLE_SCALE, FLIP, SLIDE], ids=["ss", "ms_flip", "slide"])
def test_a_batch_on_several_devices_needs_only_sums_between_them(protocol):
    model = OneConvolution()
    segmenter = Segmenter(model, random_variables(model), mesh_of(4), protocol)
    (batch,) = batches(make_examples([(60, 60)] * 4), 4)
    split = parallel.split_by_batch(segmenter.mesh)
    scaled_hw = protocol.scaled_hw(batch.size_hw)
    arrays = jax.device_put((batch.images, batch.size_hw, scaled_hw, batch.labels, batch.label_hw), split)
    static = {"protocol": protocol, "label_canvas_hw": batch.label_canvas_hw}
    program = segment.lower(model, segmenter._variables, *arrays, **static).compile()
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


def test_a_batch_that_a_protocol_makes_smaller_than_the_devices_need_is_told_as_it_was_asked_for(caplog):
    model = OneConvolution()
    segmenter = Segmenter(model, random_variables(model), mesh_of(4), Protocol("ms_flip", (0.5, 2.0), flip=True))
    with caplog.at_level("WARNING", "absl"):
        segmenter.run_known(lambda positions: [], np.zeros((0, 2), np.int32), in_batches_of(8))
    wanted = "1 (8 at single scale: for ms_flip an image takes 8 times the memory)"
    assert f"evaluating 4 images at a time, not {wanted}: there are 4 devices" in caplog.text


def test_smaller_scales_do_not_make_the_batch_larger_than_was_asked_for():
    model, examples = OneConvolution(), list(make_examples([(40, 40)] * 5))
    segmenter = Segmenter(model, random_variables(model), mesh_of(1), Protocol("ms_flip", (0.25, 0.5), flip=True))
    sizes_hw = np.array([(40, 40)] * 5)
    found = segmenter.run_known(lambda positions: (examples[i] for i in positions), sizes_hw, in_batches_of(2))
    assert [len(batch.images) for batch, _, _ in found] == [2, 2, 2]


@pytest.mark.parametrize(
    "batch_size, expected", [(1, [[1], [4], [7], [3], [6], [0], [2], [5]]), (2, [[1, 4], [7], [3, 6], [0, 2], [5]])]
)
def test_images_of_known_sizes_come_canvas_by_canvas_the_largest_first(batch_size, expected):
    sizes_hw = [(20, 20), (60, 90), (30, 31), (90, 60), (60, 90), (10, 20), (88, 60), (61, 90)]
    examples = list(make_examples(sizes_hw))

    def examples_at(positions):
        return (examples[position] for position in positions)

    model = OneConvolution()
    segmenter = Segmenter(model, random_variables(model), mesh_of(1))
    found = list(segmenter.run_known(examples_at, np.array(sizes_hw), in_batches_of(batch_size)))
    assert [[example.index for example in batch.examples] for batch, _, _ in found] == expected
    canvases = {1: (64, 96), 4: (64, 96), 7: (64, 96), 3: (96, 64), 6: (96, 64), 0: (32, 32), 2: (32, 32), 5: (32, 32)}
    for batch, _, _ in found:
        assert batch.images.shape[1:3] == canvases[batch.examples[0].index]
    for batch, labels, _ in found:
        alone, _ = segmenter(batch)
        np.testing.assert_array_equal(labels, alone)


def test_programs_are_dropped_before_there_are_too_many_for_a_process(monkeypatch):
    sizes_hw = [(20, 20), (40, 20), (20, 40), (40, 40), (20, 20)]
    model = OneConvolution()
    variables, expected = random_variables(model), []
    for share, programs in ((0.5, 4), (0.51, 1)):
        monkeypatch.setattr(parallel, "share_of_mappings", lambda share=share: share)
        monkeypatch.setattr(inference, "_compiled", set())
        segment.clear_cache()
        segmenter = Segmenter(model, variables, mesh_of(1))
        labels = [labels for _, labels, _ in segmenter.run(make_examples(sizes_hw), 1)]
        assert segment._cache_size() == programs
        for one, other in zip(labels, expected or labels, strict=True):
            np.testing.assert_array_equal(one, other)
        expected = labels


def test_variables_that_lie_on_the_mesh_are_not_copied():
    def bytes_on_devices():
        return sum(array.nbytes * len(array.devices()) for array in jax.live_arrays())

    variables = jax.device_put({"weights": np.ones(1000, np.float32)}, parallel.replicated(mesh_of(2)))
    before = bytes_on_devices()
    on_the_same = Segmenter(OneConvolution(), variables, mesh_of(2))
    assert bytes_on_devices() == before
    on_others = Segmenter(OneConvolution(), variables, mesh_of(4))
    assert bytes_on_devices() >= before + 4 * 4000
    assert on_the_same.protocol == on_others.protocol  # Both are still there.


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
