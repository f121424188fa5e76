"""Threads by free cores, before torch is imported, and never against what the user has set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from bcosify.core import threads


@pytest.fixture
def machine(monkeypatch):
    """Cores by (idle, nice, iowait) in per cent; all but the last may be used."""

    def made(*cores):
        found = [SimpleNamespace(idle=idle, nice=nice, iowait=wait) for idle, nice, wait in cores]
        monkeypatch.setattr(threads.psutil, "cpu_times_percent", lambda seconds, percpu: found)
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(len(cores) - 1)), raising=False)

    return made


@pytest.mark.parametrize(
    ("cores", "free"),
    [
        ([(100, 0, 0), (98, 0, 0), (0, 0, 0)], 2),
        ([(100, 0, 0), (3, 0, 0), (100, 0, 0)], 1),
        ([(0, 0, 0), (2, 0, 0), (100, 0, 0)], 1),
        ([(0, 95, 0), (40, 0, 50), (0, 0, 0)], 2),
    ],
)
def test_busy_cores_are_left_to_others_and_nice_jobs_give_way(machine, cores, free):
    machine(*cores)
    assert threads.free_cores() == free


def test_the_environment_is_the_users_first(machine):
    machine((100, 0, 0), (100, 0, 0), (100, 0, 0))
    environment: dict[str, str] = {}
    threads.share_cores(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": threads.SPINS}
    for name in threads.OWN:
        own = {name: "7"}
        threads.share_cores(own)
        assert own == {name: "7"}
