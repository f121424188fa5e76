"""The teacher of a student, again."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from .layers import at_start
from .libraries import reload_teacher
from .plan import apply_plan
from .student import Student, check_teacher

__all__ = ["teacher_of"]


def teacher_of(student: Student, weights: Path | None = None, converted: bool = False) -> nn.Module:
    """The frozen original of `student`, in eval mode: a copy of it while it is still its teacher, else from its source.

    Args:
        weights: the teacher's own state dict, where it was converted from a file.
        converted: give it the student's layers at their start, which compute the same function.

    Raises:
        SourceError: the teacher cannot be had again, or is another model now.
    """
    if at_start(student.model) and student.history.unchanged:
        model = copy.deepcopy(student.model)
    else:
        teacher = reload_teacher(student.source, weights)
        check_teacher(student, teacher)
        model = teacher.model
        if converted:
            apply_plan(model, student.plan, student.preprocess)
    return model.eval().requires_grad_(False)
