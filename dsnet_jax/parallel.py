"""Devices, and how arrays lie on them.

There is one mesh with one axis, `data`: batches are split over it, everything else is whole on every device. The code
is the same for one device and for a pod, for one process and for many.
"""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import jax
import jaxlib
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# Of jaxlib: they add float32 to a GPU's memory by comparing and swapping in a loop, hundreds of times slower than by
# the GPU's own instruction where many add to one place (jax issue 38806, xla issue 46225).
SLOW_SCATTER = ("0.10.2", "0.11.0")


def configure() -> None:
    """Sets what must be set before the first computation: the compilation cache, kept across runs, memory, XLA's flags.

    The user's own JAX_COMPILATION_CACHE_DIR wins; a user without a home has no cache, which is said.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        if caches := _users_caches():
            jax.config.update("jax_compilation_cache_dir", str(caches / "dsnet_jax" / "xla"))
        else:
            logging.warning("compiled programs are not kept: there is no home, nor JAX_COMPILATION_CACHE_DIR")
    if _computes_on_cpu():
        _keep_freed_memory()
    elif any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        quicken_scatter_on_cuda()


def _users_caches() -> Path | None:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    with contextlib.suppress(RuntimeError):  # As in containers, for a user that the system does not know.
        return Path.home() / ".cache"
    return None


def quicken_scatter_on_cuda() -> None:
    """Has programs for NVIDIA GPUs add to memory by the GPU's own instruction; before a backend starts.

    It takes subnormal numbers for zero. Sets XLA_FLAGS, and says so, for those jaxlib that would use something slow;
    the user's own xla_backend_extra_options win.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.__version__ in SLOW_SCATTER and "xla_backend_extra_options" not in flags:
        added = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"
        os.environ["XLA_FLAGS"] = f"{flags} {added}".strip()
        logging.warning("XLA_FLAGS: %s is added: jaxlib %s is slow on GPUs without it", added, jaxlib.__version__)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """XLA's, beside its defaults, for a program of all processes.

    On GPUs they share the work of trying kernels out, and each waits up to a day for what the others find. A process
    that has the program in its cache tries nothing: one whose cache, on another machine, has not would wait in vain.
    """
    on_gpus = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return {"xla_gpu_shard_autotuning": False} if on_gpus and jax.process_count() > 1 else {}


def _computes_on_cpu() -> bool:
    """As far as can be told before JAX looks for devices, which would be too early for `jax.distributed`."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def _keep_freed_memory() -> None:
    """Lets the C library keep what is freed, for the next step, instead of giving it back to the system.

    On CPU, XLA asks for a program's temporaries anew at every call. Gigabytes that come from the system come page by
    page, each cleared: a sixth of the time of a training step. One arena, since only the main one can be so large.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's.
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)


def share_of_mappings() -> float:
    """Of the memory mappings that Linux allows a process (vm.max_map_count), those in use; 0 where that is not told.

    XLA maps every function of a program for CPU by itself, of large programs more than a thousand; when there are no
    mappings left, LLVM ends the process. Some 40 programs of `ms_flip` need all 65,530.
    """
    try:
        with open("/proc/self/maps", "rb") as maps, open("/proc/sys/vm/max_map_count") as limit:
            return sum(1 for _ in maps) / int(limit.read())
    except OSError:
        return 0.0


def global_mesh() -> Mesh:
    """All devices of all processes."""
    return mesh_over(jax.devices())


def local_mesh() -> Mesh:
    """The devices of this process: evaluation needs no other process until the counts are added up."""
    return mesh_over(jax.local_devices())


def mesh_over(devices: Sequence[jax.Device]) -> Mesh:
    """The one axis over these devices, attached ones or only described, those of a process side by side.

    So a process's part of a batch is one block of it, wherever its devices lie. `jax.make_mesh` orders them by their
    places, for the sake of several axes, and refuses machines that are a slice each, as XLA counts GPU nodes.
    """
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), (AXIS,), axis_types=(AxisType.Auto,))


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
