"""A trained network as one file for other programs: `dsnet export`."""

import errno
import os
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dsnet_jax.data.specs import DatasetSpec
from dsnet_jax.errors import InputError, writing_into
from dsnet_jax.experiment import build_model
from dsnet_jax.weights.description import describe
from dsnet_jax.weights.folding import fold_batch_norm
from dsnet_jax.weights.onnx import to_onnx
from dsnet_jax.weights.program import label_program
from dsnet_jax.weights.safetensors import backbone_to_safetensors, to_safetensors
from dsnet_jax.weights.stablehlo import to_stablehlo
from dsnet_jax.writing import check_writable, is_remote, write_bytes

ANOTHER = "give another --output"


def export(
    config: ConfigDict,
    spec: DatasetSpec,
    variables: dict[str, Any],
    step: int,
    file: epath.PathLike,
    file_format: str,
    size_hw: tuple[int, int] | None = None,
    batch_size: int | None = None,
    folded: bool = False,
) -> None:
    """Writes the file, and tells what it holds.

    Args:
      config: of the experiment.
      spec: its classes.
      variables: params and batch_stats.
      step: of the checkpoint.
      file: to be written, or replaced; its folder must be there.
      file_format: stablehlo, onnx, safetensors, or torchvision: the backbone alone, as .safetensors of its names.
      size_hw: of the images of a program; None: any, which ONNX cannot have.
      batch_size: of a program; None: any.
      folded: whether batch normalisation is folded into the convolutions.

    Raises:
      InputError: the format does not go with the size, the batch or this network; or the file cannot be written.
    """
    is_program = file_format in ("stablehlo", "onnx")
    if not is_program and (size_hw or batch_size):
        raise InputError(f"--size-hw and --batch-size are of programs: {file_format} has weights alone", exit_code=2)
    if file_format == "onnx" and size_hw is None:
        raise InputError("ONNX files have one size: give --size-hw HEIGHT WIDTH", exit_code=2)
    if file_format == "stablehlo" and size_hw is None and config.model.sampling == "nonlocal":
        raise InputError("a non-local block works in bands of a known size: give --size-hw HEIGHT WIDTH", exit_code=2)
    _check_output(epath.Path(file))
    if folded:
        variables = fold_batch_norm(variables)
    description = describe(config, spec, step, folded, is_program)
    if file_format == "safetensors":
        data = to_safetensors(config, spec, variables, step, description)
    elif file_format == "torchvision":
        data = backbone_to_safetensors(variables, description)
    else:
        config = config.copy_and_resolve_references()
        if file_format == "onnx":  # Its runtimes have no bfloat16 on CPU.
            config.model.dtype = "float32"
        elif size_hw is None:  # Products with hat matrices come in bands of a known size.
            config.model.sampling_formulation = "platform"
        model = build_model(config.model, spec.num_classes)
        description["computed_in"] = config.model.dtype
        # Bands are a loop, which ONNX's runtimes do not make quicker.
        program = label_program(model, variables, config.data.image_scale, in_bands=file_format == "stablehlo")
        if file_format == "onnx":
            data = to_onnx(program, description, size_hw, batch_size)
        else:
            data = to_stablehlo(program, description, size_hw, batch_size)
    with writing_into(file, ANOTHER):
        write_bytes(epath.Path(file), data)
    size = f", images of {size_hw[0]} x {size_hw[1]}" if size_hw else ""
    print(f"{file}: {file_format} of step {step}, {len(data) / 1e6:.1f} MB{size}")


def _check_output(file: epath.Path) -> None:
    """Before anything is computed. Raises InputError."""
    with writing_into(file, ANOTHER):
        if not file.name or (not is_remote(file) and file.is_dir()):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not is_remote(file) and not file.parent.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    check_writable(file.parent, ANOTHER)
