"""Compiles a config's real programs for devices that are not there, and prints what their compiler found."""

import time

from ml_collections import ConfigDict

from dsnet_jax.errors import InputError
from dsnet_jax.experiment import build_model
from dsnet_jax.plan.programs import Compiled, TooLarge, compile_for, lower_evaluation, lower_training, most_images
from dsnet_jax.plan.search import largest_batch
from dsnet_jax.plan.targets import COMPILER_OPTIONS, Target, find_target, mesh_of
from dsnet_jax.progress import duration
from dsnet_jax.stopping import unhandled
from dsnet_jax.summary import classes_of, parts_of
from dsnet_jax.training.program import check_shares


def plan(
    config: ConfigDict,
    target_name: str,
    batch_per_device: int | None = None,
    evaluation: bool = False,
    num_classes: int | None = None,
) -> None:
    """Prints memory, collectives, the largest batch and ceilings of speed of a program on devices that are not there.

    Nothing is computed. The compilers are those that the devices' own machines would use.

    Args:
      config: of an experiment.
      target_name: one of `targets.TARGETS`.
      batch_per_device: images; None: the config's batch, shared by the devices.
      evaluation: the program of `dsnet evaluate`, for images of the size of a training crop; otherwise the train step.
      num_classes: K; None: that of the config's data set.

    Raises:
      InputError: there is no such target, its compiler is not installed or in use, or the batch cannot be shared, or
        has more pixels than an evaluation counts.
    """
    target = find_target(target_name)
    model = build_model(config.model, classes_of(config, num_classes))
    mesh = mesh_of(target)
    devices = mesh.size
    batch_per_device = _share(config, devices, batch_per_device, evaluation)
    program = "evaluation" if evaluation else "training"
    height, width = config.data.crop_size_hw
    print(
        f"{program} of {config.model.name}, {config.model.backbone}, {model.num_classes} classes, {height}x{width}, "
        f"{config.model.dtype}, on {target_name}: {devices} devices, {batch_per_device} images each"
    )
    if options := COMPILER_OPTIONS[target.platform]:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        print(f"compiled with {given}, which is needed where no such device is; a run does without")
    parts = parts_of(model, config.data.crop_size_hw, train=not evaluation)
    # The backward pass has two products for each of the forward pass: by the inputs and by the kernel.
    flops = 2 * (1 if evaluation else 3) * sum(part.multiply_adds for part in parts)
    print(f"parameters: {sum(part.parameters for part in parts) / 1e6:.1f} M")
    passes = "one pass forward" if evaluation else "three times the pass forward"
    print(f"FLOPs an image: {flops / 1e9:,.0f} G, of convolutions and matrix products, {passes}")

    def compiled(batch: int) -> Compiled | TooLarge:
        changed = config.copy_and_resolve_references()
        (changed.evaluation if evaluation else changed.data).batch_size = batch * devices
        began = time.monotonic()
        lowered = (lower_evaluation if evaluation else lower_training)(changed, model, mesh)
        with unhandled():  # Nothing is lost with it.
            found = compile_for(target.platform, lowered)
        took = duration(time.monotonic() - began)
        print(f"{batch} images a device, compiled in {took}: {_memory(target, found)}", flush=True)
        return found

    found = compiled(batch_per_device)
    if isinstance(found, Compiled):
        for line in (*_collectives(found), *_ceilings(target, found, devices, batch_per_device, flops)):
            print(line, flush=True)
    if target.memory is None:
        return

    tried = {batch_per_device: _measured(target, found)}
    if isinstance(found, Compiled):
        tried[0] = found.arguments + found.code, True  # Nearly: of the arguments most is the state.
    if evaluation:
        tried[most_images(config, devices) + 1] = float("inf"), False
    print("the largest batch: at most four more are compiled", flush=True)
    unit = 1 if evaluation else config.training.accumulation_steps
    limit = target.usable * target.memory
    largest = largest_batch(lambda batch: _measured(target, compiled(batch)), limit, tried, unit)
    beyond = largest.fits + unit
    if not largest.fits and largest.too_large > unit:
        print(f"largest batch: not found, less than {largest.too_large}: give a smaller --batch-per-device")
        return
    if largest.too_large == beyond:
        rest = f"{beyond} do not fit"
    elif largest.expected <= largest.fits:
        rest = f"{beyond} would not fit, by how memory grew"
    else:
        rest = f"{largest.expected} may fit, by how memory grew"
    print(f"largest batch: {largest.fits} images a device, {largest.fits * devices} a step; {rest}")


def _share(config: ConfigDict, devices: int, batch_per_device: int | None, evaluation: bool) -> int:
    if batch_per_device is not None and batch_per_device < 1:
        raise InputError(f"--batch-per-device is {batch_per_device}: 1 or more is needed", exit_code=2)
    if evaluation:
        batch = batch_per_device or -(-config.evaluation.batch_size // devices)  # As `dsnet evaluate` rounds it.
        if batch > (most := most_images(config, devices)):
            height, width = config.data.crop_size_hw
            raise InputError(
                f"{batch} images of {height}x{width} on each of {devices} devices have more pixels than an evaluation "
                f"counts at a time: give --batch-per-device={most} or less",
                exit_code=2,
            )
        return batch
    if batch_per_device is not None:
        config = config.copy_and_resolve_references()
        config.data.batch_size = batch_per_device * devices
    check_shares(config, devices)
    return config.data.batch_size // devices


def _measured(target: Target, found: Compiled | TooLarge) -> tuple[float, bool]:
    """Bytes, and whether they fit; where the compiler itself refuses what does not, its word is taken."""
    if isinstance(found, TooLarge):
        return found.memory or float("inf"), False
    return found.memory, target.memory is None or found.memory <= target.usable * target.memory


def _memory(target: Target, found: Compiled | TooLarge) -> str:
    size = f"{target.memory / 1e9:.1f} GB" if target.memory else ""
    if isinstance(found, TooLarge):
        needed = f"{found.memory / 1e9:.1f} GB are needed" if found.memory else "the compiler does not say by how much"
        return f"does not fit into {size}: {needed}"
    kept = found.outputs - found.aliased
    text = (
        f"{found.memory / 1e9:.2f} GB a device (arguments {found.arguments / 1e9:.2f}, temporaries "
        f"{found.temporaries / 1e9:.2f}, outputs {found.outputs / 1e9:.2f} of which {kept / 1e9:.2f} beside the "
        f"arguments, code {found.code / 1e9:.2f})"
    )
    if target.memory is None:
        return text
    given = f" of which JAX takes {target.usable:.0%}" if target.usable < 1 else ""
    return f"{text}: {'fits' if _measured(target, found)[1] else 'does not fit'} into {size}{given}"


def _collectives(found: Compiled) -> list[str]:
    """One line a kind; those in loops are counted once."""
    return [
        f"{kind}: {count} in the program, {size / 1e6:,.1f} MB" for kind, (count, size) in found.collectives.items()
    ] or ["no collectives"]


def _ceilings(target: Target, found: Compiled, devices: int, batch_per_device: int, flops: int) -> list[str]:
    """What no run can exceed, which is not what one will reach."""
    lines = []
    if target.flops:
        rate = devices * target.flops / flops
        lines.append(f"ceiling by arithmetic: {rate:,.0f} images/s, at {target.flops / 1e12:,.0f} TFLOP/s a device")
    if target.bandwidth and not found.accessed:
        lines.append("ceiling by memory: not known, this compiler does not say what a step reads and writes")
    elif target.bandwidth:
        rate = devices * batch_per_device * target.bandwidth / found.accessed
        lines.append(
            f"ceiling by memory: {rate:,.0f} images/s, at {target.bandwidth / 1e9:,.0f} GB/s and "
            f"{found.accessed / 1e9:,.1f} GB a step and device, loops counted once"
        )
    return lines
