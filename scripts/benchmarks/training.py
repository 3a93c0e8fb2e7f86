"""A whole training, from the first command to the last score, beside the same training in plain PyTorch.

    python scripts/benchmark.py training --config=configs/camvid_dsnet_r18.py --config.data.root=datasets --epochs=5

Ours is `dsnet train` in a process of its own: its start, compilation (nothing is cached), reading and decoding,
checkpoints and evaluations are all in the time. PyTorch's side trains the same network on the same crops, batches and
epochs, all parts at the poly schedule of the base learning rate, and scores it as often; its start, and decoding every
image once, are not in its time. With segmentation_models_pytorch in the other Python its DeepLabV3+ of the same
backbone is trained too (--with-smp), which is another network. A turn is a whole training.
"""

import argparse
import contextlib
import json
import operator
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.evaluation import same_network, write_for_peer
from ml_collections import ConfigDict

from dsnet_jax.config import load_config
from dsnet_jax.data.records import open_split
from dsnet_jax.errors import InputError

ROUNDS = 1
DSNET = [sys.executable, "-m", "dsnet_jax"]
OURS, THEIRS, SMP = "dsnet_jax", "PyTorch, the same network", "PyTorch, segmentation_models' DeepLabV3+"

THEIRS_ALWAYS = {  # Fields that its side is not told, as it trains.
    "data.flip_probability": 0.5,
    "data.scale_box": (),
    "model.aspp_dropout": 0.0,
    "model.dropout": 0.1,
    "model.deep_supervision": False,
    "optimizer.poly_power": 0.9,
    "optimizer.momentum": 0.9,
    "optimizer.decay_norm_and_bias": True,
    "optimizer.backbone_lr_multiplier": 1.0,
    "optimizer.head_lr_multiplier": 1.0,
    "optimizer.offset_lr_multiplier": 1.0,
    "training.accumulation_steps": 1,
    "training.ema_decay": 0.0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The epochs; --config=FILE and --config.FIELD=VALUE are read as everywhere."""
    parser.add_argument("--epochs", type=int, help="of each training, with its whole schedule (default: the config's)")
    parser.add_argument("--with-smp", action="store_true", help="also train segmentation_models_pytorch's DeepLabV3+")


def run(options: argparse.Namespace) -> harness.Report:
    """Measures.

    Raises:
      InputError: the config or its data cannot be used, PyTorch's side does not have this network, or a training fails.
    """
    if options.epochs is not None:
        options.config_flags = [*options.config_flags, f"--config.training.epochs={options.epochs}"]
    config = load_config(options.config_flags)
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        flags = _flags(config, Path(folder)) if options.peer_python else []

        def start(network: str) -> harness.Peer | None:
            arguments = [*flags, f"--network={network}", f"--threads={options.threads}"]
            return stack.enter_context(harness.peer(options, "training_torch.py", arguments))

        def theirs(name: str, peer: harness.Peer) -> float:
            answer = peer.ask("train")
            scores[name] = answer["result"]
            return answer["seconds"]

        peers = {THEIRS: start("dsnet")} | ({SMP: start("smp_deeplabv3plus")} if options.with_smp else {})
        sides = {OURS: partial(_train, options.config_flags, scores)}
        sides |= {name: peer and partial(theirs, name, peer) for name, peer in peers.items()}
        seconds = harness.in_turns(sides, options, warm_up=0)
        versions = peers[THEIRS] and peers[THEIRS].versions
    task = harness.Task(f"{config.training.epochs} epochs", seconds, [(OURS, name) for name in peers])
    figures = {f"{name}, scores of the last training": of for name, of in scores.items()}
    return harness.Report([task], figures, versions)


def _train(config_flags: list[str], scores: dict[str, dict[str, float]]) -> float:
    """One training of ours, in seconds; its scores go into `scores`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*DSNET, "train", *config_flags, f"--workdir={folder}/run"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        began = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise InputError(f"dsnet train ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        last = next(line for line in reversed(lines) if "val_miou" in line)
        scores[OURS] = {"mIoU": last["val_miou"], "pixel accuracy": last["val_pixel_accuracy"]}
    return seconds


def _flags(config: ConfigDict, folder: Path) -> list[Any]:
    """Writes both splits' files as they were prepared, and gives the flags for PyTorch's side."""
    splits = {
        "train": open_split(config.data.root, config.data.name, config.data.train_split),
        "val": open_split(config.data.root, config.data.name, config.data.eval_split),
    }
    network = same_network(config)
    ours = {name: operator.attrgetter(name)(config) for name in THEIRS_ALWAYS}
    if other := [f"config.{name}={value!r}" for name, value in ours.items() if value != THEIRS_ALWAYS[name]]:
        raise InputError(f"{', '.join(other)}: PyTorch's side does not train so, leave --peer-python out", exit_code=2)
    for name, split in splits.items():
        write_for_peer(split, folder / name)
    return [
        folder,
        *network,
        f"--classes={splits['train'].spec.num_classes}",
        f"--image-scale={config.data.image_scale}",
        "--crop-size-hw",
        *config.data.crop_size_hw,
        "--scale-range",
        *config.data.scale_range,
        f"--batch-size={config.data.batch_size}",
        f"--epochs={config.training.epochs}",
        f"--evaluate-every-epochs={config.training.evaluate_every_epochs}",
        f"--base-lr={config.optimizer.base_lr}",
        f"--weight-decay={config.optimizer.weight_decay}",
    ]
