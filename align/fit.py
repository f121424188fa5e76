"""A phase that gathers features of its pictures and then solves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ..data.index import ShardIndex
from .measure import evaluated
from .objectives import FITS
from .run import AlignRun, Outcome
from .stopping import asked_to_stop

__all__ = ["fit"]


@torch.no_grad()
def fit(run: AlignRun, number: int, outcome: Outcome) -> Outcome:
    """The outcome after phase `number`; stopped on the way, it starts again."""
    progress, pictures = outcome.progress, run.pictures
    solver = FITS[run.recipe.phases[number].objective](run.learner.model, run.recipe)
    end = progress.step + run.recipe.steps[number]
    ids: list[Tensor] = []
    for batch in pictures.batches(progress.step, end):
        pictures.bad.add(batch.bad)
        solver.gather(pictures.normalised(batch.pictures))
        ids.append(batch.ids)
        if asked_to_stop(run, progress.step):
            return dataclasses.replace(outcome, stopped=True)
    solver.join(run.accelerator.gather)
    shown = run.accelerator.gather(torch.cat(ids).to(run.accelerator.device))
    assert isinstance(shown, Tensor)
    found = solver.solve(list(pictures.held_out()))
    for prototype in found["prototypes"]:
        prototype["nearest"] = id = int(shown[prototype["nearest"]])
        if isinstance(pictures.train, ShardIndex):
            prototype["picture"] = f"{Path(pictures.train.file(id).path).name}:{pictures.train.key(id)}"
    progress = evaluated(run, dataclasses.replace(progress.in_phase(number, ()), step=end))
    return dataclasses.replace(outcome, progress=progress.ended(), fitted=found)
