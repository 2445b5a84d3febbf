"""The cores that this process may use, and how torch's threads share them with other processes.

A pod with a limit of four cores sees all cores of its node. With a thread or a process for each of them it would need
many times its memory, and Linux would stop it for most of the time. So the limit counts, not what the node has.

Threads that wait for each other in torch's loops spin before they sleep. A sleeping thread is woken late, which a
training of narrow layers notices in each of its thousands of loops; a spinning one takes the core from other processes.
How many turns they spin is read when OpenMP is loaded, so it depends on the machine at that time. Seconds of three
epochs of the model in `benchmarks/peers.py`, two cores, alone and beside one busy process:

    turns          1,000   3,000   10,000   30,000   100,000 (OpenMP's default is 300,000)
    alone           20.8    17.4     16.0     15.8      15.6
    beside one      29.3    34.8     48.5     76.7     148.3
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from . import environment

_CGROUP = Path("/sys/fs/cgroup")
_LOAD = Path("/proc/loadavg")
_READINGS = 5
_SECONDS_BETWEEN_READINGS = 0.004
_TURNS_ALONE, _TURNS_BESIDE_OTHERS = 10_000, 1_000


def cores() -> int:
    """Number of cores that this process may use: those it is bound to, within the limit of its container."""
    return max(min(_bound_to(), _limit()), 1)


def share_cores() -> None:
    """Let torch compute on the cores that this process may use; called before torch is imported.

    What the user's environment says is not changed.
    """
    limited = cores() < _bound_to()
    if limited:  # otherwise torch counts them itself, and does not count two threads of one core
        os.environ.setdefault(environment.THREADS.name, str(cores()))
    if not environment.SPIN_TURNS.read():
        # Of a limit, spinning would use up what computing needs.
        turns = _TURNS_BESIDE_OTHERS if limited or _others_run() else _TURNS_ALONE
        os.environ[environment.SPIN_TURNS.name] = str(turns)


def _bound_to() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _limit() -> int:
    """Whole cores of the container's limit, by control groups version 2 or 1; without one more than there are."""
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return int(quota) // int(period)  # "max" is no number
    with suppress(OSError, ValueError):
        quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) // int(period) if int(quota) > 0 else sys.maxsize
    return sys.maxsize


def _others_run() -> bool:
    """Whether other processes of the machine compute all the time, so that not every core is free."""
    for _ in range(_READINGS):
        try:
            running = int(_LOAD.read_text().split()[3].split("/")[0])  # this thread included, see proc(5)
        except (OSError, ValueError, IndexError):
            return True
        if running - 1 + cores() <= (os.cpu_count() or 1):
            return False
        time.sleep(_SECONDS_BETWEEN_READINGS)
    return True
