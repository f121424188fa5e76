"""Our own: contributions in explanation mode, exact, of any model."""

from __future__ import annotations

from torch import Tensor

from ...explain import explain_scores
from ..decisions import Decisions, side_by_side
from ..subject import Subject
from .registry import method


@method("explanation", 2, "this project; on unconverted transformers LibraGrad's rules, arXiv 2411.16760", several=True)
def _explanation(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    target = side_by_side(decisions, len(images))
    return explain_scores(subject.model, images, target, check=False, parts=False).contributions.flatten(0, 1)
