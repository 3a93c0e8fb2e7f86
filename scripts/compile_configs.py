"""Compiles a training step of every experiment in configs/ at its own crop and batch, for a device that is not there.

    python scripts/compile_configs.py --target=cpu
    python scripts/compile_configs.py --target=v5e:2x4 --only=voc2012   # Needs libtpu, as `dsnet plan` does.

Experiments are those that the docstrings train. Those whose programs are the same, or differ in rates and epochs alone,
are compiled once. Prints a table of memory and of the time that compiling took; nothing is computed.
"""

import argparse
import hashlib
import re
import runpy
import time
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsnet_jax.config import default_config, load_config
from dsnet_jax.experiment import build_model
from dsnet_jax.plan.programs import Compiled, compile_for, lower_training
from dsnet_jax.plan.targets import find_target, mesh_of
from dsnet_jax.progress import duration
from dsnet_jax.summary import classes_of

CONFIGS = Path(__file__).parents[1] / "configs"


def experiments(only: str) -> dict[str, ConfigDict]:
    """Every experiment that a docstring in configs/ trains and whose name holds `only`, by `file.py:argument`."""
    found = {}
    for file in sorted(CONFIGS.glob("*.py")):
        text = runpy.run_path(str(file))["__doc__"].replace("\\\n", " ")
        for line in text.splitlines():
            if match := re.match(r" +dsnet train --config=configs/(\S+)(.*)", line):
                name, rest = match.groups()
                overrides = [word for word in rest.split() if word.startswith("--config.")]
                if only in name:
                    found[" ".join([name, *overrides])] = load_config([f"--config={CONFIGS / name}", *overrides])
    return found


def training_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The step of an experiment, with the default's rates and epochs: constants of it, which cost neither way."""
    config, default = config.copy_and_resolve_references(), default_config()
    config.training.epochs = default.training.epochs
    for name in ("base_lr", "backbone_lr_multiplier", "head_lr_multiplier", "offset_lr_multiplier"):
        config.optimizer[name] = default.optimizer[name]
    return lower_training(config, build_model(config.model, classes_of(config)), mesh)


def key_of(step: jax.stages.Lowered) -> str:
    """The same for programs that are the same."""
    return hashlib.sha256(step.as_text().encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", help="a target of `dsnet plan`")
    parser.add_argument("--only", default="", help="part of the experiments' names")
    options = parser.parse_args()
    target = find_target(options.target)
    mesh = mesh_of(target)
    print("| experiment | temporaries, GB a device | memory, GB a device | compiled in |\n|---|---:|---:|---:|")
    first = {}
    for name, config in experiments(options.only).items():
        step = training_step(config, mesh)
        same = first.setdefault(key_of(step), name)
        if same != name:
            print(f"| {name} | as {same} | | |", flush=True)
            continue
        began = time.monotonic()
        result = compile_for(target.platform, step)
        took = duration(time.monotonic() - began)
        if isinstance(result, Compiled):
            sizes = f"{result.temporaries / 1e9:.1f} | {result.memory / 1e9:.1f}"
        else:
            sizes = f"too large | {result.memory / 1e9 if result.memory else float('nan'):.1f}"
        print(f"| {name} | {sizes} | {took} |", flush=True)


if __name__ == "__main__":
    main()
