"""Weights of others as a folder that runs start from and, for whole networks, that is evaluated: `dsnet port`."""

import contextlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dsnet_jax.checkpoints import Checkpoints
from dsnet_jax.config import default_config
from dsnet_jax.data.specs import VOC2012
from dsnet_jax.errors import InputError, listed, writing_into
from dsnet_jax.experiment import build_model, initial_variables
from dsnet_jax.models.resnet import RESNETS
from dsnet_jax.weights.torch_files import read_arrays, sha256_of
from dsnet_jax.weights.torchvision import RELEASES, SAVED_AGAIN, Conversion, Layout, convert, is_left_out, recognise
from dsnet_jax.workdir import LOCK, claim_workdir, locked_workdir
from dsnet_jax.writing import write_text

PORT = "port.json"  # Where the weights of a folder come from.


def port(file: str, workdir: epath.PathLike, backbone_only: bool = False) -> None:
    """Makes a folder of a file of weights, and tells what was taken, left out and cast.

    A ResNet becomes a folder that `config.init_from` takes. torchvision's FCN and DeepLabv3 become the workdir of a
    run that never was, at step 0: its classes are PASCAL VOC's 21.

    Args:
      file: a .safetensors, or a .pth written by torch.save.
      workdir: a new folder.
      backbone_only: of a whole network.

    Raises:
      InputError: the file cannot be used, the message lists what is wrong; or the folder holds something, or cannot be
        written.
    """
    source, folder = Path(file), epath.Path(workdir)
    _refuse_what_is_there(folder)
    checksum = sha256_of(source)
    later = SAVED_AGAIN.get(checksum[:8])
    if later and tarfile.is_tarfile(source):
        raise InputError(
            f"{source}: {RELEASES[checksum[:8]]}, is in PyTorch's first format, a tar file, which cannot be read "
            f"safely: download {later}, which has the same weights, from download.pytorch.org/models"
        )
    layout, conversion = arrays_ported(read_arrays(source), str(source), backbone_only)
    origin = RELEASES.get(checksum[:8])
    about = {
        "source": source.name,
        "sha256": checksum,
        "release": origin,
        "backbone": layout.backbone,
        "stem": layout.stem,
        "head": layout.head,
        "left_out": conversion.left_out,
        "cast": dict(conversion.cast),
    }
    with locked_workdir(folder):
        _refuse_what_is_there(folder)  # Another process may have been quicker.
        with _removed_on_failure(folder):
            checkpoints = Checkpoints(folder)
            tree = "variables" if layout.head else "backbone"
            checkpoints.save(0, {tree: _move_to_device(conversion)}, {"ported_from": about})
            checkpoints.close()
            write_text(folder / PORT, json.dumps(about, indent=2) + "\n")
            if layout.head:
                claim_workdir(folder, config_of(layout), VOC2012)  # Last: it says that all the rest is there.
    _tell(source, folder, layout, conversion, origin or "none of the releases known here", checksum)


def _move_to_device(conversion: Conversion) -> dict[str, Any]:
    """Its variables, array by array, so that there are never two copies of all of them."""
    leaves, structure = jax.tree.flatten(conversion.variables)
    conversion.variables = {}
    for index, leaf in enumerate(leaves):
        leaves[index] = jax.block_until_ready(jax.device_put(leaf))
    conversion.variables = jax.tree.unflatten(structure, leaves)
    return conversion.variables


def arrays_ported(
    arrays: Mapping[str, np.ndarray], source: str, backbone_only: bool = False
) -> tuple[Layout, Conversion]:
    """What a file of `arrays` holds, and its variables as ours: params and batch_stats, NumPy float32.

    Args:
      arrays: by name.
      source: what errors call the file.
      backbone_only: of a whole network.

    Raises:
      InputError: anything is missing, unknown, or of another shape; all of it is listed.
    """
    if arrays and all(name.startswith("module.") for name in arrays):  # DataParallel's.
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    layout = recognise(arrays, backbone_only)
    if layout is None:
        raise InputError(
            f"{source}: holds no ResNet, the names of its {len(arrays)} arrays are others: "
            f"{', '.join(list(arrays)[:4]) or 'none'}: see docs/porting.md"
        )

    def may_be_left_out(name: str) -> bool:
        outside = layout.head is None and not name.startswith(layout.prefix)
        return outside or is_left_out(name.removeprefix(layout.prefix))

    conversion = convert(arrays, _shapes(layout), layout.table, may_be_left_out)
    what = f"{layout.backbone} with stem {layout.stem}" + (f" and head {layout.head}" if layout.head else "")
    if conversion.faults:
        kinds = Counter(line.partition(": ")[2].split()[0] for line in conversion.faults)
        raise InputError(
            f"{source}: nearest is {what}, but {len(conversion.faults)} of its arrays do not fit "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())}): give a complete file of a network "
            "that docs/porting.md lists\n" + "\n".join(listed(conversion.faults))
        )
    if layout.head and layout.classes != VOC2012.num_classes:
        raise InputError(
            f"{source}: has {layout.classes} classes, whose names are not known; a whole network is ported with PASCAL "
            "VOC's 21: give --backbone-only to start from its backbone"
        )
    return layout, conversion


def config_of(layout: Layout) -> ConfigDict:
    """The experiment whose network torchvision's is; the rest is as `default_config` has it."""
    config = default_config()
    config.data.name = VOC2012.name
    config.model.update(
        name=layout.head,
        backbone=layout.backbone,
        stem=layout.stem,
        output_stride=8,
        width=layout.width,
        deep_supervision=layout.auxiliary,
        auxiliary_width=layout.auxiliary_width,
    )
    if layout.head == "aspp":
        config.model.update(dropout=0.0, aspp_dropout=0.5)
    return config.lock()


def is_ported_backbone(workdir: epath.PathLike) -> bool:
    """Whether a folder holds a backbone alone; raises InputError if it is damaged."""
    return (epath.Path(workdir) / PORT).exists() and _read_port(workdir)["head"] is None


def load_backbone(workdir: epath.PathLike, sharding: jax.sharding.Sharding) -> dict[str, Any]:
    """The params and batch_stats of a ported backbone, on the devices of a replicated sharding.

    Raises:
      InputError: the folder is damaged.
    """
    about = _read_port(workdir)
    like = jax.eval_shape(lambda: _fresh_backbone(about["backbone"], about["stem"]))
    like = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), like)
    checkpoints = Checkpoints(workdir, read_only=True)
    trees, _ = checkpoints.restore({"backbone": like})
    checkpoints.close()
    return trees["backbone"]


def _read_port(workdir: epath.PathLike) -> dict[str, Any]:
    """Backbone, stem and head, as `port` has noted them."""
    file = epath.Path(workdir) / PORT
    try:
        about = json.loads(file.read_bytes())
        return {name: about[name] for name in ("backbone", "stem", "head")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged: port the weights again, into a new folder") from error


def _refuse_what_is_there(folder: epath.Path) -> None:
    with writing_into(folder, "give another --workdir"):
        if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
            raise InputError(f"{folder} {'holds something' if folder.is_dir() else 'is a file'}: give a new --workdir")


@contextlib.contextmanager
def _removed_on_failure(folder: epath.Path) -> Iterator[None]:
    """Leaves no half of a folder, which the same command would refuse when it is given again."""
    try:
        yield
    except BaseException as error:  # Stopping is one.
        with contextlib.suppress(OSError):
            folder.rmtree()
        if isinstance(error, OSError):
            raise InputError(f"{folder} cannot be written ({error.strerror}): give another --workdir") from error
        raise


def _shapes(layout: Layout) -> Any:
    if layout.head is None:
        return jax.eval_shape(lambda: _fresh_backbone(layout.backbone, layout.stem))
    model = build_model(config_of(layout).model, layout.classes)
    return jax.eval_shape(lambda: initial_variables(model))


def _fresh_backbone(name: str, stem: str) -> Any:
    return RESNETS[name](stem=stem).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)


def _tell(source: Path, folder: epath.Path, layout: Layout, conversion: Conversion, origin: str, checksum: str) -> None:
    leaves, params = (jax.tree.leaves(tree) for tree in (conversion.variables, conversion.variables["params"]))
    print(f"{source}: {origin} (sha256 {checksum})")
    head = f", head {layout.head}" if layout.head else ""
    head += ", deep supervision" if layout.auxiliary else ""
    print(
        f"{layout.backbone}, stem {layout.stem}{head}: {len(leaves)} arrays, "
        f"{sum(leaf.size for leaf in params) / 1e6:.1f} M parameters"
    )
    for dtype, count in conversion.cast.items():
        print(f"cast to float32: {count} arrays of {dtype}")
    if conversion.left_out:
        parts = Counter(
            "num_batches_tracked"
            if name.endswith("num_batches_tracked")
            else name.removeprefix(layout.prefix).split(".")[0]
            for name in conversion.left_out
        )
        print("left out: " + ", ".join(f"{part} ({count})" for part, count in sorted(parts.items())))
    if layout.head:
        print(f"{folder}: ready, as in `dsnet predict --workdir={folder} --output=predictions IMAGE`")
    else:
        fields = f"--config.init_from={folder} --config.model.backbone={layout.backbone}"
        stem = f" --config.model.stem={layout.stem}" if layout.stem != "v1" else ""
        print(f"{folder}: ready, a run starts from it with {fields}{stem}")
