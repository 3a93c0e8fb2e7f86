"""`dsnet export`."""

import argparse

FORMATS = ("stablehlo", "onnx", "safetensors", "torchvision")


def add_arguments(export: argparse.ArgumentParser) -> None:
    """The flags beside those that name a checkpoint."""
    export.add_argument("--output", required=True, help="file to write")
    export.add_argument("--format", required=True, choices=FORMATS, help="of the file; docs/porting.md tells of each")
    export.add_argument(
        "--size-hw",
        nargs=2,
        type=_count,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, pixels (default: any, 32 to 65535; onnx needs it)",
    )
    export.add_argument("--batch-size", type=_count, help="images at a time (default: any)")
    export.add_argument(
        "--fold-batch-norm", action="store_true", help="take batch normalisation into the convolutions before it"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Writes what the flags ask for."""
    from dsnet_jax import parallel
    from dsnet_jax.evaluation.trained import load_trained
    from dsnet_jax.weights.export import export

    parallel.configure()
    trained = load_trained(options.workdir, options.step)
    export(
        trained.config,
        trained.spec,
        trained.variables,
        trained.step,
        options.output,
        options.format,
        size_hw=options.size_hw and tuple(options.size_hw),
        batch_size=options.batch_size,
        folded=options.fold_batch_norm,
    )
