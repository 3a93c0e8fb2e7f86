"""Devices that a program can be compiled for: what they are, and their description for XLA's compilers."""

import dataclasses
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from dsnet_jax import parallel
from dsnet_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind, side by side.

    Attributes:
      platform: tpu, cuda or cpu.
      memory: bytes of one device; None: not known.
      flops: peak of bfloat16 products a second of one device; None: not known.
      bandwidth: peak of bytes a second between a device and its memory; None: not known.
      topology: for XLA: the name of the topology (TPU), or how many partitions, hosts and devices of a host (GPU).
      accelerator_type: Cloud TPU's name of the slice, which libtpu wants to know where there is no TPU.
      usable: share of the memory that JAX gives to a program.
    """

    platform: str
    memory: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    topology: str = ""
    accelerator_type: str = ""
    usable: float = 1.0


GIB = 2**30

# Per JAX device, which is a chip; of TPU7x half a chip. Sources: Cloud TPU's pages "TPU v4", "TPU v5e", "TPU v5p",
# "TPU v6e" and "TPU7x" (cloud.google.com/tpu/docs), NVIDIA's data sheet of the H100 SXM (dense, not sparse).
TARGETS = {
    "v4:2x2x1": Target("tpu", 32 * GIB, 275e12, 1200e9, "v4:2x2x1", "v4-8"),
    "v5e:2x4": Target("tpu", 16 * GIB, 197e12, 819e9, "v5e:2x4", "v5litepod-8"),
    "v5p:2x2x1": Target("tpu", 95 * GIB, 459e12, 2765e9, "v5p:2x2x1", "v5p-8"),
    "v6e:2x4": Target("tpu", 32 * GIB, 918e12, 1638e9, "v6e:2x4", "v6e-8"),
    "tpu7x:2x2x1": Target("tpu", 96 * GIB, 1153.5e12, 3690e9, "tpu7x:2x2x1", "tpu7x-8"),
    # Of a GPU's memory JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    "h100:8": Target("cuda", 84942979072, 989e12, 3352.32e9, "1x8x1", usable=0.75),
    "cpu": Target("cpu"),
}

# The H100 in XLA's words (stream_executor.GpuTargetConfigProto): the fields that describe its memory and its cores, as
# in xla/backends/gpu/target_config/specs/h100_sxm.txtpb of openxla/xla (Apache 2.0).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Of XLA by platform. Without a GPU at hand it cannot tile products of highest precision in Triton, and fails.
COMPILER_OPTIONS = {"tpu": {}, "cuda": {"xla_gpu_enable_triton_gemm": False}, "cpu": {}}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
      InputError: there is none; exit code 2.
    """
    if name not in TARGETS:
        raise InputError(f"--target is {name!r}: one of {', '.join(TARGETS)} is needed", exit_code=2)
    return TARGETS[name]


def mesh_of(target: Target) -> Mesh:
    """All devices of a target with the axes of `parallel.global_mesh`; for cpu the devices of this process.

    Nothing can be computed on them, only compiled for them. To be called before anything is computed in this process.

    Raises:
      InputError: the compiler for the target is not installed, or another process is using it.
    """
    jax.config.update("jax_platforms", "cpu")  # Whatever is attached to this machine is left alone.
    if target.platform == "cpu":
        return parallel.global_mesh()
    try:
        devices = _describe(target)
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise _explained(target, error) from error
    return parallel.mesh_over(devices)


def _describe(target: Target) -> list[Any]:
    if target.platform == "cuda":
        parallel.quicken_scatter_on_cuda()  # As training on these devices does.
        options = {"target_config": H100, "topology": target.topology}
        return topologies.get_topology_desc(platform="cuda", topology_name="h100", **options).devices
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu asks the machine what it is, and waits long where that is no TPU.
    os.environ["TPU_ACCELERATOR_TYPE"] = target.accelerator_type
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    # A v4 is otherwise two devices a chip, which training on one never uses; the others have no such choice by default.
    options = {"chip_config_name": "megacore"} if target.topology.startswith("v4") else {}
    return topologies.get_topology_desc(target.topology, "tpu", **options).devices


def _explained(target: Target, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    if "lockfile" in text or "already in use" in text:
        return InputError(f"libtpu is in use by another process ({text[:150]}): wait for it, one at a time may compile")
    return InputError(
        f"the compiler for {target.platform} cannot be used ({text[:150]}): install it with "
        f"`pip install -e '.[{target.platform}]'`, in an environment of its own",
        exit_code=2,
    )
