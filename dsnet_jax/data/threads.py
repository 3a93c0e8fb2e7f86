"""How many threads read and decode: what suits the machine, or the part of it that the process may use."""

import os


def threads_for(read_threads: int = 0, worker_count: int = 0) -> int:
    """`config.data.read_threads`, or for 0 what suits the machine: one for each processor of the process, 4 to 32.

    Where there are workers, these are shared by them.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return read_threads or max(1, min(max(4, processors), 32) // max(1, worker_count))
