"""How far a student stands for its teacher, in words: what is said beside every explanation, file and card of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .layers import at_start
from .student import Student, weights_size

__all__ = ["Agreement", "agreement_of", "measured_agreement", "trained_since"]

SAME_WEIGHTS = 1e-9  # of their size: how far sums in another order may differ
ENOUGH = 0.5  # of the pictures; below, a student's maps explain decisions that are mostly not its teacher's


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Attributes:
    share: of held-out pictures on which student and teacher decide alike, in [0, 1]; None where that is not known, or
        the model decides nothing.
    low: whether to trust it less than a coin. words: a sentence. unchanged: whether it is still its teacher, or what
        one's own training made of it.
    """

    share: float | None
    low: bool
    words: str
    unchanged: bool = False


def agreement_of(student: Student) -> Agreement:
    """What its history says of it: measured at the end of the alignment, on pictures that were held out. (Ours.)

    Example: agreement_of(load("runs/eff")).words
    """
    history = student.history
    if history.alignment is None:
        if history.unchanged and at_start(student.model):
            if trained_since(student):
                words = (
                    "The student was trained since its conversion, where it was its teacher: it is a model of its own."
                )
                return Agreement(1.0, False, words, True)
            return Agreement(
                1.0, False, "The student is still its teacher: no weight has changed since the conversion.", True
            )
        return Agreement(
            None, True, "The student is not aligned: nobody has measured how often it decides like its teacher."
        )
    return measured_agreement(history.alignment.final or {}, history.alignment.pictures)


def trained_since(student: Student) -> bool:
    """Whether the weights are others than the conversion made, where it was recorded which these were."""
    recorded = student.history.conversion.weights
    if recorded is None or any(tensor.is_meta for tensor in student.model.parameters()):
        return False
    return abs(weights_size(student.model) - recorded) > SAME_WEIGHTS * recorded


def measured_agreement(measured: Mapping[str, Any], pictures: int) -> Agreement:
    """The same of what an alignment on `pictures` views measured at its end (`Alignment.final`)."""
    share = measured.get("top1_agreement")
    if share is None:
        return _of_features(measured, pictures)
    words = f"The student decides like its teacher on {share:.0%} of held-out pictures"
    if share < ENOUGH:
        return Agreement(share, True, f"{words}: its maps explain another model.")
    return Agreement(share, False, f"{words}.")


def _of_features(measured: Mapping[str, Any], pictures: int) -> Agreement:
    cosine = measured.get("centred_cosine")
    if cosine is None:
        words = f"The student was aligned on {pictures} pictures and never compared with its teacher."
        return Agreement(None, True, words)
    words = f"The output of the student has a centred cosine of {cosine:.2f} to its teacher's on held-out pictures"
    if cosine < ENOUGH:
        return Agreement(None, True, f"{words}: its maps explain another model.")
    return Agreement(None, False, f"{words}.")
