"""How many threads torch gets beside other jobs: a thread that waits for a busy core holds all others up. (Ours.)

Threads of OpenMP wait for each other in a loop that burns time. On a machine of two cores that other jobs kept busy,
two of them took 2.8 times as long as one (EfficientNet-Lite0, training: 0.66 and 1.85 steps a second). So there are as
many as cores are free, and they wait in that loop for a short while only.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import psutil

__all__ = ["free_cores", "share_cores"]

OWN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
SPINS = "2000"  # turns of that loop
SAMPLE = 0.2  # seconds


def free_cores() -> int:
    """How many cores are not busy now, at least 1, of those that this process may use. Jobs that are nice give way."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = psutil.cpu_times_percent(SAMPLE, percpu=True)
    idle = sum(
        core.idle + getattr(core, "nice", 0.0) + getattr(core, "iowait", 0.0)
        for number, core in enumerate(cores)
        if number in allowed
    )
    return max(1, round(idle / 100))


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets torch's threads in the environment, before torch is imported; what the user has set there stays."""
    if not any(name in environment for name in OWN):
        environment.update({"OMP_NUM_THREADS": str(free_cores()), "GOMP_SPINCOUNT": SPINS})
