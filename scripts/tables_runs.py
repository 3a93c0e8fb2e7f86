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

from dsnet_jax.config import FREE_FIELDS, differences, from_json, load_config
from dsnet_jax.errors import InputError
from dsnet_jax.workdir import write_text

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
ROWS = json.loads(Path(__file__).with_name("tables.json").read_text())
NOT_COMPARED = (*FREE_FIELDS, "init_from", "seed")  # The last two are the run's own, beside its config.


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

    def flags(self, runs: str | os.PathLike, configs: str | os.PathLike = "configs") -> list[str]:
        """The flags of `dsnet train` that say what is trained; `runs` is the folder of the workdirs."""
        flags = [f"--config={configs}/{self.config}", f"--config.seed={self.seed}"]
        if self.data:
            flags.append(f"--config.data.name={self.data}")
        if self.after:
            flags.append(f"--config.init_from={runs}/{Run(self.after, self.seed).name}")
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


def changes(expected: ConfigDict, found: ConfigDict) -> list[str]:
    """What of two configs makes another experiment, one line a field."""
    return [line for name, line in differences(expected, found).items() if name not in NOT_COMPARED]


def missing_protocols(run: Run, workdir: Path) -> list[str]:
    """Of a run's evaluations, those that its trained workdir does not hold yet."""
    return [protocol for protocol in run.protocols if _results(workdir, protocol) is None]


def _results(workdir: Path, protocol: str) -> dict | None:
    """The evaluation of the last step on the config's own split, wherever in the workdir's evaluation/ it lies."""
    split = json.loads((workdir / "config.json").read_text())["data"]["eval_split"]
    step = _log(workdir)[-1]["step"]
    for file in sorted((workdir / "evaluation").rglob("results.json")):
        results = json.loads(file.read_text())
        if (results["protocol"], results["split"], results["checkpoint_step"]) == (protocol, split, step):
            return results
    return None


def _log(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def collect(run: Run, workdir: Path, expected: ConfigDict, folder: Path, hardware: str) -> None:
    """Writes the facts of a run that is trained and evaluated.

    Args:
      run: of the tables.
      workdir: where it was trained.
      expected: the config that it has to have been trained with, apart from fields that change nothing.
      folder: of the facts.
      hardware: that it was trained on, for people.

    Raises:
      InputError: it was trained with another config, which is a trial and no result; or an evaluation is missing.
    """
    config = from_json((workdir / "config.json").read_text(), str(workdir / "config.json"))
    if (different := changes(expected, config)) or config.seed != run.seed:
        raise InputError(f"{workdir} is a trial and not collected: {'; '.join(different) or f'seed {config.seed}'}")
    scores = {} if run.submits else {protocol: _results(workdir, protocol) for protocol in run.protocols}
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
        "hardware": hardware,
        "version": _version(),
        "offsets": _offsets([line for line in trained if "offset_mean" in line]),
        "scores": {protocol: _scores(results) for protocol, results in scores.items()},
        "experiment": _without_paths(config),
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


def _without_paths(config: ConfigDict) -> dict:
    """A config's fields but those that tell where something lies on this machine."""
    fields = config.to_dict()
    del fields["data"]["root"], fields["init_from"]
    return fields


KEPT = ("miou", "boundary_miou", "mean_accuracy", "pixel_accuracy", "images", "absent_classes", "benchmark_figures")


def _scores(results: dict) -> dict:
    classes = {key: {row["name"]: row[key] for row in results["classes"]} for key in ("iou", "boundary_iou")}
    return {key: results[key] for key in KEPT} | classes


def _version() -> str:
    """Of dsnet_jax, and where it runs from a clone the commit."""
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("dsnet_jax")
    return f"{version('dsnet_jax')} ({commit})"


def facts_of(run: Run, folder: Path, fields: Iterable[str] = ()) -> dict | None:
    """What is kept of a run; None where there is nothing, or nothing that its config as it is now would give."""
    file = folder / f"{run.name}.json"
    if not file.exists():
        return None
    facts = json.loads(file.read_text())
    try:
        different = changes(from_json(json.dumps(facts["experiment"]), str(file)), run.load(fields))
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
