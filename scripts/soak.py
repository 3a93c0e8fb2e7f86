"""Kills a training run again and again, and compares what it ends with to a run that was left alone.

    .venv/bin/python scripts/soak.py --kills=20

Both runs train a ResNet-18 DSNet on the built-in data set, log every step, save every fifth and evaluate eight
times. One of them is killed at random instants, by SIGKILL or SIGTERM: while it starts, between steps, inside a save
and inside an evaluation; and started again by the same command. In the end parameters, optimizer state, batch
statistics, losses of every step, records of every step and scores must be equal, bit for bit. Exit code 0 says that
they are.
"""

import argparse
import collections
import json
import logging
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsnet_jax import cli, parallel
from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.training import loop
from dsnet_jax.training.metrics_log import TIMES

STEPS, EVALUATE_EVERY = 400, 50
INSTANTS = ("while it starts", "between steps", "inside a save", "inside an evaluation")
FIELDS = {
    "data.crop_size_hw": (64, 64),
    "data.batch_size": 8,
    "model.width": 32,
    "training.epochs": STEPS // EVALUATE_EVERY,
    "training.evaluate_every_epochs": 1,
    "training.checkpoint_every_steps": 5,
    "training.log_every_steps": 1,
    "evaluation.batch_size": 25,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the instants and signals")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder, removed)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # What this script calls itself with.
    options = parser.parse_args()
    if options.run:
        return run(options.folder, options.run)
    with tempfile.TemporaryDirectory() as temporary:
        return soak(options.folder or Path(temporary), options.kills, random.Random(options.seed))


def run(root: Path, workdir: Path) -> int:
    """`dsnet train`, which also notes the records of every batch that it is given."""
    original = loop.train_batches

    def noted(*arguments):
        start = arguments[3]
        for step, batch in enumerate(original(*arguments), start=start + 1):
            with Path(f"{workdir}-records.txt").open("a") as file:
                file.write(f"{step} {' '.join(map(str, batch['record']))}\n")
            yield batch

    loop.train_batches = noted
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    config = Path(__file__).parents[1] / "configs" / "shapes_quickstart.py"
    return cli.main(["train", f"--config={config}", f"--workdir={workdir}", f"--config.data.root={root}", *fields])


def soak(folder: Path, kills: int, rng: random.Random) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    if cli.main(["prepare", "shapes", f"--root={folder}"]):
        return 1
    alone, killed = folder / "alone", folder / "killed"
    print("a run that is left alone ...", flush=True)
    if start(folder, alone).wait():
        return 1

    # One kill in each stretch of the run, at an instant of each kind in turn.
    stretches = np.linspace(0, STEPS, kills + 1).astype(int)
    counts, began = collections.Counter(), time.monotonic()
    for kill in range(kills):
        kind = INSTANTS[kill % len(INSTANTS)]
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        process = start(folder, killed)
        wait_for(kind, process, killed, rng.randint(stretches[kill], stretches[kill + 1] - 1), rng)
        process.send_signal(number)
        code = process.wait()
        # Until Python has come as far as to listen, SIGTERM ends it as any process.
        if code not in (-signal.SIGKILL, 143) and (code, kind) != (-signal.SIGTERM, "while it starts"):
            print(f"kill {kill + 1}: {number.name} {kind} ended with exit code {code}")
            return 1
        counts[number.name, kind] += 1
        elapsed = time.monotonic() - began
        steps = [int(path.name) for path in (killed / "checkpoints").glob("*") if path.name.isdigit()]
        saved = f"step {max(steps)} is saved" if steps else "nothing is saved"
        print(f"kill {kill + 1}/{kills}: {number.name} {kind}, {saved}, {elapsed:.0f} s", flush=True)
    if start(folder, killed).wait():
        return 1

    for (name, kind), count in sorted(counts.items()):
        print(f"{count} times {name} {kind}")
    faults = compare(alone, killed)
    print("\n".join(faults) if faults else "equal bit for bit: state, losses, records, scores")
    return 1 if faults else 0


def start(root: Path, workdir: Path) -> subprocess.Popen:
    arguments = [sys.executable, __file__, f"--folder={root}", f"--run={workdir}"]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(kind: str, process: subprocess.Popen, workdir: Path, step: int, rng: random.Random) -> None:
    """Returns at an instant of the wanted kind, at step `step` or after it; at once if the process ends."""

    def is_saving() -> bool:
        return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))

    def is_evaluating() -> bool:
        return last_step(workdir) % EVALUATE_EVERY == 0 and "val_miou" not in last_line(workdir)

    if kind == "while it starts":
        time.sleep(rng.uniform(0, 8))
        return
    at_that = {"inside a save": is_saving, "inside an evaluation": is_evaluating, "between steps": lambda: True}[kind]
    before = last_step(workdir)
    while process.poll() is None:
        now = last_step(workdir)
        if now > before and now >= step and at_that():
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, {"inside a save": 0.1, "inside an evaluation": 1.0, "between steps": 0.5}[kind]))


def last_line(workdir: Path) -> dict:
    """Of metrics.jsonl, the last that is whole; step 0 where there is none."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else {"step": 0}


def last_step(workdir: Path) -> int:
    return last_line(workdir)["step"]


def compare(alone: Path, killed: Path) -> list[str]:
    """What differs, one line each."""
    faults = []
    ours, theirs = arrays_of(killed), arrays_of(alone)
    if ours.keys() != theirs.keys():
        faults.append("the checkpoints hold different leaves")
    faults += [f"{name} differs" for name in ours if ours[name].tobytes() != theirs.get(name, np.zeros(0)).tobytes()]
    print(f"{len(ours)} arrays of step {STEPS} were compared")
    our_lines, their_lines = lines_of(killed), lines_of(alone)
    faults += [f"metrics.jsonl: {a} and {b}" for a, b in zip(our_lines, their_lines, strict=False) if a != b][:5]
    if len(our_lines) != len(their_lines):
        faults.append(f"metrics.jsonl has {len(our_lines)} lines and {len(their_lines)}")
    if Checkpoints(killed, read_only=True).scores != Checkpoints(alone, read_only=True).scores:
        faults.append("the scores differ")
    (our_records, repeated), (their_records, _) = records_of(killed), records_of(alone)
    faults += [
        f"records of step {step} differ" for step in their_records if our_records.get(step) != their_records[step]
    ]
    print(f"{repeated} batches were drawn more than once: steps repeated, and batches that were laid out ahead")
    return faults


def arrays_of(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by name."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax misses a file that it does not need.
    checkpoints = Checkpoints(workdir, read_only=True)
    folder = workdir / "checkpoints" / str(STEPS)
    sharding = parallel.replicated(parallel.local_mesh())
    like = {}
    for name in ("variables", "optimizer"):
        metadata = ocp.StandardCheckpointer().metadata(folder / name).item_metadata
        like[name] = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), metadata.tree)
    trees, _ = checkpoints.restore(like, STEPS)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


def lines_of(workdir: Path) -> list[dict]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def records_of(workdir: Path) -> tuple[dict[int, str], int]:
    """The records of every step, and how many batches were drawn again; different records for one step are a fault."""
    records: dict[int, str] = {}
    repeated = 0
    for line in Path(f"{workdir}-records.txt").read_text().splitlines():
        step, _, ids = line.partition(" ")
        if len(ids.split()) != FIELDS["data.batch_size"]:  # Killed as it was written.
            continue
        repeated += int(step) in records
        if records.setdefault(int(step), ids) != ids:
            records[int(step)] = "different ones at different times"
    return records, repeated


if __name__ == "__main__":
    sys.exit(main())
