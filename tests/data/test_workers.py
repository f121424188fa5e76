"""Processes that read pictures leave stop signals to the process that trains, from their first moment."""

from __future__ import annotations

import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest
from bcosify.data import workers


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_fork_server_ignores_stop_signals_before_it_has_imported_anything():
    forkserver._forkserver._stop()
    before = [signal.getsignal(number) for number in workers.STOP_SIGNALS]
    workers.fork_server()
    status = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text().splitlines()
    ignored = int(next(line for line in status if line.startswith("SigIgn")).split()[1], 16)
    assert all(ignored >> (number - 1) & 1 for number in workers.STOP_SIGNALS)
    assert [signal.getsignal(number) for number in workers.STOP_SIGNALS] == before
