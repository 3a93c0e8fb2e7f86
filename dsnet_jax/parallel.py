"""Devices, and how arrays lie on them.

There is one mesh with one axis, `data`: batches are split over it, everything else is whole on every device. The code
is the same for one device and for a pod, for one process and for many.
"""

import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def configure() -> None:
    """Sets what must be set before the first computation: the compilation cache, kept across runs.

    The user's own JAX_COMPILATION_CACHE_DIR wins.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "dsnet_jax" / "xla"))


def global_mesh() -> Mesh:
    """All devices of all processes."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """The devices of this process: evaluation needs no other process until the counts are added up."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, [b, ...] each, as global arrays [b * processes, ...] split over the mesh."""
    sharding = split_by_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
