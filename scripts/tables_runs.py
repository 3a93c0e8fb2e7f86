"""The trainings that the tables need, and what is kept of each: a small JSON file and its log.

`tables.json` holds the rows with the paper's figures. Facts (`docs/results/NAME.json`, with `NAME.jsonl`, the run's
metrics.jsonl) are committed: tables are made of them alone, on any machine.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness import processor
from ml_collections import ConfigDict

from dsnet_jax.config import FREE_FIELDS, SCORE_FIELDS, differences, from_json, load_config
from dsnet_jax.errors import InputError
from dsnet_jax.writing import write_text

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
ROWS = json.loads(Path(__file__).with_name("tables.json").read_text())
NOT_COMPARED = {*FREE_FIELDS, "seed"} - {*SCORE_FIELDS}  # The seed is the run's own, beside its config.
VERSIONS, HARDWARE = "versions.txt", "hardware.txt"  # In a workdir: what trained there, one a line.


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and its evaluations; several rows may be read off it.

    Attributes:
      config: file in configs/ with its argument, as `camvid_comparison.py:cgds`.
      seed: of the training.
      data: a data set in the place of the config's; empty: none.
      after: config of the run whose weights it starts from; empty: none.
      protocols: of inference, each an evaluation.
      submits: whether predictions for the split `test` are packed for the benchmark's server.
    """

    config: str
    seed: int
    data: str = ""
    after: str = ""
    protocols: tuple[str, ...] = ("ss",)
    submits: bool = False

    @property
    def name(self) -> str:
        """Of its workdir and its facts."""
        parts = [*self.config.replace(".py", "").split(":"), *filter(None, [self.data]), f"seed{self.seed}"]
        return "-".join(parts)

    @property
    def before(self) -> "Run":
        """The run whose weights it starts from, if there is one."""
        return Run(self.after, self.seed)

    def flags(self, runs: str | os.PathLike, configs: str | os.PathLike = "configs") -> list[str]:
        """The flags of `dsnet train` that say what is trained; `runs` is the folder of the workdirs."""
        flags = [f"--config={configs}/{self.config}", f"--config.seed={self.seed}"]
        if self.data:
            flags.append(f"--config.data.name={self.data}")
        if self.after:
            flags.append(f"--config.init_from={runs}/{self.before.name}")
        return flags

    def commands(self, runs: str | os.PathLike, flags: Iterable[str]) -> list[list[str]]:
        """All that `dsnet` is asked for, in order."""
        workdir = f"--workdir={runs}/{self.name}"
        commands = [["train", *flags, workdir]]
        if self.submits:
            flags = [f"--protocol={self.protocols[0]}", f"--submission={runs}/{self.name}/submission.tgz"]
            return [*commands, ["predict", workdir, "--split=test", *flags]]
        return commands + [["evaluate", workdir, f"--protocol={protocol}"] for protocol in self.protocols]

    def load(self, fields: Iterable[str] = ()) -> ConfigDict:
        """Its config, with further `--config.FIELD=VALUE`.

        Raises:
          InputError: there is no such config, or no such field.
        """
        return load_config([*self.flags("runs", CONFIGS), *fields])

    def changes(self, expected: ConfigDict, found: ConfigDict) -> list[str]:
        """What of two configs makes another experiment than this one, or other scores, one line a field."""
        different = differences(self.without_paths(expected), self.without_paths(found))
        return [line for name, line in different.items() if name not in NOT_COMPARED]

    def without_paths(self, config: ConfigDict) -> ConfigDict:
        """A config in which a run that it starts from is a name, wherever on this machine its workdir lies."""
        config = config.copy_and_resolve_references()
        if self.after:
            config.init_from = Path(config.init_from).name
        return config


def run_of(row: dict, seed: int) -> Run:
    """The training that a row is read off."""
    protocol, submits = row.get("protocol", "ss"), row.get("split") == "test"
    return Run(row["config"], seed, row.get("data", ""), row.get("after", ""), (protocol,), submits)


def planned(scale: str, seeds: int) -> list[Run]:
    """The runs of a scale in the order in which they are worth having, each once.

    At scale `cpu` the first two seeds of the rows marked `first` come first, then the seeds of all others in turn.
    """
    if scale == "cpu":
        rows = ROWS["cpu"]
        first = [row for row in rows if row.get("first")]
        order = [run_of(row, seed) for seed in range(min(seeds, 2)) for row in first]
    else:
        rows = [row for table in ROWS["paper"] for row in table["rows"] if "config" in row]
        order = []
    order += [run_of(row, seed) for seed in range(seeds) for row in rows]
    runs: dict[str, Run] = {}
    for run in order:
        known = runs.get(run.name, run)
        runs[run.name] = dataclasses.replace(run, protocols=tuple(dict.fromkeys(known.protocols + run.protocols)))
    return list(runs.values())


def missing_protocols(run: Run, workdir: Path, expected: ConfigDict) -> list[str]:
    """Of a run's evaluations with the expected config, those that its trained workdir does not hold yet."""
    return [protocol for protocol in run.protocols if _results(run, workdir, expected, protocol) is None]


def _results(run: Run, workdir: Path, expected: ConfigDict, protocol: str) -> dict | None:
    """The evaluation of the last step on the config's own split, wherever in the workdir's evaluation/ it lies."""
    wanted = protocol, expected.data.eval_split, _log(workdir)[-1]["step"]
    for file in sorted((workdir / "evaluation").rglob("results.json")):
        results = json.loads(file.read_text())
        if (results["protocol"], results["split"], results["checkpoint_step"]) == wanted:
            scored_with = from_json(json.dumps(results["config"]), str(file))
            if not run.changes(expected, scored_with):
                return results
    return None


def differs(run: Run, workdir: Path, expected: ConfigDict, steps: int) -> str:
    """What keeps a workdir from being that of a run of so many steps; empty: nothing."""
    if not (workdir / "config.json").exists():
        return "is not there"
    config = from_json((workdir / "config.json").read_text(), str(workdir / "config.json"))
    if different := run.changes(expected, config):
        return f"is of another config ({'; '.join(different)})"
    if config.seed != run.seed:
        return f"has another seed, {config.seed}"
    trained = _log(workdir)[-1]["step"]
    return "" if trained == steps else f"was trained for {trained} steps, not {steps}"


def _log(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def collect(run: Run, workdir: Path, expected: ConfigDict, folder: Path) -> None:
    """Writes the facts of a run that is trained and evaluated.

    Args:
      run: of the tables.
      workdir: where it was trained.
      expected: the config that it has to have been trained with, apart from fields that change nothing.
      folder: of the facts.

    Raises:
      InputError: it was trained with another config, which is a trial and no result; or an evaluation is missing.
    """
    config = from_json((workdir / "config.json").read_text(), str(workdir / "config.json"))
    if (different := run.changes(expected, config)) or config.seed != run.seed:
        raise InputError(f"{workdir} is a trial and not collected: {'; '.join(different) or f'seed {config.seed}'}")
    protocols = () if run.submits else run.protocols
    scores = {protocol: _results(run, workdir, expected, protocol) for protocol in protocols}
    if absent := [protocol for protocol, results in scores.items() if results is None]:
        raise InputError(f"{workdir}: no evaluation of its last step by protocol {absent[0]}: run dsnet evaluate")
    log = _log(workdir)
    trained = [line for line in log if "seconds_per_step" in line]
    ends = [0, *(line["step"] for line in trained)]
    seconds = sum((line["step"] - start) * line["seconds_per_step"] for start, line in zip(ends, trained, strict=False))
    facts = {
        "config": run.config,
        "seed": run.seed,
        "dataset": config.data.name,
        "split": "test" if run.submits else config.data.eval_split,
        "epochs": config.training.epochs,
        "steps": log[-1]["step"],
        "minutes": seconds / 60,  # Of the steps alone: no compiling, no evaluations, nothing twice that was stopped.
        "date": time.strftime("%Y-%m-%d", time.gmtime((workdir / "metrics.jsonl").stat().st_mtime)),
        "hardware": ", then ".join(_noted(workdir, HARDWARE) or ["not noted"]),
        "version": ", ".join(_noted(workdir, VERSIONS) or ["not noted"]),
        "offsets": _offsets([line for line in trained if "offset_mean" in line]),
        "scores": {protocol: _scores(results) for protocol, results in scores.items()},
        "experiment": _experiment(run, config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{run.name}.jsonl", (workdir / "metrics.jsonl").read_text())
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
    write_text(folder / f"{run.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")  # Last: it says that the run is done.


def _offsets(lines: list[dict]) -> dict[str, float] | None:
    """Pixels of the sampled map: mean and share outside of it at the last step, and the largest ever logged."""
    if not lines:
        return None
    return {
        "mean": lines[-1]["offset_mean"],
        "outside": lines[-1]["offset_outside"],
        "largest": max(line["offset_max"] for line in lines),
    }


def _experiment(run: Run, config: ConfigDict) -> dict:
    """A config's fields, without what tells where something lies on this machine."""
    fields = run.without_paths(config).to_dict()
    del fields["data"]["root"]
    return fields


KEPT = ("miou", "boundary_miou", "mean_accuracy", "pixel_accuracy", "images", "absent_classes", "benchmark_figures")


def _scores(results: dict) -> dict:
    classes = {key: {row["name"]: row[key] for row in results["classes"]} for key in ("iou", "boundary_iou")}
    return {key: results[key] for key in KEPT} | classes


def note(workdir: Path) -> None:
    """Notes in a workdir which dsnet_jax is about to train there, and on what; `collect` gives all that did."""
    for name, now in ((VERSIONS, _version()), (HARDWARE, hardware())):
        if now not in (known := _noted(workdir, name)):
            write_text(workdir / name, "".join(f"{line}\n" for line in [*known, now]))


def _noted(workdir: Path, name: str) -> list[str]:
    file = workdir / name
    return file.read_text().splitlines() if file.exists() else []


def _version() -> str:
    """Of dsnet_jax, and where it runs from a clone the commit, `-dirty` where what computes differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("describe", "--always")
        changed = git("status", "--porcelain", "--", "dsnet_jax", "configs", "scripts")
    except (OSError, subprocess.CalledProcessError):
        return version("dsnet_jax")
    return f"{version('dsnet_jax')} ({commit}{'-dirty' if changed else ''})"


def facts_of(run: Run, folder: Path, fields: Iterable[str] = ()) -> dict | None:
    """What is kept of a run; None where there is nothing, or nothing that its config as it is now would give."""
    file = folder / f"{run.name}.json"
    if not file.exists():
        return None
    facts = json.loads(file.read_text())
    try:
        different = run.changes(from_json(json.dumps(facts["experiment"]), str(file)), run.load(fields))
    except InputError as error:
        different = [str(error)]
    if different:
        _say_once(f"{file}: of another config than {run.config} is now, not shown: {'; '.join(different)}")
    return None if different else facts


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def hardware() -> str:
    """This machine's devices, for people. Asked in a process of its own: whoever asks a TPU keeps it."""
    script = "import jax; d = jax.devices(); print(len(d), d[0].device_kind, sep=';')"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    count, _, kind = found.strip().splitlines()[-1].partition(";")
    if kind != "cpu":
        return f"{count} x {kind}"
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}"
