"""How many threads a run computes with: those the user wants, else one for each core there is.

The number follows from what stands still (processor, container, command line), never from the
load: sums are split among the threads, so another number means other bits. How a thread waits for
the others changes no bit, and does follow the load.
"""

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
# a container's share of processor time under Linux: "200000 100000" is two cores, "max 100000" all
QUOTA = Path("/sys/fs/cgroup/cpu.max")
# "0.20 0.18 0.12 3/80 11206": of eighty threads three want a processor now
LOAD = Path("/proc/loadavg")


def settle_waiting() -> None:
    """Says how the threads of OpenMP (libgomp) wait; must be called before torch is loaded.

    A thread that spins while it waits takes a core from whoever needs it: on two cores with four
    programs a run takes two to ten times as long. A thread that sleeps must be woken: a run of the
    nano model alone on the machine takes 1.4 times as long. So they sleep where other programs are
    at work at this moment, and else spin for some microseconds. What the user has set holds.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    # this program's own thread is one of those that want a processor
    others = int(text_of(LOAD).split()[3].partition("/")[0]) - 1 if text_of(LOAD) else 0
    if others + available_cores() > (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = "3000"


def set_threads(wanted: int | None = None) -> int:
    """Compute with `wanted` threads, else with OMP_NUM_THREADS (torchrun sets it), else with
    `available_cores()`; returns the number."""
    import torch  # here, so that settle_waiting comes before it

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
    cores = len({text_of(CPUS / f"cpu{number}/topology/thread_siblings_list") or number for number in allowed})
    share, _, period = text_of(QUOTA).partition(" ")
    if share.isdecimal() and period.isdecimal():
        cores = min(cores, int(share) // int(period))
    return max(cores, 1)


def text_of(path: Path) -> str:
    """What the system says in one of its files, "" where it has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
