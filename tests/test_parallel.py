"""Meshes and shardings."""

import dataclasses
import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsnet_jax import parallel

QUICK = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"


def test_the_meshes_have_one_axis_over_all_devices():
    for mesh in (parallel.global_mesh(), parallel.local_mesh()):
        assert mesh.axis_names == (parallel.AXIS,) and mesh.size == 8
        assert set(mesh.devices.flat) == set(jax.devices())


def test_devices_of_a_process_are_side_by_side_also_where_machines_are_slices():
    """As on GPU nodes, each of which XLA counts as a slice."""
    Device = dataclasses.make_dataclass("Device", ["process_index", "id", "slice_index"], frozen=True)
    devices = [Device(process, number, process) for process, number in [(1, 3), (0, 0), (1, 2), (0, 1)]]
    ordered = parallel.mesh_over(devices).devices
    assert [(device.process_index, device.id) for device in ordered] == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_a_batch_is_split_by_image_and_keeps_order_and_type():
    mesh = parallel.global_mesh()
    image = np.arange(16 * 2 * 3, dtype=np.uint8).reshape(16, 2, 3)
    label = np.arange(16, dtype=np.int64) % 5
    batch = parallel.put_batch(mesh, {"image": image, "label": label.astype(np.uint8)})
    assert batch["image"].sharding.spec == PartitionSpec(parallel.AXIS)
    assert [shard.data.shape for shard in batch["image"].addressable_shards] == [(2, 2, 3)] * 8
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image"], image)
    np.testing.assert_array_equal(batch["label"], label)


def test_replicated_arrays_are_whole_on_every_device():
    mesh = parallel.global_mesh()
    array = jax.device_put(np.arange(6.0), parallel.replicated(mesh))
    assert [shard.data.shape for shard in array.addressable_shards] == [(6,)] * 8


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux tells them")
def test_the_share_of_mappings_grows_with_what_is_mapped():
    before = parallel.share_of_mappings()
    assert 0 < before < 0.9
    files = [mmap.mmap(-1, 4096, prot=prot) for _ in range(500) for prot in (mmap.PROT_READ, mmap.PROT_WRITE)]
    with open("/proc/sys/vm/max_map_count") as limit:
        assert parallel.share_of_mappings() - before > 500 / int(limit.read())
    for file in files:
        file.close()


def test_where_mappings_are_not_told_there_is_room(monkeypatch):
    def not_there(*arguments):
        raise FileNotFoundError

    monkeypatch.setattr(parallel, "open", not_there, raising=False)
    assert parallel.share_of_mappings() == 0


@pytest.fixture
def cache_folder():
    """Puts back the folder of the compilation cache."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path, cache_folder):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parallel.configure()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "dsnet_jax" / "xla")


def homeless():
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home_may_name_the_folder_of_caches(monkeypatch, tmp_path, cache_folder):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(parallel.Path, "home", homeless)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parallel.configure()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "dsnet_jax" / "xla")


def test_a_user_without_a_home_goes_without_a_cache_and_is_told(monkeypatch, cache_folder, caplog):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel.Path, "home", homeless)
    before = jax.config.jax_compilation_cache_dir
    with caplog.at_level("WARNING", "absl"):
        parallel.configure()
    assert jax.config.jax_compilation_cache_dir == before
    assert "compiled programs are not kept: there is no home" in caplog.text


def test_the_users_own_choice_of_a_cache_wins(monkeypatch, tmp_path, cache_folder):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    parallel.configure()
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize(
    ("version", "plugins", "before", "after"),
    [
        ("0.10.2", ["xla_cuda13"], "", QUICK),
        ("0.11.0", ["xla_cuda12"], "--xla_dump_to=x", f"--xla_dump_to=x {QUICK}"),
        ("0.10.2", ["xla_cuda13"], "--xla_backend_extra_options=-a", "--xla_backend_extra_options=-a"),
        ("0.10.1", ["xla_cuda13"], "", ""),
        ("0.11.1", ["xla_cuda13"], "", ""),
        ("0.10.2", ["tpu"], "", ""),
        ("0.10.2", [], "", ""),
    ],
)
def test_gpus_scatter_quickly_also_with_the_jaxlib_that_needs_to_be_told(
    version, plugins, before, after, monkeypatch, caplog
):
    monkeypatch.setattr(parallel.jaxlib, "__version__", version)
    monkeypatch.setattr(parallel, "entry_points", lambda group: [SimpleNamespace(name=name) for name in plugins])
    monkeypatch.setattr(parallel, "_computes_on_cpu", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", before)
    with caplog.at_level("WARNING", logger="absl"):
        parallel.configure()
    assert os.environ["XLA_FLAGS"] == after
    assert (QUICK in caplog.text) == (before != after)


@pytest.mark.parametrize(("platform", "processes", "any_"), [("gpu", 2, True), ("gpu", 1, False), ("tpu", 2, False)])
def test_several_processes_with_gpus_do_not_share_the_trying_out_of_kernels(platform, processes, any_, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    options = parallel.compiler_options(mesh)
    assert bool(options) == any_
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)  # XLA refuses names that it does not know.


def test_a_process_that_computes_on_the_cpu_of_a_machine_with_gpus_is_left_alone(monkeypatch):
    monkeypatch.setattr(parallel.jaxlib, "__version__", "0.10.2")
    monkeypatch.setattr(parallel, "entry_points", lambda group: [SimpleNamespace(name="xla_cuda13")])
    monkeypatch.setattr(parallel, "_computes_on_cpu", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "")
    parallel.configure()
    assert os.environ["XLA_FLAGS"] == ""


FAULTS = """
import resource, threading
from dsnet_jax import parallel

parallel.configure()

def fault_pages(size):
    for _ in range(2):  # 64 MB, 16 thousand pages: the first time they come from the system.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"1" * size
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)

thread = threading.Thread(target=fault_pages, args=[2**26])  # As XLA's are: another than the main one.
thread.start()
thread.join()
"""


@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("tpu", False)])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is another")
def test_on_cpu_memory_that_was_freed_is_used_again(platforms, kept):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=environment | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(run.stdout) < 1000) == kept
