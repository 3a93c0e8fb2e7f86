"""An inference protocol on padded canvases against a plain loop over bare images, in time and in what comes out.

    python scripts/compare_protocols.py ms_flip --sizes=50 --check=10

The plain loop compiles the network for each image's own size, without canvas, extent or batches. Both sides see random
images of as many sizes, in turns; compilations are not timed, but counted. The network is a DSNet, of random weights,
or that of a run.
"""

import argparse
import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsnet_jax import parallel
from dsnet_jax.config import default_config
from dsnet_jax.data.pipeline import Example
from dsnet_jax.data.records import spread_evenly
from dsnet_jax.data.transforms import scaled_size_hw
from dsnet_jax.evaluation.canvases import Batch, batches, choose_canvases
from dsnet_jax.evaluation.inference import Segmenter, segment
from dsnet_jax.evaluation.passes import mean_probabilities, passes_over, tile_by_tile
from dsnet_jax.evaluation.protocols import NAMES, Protocol, protocol_named
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.experiment import build_model
from dsnet_jax.ops import Extent, resize_bilinear
from dsnet_jax.ops.normalise import normalise

TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=NAMES)
    parser.add_argument("--sizes", type=int, default=50, help="images, each of another size")
    parser.add_argument("--check", type=int, default=10, help="of these, whose probabilities are compared")
    parser.add_argument("--sides", type=int, nargs=2, default=(160, 415), help="shortest and longest side")
    parser.add_argument("--workdir", help="of a run, whose network and last weights are taken")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--classes", type=int, default=21)
    options = parser.parse_args()
    if options.sizes > (options.sides[1] - options.sides[0] + 1) ** 2:
        parser.error(
            f"there are no {options.sizes} sizes with sides of {options.sides[0]} to {options.sides[1]} pixels"
        )

    parallel.configure()
    config = default_config()
    config.model.update(backbone=options.backbone, width=options.width, deep_supervision=False)
    config.evaluation.slide_crop_hw = (192, 192)
    protocol = protocol_named(options.protocol, config)
    if options.workdir:
        trained = load_trained(options.workdir)
        model, variables = trained.model, trained.variables
    else:
        model = build_model(config.model, options.classes)
        variables = jax.device_put(random_variables(model))
    made = make_batches(options.sizes, options.sides, protocol)
    print_padding(made, protocol)
    print_times(*time_both(model, variables, made, protocol))
    if options.check:
        checked = [made[position] for position in spread_evenly(options.check, len(made))]
        print_differences(model, variables, checked, protocol)


def random_variables(model: nn.Module) -> dict:
    """Not a network's own start, at which batch normalisation does nothing and all offsets are zero."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 4:
            return values * (2 / np.prod(leaf.shape[:3])) ** 0.5
        return 0.3 * values if path[-1].key in ("mean", "bias") else np.exp(0.3 * values)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_batches(sizes: int, sides: tuple[int, int], protocol: Protocol) -> list[Batch]:
    """Batches of one image each, on the canvases that an evaluation of these images would choose."""
    rng = np.random.default_rng(0)
    chosen = set()
    while len(chosen) < sizes:
        chosen.add(tuple(rng.integers(sides[0], sides[1] + 1, 2).tolist()))
    canvases = choose_canvases(np.array(sorted(chosen)), 1.0, protocol, 1)
    examples = [
        # Blocks of colour, as photographs have them, and noise.
        Example(index, str(size_hw), _blocks(rng, size_hw), None, size_hw)
        for index, size_hw in enumerate(sorted(chosen))
    ]
    return list(batches(examples, 1, canvases_of=lambda example: canvases[example.label_hw]))


def _blocks(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    blocks = rng.integers(0, 256, (-(-size_hw[0] // 16), -(-size_hw[1] // 16), 3)).repeat(16, 0).repeat(16, 1)
    noisy = blocks[: size_hw[0], : size_hw[1]] + rng.normal(0, 20, (*size_hw, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def plain_probabilities(model: nn.Module, protocol: Protocol, variables: dict, image: jax.Array) -> jax.Array:
    """The mean softmax of all passes over a bare image, uint8 [H, W, 3] -> [H, W, K], as one would write it down.

    The network takes normalised images.
    """
    size_hw = image.shape[:2]
    bare = partial(model.apply, variables, train=False)
    stride = 64 // jax.eval_shape(bare, jnp.zeros((1, 64, 64, 3))).logits.shape[1]
    image = normalise(image[None])

    def seen(images: jax.Array, shape_hw: tuple[int, int]) -> jax.Array:
        logits = bare(images).logits
        ratio_hw = tuple(size / shape / stride for size, shape in zip(images.shape[1:3], shape_hw, strict=True))
        return jax.nn.softmax(resize_bilinear(logits, shape_hw, ratio_hw), axis=-1)

    if protocol.crop_hw:
        total, times = 0, np.zeros(size_hw)
        for top in _starts(size_hw[0], protocol.crop_hw[0], protocol.stride_hw[0]):
            for left in _starts(size_hw[1], protocol.crop_hw[1], protocol.stride_hw[1]):
                inside = np.s_[top : top + protocol.crop_hw[0], left : left + protocol.crop_hw[1]]
                window = image[:, *inside]
                part = seen(window, window.shape[1:3])[0]
                below, beside = size_hw[0] - top - part.shape[0], size_hw[1] - left - part.shape[1]
                total += jnp.pad(part, ((top, below), (left, beside), (0, 0)))
                times[inside] += 1
        return total / times[..., None]
    total = 0
    for scale in protocol.scales:
        scaled = resize_bilinear(image, scaled_size_hw(size_hw, scale))
        if protocol.flip:
            upright, mirrored = seen(jnp.concatenate([scaled, scaled[:, :, ::-1]]), size_hw)
            total += upright + mirrored[:, ::-1]
        else:
            total += seen(scaled, size_hw)[0]
    return total / (len(protocol.scales) * (2 if protocol.flip else 1))


def _starts(side: int, crop: int, stride: int) -> list[int]:
    starts = [0]
    while starts[-1] + crop < side:
        starts.append(min(starts[-1] + stride, side - crop))
    return starts


def time_both(model: nn.Module, variables: dict, made: list[Batch], protocol: Protocol) -> np.ndarray:
    """Seconds of every image, ours and the plain loop's, [2, N]: medians of turns. Compares the labels.

    The plain loop's program is made anew for each image, and dropped: a process may not map the code of hundreds.
    """
    segmenter = Segmenter(model, variables, parallel.local_mesh(), protocol)
    before, began = segment._cache_size(), time.perf_counter()
    for batch in made:
        jax.block_until_ready(segmenter(batch))
    took, compiled = time.perf_counter() - began, segment._cache_size() - before
    print(f"ours: {compiled} programs, {took:.0f} s to compile (or find) and run them once", flush=True)
    seconds, took, agreeing, pixels = np.zeros((2, TURNS, len(made))), 0.0, 0, 0
    for index, batch in enumerate(made):
        plain = jax.jit(partial(plain_labels, model, protocol))
        sides = partial(segmenter, batch), partial(plain, variables, batch.examples[0].image)
        began = time.perf_counter()
        expected = np.asarray(sides[1]())
        took += time.perf_counter() - began
        [(_, labels)] = batch.cropped(sides[0]()[0])
        agreeing, pixels = agreeing + np.sum(labels == expected), pixels + labels.size
        for turn in range(TURNS):
            for side, function in enumerate(sides):
                began = time.perf_counter()
                jax.block_until_ready(function())
                seconds[side, turn, index] = time.perf_counter() - began
    print(f"the plain loop: {len(made)} programs, {took:.0f} s to compile (or find) and run them once")
    print(f"labels of all {len(made)} images: {100 * agreeing / pixels:.4f} % are the same")
    return np.median(seconds, axis=1)


def plain_labels(model: nn.Module, protocol: Protocol, variables: dict, image: jax.Array) -> jax.Array:
    return jnp.argmax(plain_probabilities(model, protocol, variables, image), axis=-1).astype(jnp.uint8)


def print_padding(made: list[Batch], protocol: Protocol) -> None:
    canvases = {batch.images.shape[1:3] for batch in made}
    computed = sum(int(protocol.pixels(np.array(batch.images.shape[1:3]), 32)) for batch in made)
    true = sum(int(protocol.pixels(batch.size_hw[0])) for batch in made)
    print(f"{protocol.name}: {len(made)} images of as many sizes on {len(canvases)} canvases")
    print(f"pixels seen over pixels of the bare images' passes: {computed / true:.3f}")


def print_times(ours: np.ndarray, theirs: np.ndarray) -> None:
    print(f"ours {ours.sum():.1f} s, the plain loop {theirs.sum():.1f} s: {ours.sum() / theirs.sum():.3f} of its time")
    print(f"image by image, the median ratio: {np.median(ours / theirs):.3f}")


def print_differences(model: nn.Module, variables: dict, made: list[Batch], protocol: Protocol) -> None:
    """Of the probabilities, which `dsnet evaluate` never holds as a whole."""

    @partial(jax.jit, static_argnums=3)
    def ours(variables: dict, batch: tuple, scaled_hw: jax.Array, canvas_hw: tuple[int, int]) -> jax.Array:
        images, size_hw = batch
        extent = Extent(size_hw, images.shape[1:3])
        images = extent.zero_outside(normalise(images))
        network = partial(model.apply, variables, train=False)
        passes = passes_over(
            lambda *seen: network(*seen).logits, images, extent, scaled_hw, size_hw, canvas_hw, protocol
        )
        return tile_by_tile(mean_probabilities, passes)

    largest, agreeing, pixels = 0.0, 0, 0
    for batch in made:
        height, width = batch.examples[0].label_hw
        scaled_hw = protocol.scaled_hw(batch.size_hw)
        found = np.asarray(ours(variables, (batch.images, batch.size_hw), scaled_hw, batch.label_canvas_hw))
        theirs = jax.jit(partial(plain_probabilities, model, protocol))  # One program at a time, as above.
        found, expected = found[0, :height, :width], np.asarray(theirs(variables, batch.examples[0].image))
        difference = np.abs(found - expected).max()
        same = found.argmax(-1) == expected.argmax(-1)
        print(
            f"{height} x {width} on {batch.label_canvas_hw}: probabilities differ by {difference:.1e} at most, "
            f"{100 * same.mean():.4f} % of the labels are the same, {len(np.unique(found.argmax(-1)))} classes",
            flush=True,
        )
        largest, agreeing, pixels = max(largest, difference), agreeing + same.sum(), pixels + same.size
    print(f"{len(made)} images: by {largest:.1e} at most, {100 * agreeing / pixels:.4f} % of the labels are the same")


if __name__ == "__main__":
    main()
