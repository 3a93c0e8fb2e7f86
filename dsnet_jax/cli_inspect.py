"""`dsnet inspect`: the flags of what can be looked at, and the one function that each calls."""

import argparse
from collections.abc import Callable


def add_subjects(
    add: Callable[..., argparse.ArgumentParser], add_checkpoint_flags: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Adds what can be inspected as subcommands.

    Args:
      add: takes name, summary, example and whether a config is taken, and gives the subcommand's parser.
      add_checkpoint_flags: adds --workdir and --step to one.
    """
    model = add(
        "model",
        "Print the network of a config: shapes, parameters and multiply-adds of its parts.",
        "dsnet inspect model --config=configs/voc2012_dsnet_r101.py",
        takes_config=True,
    )
    model.add_argument("--classes", type=int, help="number of classes (default: those of the config's data set)")

    data = add(
        "data",
        "Print what a prepared data set holds: images, sizes, classes, and what is suspicious, as images that are in\n"
        "two splits. With --output also inspection.json and a sheet of labelled examples for each split.",
        "dsnet inspect data --name=camvid --output=camvid_inspected",
    )
    _add_data_flags(data)
    data.add_argument(
        "--split", help="the only split to look at (default: all that are stored; those composed of them are counted)"
    )
    data.add_argument("--output", help="folder for inspection.json and the sheets")

    points = add(
        "points",
        "Draw where a trained network samples: regular grids and predicted points on images, and how long the offsets\n"
        "are; print their mean, the largest, and how many points lie outside. With --baseline also a picture with the\n"
        "predictions of both networks beside image and truth.",
        "dsnet inspect points --workdir=runs/camvid --baseline=runs/camvid_aspp --position=120,200",
    )
    add_checkpoint_flags(points)
    points.add_argument("--split", help="split of the data set (default: config.data.eval_split)")
    points.add_argument("--root", help="where prepared data sets lie (default: config.data.root)")
    points.add_argument("--images", type=int, default=4, help="how many to draw, spread evenly (default: %(default)s)")
    points.add_argument("--id", action="append", default=[], help="an image to draw instead; may be repeated")
    points.add_argument(
        "--position",
        action="append",
        default=[],
        type=_position,
        metavar="Y,X",
        help="pixel whose points are drawn; may be repeated (default: some on the borders between classes)",
    )
    points.add_argument("--baseline", help="workdir of another run, to compare predictions with")
    points.add_argument("--output", help="folder for the pictures (default: sampling_points/SPLIT in the workdir)")

    submission = add(
        "submission",
        "Check an archive for a benchmark's server: every image of the split, sizes, names, values, palette.",
        "dsnet inspect submission results.tgz --name=voc2012",
    )
    submission.add_argument("file", help="the archive")
    _add_data_flags(submission)
    submission.add_argument("--split", default="test", help="that is submitted (default: %(default)s)")


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="of the prepared data set")
    parser.add_argument("--root", default="datasets", help="where prepared data sets lie (default: %(default)s)")


def _position(text: str) -> tuple[float, float]:
    try:
        y, x = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not Y,X in pixels") from None
    return y, x


def run(options: argparse.Namespace) -> None:
    """Calls what the command line asks for.

    Raises:
      InputError: see there.
    """
    {"model": _model, "data": _data, "points": _points, "submission": _submission}[options.subject](options)


def _model(options: argparse.Namespace) -> None:
    from dsnet_jax.config import load_config

    config = load_config(options.config_flags)  # Before JAX is imported: a misspelling is told at once.
    from dsnet_jax.summary import print_summary

    print_summary(config, options.classes)


def _data(options: argparse.Namespace) -> None:
    from dsnet_jax.data.inspection import inspect_data
    from dsnet_jax.writing import check_writable

    if options.output is not None:
        check_writable(options.output, "give another --output")
    inspect_data(options.root, options.name, options.split, options.output)


def _points(options: argparse.Namespace) -> None:
    from dsnet_jax import parallel
    from dsnet_jax.evaluation.sampling_pictures import draw_sampling_points
    from dsnet_jax.training.memory import out_of_memory_explained

    parallel.configure()
    with out_of_memory_explained(["a smaller evaluation.batch_size in the run's config.json"]):
        draw_sampling_points(
            options.workdir,
            options.step,
            options.split,
            options.root,
            ids=options.id,
            images=options.images,
            positions=options.position,
            baseline=options.baseline,
            output=options.output,
        )


def _submission(options: argparse.Namespace) -> None:
    from dsnet_jax.data.records import open_split
    from dsnet_jax.evaluation.submissions import check_submission

    check_submission(options.file, open_split(options.root, options.name, options.split))
