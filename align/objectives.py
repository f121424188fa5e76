"""What a phase of alignment minimises. Each objective is a module over the student, so that DDP and FSDP see its
forward.

end-to-end    mean token (1 - cos) at a third, two thirds and all of the depth, and (1 - cos) of the output.
block-local   every unit of the student is fed what the teacher's unit was fed, and fitted to the teacher's update of
it.
              No unit's error runs through the others. (Ours.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .losses import cosine_distance, update_error
from .taps import Call, channels_last, check_taps, depth_taps, find_blocks, find_units, first_tensor, record

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["OBJECTIVES", "BlockLocal", "EndToEnd", "Objective", "observe"]


class Objective(nn.Module):
    """Base: `taps` names what must be recorded in the teacher; forward gives named losses, `total` among them."""

    def __init__(self, student: nn.Module, taps: tuple[str, ...]) -> None:
        super().__init__()
        check_taps(student, taps)
        self.student = student
        self.taps = taps

    def centre_on(self, calls: dict[str, Call], output: Tensor) -> None:
        """Takes note of the teacher's mean features on a few pictures, where the objective wants them."""

    def run(self, pictures: Tensor, calls: dict[str, Call]) -> None:  # noqa: ARG002 - the general case needs no calls
        """Runs the student as this objective feeds it."""
        self.student(pictures)


class EndToEnd(Objective):
    """The student runs on its own from the picture."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        super().__init__(student, recipe.taps or depth_taps(find_blocks(student)))
        self.output_weight = recipe.output_weight
        self.centred = recipe.centre
        self.means: dict[str, Tensor] = {}

    def centre_on(self, calls: dict[str, Call], output: Tensor) -> None:
        if self.centred:
            self.means = {name: channels_last(calls[name].output).mean(0) for name in self.taps}
            self.means["output"] = output.mean(0)

    def _distance(self, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        mean = self.means.get(name, 0.0)
        return cosine_distance(ours - mean, theirs - mean)

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:
        with record(self.student, self.taps) as ours:
            ours_output = first_tensor(self.student(pictures))
        losses = {
            name: self._distance(name, channels_last(ours[name].output), channels_last(calls[name].output))
            for name in self.taps
        }
        losses["output"] = self._distance("output", ours_output, output)
        total = sum((losses[name] for name in self.taps), self.output_weight * losses["output"])
        return {**losses, "total": total}


class BlockLocal(Objective):
    """Every unit alone, on the teacher's input of it."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:  # noqa: ARG002 - one signature for all objectives
        super().__init__(student, find_units(student, find_blocks(student)))

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        losses = {name: self._unit(name, calls[name]) for name in self.taps if name in calls}
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def run(self, pictures: Tensor, calls: dict[str, Call]) -> None:  # noqa: ARG002 - units see features, not pictures
        for name in self.taps:
            if name in calls:
                self._output(name, calls[name])

    def _output(self, name: str, call: Call) -> Tensor:
        return first_tensor(self.student.get_submodule(name)(*call.args, **call.kwargs))

    def _unit(self, name: str, call: Call) -> Tensor:
        ours = self._output(name, call)
        theirs, before = call.output, call.args[0] if call.args else None
        if isinstance(before, Tensor) and before.shape == theirs.shape:
            ours, theirs = ours - before, theirs - before
        return update_error(channels_last(ours), channels_last(theirs))


@torch.no_grad()
def observe(teacher: nn.Module, pictures: Tensor, taps: tuple[str, ...]) -> tuple[dict[str, Call], Tensor]:
    """The teacher's calls at `taps` and its output on pictures (B, 3, H, W)."""
    with record(teacher, taps) as calls:
        output = first_tensor(teacher(pictures))
    return calls, output


OBJECTIVES: dict[str, Callable[[nn.Module, Recipe], Objective]] = {"end-to-end": EndToEnd, "block-local": BlockLocal}
