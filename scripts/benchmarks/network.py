"""DSNet's inference and training step, beside the same network put together from torchvision's parts.

Ours are the programs that `dsnet evaluate` and `dsnet train` compile, copying a batch to the devices included: from
uint8 images to labels at their size, and forward, backward and update. There is no deep supervision on either side.
PyTorch's network is in channels_last, its fastest layout, starts from normalised images, and does not look whether a
step is finite.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import harness

from dsnet_jax import parallel
from dsnet_jax.config import default_config
from dsnet_jax.data.pipeline import Example
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.canvases import batches, choose_canvases
from dsnet_jax.evaluation.inference import Segmenter
from dsnet_jax.evaluation.protocols import SINGLE_SCALE
from dsnet_jax.experiment import build_model
from dsnet_jax.training.program import check_shares, lower_step, step_of

ROUNDS = 7
OURS, THEIRS = "dsnet_jax", "PyTorch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, and what goes through it."""
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--output-stride", type=int, default=16, choices=(8, 16, 32))
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--size-hw", type=int, nargs=2, default=(512, 512), help="of the images, pixels")
    parser.add_argument("--batch", type=int, default=2)


def run(options: argparse.Namespace) -> harness.Report:
    """Measures.

    Raises:
      InputError: no such network, a size that is no multiple of its output stride, or a batch of one or one that the
        devices cannot share.
      RuntimeError: PyTorch's network is not ours, or a training step was not finite.
    """
    if any(side % options.output_stride for side in options.size_hw):
        raise InputError(f"--size-hw is {options.size_hw}: multiples of --output-stride are needed", exit_code=2)
    if options.batch < 2:
        raise InputError("--batch is less than 2: image pooling is normalised over the batch", exit_code=2)
    work, figures = _ours(options)
    flags = ["--size-hw", *options.size_hw]
    flags += [f"--{name}={getattr(options, name)}" for name in ("backbone", "width", "classes", "batch", "threads")]
    with harness.peer(options, "network_torch.py", [*flags, f"--output-stride={options.output_stride}"]) as peer:
        if peer and (theirs := peer.ask("parameters")["result"]) != figures["parameters"]:
            raise RuntimeError(f"ours has {figures['parameters']} parameters, PyTorch's {theirs}: not the same network")
        tasks = []
        for what, ours in work.items():
            seconds = harness.in_turns({OURS: ours, THEIRS: peer and partial(peer.seconds, what)}, options)
            tasks.append(harness.Task(what, seconds, [(OURS, THEIRS)]))
        return harness.Report(tasks, {"ours": figures}, peer and peer.versions)


def _ours(options: argparse.Namespace) -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """What does each piece of work once, and what is known of the programs."""
    config = default_config()
    config.model.update(backbone=options.backbone, width=options.width, output_stride=options.output_stride)
    config.model.deep_supervision = False
    config.data.update(batch_size=options.batch, crop_size_hw=tuple(options.size_hw))
    model = build_model(config.model, options.classes)
    rng, size_hw = np.random.default_rng(0), tuple(options.size_hw)
    images = rng.integers(0, 256, (options.batch, *size_hw, 3), np.uint8)
    labels = rng.integers(0, options.classes, (options.batch, *size_hw), np.uint8)

    mesh = parallel.global_mesh()
    check_shares(config, mesh.size)
    fresh_state, step_function = step_of(config, model, steps=10**6)  # So many that the rate does not end.
    state = jax.jit(fresh_state, out_shardings=parallel.replicated(mesh))()
    step = lower_step(config, step_function, state, mesh).compile()
    figures = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"])),
        "temporaries of the training step, MB": step.memory_analysis().temp_size_in_bytes / 1e6,
    }
    copies = jax.tree.map(jnp.copy, state.variables)  # A step takes the memory of its state.
    segmenter = Segmenter(model, copies, parallel.local_mesh())
    examples = [Example(index, str(index), image, None, size_hw) for index, image in enumerate(images)]
    canvases = choose_canvases(np.array([size_hw]), 1.0, SINGLE_SCALE, options.batch)
    [to_label] = batches(examples, options.batch, canvases_of=lambda example: canvases[example.label_hw])
    to_learn = {"image": images, "label": labels, "stop_requested": np.zeros(mesh.size, np.int32)}

    def inference() -> float:
        began = time.perf_counter()
        jax.block_until_ready(segmenter(to_label))
        return time.perf_counter() - began

    def training() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, parallel.put_batch(mesh, to_learn)))
        seconds = time.perf_counter() - began
        if not metrics["finite"]:
            raise RuntimeError("a training step of random images was not finite")
        return seconds

    return {"inference": inference, "training": training}, figures
