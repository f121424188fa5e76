"""The weights of a run: those that learn, their moving average, and those to go back to."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from ..convert import Student
from ..convert.methods import find_method
from . import state

__all__ = ["Learner"]


class Learner:
    """A student while it is trained.

    Attributes:
        model: the student's, whose trained part alone asks for gradients.
        best: a copy of the weights that the phase may go back to at its end.
    """

    def __init__(self, student: Student, decay: float, device: torch.device) -> None:
        """Args: decay: of the moving average; 0 for none."""
        self.model = student.model.to(device).requires_grad_(False)
        # What is not trained gets no gradient at all, so that not even one is computed.
        self.model.get_submodule(find_method(student.method).trains).requires_grad_(True)
        self.decay = decay
        self.best: dict[str, Tensor] | None = None
        self._moving: ModelEmaV3 | None = None

    @property
    def average(self) -> nn.Module | None:
        """The student with its averaged weights, where there is one."""
        return None if self._moving is None else self._moving.module

    @property
    def result(self) -> nn.Module:
        """What is measured and saved: the average where there is one."""
        return self.model if self.average is None else self.average

    def begin(self) -> None:
        """At the start of a phase: the average begins anew, and there is nothing to go back to."""
        # Buffers are copied: a mean over a moving B would be the B of no function that was ever trained.
        self._moving = ModelEmaV3(self.model, decay=self.decay, exclude_buffers=True) if self.decay else None
        self.best = None

    def restore(self, checkpoint: Path) -> None:
        """All weights as they were."""
        self.begin()
        state.restore(checkpoint, self.model, self.average)
        self.best = state.best_of(checkpoint)

    def stepped(self) -> None:
        """After a step of the optimizer."""
        if self._moving is not None:
            self._moving.update(self.model)

    def keep(self) -> None:
        """The weights of now are those to go back to."""
        self.best = state.snapshot(self.result)

    def go_back(self) -> None:
        assert self.best is not None
        for model in dict.fromkeys((self.model, self.result)):
            model.load_state_dict(self.best)
