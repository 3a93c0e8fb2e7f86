"""A whole evaluation of a prepared split, in images a second, beside a plain PyTorch loop that does the same work.

    python scripts/benchmark.py evaluation --config=configs/camvid_dsnet_r18.py --root=datasets

Read, decode, scale by data.image_scale, label at the label's own size, count the confusion matrix. Ours lays images on
canvases, evaluation.batch_size at a time, and also counts the pixels near outlines. PyTorch takes one image after the
other at its own size, in channels_last. The network is that of --config with random weights, or that of a run,
--workdir; PyTorch's weights are always random.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from benchmarks import harness
from ml_collections import ConfigDict

from dsnet_jax.config import default_config, load_config
from dsnet_jax.data.records import Split, open_split
from dsnet_jax.errors import InputError
from dsnet_jax.evaluation.evaluate import Evaluation, evaluate
from dsnet_jax.evaluation.protocols import NAMES, Protocol, protocol_named
from dsnet_jax.evaluation.trained import load_trained
from dsnet_jax.experiment import build_model, initial_variables

ROUNDS = 3
THEIRS = "PyTorch, image by image"
COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX records it, also for what its cache on disk gave.
SAME = ("backbone", "width", "output_stride", "sampling_kernel")  # Fields of config.model that PyTorch's side is told.
TRAINING_ONLY = ("dropout", "aspp_dropout", "deep_supervision", "deep_supervision_weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network and the split; --config=FILE and --config.FIELD=VALUE are read as everywhere."""
    parser.add_argument("--workdir", help="of a run, whose network and last weights are taken; instead of --config")
    parser.add_argument("--root", help="where prepared data sets lie (default: config.data.root)")
    parser.add_argument("--split", help="of the data set (default: config.data.eval_split)")
    others = [name for name in NAMES if name != "ss"]
    parser.add_argument("--protocols", nargs="+", default=(), choices=others, help="timed besides ss")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures.

    Raises:
      InputError: the config, the run or the split cannot be used, or PyTorch's side does not have this network.
      RuntimeError: both sides did not count the same number of pixels.
    """
    config, model, variables, split = _network(options)
    protocols = [protocol_named(name, config) for name in dict.fromkeys(["ss", *options.protocols])]
    names = {protocol: f"dsnet_jax, {protocol.name}" for protocol in protocols}
    found: dict[Protocol, Evaluation] = {}
    compiled = dict.fromkeys(protocols, 0)

    def ours(protocol: Protocol) -> float:
        with _compilations() as programs:
            began = time.perf_counter()
            found[protocol] = evaluate(model, variables, split, config, protocol=protocol)
            seconds = time.perf_counter() - began
        compiled[protocol] += len(programs)
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        flags = []
        if options.peer_python:
            flags = [folder, *same_network(config), f"--classes={split.spec.num_classes}"]
            flags.append(f"--image-scale={config.data.image_scale}")
            write_for_peer(split, Path(folder))
        with harness.peer(options, "evaluation_torch.py", [*flags, f"--threads={options.threads}"]) as peer:
            sides = {names[protocol]: partial(ours, protocol) for protocol in protocols}
            seconds = harness.in_turns(sides | {THEIRS: peer and partial(peer.seconds, "evaluate")}, options)
            versions = peer and peer.versions
            theirs = peer and peer.ask("pixels")["result"]
    single_scale, *others = protocols
    pixels = int(found[single_scale].matrix.sum())
    if peer and pixels != theirs:
        raise RuntimeError(f"ours counted {pixels} pixels, PyTorch's side {theirs}: not the same work")
    pairs = [(names[single_scale], THEIRS), *((names[protocol], names[single_scale]) for protocol in others)]
    figures = {
        names[protocol]: {
            "images": found[protocol].images,
            "programs compiled, in all rounds together": compiled[protocol],
            "pixels computed over pixels of the images": found[protocol].padded_share,
            "images computed only to fill batches": found[protocol].padding_images,
        }
        for protocol in protocols
    }
    return harness.Report(
        [harness.Task(f"{split.spec.name} {split.name}", seconds, pairs, len(split))], figures, versions
    )


def _network(options: argparse.Namespace) -> tuple[ConfigDict, nn.Module, Any, Split]:
    """The config, its network with weights, and the split."""
    if options.workdir:
        if options.config_flags:
            raise InputError(f"{options.config_flags[0]}: --workdir has its own config", exit_code=2)
        trained = load_trained(options.workdir)
        config, model, variables = trained.config, trained.model, trained.variables
    else:
        config, model, variables = load_config(options.config_flags), None, None
    split = open_split(options.root or config.data.root, config.data.name, options.split or config.data.eval_split)
    if model is None:
        model = build_model(config.model, split.spec.num_classes)
        variables = jax.jit(partial(initial_variables, model, config.seed))()
    return config, model, variables, split


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """A list to which the name of each program is added that is compiled within the context."""
    names = []

    def listen(event: str, _: float, **about: Any) -> None:
        if event == COMPILATION:
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def same_network(config: ConfigDict) -> list[str]:
    """The flags that say to PyTorch's side which network it is.

    Raises:
      InputError: it does not have the config's network.
    """
    default = default_config().model
    other = [
        field
        for field, value in config.model.items()
        if field not in SAME + TRAINING_ONLY and value != default.get(field)
    ]
    if other:
        fields = ", ".join(f"config.model.{field}={config.model[field]!r}" for field in other)
        raise InputError(f"{fields}: PyTorch's side does not have this network, leave --peer-python out", exit_code=2)
    return [f"--{field.replace('_', '-')}={config.model[field]}" for field in SAME]


def write_for_peer(split: Split, folder: Path) -> None:
    """Writes a split's files as they were prepared: images/ and labels/, by position.

    Raises:
      InputError: it has no labels.
    """
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for index in range(len(split)):
        record = split[index]
        if record.label is None:
            raise InputError(
                f"split {split.name!r} of {split.spec.name} has no labels to score: choose another --split"
            )
        (folder / "images" / f"{index:06}").write_bytes(record.image)
        (folder / "labels" / f"{index:06}").write_bytes(record.label)
