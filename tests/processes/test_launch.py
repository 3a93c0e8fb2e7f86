"""Who started this process beside which others."""

import socket

import pytest
from jax._src.clusters import GceTpuCluster, GkeTpuCluster, cloud_tpu_cluster

from dsnet_jax.errors import InputError
from dsnet_jax.processes import launch
from dsnet_jax.processes.launch import PORT, Place, find_place


@pytest.fixture(autouse=True)
def nobodys_environment(monkeypatch):
    """That of a process which nobody has started beside others."""
    for name in ("SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def named_node1(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node1.cluster.example")
    addresses = {"10.0.0.1": "10.0.0.1", "me": "127.0.0.1", "127.0.0.1": "127.0.0.1"}

    def resolve(host, port):
        if host not in addresses:
            raise socket.gaierror(f"no {host}")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (addresses[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("own", ["node1", "NODE1", "node1.cluster.example", "me", "127.0.0.1"])
def test_a_process_finds_itself_in_the_list_by_name_and_by_address(named_node1, own):
    assert find_place(f"node0:4321,{own},10.0.0.1", None) == Place("node0", 4321, 3, 1)


def test_the_port_is_optional_and_hosts_may_be_ipv6_addresses(named_node1):
    assert find_place("node0,node1", None) == Place("node0", PORT, 2, 1)
    assert find_place("[2001:db8::1]:5000,node1", None) == Place("2001:db8::1", 5000, 2, 1)


def test_the_process_can_be_given_where_the_machine_cannot_tell(named_node1):
    assert find_place("node1:4321,node1", 0) == Place("node1", 4321, 2, 0)
    assert find_place("proxy0,proxy1", 1) == Place("proxy0", PORT, 2, 1)


def test_a_list_of_one_host_is_one_process(named_node1):
    assert find_place("elsewhere:4321", None) is None
    assert find_place("node1", 0) is None


@pytest.mark.parametrize(
    "hosts, process, words",
    [
        ("node0,node2", None, "none of node0, node2 is a name or an address of this machine (node1)"),
        ("node1,node0,node1", None, "node1 and node1 are both this machine: say which process this is"),
        ("node1,me", None, "node1 and me are both this machine"),
        ("node0,node1", 2, "--process=2 is not among the 2 of --hosts: they count from 0 to 1"),
        ("node0,node1", -1, "--process=-1 is not among"),
        ("node0:here,node1", None, "'node0:here' ends in no port"),
        ("node0:70000,node1", None, "'node0:70000' ends in no port"),
        ("node0:0,node1", None, "choose a port from 1 to 65535"),
        ("node0,node1:4321", None, "'node1:4321' has a port, only the first host may"),
        ("node0,,node1", None, "'' is no name"),
        ("gs://bucket,node1", None, "is no name"),
        (None, 1, "--process=1 counts in a list of hosts: give --hosts too"),
    ],
)
def test_a_list_that_cannot_be_understood_is_told_in_one_line(named_node1, hosts, process, words):
    with pytest.raises(InputError) as caught:
        find_place(hosts, process)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def slurm(monkeypatch, **variables):
    """Sets what SLURM sets in task 9 of 16 on two nodes, and `variables`; None takes one away."""
    step = {"NUM_TASKS": "16", "NODELIST": "gpu[007,011]", "TASKS_PER_NODE": "8(x2)"}
    task = {"JOB_ID": "4098", "NTASKS": "16", "PROCID": "9", "LOCALID": "1", "NODEID": "1"}
    environment = {f"SLURM_STEP_{name}": value for name, value in step.items()}
    environment |= {f"SLURM_{name}": value for name, value in task.items()}
    for name, value in (environment | variables).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


def test_a_slurm_step_of_several_tasks_meets_at_its_first_node(monkeypatch):
    slurm(monkeypatch, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert find_place(None, None) == Place("gpu007", 65535 - 4096 + 1 + 2, 16, 9, [1])


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # A shell of salloc -n16.
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_NODELIST": None, "SLURM_PROCID": "0"},  # A script of sbatch -n16.
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_PROCID": None},
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n1.
        {"SLURM_PROCID": None},
    ],
)
def test_what_slurm_has_not_started_beside_others_is_alone(monkeypatch, variables):
    slurm(monkeypatch, **variables)
    assert find_place(None, None) is None


@pytest.mark.parametrize(
    "variables, devices",
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "15,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": None}, [1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8,2", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [4, 5, 6, 7]),
        ({"CUDA_VISIBLE_DEVICES": "5", "SLURM_GPUS_PER_TASK": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x8)", "CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "a100:2"}, None),
    ],
)
def test_a_slurm_task_takes_its_share_of_the_gpus_and_all_where_it_is_alone_on_its_node(
    monkeypatch, variables, devices
):
    slurm(monkeypatch, **variables)
    assert find_place(None, None).device_ids == devices


def test_gpus_that_tasks_cannot_share_equally_are_refused(monkeypatch):
    slurm(monkeypatch, SLURM_STEP_TASKS_PER_NODE="3(x2)", CUDA_VISIBLE_DEVICES="0,1,2,3")
    with pytest.raises(InputError, match="3 tasks on a node cannot share its 4 GPUs equally"):
        find_place(None, None)


def test_a_list_of_hosts_wins_over_slurm(named_node1, monkeypatch):
    slurm(monkeypatch)
    assert find_place("node0,node1", None) == Place("node0", PORT, 2, 1)


@pytest.fixture
def on_a_tpu_vm(monkeypatch):
    """Called with what the metadata server knows, makes this a Cloud TPU VM."""

    def be(metadata):
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        known = {"tpu-env": "", **metadata}
        monkeypatch.setattr(
            cloud_tpu_cluster, "get_metadata", lambda key: (known.get(key, ""), 200 if key in known else 404)
        )
        monkeypatch.setattr(GceTpuCluster, "wait_for_coordinator", lambda *_: None)
        monkeypatch.setattr(GkeTpuCluster, "wait_for_coordinator", lambda *_: None)

    return be


def test_the_workers_of_a_pod_slice_are_found_in_its_metadata(on_a_tpu_vm):
    on_a_tpu_vm({"agent-worker-number": "2", "worker-network-endpoints": "a:0:10.0.0.5,b:1:10.0.0.6,c:2:10.0.0.7"})
    assert find_place(None, None) == Place("10.0.0.5", 8482, 3, 2)


def test_a_tpu_vm_of_one_host_is_alone(on_a_tpu_vm):
    on_a_tpu_vm({"agent-worker-number": "0", "worker-network-endpoints": "a:0:10.0.0.5"})
    assert find_place(None, None) is None


def test_the_workers_of_gke_are_found_in_the_environment(on_a_tpu_vm, monkeypatch):
    on_a_tpu_vm({})
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "job-0.svc,job-1.svc")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "first-0.svc:8080")
    assert find_place(None, None) == Place("first-0.svc", 8482, 4, 3)


def test_records_that_cannot_be_read_are_told_in_one_line(on_a_tpu_vm):
    on_a_tpu_vm({"agent-worker-number": "0", "worker-network-endpoints": "a:0"})
    with pytest.raises(InputError, match="GceTpuCluster cannot tell which processes belong together: unsupported"):
        find_place(None, None)


def test_tpu_variables_on_a_machine_without_tpus_mean_nothing(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert launch.find_place(None, None) is None
