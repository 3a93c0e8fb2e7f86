"""Makes the tables of docs/results.md: of what is there, or by training and scoring what is missing.

    python scripts/tables.py                                        # the page anew, of docs/results/*.json
    python scripts/tables.py --scale=cpu --minutes=120              # the comparisons on CamVid, a CPU's protocol
    python scripts/tables.py --scale=paper --only=voc2012           # the paper's own rows, once `dsnet port` has made
                                                                    # weights/resnet50 and weights/resnet101

Runs go one after another, each by `dsnet train` and `dsnet evaluate` in a process of its own, into workdirs in --runs.
The same command goes on where the last one ended: what is finished is skipped, what was stopped is resumed. Ctrl-C,
SIGTERM and the end of --minutes stop the run under way, which saves itself first. A run that fails is told and left;
the exit code is then 1. After every run its facts go into docs/results/ and the page is written again.

Flags such as --config.data.root=DIR are passed on to `dsnet train`. With one that changes what is trained or how it is
scored, such as --config.training.epochs=1, everything is a trial: workdirs, facts and page go to RUNS/trial/, docs/
stays as it is.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tables_page import update_page
from tables_runs import CONFIGS, REPOSITORY, Run, collect, differs, facts_of, missing_protocols, note, planned

from dsnet_jax.errors import InputError
from dsnet_jax.progress import duration
from dsnet_jax.stopping import Request, deferred

DSNET = [sys.executable, "-m", "dsnet_jax"]
LOG = "log.txt"  # In a workdir: what the commands said.


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where a run failed, 2 for wrong flags, 143 and 130 after SIGTERM and Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--scale", choices=("cpu", "paper"), help="which runs to do (default: none)")
    parser.add_argument("--runs", default="runs", help="folder of the workdirs (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs", help="where results.md and results/ lie")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--seeds", type=int, help="of each run: 0, 1, ... (default: 2 at scale cpu, else 1)")
    parser.add_argument("--only", default="", help="only runs with this in their name, and what they start from")
    options, fields = parser.parse_known_args(arguments)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds={options.seeds}: 1 or more are needed")
    if wrong := [flag for flag in fields if not re.match(r"--config\.(?!seed=|init_from=)[\w.]+=", flag)]:
        parser.error(
            f"{wrong[0]!r}: --config.FIELD=VALUE is passed on; config, seed and init_from are this script's own"
        )
    if fields and not options.scale:
        parser.error(f"{fields[0]!r} is of no use without --scale")
    try:
        runs = planned(options.scale, options.seeds or {"cpu": 2, "paper": 1}[options.scale]) if options.scale else []
        chosen = {run.name for run in runs if options.only in run.name}
        chosen |= {run.before.name for run in runs if run.after and run.name in chosen}
        runs = [run for run in runs if run.name in chosen]
        if "://" in options.runs:
            raise InputError(f"{options.runs}: the workdirs have to lie in a folder of this machine", exit_code=2)
        if options.scale and not runs:
            raise InputError(f"no run of scale {options.scale} has {options.only!r} in its name", exit_code=2)
        trial = any(is_trial(run, fields) for run in runs) if fields else False
        folder = Path(options.runs, "trial") if trial else Path(options.runs)
        tables = Tables(folder, folder if trial else options.docs, fields, trial)
        tables.write_page()
        if not runs:
            return 0
        with locked(folder) as lock, deferred() as stop:
            return tables.work_off(runs, lock, stop, options.minutes)
    except InputError as error:
        print(f"tables: {error}", file=sys.stderr)
        return error.exit_code


def is_trial(run: Run, fields: list[str]) -> bool:
    """Whether fields of the command line change what a run trains, or how it is scored."""
    return bool(run.changes(run.load(), run.load(fields)))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps other calls out of a folder of workdirs, also for as long as a training goes on that was left behind.

    Gives the file descriptor that holds the lock, for the processes that are started.

    Raises:
      InputError: another has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another call is at work there, or a training that it left behind (process "
                f"{(folder / '.lock').read_text().strip() or 'unknown'}): wait until that has ended, or end it"
            ) from error
        yield lock
    finally:
        os.close(lock)


@dataclasses.dataclass
class Tables:
    """What is there of the tables, and what is done for them.

    Attributes:
      runs: folder of the workdirs.
      docs: folder of the page and of the facts.
      fields: `--config.FIELD=VALUE` for every run.
      trial: whether these change what is trained or how it is scored.
    """

    runs: Path
    docs: Path
    fields: list[str]
    trial: bool

    def write_page(self) -> None:
        update_page(self.docs / "results.md", self.docs / "results", self.fields if self.trial else [])

    def facts(self, run: Run) -> dict | None:
        return facts_of(run, self.docs / "results", self.fields)

    def is_finished(self, run: Run) -> bool:
        """Trained and scored by all protocols of its rows."""
        facts = self.facts(run)
        return facts is not None and (run.submits or set(run.protocols) <= facts["scores"].keys())

    def work_off(self, plan: list[Run], lock: int, stop: Request, minutes: float | None) -> int:
        """Does what is missing of a plan, and gives the exit code."""
        sitting = Sitting(lock, stop, time.monotonic() + 60 * minutes if minutes is not None else float("inf"))
        failed = 0
        todo = [run for run in plan if not self.is_finished(run)]
        print(f"{len(plan) - len(todo)} of {len(plan)} runs are finished", flush=True)
        for number, run in enumerate(todo, start=len(plan) - len(todo) + 1):
            if sitting.has_to_end():
                break
            taken = [60 * facts["minutes"] for run in plan if (facts := self.facts(run))]
            eta = Eta(len(plan) - number, statistics.mean(taken) if taken else None)
            try:
                if self.perform(run, sitting, f"{number}/{len(plan)} {run.name}", eta):
                    self.write_page()
            except InputError as error:
                failed += 1
                print(f"{run.name} failed: {error}", file=sys.stderr, flush=True)
        left = [run.name for run in plan if not self.is_finished(run)]
        print(f"{len(plan) - len(left)} of {len(plan)} runs are finished, {failed} failed")
        if left:
            print(f"left, in this order: {', '.join(left)}; the same command goes on")
        return 128 + stop.signal if stop.signal else min(failed, 1)

    def perform(self, run: Run, sitting: "Sitting", label: str, eta: "Eta") -> bool:
        """Trains and scores a run, from where it is; whether it was finished.

        Raises:
          InputError: a command failed, or there is nothing to start from.
        """
        if run.after:
            self.check_finished(run.before)
        workdir = self.runs / run.name
        if self.facts(run) is None:
            workdir.mkdir(exist_ok=True)
            note(workdir)
        else:  # Only evaluations are missing.
            self.check_trained(run)
        train, *others = run.commands(self.runs, [*run.flags(self.runs, CONFIGS), *self.fields])
        if not sitting.dsnet(train, workdir / LOG, label, eta):
            return False
        expected = run.load(self.fields)
        missing = missing_protocols(run, workdir, expected)
        for command in others:
            if command[0] == "evaluate" and not any(f"--protocol={protocol}" in command for protocol in missing):
                continue
            if not sitting.dsnet(command, workdir / LOG, label, eta):
                return False
        collect(run, workdir, expected, self.docs / "results")
        return True

    def check_finished(self, run: Run) -> None:
        """Raises InputError, which says what to do, where a run cannot be started from."""
        if self.facts(run) is None:
            raise InputError(f"it starts from {run.name}, which is not finished")
        self.check_trained(run)

    def check_trained(self, run: Run) -> None:
        """Raises InputError, which says what to do, where a workdir is not that which a run's facts are of."""
        workdir = self.runs / run.name
        if found := differs(run, workdir, run.load(self.fields), self.facts(run)["steps"]):
            raise InputError(
                f"{workdir} {found}: copy it from where it was trained, or remove "
                f"{self.docs / 'results' / run.name}.json and {workdir}, and the same command trains it again"
            )


@dataclasses.dataclass
class Eta:
    """How long all runs will take, told from the lines that a training prints.

    Attributes:
      others: how many runs follow the one under way.
      typical: seconds of a finished one; None as long as there is none: they are taken to last as long as this one.
    """

    others: int
    typical: float | None
    began: tuple[int, float] | None = None

    def of(self, line: str) -> str:
        """What to add to a line of the training's output."""
        found = re.match(r"step (\d+)/(\d+) ", line)
        if not found:
            return ""
        step, steps, now = int(found[1]), int(found[2]), time.monotonic()
        first, since = self.began = self.began or (step, now)
        if step <= first:
            return ""
        pace = (now - since) / (step - first)
        return f"  all runs {duration((steps - step) * pace + self.others * (self.typical or steps * pace))}"


@dataclasses.dataclass
class Sitting:
    """One call of this script.

    Attributes:
      lock: file descriptor of the lock on the folder.
      stop: whether somebody has asked to stop.
      deadline: by `time.monotonic`.
    """

    lock: int
    stop: Request
    deadline: float

    def has_to_end(self) -> bool:
        return bool(self.stop.signal) or time.monotonic() >= self.deadline

    def dsnet(self, arguments: list[str], log: Path, label: str, eta: Eta) -> bool:
        """Runs a command to its end; what it prints goes into a log and, with a label, to the terminal.

        Returns:
          True when it ended well, False when it was stopped because this sitting has to end.

        Raises:
          InputError: it failed.
        """
        if self.has_to_end():
            return False
        with log.open("a") as output, log.open(errors="replace") as printed:
            print(f"$ {shlex.join(['dsnet', *arguments])}", file=output, flush=True)
            printed.seek(0, os.SEEK_END)
            # A process group of its own: Ctrl-C reaches this process alone, and the training is told once, by it.
            process = subprocess.Popen(
                [*DSNET, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=(self.lock,),
            )
            os.pwrite(self.lock, f"{process.pid:<10}".encode(), 0)
            print(f"[{label}] {shlex.join(['dsnet', *arguments])}", flush=True)
            told, rest, last = False, "", ""
            while True:
                code = process.poll()  # First: what is printed before the end is read after it.
                *lines, rest = (rest + printed.read()).split("\n")
                for line in lines:
                    last = line.strip() or last
                    print(f"[{label}] {line}{eta.of(line)}", flush=True)
                if code is not None:
                    break
                if not told and self.has_to_end():
                    process.send_signal(signal.SIGTERM)
                    told = True
                    print(f"[{label}] is told to stop: it saves itself first", flush=True)
                time.sleep(0.2)
        if code and not told:
            raise InputError(f"dsnet {arguments[0]} ended with exit code {code}: {last or 'it said nothing'} ({log})")
        return not code


if __name__ == "__main__":
    sys.exit(main())
