"""classes: how far the student's class probabilities are from the teacher's, and nothing below.

For students whose features are to become others than the teacher's. Needs a classifier, and no labels.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...convert.taps import Call, first_tensor
from ...core.errors import RecipeError
from ..losses import class_divergence
from .base import Objective, ObjectiveConfig, objective

__all__ = ["Classes"]


@objective("classes")
class Classes(Objective):
    """The student's class probabilities against the teacher's."""

    name = "classes"
    whole = True

    def __init__(self, student: nn.Module, config: ObjectiveConfig) -> None:
        super().__init__(student, config, ())
        if getattr(student, "num_classes", None) == 0:
            raise RecipeError(
                f"objective {self.name}: {type(student).__name__} has no classes to decide on. Use the objective "
                "pairwise, or end-to-end."
            )

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:
        loss = class_divergence(first_tensor(self.student(pictures)), output)
        return {"classes": loss, "total": loss}
