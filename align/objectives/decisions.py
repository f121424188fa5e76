"""decisions: the logits alone, against the classes that the teacher decides on, and its probabilities. (Ours.)"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from torch import Tensor, nn

from ...convert.taps import Call, first_tensor
from ...core.ranges import AMOUNT
from ..losses import decision_error
from .base import ObjectiveConfig, objective
from .classes import Classes

__all__ = ["Decisions", "DecisionsConfig"]


@dataclasses.dataclass(frozen=True)
class DecisionsConfig(ObjectiveConfig):
    """Attributes:
    anchor: weight of the divergence from the teacher's probabilities.
    """

    anchor: Annotated[float, AMOUNT] = 0.1


@objective("decisions", DecisionsConfig)
class Decisions(Classes):
    """The student's logits against what the teacher decides; has a gradient at an exact start."""

    name = "decisions"

    def __init__(self, student: nn.Module, config: DecisionsConfig) -> None:
        super().__init__(student, config)
        self.anchor = config.anchor

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:
        loss = decision_error(first_tensor(self.student(pictures)), output, self.anchor)
        return {"output": loss, "total": loss}
