"""block-local: every unit of the student is fed what the teacher's unit was fed, and fitted to the teacher's update of
it. No unit's error runs through the others. layer-local: the same for every converted layer. (Both ours.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...convert.layers import scheduled_layers
from ...convert.taps import Call, channels_last, find_blocks, find_units, first_tensor
from ..losses import squared_size, update_error
from .base import Objective, ObjectiveConfig, objective

__all__ = ["BlockLocal", "LayerLocal"]


@objective("block-local")
class BlockLocal(Objective):
    """Every unit alone, on the teacher's input of it."""

    fed = True

    def __init__(self, student: nn.Module, config: ObjectiveConfig) -> None:
        super().__init__(student, config, self.units(student))
        self.mean_sizes: dict[str, Tensor] = {}

    @staticmethod
    def units(student: nn.Module) -> tuple[str, ...]:
        """What is fitted on its own."""
        return find_units(student, find_blocks(student))

    @staticmethod
    def fitted(call: Call, output: Tensor) -> Tensor:
        """What the student's and the teacher's `output` of a call are compared by."""
        return _update(call, output)

    @property
    def asks_teacher(self) -> bool:
        return True

    def centre_on(self, calls: dict[str, Call], output: Tensor) -> None:
        """Takes the mean size of what is fitted too: a loss must not depend on how a batch is split."""
        super().centre_on(calls, output)
        sizes = {name: squared_size(channels_last(self.fitted(call, call.output))) for name, call in calls.items()}
        self.mean_sizes = {name: size.mean() for name, size in sizes.items()}

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:
        losses = {name: self._unit(name, calls[name]) for name in self.taps if name in calls}
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def run(self, pictures: Tensor, calls: dict[str, Call]) -> None:
        for name in self.taps:
            if name in calls:
                self._output(name, calls[name])

    def _output(self, name: str, call: Call) -> Tensor:
        return first_tensor(self.student.get_submodule(name)(*call.args, **call.kwargs))

    def _unit(self, name: str, call: Call) -> Tensor:
        ours, theirs = (self.fitted(call, output) for output in (self._output(name, call), call.output))
        return update_error(channels_last(ours), channels_last(theirs), self.mean_sizes.get(name))


def _update(call: Call, output: Tensor) -> Tensor:
    """What is added to the input of `call` to give `output`; the output itself where the two differ in shape."""
    before = call.args[0] if call.args else None
    return output - before if isinstance(before, Tensor) and before.shape == output.shape else output


@objective("layer-local")
class LayerLocal(BlockLocal):
    """Every converted layer alone, on the teacher's input of it."""

    @staticmethod
    def units(student: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, _ in scheduled_layers(student))

    @staticmethod
    def fitted(call: Call, output: Tensor) -> Tensor:
        return output
