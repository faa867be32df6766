"""How many threads a run computes with: those the user wants, else one for each core there is.

The number follows from what stands still (processor, container, command line), never from the
load: sums are split among the threads, so another number means other bits. Beside other work it is
not the number that costs most but threads that wait spinning on a core which somebody else needs.
The programs therefore ask OpenMP to let its threads sleep (OMP_WAIT_POLICY) before torch is loaded.
"""

import os
from pathlib import Path

import torch

CPUS = Path("/sys/devices/system/cpu")
# a container's share of processor time under Linux: "200000 100000" is two cores, "max 100000" all
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def set_threads(wanted: int | None = None) -> int:
    """Compute with `wanted` threads, else with OMP_NUM_THREADS (torchrun sets it), else with
    `available_cores()`; returns the number."""
    if wanted is None and "OMP_NUM_THREADS" not in os.environ:
        wanted = available_cores()
    if wanted is not None:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def available_cores() -> int:
    """Physical cores among the processors that this process may run on; whole cores of the
    container's share at most, and at least one."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = range(os.cpu_count() or 1)
    # two processors of one core name the same siblings
    cores = len({_text(CPUS / f"cpu{number}/topology/thread_siblings_list") or number for number in allowed})
    share, _, period = _text(QUOTA).partition(" ")
    if share.isdecimal() and period.isdecimal():
        cores = min(cores, int(share) // int(period))
    return max(cores, 1)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
