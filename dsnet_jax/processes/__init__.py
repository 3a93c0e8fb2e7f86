"""Several processes that compute together, one to a machine as a rule: how they meet, act as one, and part.

JAX's own service leaves the others waiting for a process that has failed, and ends them with a crash dump a minute or
two after one has died. Here every process stops at once, with one line that names the culprit (`membership`).

Where there is one process, everything here does nothing and asks nobody.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import TracebackType

import jax
import numpy as np
from jax._src import distributed

from dsnet_jax.processes import membership
from dsnet_jax.processes.launch import find_place
from dsnet_jax.processes.membership import Hub, Member

_member: Member | None = None  # None where there is one process.
_hub: Hub | None = None  # In process 0.


def join(hosts: str | None = None, process: int | None = None) -> None:
    """Meets the processes of the same command on other machines; does nothing where there are none.

    Call it before anything is computed, and `leave` in the end. In between, when another process dies or fails, this
    one prints a line that names it, and ends with exit code 1: at once; within `membership.GRACE_SECONDS` where the
    other one told why; within `DEAD_SECONDS + BEAT_SECONDS` where a machine is gone, or stands still.

    Process 0 listens on the port of `hosts`, or where JAX's service would under SLURM, Cloud TPU and Kubernetes; the
    service itself takes a free one.

    Args:
      hosts: "node0:4321,node1,node2", process 0 first; None: as SLURM, Cloud TPU or Kubernetes say.
      process: this one's index in `hosts`; None: found by this machine's names and addresses.

    Raises:
      InputError: `hosts` or `process` are wrong, or the processes did not meet within `membership.JOIN_SECONDS`.
    """
    global _member, _hub
    place = find_place(hosts, process)
    if place is None:
        return
    if place.index == 0:
        _hub = Hub(place)
        _hub.start()
    _member = Member(place)
    _member.start()
    atexit.register(_at_exit)
    sys.excepthook = _tell_and_end
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM from us.
    host = f"[{place.host}]" if ":" in place.host else place.host
    jax.distributed.initialize(
        f"{host}:{_member.jax_port}",
        place.count,
        place.index,
        place.device_ids,
        cluster_detection_method="deactivate",  # It would leave one GPU to a SLURM task, however many there are.
        initialization_timeout=membership.JOIN_SECONDS,
        heartbeat_timeout_seconds=3 * membership.DEAD_SECONDS,  # Ours come first.
    )
    _delay_aborts()


def leave() -> None:
    """Waits until all processes are here, and parts from them: after it the end of one ends no other."""
    global _member
    if _member is None:
        return
    _member.wait_for_all()
    if distributed.global_state.client is not None:
        distributed.global_state.client.shutdown()
        distributed.global_state.client = None
    _member.wait_for_all()  # The service in process 0 has to outlive its clients: they would take its end for a crash.
    _member.close()
    _member = None
    if _hub is not None:
        _hub.join()  # Until the last has said goodbye: it would take this process's end for a death.
    jax.distributed.shutdown()


def wait_for_all() -> None:
    """Returns when every process has called it as often as this one."""
    if _member is not None:
        _member.wait_for_all()


@contextlib.contextmanager
def main_process_first(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """Within, the main process holds `context`; the others, which do not enter it, wait until it does."""
    with context if is_main_process() else contextlib.nullcontext():
        wait_for_all()
        yield


def report_failure(error: BaseException | str, exit_code: int = 1) -> None:
    """Tells the other processes why this one stops, and ends it with `exit_code`. Returns where there are no others.

    The user has been told before. A collective fails when another process is gone: an error of JAX waits a moment for
    that to be known, and the process then ends with the line that names the other one.
    """
    if _member is None:
        return
    _wait_for_the_cause(error)
    sys.stdout.flush()
    sys.stderr.flush()
    _member.fail(" ".join(str(error).split()))
    os._exit(exit_code)  # At a normal end JAX waits for the others, which may wait for this one.


def request_stop() -> None:
    """Makes `stop_requested_elsewhere` true in the other processes, soon."""
    if _member is not None:
        _member.request_stop()


def stop_requested_elsewhere() -> bool:
    """Whether another process has called `request_stop`. Costs nothing."""
    return _member is not None and _member.stop_requested


def count() -> int:
    """How many processes have joined. Unlike `jax.process_count`, it starts no backend, and so waits for nobody."""
    return 1 if _member is None else _member.place.count


def describe() -> str:
    """This process, as in "process 1 of 4 (node1)"."""
    return f"process 0 of 1 ({socket.gethostname()})" if _member is None else str(_member.place)


def is_main_process() -> bool:
    """True in the one process that writes files and prints."""
    return jax.process_index() == 0


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """The sum of every process's array, int64, exact; the array itself where there is one process."""
    if jax.process_count() == 1:
        return counts
    from jax.experimental import multihost_utils

    # Split in halves of 31 bits: arrays that travel between processes are 32 bits wide unless x64 is on.
    halves = np.stack([counts >> 31, counts & 0x7FFFFFFF]).astype(np.uint32)
    gathered = multihost_utils.process_allgather(halves).astype(np.int64).sum(axis=0)
    return (gathered[0] << 31) + gathered[1]


def _delay_aborts() -> None:
    """Lets the thread that aborts this process sleep before it does.

    When process 0 dies, JAX's client in the others notices it in the same millisecond as we do, and aborts: before our
    line is written, or after. A signal's handler is given its number: six seconds for SIGABRT.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)


def _wait_for_the_cause(error: BaseException | str) -> None:
    if _member is not None and isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(membership.GRACE_SECONDS)


def _tell_and_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What an exception does that nobody has caught."""
    _wait_for_the_cause(error)
    sys.__excepthook__(kind, error, trace)
    report_failure(f"{kind.__name__}: {error}")


def _at_exit() -> None:
    report_failure("it ended before the others")
