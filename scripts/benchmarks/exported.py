"""A network exported to StableHLO and ONNX beside the network itself: the same labels, and the time for an image.

    python scripts/benchmark.py exported --workdir=runs/camvid_dsnet_r18 --size-hw 360 480

From an image to its labels, one image at a time. The images are the first ones of the run's split that have this size,
at most eight. Ours is `dsnet_jax.load`. StableHLO is called by JAX, from a file for any size and one for this size;
ONNX by onnxruntime. There is no PyTorch side.
"""

import argparse
import importlib.util
import itertools
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from benchmarks import harness

import dsnet_jax
from dsnet_jax.data.decoding import decode_image
from dsnet_jax.data.records import Split, open_split
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.trained import Trained
from dsnet_jax.weights.export import export
from dsnet_jax.weights.stablehlo import PROGRAM

ROUNDS = 5
OURS = "dsnet_jax"
IMAGES = 8
Labelling = Callable[[np.ndarray], np.ndarray]  # uint8 [1, H, W, 3] -> uint8 [1, H, W].


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the size."""
    parser.add_argument("--workdir", required=True, help="of a run, whose network and last weights are taken")
    parser.add_argument("--size-hw", type=int, nargs=2, required=True, metavar=("HEIGHT", "WIDTH"), help="of images")
    parser.add_argument("--root", help="where prepared data sets lie (default: config.data.root)")
    parser.add_argument("--split", help="of the data set (default: config.data.eval_split)")
    parser.add_argument("--fold-batch-norm", action="store_true", help="in what is exported")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures.

    Raises:
      InputError: onnxruntime is not installed, the run cannot be used, or no image of its split has this size.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise InputError("onnxruntime is not installed: install it with `pip install -e '.[export]'`", exit_code=2)
    network = dsnet_jax.load(options.workdir)
    data = network.trained.config.data
    split = open_split(options.root or data.root, data.name, options.split or data.eval_split)
    images = _images(split, tuple(options.size_hw))
    with tempfile.TemporaryDirectory() as folder:
        sides = {OURS: lambda image: np.stack(network.predict(image))}
        sides |= _exported(network.trained, Path(folder), options)
    labels: dict[str, list[np.ndarray]] = {}

    def timed(name: str, label: Labelling) -> harness.Side[float]:
        def side() -> float:
            began = time.perf_counter()
            labels[name] = [label(image[None]) for image in images]
            return (time.perf_counter() - began) / len(images)

        return side

    seconds = harness.in_turns({name: timed(name, label) for name, label in sides.items()}, options)
    expected = np.concatenate(labels[OURS])
    agreement = {
        name: 100 * float(np.mean(np.concatenate(found) == expected)) for name, found in labels.items() if name != OURS
    }
    height, width = options.size_hw
    task = harness.Task(f"an image of {height} x {width}", seconds, [(OURS, name) for name in agreement])
    figures = {"pixels labelled as by ours, percent": agreement, "images": {"of this size": len(images)}}
    return harness.Report([task], figures, None)


def _images(split: Split, size_hw: tuple[int, int]) -> list[np.ndarray]:
    of_this_size = np.flatnonzero((np.asarray(split.sizes_hw) == size_hw).all(axis=1))
    if not len(of_this_size):
        raise InputError(f"{split.spec.name} {split.name} has no image of {size_hw}: give another --size-hw")
    records = (split[int(index)] for index in itertools.islice(of_this_size, IMAGES))
    return [decode_image(record.image, record.id) for record in records]


def _exported(trained: Trained, folder: Path, options: argparse.Namespace) -> dict[str, Labelling]:
    """What each file does, read back."""
    import onnxruntime

    def write(name: str, kind: str, size_hw: tuple[int, int] | None) -> Path:
        size = {"size_hw": size_hw, "folded": options.fold_batch_norm}
        export(trained.config, trained.spec, trained.variables, trained.step, folder / name, kind, **size)
        return folder / name

    def program(name: str, size_hw: tuple[int, int] | None) -> Callable:
        with zipfile.ZipFile(write(name, "stablehlo", size_hw)) as file:
            return jax.jit(jax.export.deserialize(bytearray(file.read(PROGRAM))).call)

    size_hw = tuple(options.size_hw)
    any_size, this_size = program("any", None), program("one", size_hw)
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(write("onnx", "onnx", size_hw), threads, providers=["CPUExecutionProvider"])
    return {
        "StableHLO, any size": lambda image: np.asarray(any_size(image)),
        "StableHLO, this size": lambda image: np.asarray(this_size(image)),
        "ONNX, onnxruntime": lambda image: session.run(["labels"], {"image": image})[0],
    }
