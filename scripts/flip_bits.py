"""Flips bits of a checkpoint, one at a time, and counts how many restores notice.

    .venv/bin/python scripts/flip_bits.py                       # A state of a narrow DSNet-R18
    .venv/bin/python scripts/flip_bits.py --workdir=runs/mine   # The newest checkpoint of a run: a copy of it

Every file of the checkpoint, Orbax's own included, gets at least one flip. A flip is noticed when restoring ends in an
error of one line; harmless when every array is restored as before, bit for bit, since the byte does not matter; and
silent otherwise: then, or if another exception is raised, this exits with 1.
"""

import argparse
import collections
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.config import load_config
from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model
from dsnet_jax.progress import track
from dsnet_jax.training.optimizer import sgd
from dsnet_jax.training.step import initial_state

CONFIG = Path(__file__).parent.parent / "configs" / "camvid_dsnet_r18.py"
OUTCOMES = ("noticed by checksum", "noticed in reading", "harmless", "SILENT", "another exception")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir, rng = Path(folder), np.random.default_rng(options.seed)
        if options.workdir is None:
            save_random_state(workdir, rng)
        else:
            copy_newest(options.workdir, workdir)
        sys.exit(flip_and_restore(workdir, options.flips, rng))


def save_random_state(workdir: Path, rng: np.random.Generator) -> None:
    """Saves a state of a narrow DSNet-R18, its momentum and averages included, of random numbers, as step 1."""
    config = load_config([f"--config={CONFIG}", "--config.model.width=32"])
    optimizer = sgd(**{k: v for k, v in config.optimizer.items() if k not in ("base_lr", "poly_power")})
    shapes = jax.eval_shape(lambda: initial_state(build_model(config.model, 11), optimizer, 0, ema_decay=0.999))
    state = jax.tree.map(lambda leaf: np.asarray(rng.normal(0, 9, leaf.shape), leaf.dtype), shapes)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, jax.device_put(state.to_trees()), {"seed": 0})
    checkpoints.close()


def copy_newest(source: Path, workdir: Path) -> None:
    step = str(Checkpoints(source, read_only=True).steps()[-1])
    shutil.copytree(source / "checkpoints" / step, workdir / "checkpoints" / step)


def flip_and_restore(workdir: Path, flips: int, rng: np.random.Generator) -> int:
    """Flips that many bits, one after the other, prints what came of them, and returns the exit code."""
    step = Checkpoints(workdir, read_only=True).steps()[-1]
    folder = workdir / "checkpoints" / str(step)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = np.array([file.stat().st_size for file in files])
    if flips < len(files):
        sys.exit(f"{len(files)} files need at least as many flips")
    # Each file once, then half by size, half evenly: the largest are read as they are, the small ones interpreted.
    chances = (sizes / sizes.sum() + 1 / len(files)) / 2
    chosen = [*range(len(files)), *rng.choice(len(files), flips - len(files), p=chances)]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like: dict[str, Any] = {}
    for tree in sorted(path.parent.name for path in folder.glob("*/_METADATA")):
        metadata = ocp.StandardCheckpointer().metadata(folder / tree).item_metadata.tree
        like[tree] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), metadata
        )
    untouched = restored_bytes(workdir, like)

    counts = {file: collections.Counter() for file in files}
    messages: dict[Path, str] = {}
    for index in track(chosen, "flipping bits"):
        file = files[index]
        original = file.read_bytes()
        flipped = bytearray(original)
        flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        try:
            outcome = "harmless" if restored_bytes(workdir, like) == untouched else "SILENT"
        except InputError as error:
            # The advice in the middle is the same for all.
            what, _, arrays = str(error).removeprefix(f"{folder}: damaged, ").partition(": no other step is there")
            messages[file] = f"{what}: {arrays.splitlines()[1]}" if "\n" in arrays else what
            outcome = "noticed by checksum" if "\n" in arrays else "noticed in reading"
        except Exception as error:
            messages[file] = repr(error)
            outcome = "another exception"
        counts[file][outcome] += 1
        file.write_bytes(original)
    assert restored_bytes(workdir, like) == untouched

    table = Table("bytes", "flips", *OUTCOMES, "file, and how the last message begins")
    for file in files:
        name = "/".join(part[:8] if len(part) == 32 else part for part in file.relative_to(folder).parts)
        row = [counts[file][outcome] for outcome in OUTCOMES]
        said = f"{name}\n  {messages[file][:90]}" if file in messages else name
        table.add_row(f"{file.stat().st_size:,}", *map(str, (sum(row), *row)), said)
    together = [sum(count[outcome] for count in counts.values()) for outcome in OUTCOMES]
    table.add_row(f"{sizes.sum():,}", *map(str, (sum(together), *together)), "together")
    Console(width=180).print(table)
    return int(together[-2] + together[-1] > 0)


def restored_bytes(workdir: Path, like: dict[str, Any]) -> dict[str, bytes]:
    """Every array as restored, by name."""
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        trees, _ = checkpoints.restore(like)
    finally:
        checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


if __name__ == "__main__":
    main()
