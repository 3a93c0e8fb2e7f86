"""Meshes, shardings and sums over processes."""

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsnet_jax import parallel


def test_the_meshes_have_one_axis_over_all_devices():
    for mesh in (parallel.global_mesh(), parallel.local_mesh()):
        assert mesh.axis_names == (parallel.AXIS,) and mesh.size == 8
        assert set(mesh.devices.flat) == set(jax.devices())


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


def test_one_process_sums_to_its_own_counts_and_is_the_main_one():
    counts = np.array([[2**40 + 1, 0]])
    assert parallel.sum_over_processes(counts) is counts
    assert parallel.is_main_process()


TWO_PROCESSES = """
import sys
import jax
import numpy as np

process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)

from dsnet_jax import parallel

counts = np.array([[2**62 // 2 - 1, 2**31 - 1, 2**31, 2**32 + 5], [0, 1, 2**53 + 1, 7]], np.int64) + process
summed = parallel.sum_over_processes(counts)
assert summed.dtype == np.int64
np.testing.assert_array_equal(summed, 2 * (counts - process) + 1)

mesh = parallel.global_mesh()
assert mesh.size == 4 and parallel.local_mesh().size == 2
batch = parallel.put_batch(mesh, {"x": np.full((2, 3), process, np.float32)})["x"]
assert batch.shape == (4, 3)
mean = jax.jit(lambda x: x.mean(), out_shardings=parallel.replicated(mesh))(batch)
assert float(mean.addressable_data(0)) == 0.5, mean  # Over the batch of both.

assert parallel.is_main_process() == (process == 0)
jax.distributed.shutdown()
"""


def test_two_processes_share_a_mesh_and_sum_counts_beyond_32_and_53_bits():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(index), port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


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


def test_the_users_own_choice_of_a_cache_wins(monkeypatch, tmp_path, cache_folder):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    parallel.configure()
    assert jax.config.jax_compilation_cache_dir == before
