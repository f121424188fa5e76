"""pairwise: the outputs alone, against the teacher's of the whole batch (B-cosification's loss for CLIP)."""

from __future__ import annotations

from torch import Tensor, nn

from ...convert.taps import Call, first_tensor
from ..losses import pairwise_error
from .base import Objective, ObjectiveConfig, objective

__all__ = ["Pairwise"]


@objective("pairwise")
class Pairwise(Objective):
    """The student's outputs against the teacher's of the whole batch; what a process has is its batch."""

    whole = True

    def __init__(self, student: nn.Module, config: ObjectiveConfig) -> None:
        super().__init__(student, config, ())

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:
        loss = pairwise_error(first_tensor(self.student(pictures)), output)
        return {"output": loss, "total": loss}
