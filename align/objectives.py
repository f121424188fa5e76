"""What a phase of alignment minimises. Each objective is a module over the student, so that DDP and FSDP see its
forward.

end-to-end   mean token (1 - cos) at some depths, and (1 - cos) of the output (ALOE, CVPR 2026).
pairwise     the outputs alone, against the teacher's outputs of the whole batch (B-cosification's loss for CLIP).
decisions    the logits alone, against the classes that the teacher decides on, and its probabilities. (Ours.)
prototypes   no descent: k-means and a convex fit (see `prototypes`).
block-local  every unit of the student is fed what the teacher's unit was fed, and fitted to the teacher's update of it.
             No unit's error runs through the others. (Ours.)
layer-local  the same for every converted layer. (Ours.)
block-own    every block is fed what the student's earlier blocks make, without a gradient to them, and fitted to the
             teacher's output. Inputs are those that it will have; errors still do not run through. (Ours.)
classes      how far the student's class probabilities are from the teacher's, and nothing below: for students whose
             features are to become others than the teacher's. Needs a classifier, and no labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..convert import Student
from ..convert.layers import scheduled_layers
from ..convert.methods import find_method
from ..convert.taps import Call, channels_last, check_taps, depth_taps, find_blocks, find_units, first_tensor, record
from ..core.errors import RecipeError
from ..core.hooks import hooked
from .losses import (
    class_divergence,
    cosine_distance,
    decision_error,
    magnitude_error,
    pairwise_error,
    squared_size,
    unexplained,
    update_error,
)
from .maps import Aim, map_error
from .prototypes import PrototypeFit

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = [
    "FITS",
    "OBJECTIVES",
    "BlockLocal",
    "BlockOwn",
    "Classes",
    "Decisions",
    "EndToEnd",
    "LayerLocal",
    "Objective",
    "Pairwise",
    "check_objectives",
    "deviations",
    "observe",
]


class Objective(nn.Module):
    """Base: `taps` names what must be recorded in the teacher; forward gives named losses, `total` among them."""

    def __init__(self, student: nn.Module, recipe: Recipe, taps: tuple[str, ...]) -> None:
        super().__init__()
        check_taps(student, taps)
        self.student = student
        self.taps = taps
        self.centred, self.standardise = recipe.centre, recipe.standardise
        self.means: dict[str, Tensor] = {}
        self.deviations: dict[str, Tensor] = {}

    @property
    def asks_teacher(self) -> bool:
        """Whether `centre_on` takes anything from what the teacher makes of a few pictures."""
        return self.centred or self.standardise != "none"

    def centre_on(self, calls: dict[str, Call], output: Tensor) -> None:
        """Takes note of the teacher's mean features on a few pictures, and how far they are from it, if asked to."""
        rows = {name: channels_last(calls[name].output) for name in self.taps if name in calls} | {"output": output}
        if self.centred:
            self.means = {name: features.mean(0) for name, features in rows.items()}
        if self.standardise != "none":
            least = 0.1 if self.standardise == "channel" else 0.0  # a sum of all channels' is not ruled by any
            self.deviations = {name: deviations(features, least) for name, features in rows.items()}

    def begin(self) -> dict[str, float]:
        """At the start of a phase: what a resumed run must be told of the student as it is now."""
        return {}

    def go_on(self, begun: dict[str, float]) -> None:
        """In a resumed run: what `begin` said at the start of the phase."""

    def run(self, pictures: Tensor, calls: dict[str, Call]) -> None:  # noqa: ARG002 - the general case needs no calls
        """Runs the student as this objective feeds it."""
        self.student(pictures)

    def _distance(self, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.standardise == "phi-s":
            return unexplained(ours, theirs, self.deviations[name].square().sum())
        mean, deviation = self.means.get(name, 0.0), self.deviations.get(name, 1.0)
        return cosine_distance((ours - mean) / deviation, (theirs - mean) / deviation)

    def _compared(self, pictures: Tensor, calls: dict[str, Call]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Runs the student: (its rows, the teacher's) at every tap, and its output."""
        with record(self.student, self.taps) as ours:
            output = first_tensor(self.student(pictures))
        return {n: (channels_last(ours[n].output), channels_last(calls[n].output)) for n in self.taps}, output


class EndToEnd(Objective):
    """The student runs on its own from the picture."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        super().__init__(student, recipe, recipe.taps or depth_taps(find_blocks(student), recipe.depths))
        self.output_weight, self.magnitude_weight = recipe.output_weight, recipe.magnitude_weight
        self.norms = WeightNorms(recipe.weight_norm)
        self.map_weight = recipe.map_weight
        self.mean_output: Tensor | None = None

    @property
    def asks_teacher(self) -> bool:
        return super().asks_teacher or bool(self.map_weight)

    def centre_on(self, calls: dict[str, Call], output: Tensor) -> None:
        super().centre_on(calls, output)
        self.mean_output = output.mean(0)

    def begin(self) -> dict[str, float]:
        return self.norms.begin(self.student)

    def go_on(self, begun: dict[str, float]) -> None:
        self.norms.first = begun

    def forward(
        self, pictures: Tensor, calls: dict[str, Call], output: Tensor, aim: Aim | None = None
    ) -> dict[str, Tensor]:
        pairs, ours_output = self._compared(pictures, calls)
        losses = {name: self._distance(name, *pair) for name, pair in pairs.items()}
        losses["output"] = self.output_weight * self._distance("output", ours_output, output)
        if self.magnitude_weight:
            errors = [magnitude_error(*pair) for pair in pairs.values()]
            losses["magnitude"] = self.magnitude_weight * torch.stack(errors).sum()
        if self.norms.weight:
            losses["weight norm"] = self.norms.penalty(self.student)
        if aim is not None:
            losses["map"] = self.map_weight * map_error(self.student, pictures[: len(aim.maps)], aim)
        return {**losses, "total": torch.stack(list(losses.values())).sum()}


class Pairwise(Objective):
    """The student's outputs against the teacher's of the whole batch; what a process has is its batch."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        super().__init__(student, recipe, ())

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        loss = pairwise_error(first_tensor(self.student(pictures)), output)
        return {"output": loss, "total": loss}


class Classes(Objective):
    """The student's class probabilities against the teacher's."""

    name = "classes"

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        super().__init__(student, recipe, ())
        if getattr(student, "num_classes", None) == 0:
            raise RecipeError(
                f"objective {self.name}: {type(student).__name__} has no classes to decide on. Use the objective "
                "pairwise, or end-to-end."
            )

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        loss = class_divergence(first_tensor(self.student(pictures)), output)
        return {"classes": loss, "total": loss}


class Decisions(Classes):
    """The student's logits against what the teacher decides; has a gradient at an exact start."""

    name = "decisions"

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        super().__init__(student, recipe)
        self.anchor = recipe.anchor

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        loss = decision_error(first_tensor(self.student(pictures)), output, self.anchor)
        return {"output": loss, "total": loss}


class BlockLocal(Objective):
    """Every unit alone, on the teacher's input of it."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        super().__init__(student, recipe, self.units(student))
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
        ours, theirs = (self.fitted(call, output) for output in (self._output(name, call), call.output))
        return update_error(channels_last(ours), channels_last(theirs), self.mean_sizes.get(name))


def deviations(features: Tensor, least: float) -> Tensor:
    """(C,): standard deviation of each channel of features (R, C), at least `least` of their root mean square.

    So a channel in which the teacher says nothing does not rule what is divided by it.
    """
    found = features.float().std(0, correction=0)
    return found.clamp_min(least * found.square().mean().sqrt()).clamp_min(torch.finfo(torch.float32).tiny)


def _update(call: Call, output: Tensor) -> Tensor:
    """What is added to the input of `call` to give `output`; the output itself where the two differ in shape."""
    before = call.args[0] if call.args else None
    return output - before if isinstance(before, Tensor) and before.shape == output.shape else output


class LayerLocal(BlockLocal):
    """Every converted layer alone, on the teacher's input of it."""

    @staticmethod
    def units(student: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, _ in scheduled_layers(student))

    @staticmethod
    def fitted(call: Call, output: Tensor) -> Tensor:  # noqa: ARG004 - a layer is no residual branch
        return output


class BlockOwn(Objective):
    """Every block on the student's own input of it, which gives no gradient to what made it."""

    def __init__(self, student: nn.Module, recipe: Recipe) -> None:
        self.blocks = find_blocks(student)
        super().__init__(student, recipe, self.blocks)

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:
        with hooked(before=((self.student.get_submodule(name), _cut) for name in self.blocks)):
            pairs, ours_output = self._compared(pictures, calls)
        losses = {name: self._distance(name, *pair) for name, pair in pairs.items()}
        losses["output"] = self._distance("output", ours_output, output)
        return {**losses, "total": torch.stack(list(losses.values())).sum()}


def _cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001 - a hook
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in args)


class WeightNorms:
    """Keeps converted layers near the weight norms that they had at first: cosines in loss and layers see no norm."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.first: dict[str, float] = {}

    def begin(self, student: nn.Module) -> dict[str, float]:
        """Takes the norms of now as the first ones; returns them."""
        self.first = {name: float(norm.detach()) for name, norm in self._norms(student).items()} if self.weight else {}
        return self.first

    @staticmethod
    def _norms(student: nn.Module) -> dict[str, Tensor]:
        """Frobenius norm of every converted matrix or kernel."""
        layers = {name: getattr(layer, "weight", None) for name, layer in scheduled_layers(student)}
        return {name: weight.norm() for name, weight in layers.items() if weight is not None and weight.dim() > 1}

    def penalty(self, student: nn.Module) -> Tensor:
        """`weight` times the mean squared relative change."""
        changes = [norm / self.first[name] - 1 for name, norm in self._norms(student).items()]
        return self.weight * torch.stack(changes).square().mean()


@torch.no_grad()
@torch.no_grad()
def observe(teacher: nn.Module, pictures: Tensor, taps: tuple[str, ...]) -> tuple[dict[str, Call], Tensor]:
    """The teacher's calls at `taps` and its output on pictures (B, 3, H, W), without a graph.

    (Not in inference mode: a loss that compares with these tensors could not keep them for its backward pass.)
    """
    with record(teacher, taps) as calls:
        output = first_tensor(teacher(pictures))
    return calls, output


OBJECTIVES: dict[str, Callable[[nn.Module, Recipe], Objective]] = {
    "end-to-end": EndToEnd,
    "pairwise": Pairwise,
    "decisions": Decisions,
    "block-local": BlockLocal,
    "layer-local": LayerLocal,
    "block-own": BlockOwn,
    "classes": Classes,
}

# Phases that gather features of their pictures and solve, instead of descending.
FITS: dict[str, Callable[[nn.Module, Recipe], PrototypeFit]] = {"prototypes": PrototypeFit.from_recipe}


def check_objectives(student: Student, recipe: Recipe) -> None:
    """Raises RecipeError for an objective that has nothing to teach a student of this method."""
    method = find_method(student.method)
    fitting = [names for swap, names in method.objectives.items() if swap in {s.swap for s in student.plan.swaps}]
    allowed = fitting[0] if fitting else tuple(OBJECTIVES)
    for number, phase in enumerate(recipe.phases):
        if phase.objective not in allowed:
            raise RecipeError(
                f"phases.{number}.objective {phase.objective}: a student of --method {method.name} "
                f"({type(student.model).__name__}) learns nothing from it. It takes: {', '.join(allowed)}; see the "
                f"recipes {method.name}/... that ship."
            )
