"""How fast the parts of dsnet_jax are, beside what PyTorch offers for the same.

    python scripts/benchmark.py network --peer-python=/path/to/torch/bin/python --json=network.json

All sides take turns within one run, on the same processors, so that what else the machine does falls on all of them;
PyTorch's side, scripts/peers/, is a process of its own Python. `COMMAND --help` says what is compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks import evaluation, exported, harness, network, operator, pipeline, training

from dsnet_jax import parallel
from dsnet_jax.errors import InputError

COMMANDS = {
    "operator": operator,
    "network": network,
    "pipeline": pipeline,
    "training": training,
    "evaluation": evaluation,
    "exported": exported,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark, prints its table and writes --json. Returns the exit code."""
    shown = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **shown)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, benchmark in COMMANDS.items():
        summary = benchmark.__doc__.partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=benchmark.__doc__, **shown)
        harness.add_arguments(command, benchmark.ROUNDS)
        if benchmark is not exported:  # Which has no PyTorch side.
            harness.add_peer_argument(command)
        benchmark.add_arguments(command)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("training", "evaluation"):
        parser.error(f"unknown argument {rest[0]!r}")
    options.config_flags = rest
    try:
        harness.pin(options.threads)
        parallel.configure()
        report = COMMANDS[options.command].run(options)
    except InputError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return error.exit_code
    found = harness.to_json(report, options.command, options)
    versions = found["versions"] | (report.peer_versions or {})
    where = f"{found['processor']}, {options.threads} threads, medians of {options.rounds} rounds"
    print(f"{options.command}, {found['date']}, {where}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"\n{harness.table(report)}", end="")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
