"""What ends a phase or a run before its last step: no more improvement, too little agreement, a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator

import torch
from accelerate.utils import broadcast
from torch import Tensor

from .measure import evaluated, settle_statistics
from .run import AlignRun
from .state import Progress

__all__ = ["agreement_of", "asked_to_stop", "handed_on", "held_to_floor", "judged", "signals_noted", "walked"]

STOP_SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


def judged(run: AlignRun, progress: Progress) -> Progress:
    """`progress` after the evaluation that was just made; keeps the weights where it was the best so far."""
    progress = progress.judged(_newest(run, progress, "centred_cosine"))
    if progress.best_step == progress.step:
        run.learner.keep()
    return progress


def held_to_floor(run: AlignRun, progress: Progress) -> tuple[Progress, bool]:
    """`progress` after the evaluation that was just made, and whether the student agrees too little to go on.

    Keeps the weights where they still agree enough.
    """
    if not agreement_of(run, progress) >= run.recipe.min_agreement:
        return progress, True
    run.learner.keep()
    return dataclasses.replace(progress, best_step=progress.step), False


def walked(run: AlignRun, progress: Progress, steps: int) -> Progress:
    """`progress` after an evaluation under a floor, the next one `steps` later; keeps the furthest good weights."""
    assert progress.walk is not None
    agreement = agreement_of(run, progress)
    walk = progress.walk.judged(progress.step, steps, agreement, run.recipe.keep)
    if walk.step == progress.step:
        run.learner.keep()
        progress = dataclasses.replace(progress, best_step=progress.step)
    return dataclasses.replace(progress, walk=walk)


def handed_on(run: AlignRun, progress: Progress) -> Progress:
    """`progress` at the end of a phase, with the student as it was at the phase's best evaluation."""
    if run.learner.best is not None and progress.best_step < progress.step:
        run.learner.go_back()
        settle_statistics(run, run.recipe.phases[progress.phase], everything=True)
        progress = evaluated(run, progress, weights_of=progress.best_step * run.recipe.batch_size)
    run.learner.best = None
    return progress.ended()


def agreement_of(run: AlignRun, progress: Progress) -> float:
    """Held-out agreement at the newest evaluation: top-1, or the centred cosine where there are no classes."""
    return _newest(run, progress, "top1_agreement", "centred_cosine")


def _newest(run: AlignRun, progress: Progress, *names: str) -> float:
    """The first of `names` that the newest evaluation has: the main process has made it, and tells all others."""
    point = progress.curve[-1] if run.accelerator.is_main_process else {}
    value = next((point[name] for name in names if name in point), 0.0)
    told = broadcast(torch.tensor(value, dtype=torch.float64, device=run.accelerator.device))
    assert isinstance(told, Tensor)
    return float(told)


@contextlib.contextmanager
def signals_noted(noted: list[int]) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 (what Slurm sends before it takes a node away) are `noted`, and end nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(run: AlignRun, step: int) -> bool:
    """Whether any process was sent a stop signal; all agree, as they ask each other at the same steps."""
    if run.accelerator.num_processes == 1:
        return bool(run.signals)
    if step % run.recipe.log_every:
        return False
    noted = torch.tensor(float(len(run.signals)), device=run.accelerator.device)
    total = run.accelerator.reduce(noted, "sum")
    assert isinstance(total, Tensor)
    return bool(total > 0)
