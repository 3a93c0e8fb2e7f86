"""Who started this process beside which others: a list of hosts, SLURM, or a Cloud TPU's or Kubernetes' own records.

Only reads: the environment, names and addresses. `processes.join` does the rest.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
from urllib.parse import urlsplit

from jax._src.clusters import GceTpuCluster, GkeTpuCluster, K8sCluster, SlurmCluster

from dsnet_jax.errors import InputError

PORT = 8476  # Where process 0 of a list of hosts is met, unless the list says otherwise.
LOOKUP_SECONDS = 300  # How long the name of process 0's host may take to appear.


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those that compute together.

    Attributes:
      host: name or address of process 0's machine.
      port: TCP, on it, where the others meet process 0.
      count: of processes.
      index: of this one, from 0.
      device_ids: GPUs that are this process's, among those that it sees; None: all that it sees.
    """

    host: str
    port: int
    count: int
    index: int
    device_ids: list[int] | None = None

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} ({socket.gethostname()})"


def find_place(hosts: str | None, process: int | None) -> Place | None:
    """The place of this process; None where it is alone.

    Args:
      hosts: "node0:4321,node1,node2": one process each, process 0 first, the port optional; None: whatever started
        this process knows (SLURM, Cloud TPU, GKE), or nobody does and it is alone.
      process: its index in `hosts`; None: the entry that is a name or an address of this machine.

    Raises:
      InputError: `hosts` or `process` cannot be understood (exit code 2), or the launcher's records cannot.
    """
    if hosts is not None:
        return _from_hosts(hosts, process)
    if process is not None:
        raise InputError(f"--process={process} counts in a list of hosts: give --hosts too", exit_code=2)
    return _from_slurm() or _from_cloud()


def _from_hosts(text: str, process: int | None) -> Place | None:
    hosts, port = [], PORT
    for index, entry in enumerate(entry.strip() for entry in text.split(",")):
        try:
            parts = urlsplit(f"//{entry}")
            host, entry_port = parts.hostname, parts.port
        except ValueError as error:
            raise InputError(f"--hosts: {entry!r} ends in no port ({error})", exit_code=2) from error
        if not host or parts.netloc != entry or "@" in entry:
            raise InputError(f"--hosts: {entry!r} is no name or address of a host", exit_code=2)
        if entry_port is not None and index:
            raise InputError(
                f"--hosts: {entry!r} has a port, only the first host may: the others meet there", exit_code=2
            )
        if entry_port == 0:
            raise InputError(f"--hosts: {entry!r}: choose a port from 1 to 65535", exit_code=2)
        port = entry_port or port
        hosts.append(host)
    if process is None:
        process = _find_this_machine(hosts)
    if not 0 <= process < len(hosts):
        raise InputError(
            f"--process={process} is not among the {len(hosts)} of --hosts: they count from 0 to {len(hosts) - 1}",
            exit_code=2,
        )
    return Place(hosts[0], port, len(hosts), process) if len(hosts) > 1 else None


def _find_this_machine(hosts: list[str]) -> int:
    if len(hosts) == 1:
        return 0
    found = [index for index, host in enumerate(hosts) if _is_this_machine(host)]
    if not found:
        raise InputError(
            f"--hosts: none of {', '.join(hosts)} is a name or an address of this machine ({socket.gethostname()}): "
            "correct the list, or say which one this is with --process=I",
            exit_code=2,
        )
    if len(found) > 1:
        raise InputError(
            f"--hosts: {' and '.join(hosts[index] for index in found)} are both this machine: say which process this "
            f"is with --process=I, one of {', '.join(map(str, found))}",
            exit_code=2,
        )
    return found[0]


def _is_this_machine(host: str) -> bool:
    name = socket.gethostname().lower()
    if host in {name, name.split(".")[0], socket.getfqdn().lower()}:
        return True
    try:
        addresses = {(family, address[0]) for family, *_, address in socket.getaddrinfo(host, None)}
    except OSError:  # A name that only others can resolve is not ours.
        return False
    return any(_has_address(*address) for address in addresses)


def _has_address(family: socket.AddressFamily, address: str) -> bool:
    """Only an address of one's own can be bound."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as test:
        test.bind((address, 0))
        return True
    return False


def _from_slurm() -> Place | None:
    # Inside a step of several tasks only. The shell of salloc, and the script of sbatch, know the tasks of the whole
    # job (SLURM_NTASKS), and may even have a rank; but nobody has started the others.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2 or not SlurmCluster.is_env_present():
        return None
    host, port = SlurmCluster.get_coordinator_address(LOOKUP_SECONDS, None).rsplit(":", 1)
    return Place(
        host, int(port), int(os.environ["SLURM_STEP_NUM_TASKS"]), SlurmCluster.get_process_id(), _slurm_devices()
    )


def _slurm_devices() -> list[int] | None:
    """The GPUs of this task: all that it sees if it is alone on its node, else its equal share.

    JAX's own rule is one GPU to a task, whatever there is.
    """
    tasks = _tasks_on_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""), int(os.environ.get("SLURM_NODEID", 0)))
    if tasks == 1:
        return None
    local = int(os.environ["SLURM_LOCALID"])
    if "CUDA_VISIBLE_DEVICES" not in os.environ:  # SLURM does not manage them.
        return [local]
    visible = len([device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device])
    own = os.environ.get("SLURM_GPUS_PER_TASK", "").split(":")[-1]  # As "a100:2", or "2".
    if visible < tasks or str(visible) == own:
        return None  # SLURM shows each task no more than its own.
    share, rest = divmod(visible, tasks)
    if rest:
        raise InputError(
            f"{tasks} tasks on a node cannot share its {visible} GPUs equally: choose another --ntasks-per-node, "
            "1 takes all GPUs"
        )
    return list(range(local * share, (local + 1) * share))


def _tasks_on_node(counts: str, node: int) -> int:
    """SLURM's "8(x2),4": two nodes of 8 tasks and one of 4."""
    tasks = []
    for number, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(number)] * int(repeated or 1)
    if node >= len(tasks):
        raise InputError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} does not say how many tasks node {node} has")
    return tasks[node]


def _from_cloud() -> Place | None:
    clusters = [GkeTpuCluster, GceTpuCluster]
    # Of a job that is no indexed one, or without the package that reads it, Kubernetes cannot tell who is who.
    if "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes"):
        clusters.append(K8sCluster)
    for cluster in clusters:
        if not cluster.is_env_present():
            continue
        try:
            count = cluster.get_process_count()
            if count == 1:
                return None
            host, port = cluster.get_coordinator_address(LOOKUP_SECONDS, None).rsplit(":", 1)
            return Place(host, int(port), count, cluster.get_process_id())
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{cluster.__name__} cannot tell which processes belong together: {reason}") from error
    return None
