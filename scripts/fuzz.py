"""Damages images, masks, archives and weights at random, and gives them to `dsnet prepare`, `predict` and `port`.

    .venv/bin/python scripts/fuzz.py --count=1000 --seed=0 --source=CamVid

Each round puts many damaged files through the real commands in one process, with a limit on its time and its address
space. The commands must end with 0 or 1, without a traceback, and name every file that they refuse; what is whole must
be accepted. What fails is kept, and the folder is printed. The same seed gives the same files.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from damaged_files import class_list, damage, palette_png, sample_archives, sample_images, sample_masks
from safetensors.numpy import save as safetensors_bytes

PACKAGE_FOLDER = Path(__file__).parents[1]
SECONDS = 600  # For a round.
ADDRESS_SPACE = 12 * 2**30  # Of a process, most of it reserved by JAX and never touched.
PEAK_MEMORY = 2.5e9  # Bytes that a process may really use.
LABELLED_PIXELS = 480 * 384  # Of a canvas in `dsnet predict`: every canvas is compiled for.


@dataclass
class Result:
    """How a command ended: its exit code, None if it raised; and what it printed."""

    code: int | None
    output: str


@dataclass
class Round:
    """Damaged files, and what came of them.

    Attributes:
      folder: that holds them.
      kinds: what each file was before it was damaged, by path; None: it is whole, and must be accepted.
      faults: what should not have happened.
      counts: of (kind, command, "accepted" or "refused").
    """

    folder: Path
    kinds: dict[Path, str | None] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    counts: collections.Counter = field(default_factory=collections.Counter)

    def write(self, name: str, data: bytes, kind: str | None):
        """Adds a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.kinds[path] = kind

    def judge(self, command: list[str], result: Result):
        """Notes what no input may cause."""
        if result.code not in (0, 1) or "Traceback" in result.output:
            self.faults.append(f"exit code {result.code} of dsnet {' '.join(command)}:\n{result.output[-3000:]}")

    def count(self, path: Path, command: str, accepted: bool, output: str):
        """Counts a file; one that was refused must have been named."""
        kind = self.kinds[path]
        self.counts[kind or "whole", command, "accepted" if accepted else "refused"] += 1
        if kind is None and not accepted:
            self.faults.append(f"{path} is whole, and {command} refused it:\n{output[-3000:]}")
        if not accepted and str(path) not in output:
            self.faults.append(f"{command} refused {path} without naming it:\n{output[-3000:]}")


Runner = Callable[[list[list[str]]], list[Result]]


def image_round(folder: Path, count: int, rng: np.random.Generator, source: Path | None, workdir: Path, run: Runner):
    """A data set of `count` pairs, one file of each damaged, and a whole pair, is prepared, and its images labelled."""
    images = sample_images(rng, source)
    whole = next(iter(images.values()))[0]
    masks = sample_masks(rng, cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR).shape[:2])
    every_file = [data for files in (images | masks).values() for data in files]
    fuzzed = Round(folder)
    for index in range(count + 1):
        pair, kinds = [whole, masks["grey mask"][0]], [None, None]
        if index < count:
            which = int(index % 4 == 3)  # A mask, or an image.
            chosen = (images, masks)[which]
            kinds[which] = sorted(chosen)[rng.integers(len(chosen))]
            sample = chosen[kinds[which]][rng.integers(len(chosen[kinds[which]]))]
            pair[which] = damage(sample, every_file[rng.integers(len(every_file))], rng)
        for name, data, kind in zip(("images", "masks"), pair, kinds, strict=True):
            fuzzed.write(f"source/{name}/train/{index:04}.png", data, kind)
    (folder / "source" / "classes.txt").write_bytes(class_list())

    prepare = ["prepare", "folder", "--name=town", f"--source={folder / 'source'}"]
    predict = ["predict", f"--workdir={workdir}", f"--output={folder / 'labels'}", f"--max-pixels={LABELLED_PIXELS}"]
    roots = [folder / "strict", folder / "lenient"]
    commands = [
        [*prepare, f"--root={roots[0]}"],
        [*prepare, f"--root={roots[1]}", "--skip-bad"],
        [*predict, str(folder / "source" / "images" / "train")],
    ]
    strict, lenient, labelled = results = run(commands)
    for command, result in zip(commands, results, strict=True):
        fuzzed.judge(command, result)
    for root, result in zip(roots, results, strict=False):
        with contextlib.suppress(FileNotFoundError):  # There are few problems.
            result.output += (root / "town-problems.txt").read_text()
    left_out = [line for line in lenient.output.splitlines() if line.startswith("train: ")]
    refused = {name for name in {path.name for path in fuzzed.kinds} if any(f"/{name}: " in line for line in left_out)}
    for path, kind in fuzzed.kinds.items():
        if kind is not None or path.name not in refused:  # With a damaged file its partner is left out.
            fuzzed.count(path, "prepare", path.name not in refused, strict.output)
        if "images" in path.parts:
            is_labelled = (folder / "labels" / f"{path.stem}_overlay.png").exists()
            fuzzed.count(path, "predict", is_labelled, labelled.output)
    prepared = len(fuzzed.kinds) // 2 - len(refused)
    if f"train: {prepared} images" not in lenient.output:
        fuzzed.faults.append(f"{folder}: {len(refused)} pairs are named, {prepared} are left:\n{lenient.output}")
    if (strict.code, lenient.code) != (bool(refused), 0):
        fuzzed.faults.append(f"{folder}: exit codes {strict.code}, {lenient.code} with {len(refused)} pairs refused")
    if labelled.code != any(verdict == "refused" for _, command, verdict in fuzzed.counts if command == "predict"):
        fuzzed.faults.append(f"{folder}: exit code {labelled.code} of predict:\n{labelled.output}")
    return fuzzed


def archive_round(folder: Path, count: int, rng: np.random.Generator, run: Runner) -> Round:
    """`count` damaged archives, and a whole one of each kind, are prepared one by one."""
    image = next(iter(sample_images(rng, None).values()))[0]
    mask = sample_masks(rng, (40, 48))["grey mask"][0]
    archives = sample_archives(image, mask)
    every_file = [data for files in archives.values() for data in files]
    fuzzed = Round(folder)
    for kind, files in archives.items():
        fuzzed.write(f"whole.{kind}", files[0], None)
    for index in range(count):
        kind = sorted(archives)[index % len(archives)]
        sample = archives[kind][rng.integers(len(archives[kind]))]
        fuzzed.write(f"{index:04}.{kind}", damage(sample, every_file[rng.integers(len(every_file))], rng), kind)
    commands = []
    for index, path in enumerate(fuzzed.kinds):
        command = ["prepare", "folder", "--name=town", f"--source={path}", f"--root={folder / 'roots' / path.name}"]
        commands.append(command + ["--skip-bad"] * (index % 2))
    for path, command, result in zip(fuzzed.kinds, commands, run(commands), strict=True):
        fuzzed.judge(command, result)
        fuzzed.count(path, "prepare", result.code == 0, result.output)
    return fuzzed


def weights_round(folder: Path, count: int, rng: np.random.Generator, run: Runner) -> Round:
    """`count` damaged files of weights, and a whole one of each kind, are ported: accepted is what can be read."""
    samples = sample_weights(rng)
    every_file = list(samples.values())
    fuzzed = Round(folder)
    for kind, data in samples.items():
        fuzzed.write(f"whole.{kind}", data, None)
    for index in range(count):
        kind = sorted(samples)[index % len(samples)]
        fuzzed.write(f"{index:04}.{kind}", damage(samples[kind], every_file[rng.integers(len(every_file))], rng), kind)
    commands = [["port", str(path), f"--workdir={folder / 'ported' / path.name}"] for path in fuzzed.kinds]
    for path, command, result in zip(fuzzed.kinds, commands, run(commands), strict=True):
        fuzzed.judge(command, result)
        read = any(end in result.output for end in ("do not fit", "holds no ResNet", "PyTorch is needed"))
        fuzzed.count(path, "port", read, result.output)
    return fuzzed


def sample_weights(rng: np.random.Generator) -> dict[str, bytes]:
    """Files with one array of a ResNet by kind; the .pth as PyTorch writes them now, and as before version 1.6."""
    name, array = "layer1.0.bn1.weight", rng.standard_normal((2, 4), np.float32)

    def pth(end_of_storage: bytes) -> bytes:
        name_, storage, key, place = (
            b"X" + struct.pack("<I", len(text)) + text.encode() for text in (name, "storage", "0", "cpu")
        )
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"ctorch\nFloatStorage\n" + key + place + b"K\x08"
        tensor += end_of_storage + b"tQK\x00K\x02K\x04\x86K\x04K\x01\x86\x89ccollections\nOrderedDict\n)RtR"
        return b"\x80\x02}" + name_ + tensor + b"s."

    about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    begin = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, about))
    legacy = begin + pth(b"N") + pickle.dumps(["0"], 2) + struct.pack("<q", array.size) + array.tobytes()
    zipped = io.BytesIO()
    members = {"data.pkl": pth(b""), "byteorder": b"little", "data/0": array.tobytes(), "version": b"3\n"}
    with zipfile.ZipFile(zipped, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{member}"), content)
    return {"safetensors": safetensors_bytes({name: array}), "zip.pth": zipped.getvalue(), "legacy.pth": legacy}


def run_here(commands: list[list[str]]) -> list[Result]:
    """Runs commands in this process."""
    from dsnet_jax import cli

    results = []
    for command in commands:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = cli.main(command)
            except Exception:
                code = None
                traceback.print_exc()
        results.append(Result(code, printed.getvalue()))
        shutil.rmtree(next((flag[7:] for flag in command if flag.startswith("--root=")), "") + "/town", True)
    return results


def run_apart(commands: list[list[str]]) -> list[Result]:
    """Runs commands in another process, which has limits."""
    worker = [sys.executable, __file__, "--worker"]
    try:
        ended = subprocess.run(worker, input=json.dumps(commands), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        return [Result(None, f"no end after {SECONDS} s: {error.stdout!r}")] * len(commands)
    results = [Result(**json.loads(line)) for line in ended.stdout.splitlines() if line.startswith('{"code"')]
    died = Result(None, f"the process ended with {ended.returncode}: {ended.stderr[-3000:]}")
    return results + [died] * (len(commands) - len(results))


def worker():
    """Runs the commands that come by standard input, and tells of each as soon as it has ended."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for command in json.load(sys.stdin):
        (result,) = run_here([command])
        print(json.dumps({"code": result.code, "output": result.output}), flush=True)


def make_run(folder: Path) -> Path:
    """Trains a small network for one step, with the real commands."""
    files = sample_archives(
        sample_images(np.random.default_rng(0), None)["RGB PNG"][0], palette_png(np.zeros((40, 48)))
    )
    (folder / "town.zip").write_bytes(files["zip"][0])
    config = PACKAGE_FOLDER / "configs" / "shapes_quickstart.py"
    set_fields = {
        "data.name": "town",
        "data.root": folder / "datasets",
        "data.batch_size": 2,
        "data.crop_size_hw": "(32,32)",
        "data.eval_split": "train",
        "model.width": 8,
        "training.epochs": 1,
    }
    flags = [f"--config.{name}={value}" for name, value in set_fields.items()]
    for command in (
        ["prepare", "folder", "--name=town", f"--source={folder / 'town.zip'}", f"--root={folder / 'datasets'}"],
        ["train", f"--config={config}", f"--workdir={folder / 'run'}", *flags],
    ):
        subprocess.run([sys.executable, "-m", "dsnet_jax", *command], cwd=PACKAGE_FOLDER, check=True)
    return folder / "run"


def main() -> int:
    """Reads the flags, runs the rounds, prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="files to damage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of SegNet's CamVid, for real images")
    parser.add_argument("--files-a-round", type=int, default=100, help="files a process (default: %(default)s)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dsnet-fuzz-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    workdir = make_run(folder)
    counts, failed = collections.Counter(), 0
    starts = range(0, options.count, options.files_a_round)
    for number, start in enumerate(starts):
        rng = np.random.default_rng((options.seed, number))
        here, count = folder / f"round{number:03}", min(options.files_a_round, options.count - start)
        if number % 4 >= 2:
            fuzzed = (archive_round, weights_round)[number % 4 - 2](here, count, rng, run_apart)
        else:
            fuzzed = image_round(here, count, rng, options.source if number % 4 else None, workdir, run_apart)
        counts += fuzzed.counts
        failed += bool(fuzzed.faults)
        print(
            "\n".join([f"round {number + 1} of {len(starts)}: {len(fuzzed.faults)} faults", *fuzzed.faults]), flush=True
        )
        if fuzzed.faults:
            print(f"kept: {here}")
        else:
            shutil.rmtree(here)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    for kind, command in sorted({key[:2] for key in counts}):
        accepted, refused = (counts[kind, command, verdict] for verdict in ("accepted", "refused"))
        print(f"{command}  {kind:17} {accepted:5} accepted {refused:5} refused")
    print(f"seed {options.seed}: {options.count} files, {failed} of {len(starts)} rounds with faults")
    print(f"most memory of a process: {peak / 1e9:.2f} GB, the limit is {PEAK_MEMORY / 1e9:.2f} GB")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed or peak > PEAK_MEMORY else 0


if __name__ == "__main__":
    sys.exit(worker() if sys.argv[1:] == ["--worker"] else main())
