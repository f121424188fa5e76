"""Processes that read pictures: they leave stop signals to the process that trains, and never outlive it."""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from ..core.errors import DataError

__all__ = [
    "STOP_SIGNALS",
    "WorkersEnded",
    "check_shared_memory",
    "fork_server",
    "ignore_stop_signals",
    "start_worker",
    "way_out",
]

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
SHARED = Path("/dev/shm")
AHEAD = 2  # batches that a DataLoader lets each worker make before they are asked for


class WorkersEnded(DataError):
    """Processes that read pictures ended by themselves."""


def fork_server() -> BaseContext:
    """Clean processes that are cheap to start: a server imports `fork_server` once, and workers are forked from it."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.fork_server"])
    _start_server()
    return context


def _start_server() -> None:
    """Starts the fork server, and multiprocessing's tracker of semaphores with it.

    What is ignored here is ignored there from the first moment: the server imports for seconds before it could do so.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may handle signals
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_worker(worker: int) -> None:
    """The first thing that a worker does.

    Stop signals often go to every process of a job (`timeout`, Slurm, systemd, Ctrl-C): what they mean is decided by
    the process that trains, which needs its workers for the step that it is in, and ends them when it ends.
    """
    # Workers are the parallelism; threads inside them only fight for the same cores.
    torch.set_num_threads(1)
    ignore_stop_signals()
    threading.Thread(target=_end_with_main, daemon=True, name="end with the main process").start()


def ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_with_main() -> None:
    """A killed main process says nothing; the pipe that it held breaks. The fork server ends after its last worker."""
    main = mp.parent_process()
    if main is not None:
        wait([main.sentinel])
        os._exit(1)


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raises DataError where /dev/shm cannot hold the batches that `workers` make ahead, each of `batch_bytes`."""
    if not workers or not SHARED.is_dir():
        return
    needed, free = batch_bytes * (workers * AHEAD + 1), shutil.disk_usage(SHARED).free
    if needed > free:
        raise DataError(
            f"{workers} workers hand over batches in {SHARED}, which has {_mega(free)} free, and need {_mega(needed)}. "
            f"{way_out(workers)}, or make it larger (docker run --shm-size=1g)."
        )


def way_out(workers: int) -> str:
    """What to type where workers are the trouble."""
    return f"Use fewer (--set workers={workers // 2}) or none (--set workers=0)" if workers > 1 else "--set workers=0"


def _mega(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
