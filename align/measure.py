"""What is measured of a student as it learns: held-out fidelity, explanations, its BatchNorms' statistics."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..convert.layers import estimate_gains, estimate_statistics
from ..evaluate.fidelity import fidelity
from .log import write_row
from .prepare import without_checkpointing
from .probe import EXPLANATIONS
from .recipe import Phase
from .run import AlignRun
from .state import Progress
from .trackers import log_picture

__all__ = ["evaluated", "explained", "settle_statistics", "statistics_batches"]

# The student that is measured and saved has statistics of so many pictures, in batches of this size.
STATISTICS_PICTURES, STATISTICS_BATCH = 256, 32


@torch.no_grad()
def evaluated(run: AlignRun, progress: Progress, **notes: Any) -> Progress:
    """`progress` with one more point, and `notes` on it, on its curve; only the main process measures."""
    if not run.accelerator.is_main_process:
        return progress
    found = fidelity(run.outputs(run.learner.result), run.teacher_outputs, run.student.labels is not None)
    begun = {"phase": progress.phase, "objective": run.recipe.phases[progress.phase].objective}
    where = begun if progress.step else {"phase": "start"}
    point = {"pictures": progress.step * run.recipe.batch_size, **where, **notes, **found}
    write_row(run, {"held_out": point}, progress.step)
    if not run.config.quiet:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in point.items() if isinstance(value, float))
        tqdm.write(f"{point['pictures']:>8} pictures: {shown}", file=sys.stderr)
    return dataclasses.replace(progress, curve=(*progress.curve, point))


def explained(run: AlignRun, progress: Progress) -> None:
    """Writes and logs a sheet of explanations; only the main process explains."""
    if not run.accelerator.is_main_process:
        return
    model, pictures = run.learner.result, progress.step * run.recipe.batch_size
    probe = run.probe
    library = run.student.source.library
    with without_checkpointing(model, library) if run.recipe.gradient_checkpointing else contextlib.nullcontext():
        sheet = probe.write(model, run.config.work / EXPLANATIONS / f"{pictures:08d}.png")
    if sheet is not None:
        log_picture(run.accelerator, EXPLANATIONS, sheet, progress.step)


def statistics_batches(run: AlignRun) -> Sequence[Tensor]:
    """The pictures that statistics and gains at rest come from, each (B, 3, H, W); the same in every process."""
    return run.pictures.calibration(STATISTICS_PICTURES).split(STATISTICS_BATCH)


def settle_statistics(run: AlignRun, phase: Phase, everything: bool = False) -> None:
    """Statistics and gains of the student as it is now, alike in every process.

    Of what is measured; or of `everything`, where there is an average beside the weights that learn.
    """
    if not (phase.batch_statistics or phase.reference_gains):
        return
    batches = statistics_batches(run)
    models = (run.learner.model, run.learner.result) if everything else (run.learner.result,)
    for model in dict.fromkeys(models):
        if phase.batch_statistics:
            estimate_statistics(model, batches)
        if phase.reference_gains:
            estimate_gains(model, run.teacher, batches)
