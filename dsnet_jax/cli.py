"""The `dsnet` command: each subcommand reads its flags and calls one function.

JAX is imported by the subcommands that compute, not before: `dsnet --help` answers at once.
"""

import argparse
import contextlib
import difflib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from dsnet_jax import cli_export, cli_inspect
from dsnet_jax.errors import InputError
from dsnet_jax.progress import silence, tell
from dsnet_jax.stopping import Stopped, raising

# What helps the commands that label images where memory does not suffice.
FEWER_IMAGES = "fewer images at a time (a smaller --config.evaluation.batch_size)"
SMALLER_IMAGES = "smaller images (a smaller --max-pixels refuses the others)"
WINDOWS = "--protocol=slide with small windows (--config.evaluation.slide_crop_hw)"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names the nearest known command."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)", exit_code=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: of the command line, without the program's name; None: those of this process.

    Returns:
      The exit code: 0, 1 for input that cannot be used, 2 for a command line that cannot, 130 after Ctrl-C, 143 after
      SIGTERM, 129 after SIGHUP, 141 when nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with raising():
            return _run(arguments)
    except InputError as error:
        if "--debug" in arguments:
            raise
        print(f"dsnet: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        again = "goes on from what was saved" if arguments[:1] == ["train"] else "begins anew"
        tell(f"dsnet: {stopped}; the same command {again}", sys.stderr)  # Its terminal may be gone.
        return stopped.exit_code
    except BrokenPipeError:  # Whoever read our output has seen enough, as in `dsnet prepare shapes | head`.
        silence(sys.stdout)
        return 141


def _run(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        nearest = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the commands are {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {arguments[0]!r}: {hint}", exit_code=2)
    options, rest = _parser().parse_known_args(arguments)
    ours = f"--config.{options.takes_config}." if isinstance(options.takes_config, str) else ""  # Only this section.
    if wrong := [flag for flag in rest if not (options.takes_config and flag.startswith(ours))]:
        why = f"see dsnet {options.command} --help"
        if ours and wrong[0].startswith("--config"):
            why = f"the run's own config holds, but for {ours}FIELD=VALUE"
        raise InputError(f"unknown argument {wrong[0]!r} ({why})", exit_code=2)
    options.config_flags = rest
    _mark_absl_flags_parsed()
    return COMMANDS[options.command](options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dsnet",
        description="DSNet: context guided dynamic sampling for semantic segmentation.\n"
        "`dsnet COMMAND --help` shows the flags of a command and an example.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    add = functools.partial(_add_command, commands)

    prepare = add(
        "prepare",
        "Check every file of a data set and write it in the form that is trained from.",
        "dsnet prepare camvid --source=/data/CamVid",
    )
    data_sets = ("shapes", "camvid", "voc2012", "ade20k", "pascal_context", "pascal_context_60", "folder")
    prepare.add_argument("data_set", choices=data_sets, help="what is prepared")
    prepare.add_argument(
        "--source",
        action="append",
        help="folder, .tar, .tar.gz or .zip of the images and masks; shapes needs none; what is published in pieces "
        "takes the folder where they lie, or several --source",
    )
    prepare.add_argument(
        "--accept-repacked", action="store_true", help="take archives whose checksum is not the published one"
    )
    prepare.add_argument("--root", default="datasets", help="where prepared data sets lie (default: %(default)s)")
    prepare.add_argument("--name", help="name of a `folder` data set, as config.data.name refers to it")
    prepare.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be used, and list them")
    prepare.add_argument("--max-pixels", type=int, help="refuse larger images (default: 100 million)")
    prepare.add_argument("--overwrite", action="store_true", help="replace a prepared data set of that name")

    train = add(
        "train",
        "Train the network of a config, or go on with a run that was stopped. Fields of the config are set with\n"
        "--config.FIELD=VALUE.",
        "dsnet train --config=configs/camvid_dsnet_r18.py --workdir=runs/camvid --config.optimizer.base_lr=0.02",
        takes_config=True,
    )
    train.add_argument("--workdir", required=True, help="folder of the run: config, metrics, checkpoints")
    _add_process_flags(train)

    evaluate = add(
        "evaluate",
        "Score a trained network on a split: results.json, a table, the confusion matrix and pictures.",
        "dsnet evaluate --workdir=runs/camvid --split=val",
        takes_config="evaluation",
    )
    _add_checkpoint_flags(evaluate)
    evaluate.add_argument("--split", help="split of the data set (default: config.data.eval_split)")
    evaluate.add_argument("--root", help="where prepared data sets lie (default: config.data.root)")
    _add_protocol_flag(evaluate)
    _add_process_flags(evaluate)

    predict = add(
        "predict",
        "Label images: an index PNG in the data set's palette and a coloured overlay for each; or a whole split, for\n"
        "the server of its benchmark: --split=test --submission=FILE.tgz.",
        "dsnet predict --workdir=runs/camvid --output=predictions street.jpg more_images/",
        takes_config="evaluation",
    )
    _add_checkpoint_flags(predict)
    predict.add_argument("--output", help="folder for the predictions of the images given")
    predict.add_argument("--split", help="split of the run's data set that --submission is for")
    predict.add_argument("--submission", help="archive to write: .tgz for voc2012, .zip for ade20k")
    predict.add_argument("--root", help="where prepared data sets lie (default: config.data.root)")
    _add_protocol_flag(predict)
    predict.add_argument(
        "--max-pixels", type=int, help="refuse larger canvases, as --protocol enlarges them (default: 4096 x 3072)"
    )
    predict.add_argument("inputs", nargs="*", help="images, and folders of images")

    export = add(
        "export",
        "Write a trained network as one file for other programs: StableHLO or ONNX, from images as they are to labels\n"
        "of their size; or its weights as safetensors, all of them, or the backbone by torchvision's names.",
        "dsnet export --workdir=runs/camvid --format=onnx --size-hw 360 480 --output=camvid.onnx",
    )
    _add_checkpoint_flags(export)
    cli_export.add_arguments(export)

    inspect = add(
        "inspect",
        "Look at a network, a data set, the points that a network samples, or a submission.",
        "dsnet inspect model --config=configs/voc2012_dsnet_r101.py",
    )
    subjects = inspect.add_subparsers(dest="subject", metavar="SUBJECT", required=True, parser_class=_Parser)
    cli_inspect.add_subjects(functools.partial(_add_command, subjects), _add_checkpoint_flags)

    port = add(
        "port",
        "Take over weights of others: a ResNet's, for config.init_from; or torchvision's FCN or DeepLabv3 with its 21\n"
        "classes, to evaluate, predict and export. docs/porting.md has every way in.",
        "dsnet port resnet50-0676ba61.pth --workdir=weights/resnet50",
    )
    port.add_argument("file", help=".safetensors, or .pth (needs the extra `port`: PyTorch)")
    port.add_argument("--workdir", required=True, help="new folder for the weights")
    port.add_argument("--backbone-only", action="store_true", help="leave out the head of a whole network")

    plan = add(
        "plan",
        "Compile a config's training step, or its evaluation, for devices that are not there: memory, what is sent\n"
        "between devices, the largest batch, ceilings of speed.",
        "dsnet plan --config=configs/voc2012_dsnet_r101.py --target=v5e:2x4 --batch-per-device=4",
        takes_config=True,
    )
    plan.add_argument("--target", required=True, help="as v5e:2x4 or h100:8; docs/planning.md lists them")
    plan.add_argument("--batch-per-device", type=int, help="images (default: the config's batch, shared)")
    plan.add_argument("--evaluate", action="store_true", help="the evaluation's program, not the training step")
    plan.add_argument("--classes", type=int, help="number of classes (default: those of the config's data set)")
    return parser


def _add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, example: str, takes_config: bool | str = False
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, epilog=f"example:\n  {example}")
    command.set_defaults(takes_config=takes_config)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of the run, as given to `dsnet train`")
    parser.add_argument("--step", type=_step, help="step of the checkpoint, or `best` (default: the last)")


def _add_protocol_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        default="ss",
        choices=("ss", "flip", "ms_flip", "slide"),
        help="what the network sees: the image, its mirror image too, both at several scales, or windows of "
        "it (default: %(default)s; scales and windows are fields: --config.evaluation.scales=0.5,1.0)",
    )


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hosts",
        help="hosts that run this command together, as node0:8476,node1 (default: what SLURM, Cloud TPU or GKE say)",
    )
    parser.add_argument("--process", type=int, help="which of --hosts this is (default: found by name and address)")


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor `best`")
    return text if text == "best" else int(text)


def _mark_absl_flags_parsed() -> None:
    """Libraries that read absl's flags insist that somebody parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _prepare(options: argparse.Namespace) -> None:
    from dsnet_jax.data.prepare import prepare

    limit = {} if options.max_pixels is None else {"max_pixels": options.max_pixels}
    prepare(
        options.data_set,
        options.source,
        options.root,
        name=options.name,
        accept_repacked=options.accept_repacked,
        skip_bad=options.skip_bad,
        overwrite=options.overwrite,
        **limit,
    )


def _train(options: argparse.Namespace) -> None:
    from dsnet_jax.config import load_config

    config = load_config(options.config_flags)  # Before JAX is imported: a misspelling is told at once.
    from dsnet_jax import parallel
    from dsnet_jax.training.loop import train

    parallel.configure()
    with _together(options):
        train(config, options.workdir)


@contextlib.contextmanager
def _together(options: argparse.Namespace) -> Iterator[None]:
    """Within, this process computes with those of the same command on other machines, if there are any."""
    from dsnet_jax import processes

    processes.join(options.hosts, options.process)
    try:
        yield
    except (InputError, Stopped) as end:
        if processes.count() > 1:  # Otherwise `main` tells it.
            tell(f"dsnet: {end}", sys.stderr)
            processes.report_failure(str(end).splitlines()[0], end.exit_code)
        raise
    processes.leave()


def _evaluate(options: argparse.Namespace) -> None:
    from dsnet_jax import parallel
    from dsnet_jax.evaluation.evaluate import evaluate_run
    from dsnet_jax.training.memory import out_of_memory_explained

    parallel.configure()
    with _together(options), out_of_memory_explained([FEWER_IMAGES, WINDOWS]):
        evaluate_run(options.workdir, options.step, options.split, options.root, options.protocol, options.config_flags)


def _predict(options: argparse.Namespace) -> int:
    if spaced := [given for given in options.inputs if given.startswith("--config")]:
        raise InputError(f"{spaced[0]!r}: leave out the spaces", exit_code=2)
    if options.submission or options.split:
        return _predict_submission(options)
    if not options.inputs or not options.output or options.root:
        raise InputError("predict wants images and --output, or --split and --submission (and --root)", exit_code=2)
    from dsnet_jax import parallel
    from dsnet_jax.evaluation.predict import predict_files
    from dsnet_jax.training.memory import out_of_memory_explained

    parallel.configure()
    given = options.workdir, options.step, options.inputs, options.output, options.max_pixels, options.protocol
    with out_of_memory_explained([SMALLER_IMAGES, WINDOWS]):
        return 1 if predict_files(*given, options.config_flags) else 0


def _predict_submission(options: argparse.Namespace) -> int:
    of_files = options.inputs or options.output or options.max_pixels
    if not options.submission or not options.split or of_files:
        raise InputError("--split and --submission go together, without images, --output or --max-pixels", exit_code=2)
    from dsnet_jax import parallel
    from dsnet_jax.evaluation.submit import predict_submission
    from dsnet_jax.training.memory import out_of_memory_explained

    parallel.configure()
    where = options.workdir, options.step, options.split, options.submission, options.root
    with out_of_memory_explained([FEWER_IMAGES, WINDOWS]):
        predict_submission(*where, options.protocol, options.config_flags)
    return 0


def _port(options: argparse.Namespace) -> None:
    from dsnet_jax.weights.port import port

    port(options.file, options.workdir, options.backbone_only)


def _plan(options: argparse.Namespace) -> None:
    from dsnet_jax.config import load_config

    config = load_config(options.config_flags)
    from dsnet_jax.plan import plan

    plan(config, options.target, options.batch_per_device, options.evaluate, options.classes)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "inspect": cli_inspect.run,
    "export": cli_export.run,
    "port": _port,
    "plan": _plan,
}
