"""Does the explanation add up? How exactly, how much of the score the constants are, and how sure the model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...core.errors import LedgerError
from ...core.pictures import fitted
from ...explain import explain_scores
from ..record import Measurement
from ..registry import Headline, Job, Metric, measures
from ..task import OURS

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Explained


@measures(
    Metric("confidence", "faithfulness", better=0),
    Metric("ledger_residual", "faithfulness", better=-1, headlines=(Headline("ledger_residual", 3, "student", OURS),)),
    Metric("bias_share", "faithfulness", better=-1, headlines=(Headline("bias_share", 2, "student", OURS),)),
    Metric("carried_share", "faithfulness", better=0),
    needs="model",
    place=20,
)
def _measured(notes: Notes, task: Explained, model: str) -> Iterator[Job]:
    yield f"ledger: {model}", partial(_ledger, notes, task, model)


def _ledger(notes: Notes, task: Explained, model: str) -> None:
    subject, pictures, decisions = task.subjects[model], task.pictures, task.decisions
    notes.measure(Measurement("faithfulness", "confidence", model), lambda: task.confidence(model))
    residuals, shares, carried = [], [], []
    row = Measurement("faithfulness", "ledger_residual", model, OURS)
    try:
        for rows in torch.arange(len(pictures)).split(subject.batch_size):
            images = fitted(pictures.images[rows], subject.model)
            found = explain_scores(subject.model, images, decisions.rows(rows).target(), check=False)
            task.once(("ledger", model), lambda found=found: found)  # of the first batch, for the page
            residuals.append(found.residual.abs() / found.scores.abs().clamp_min(1))
            parts = found.input_part.abs(), found.constant_part.abs()
            shares.append(parts[1] / (parts[0] + parts[1]).clamp_min(1e-12))
            if found.direct is not None:
                carried.append(found.carried_share)
    except LedgerError as error:
        notes.absent(row, str(error))
        return
    notes.measure(row, lambda: torch.cat(residuals).flatten())
    notes.measure(dataclasses.replace(row, metric="bias_share"), lambda: torch.cat(shares).flatten())
    if carried:
        notes.measure(dataclasses.replace(row, metric="carried_share"), lambda: torch.cat(carried).flatten())
