"""Is the explanation about the class that was asked for? The map of the decision beside the map of another one. (Ours.)

The share of a map inside an object's mask says little by itself: a map that finds objects, whatever class is asked,
has a large one, and so can a map of a model that knows nothing. What counts is by how much the map of the decision does
better than the map of another decision on the same picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import DataError, NotApplicable
from .baselines import Method, maps_of
from .decisions import ClassDecisions, Decisions, ValueDecisions, interleaved
from .metrics.localisation import energy_in_mask, pointing_game, signed_in_mask
from .subject import Subject

if TYPE_CHECKING:
    from .task import Explained

__all__ = [
    "MEASURES",
    "OTHERS",
    "OWN",
    "Measure",
    "contrast",
    "maps_of_others",
    "maps_with_others",
    "other_decisions",
    "others_of",
]


@dataclasses.dataclass(frozen=True)
class Measure:
    """What two maps are compared by.

    Attributes:
        value: (maps (B, H, W), masks (B, H, W)) -> (B,).
        row, contrast: what it and its class contrast are called in an evaluation.
        gain: what the student's less its teacher's is called there; of contrasts, it is `contrast`_gain.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    row: str
    contrast: str
    gain: str


MEASURES = {
    "in_mask": Measure(energy_in_mask, "energy_in_mask", "energy_in_mask_contrast", "energy_in_mask_gain"),
    "signed_share": Measure(signed_in_mask, "signed_share", "signed_contrast", "signed_share_gain"),
    "pointing": Measure(pointing_game, "pointing_game", "pointing_contrast", "pointing_gain"),
}
# The decisions that a map is compared with that of: any other class, and the second most likely one.
OTHERS = ("random class", "runner-up")
OWN = "decision"


def others_of(kind: str, decisions: Decisions, outputs: Tensor, seed: int = 0) -> Decisions:
    """For each of N decisions another one of a kind in `OTHERS`, by the teacher's outputs (N, D).

    Raises NotApplicable, with the reason, where there is none.
    """
    if isinstance(decisions, ValueDecisions):
        raise NotApplicable("a regression has one output, and no other to compare its map with")
    if kind == OTHERS[0]:
        try:
            return other_decisions(decisions, outputs.shape[1], seed)
        except DataError as error:
            raise NotApplicable(f"no contrast is possible: {error}") from error
    if not isinstance(decisions, ClassDecisions):
        raise NotApplicable("features have no classes, and so no runner-up")
    if outputs.shape[1] < 2:
        raise NotApplicable("no contrast is possible: there is one class")
    own = decisions.classes.to(outputs.device)[:, None]
    second = outputs.detach().scatter(1, own, float("-inf")).argmax(1)
    return dataclasses.replace(decisions, classes=second.cpu())


def maps_with_others(way: Method, subject: Subject, task: Explained, kinds: Sequence[str]) -> dict[str, Tensor]:
    """`OWN` -> maps (N, H, W) of the decisions of `task`, of any model; of each other kind of decision, of `kinds`,
    that there is, too. All are from one forward pass where the method can.

    Raises NotApplicable where there are no maps of the decisions.
    """
    images, seed = task.pictures.images, task.settings.seed
    asked = {OWN: task.decisions}
    for kind in kinds:
        with contextlib.suppress(NotApplicable):  # the rows that need it ask again, and say why there is none
            asked[kind] = others_of(kind, task.decisions, task.outputs["teacher"], seed)
    try:
        maps = maps_of(way, subject, images, interleaved(list(asked.values())), seed)
    except NotApplicable:
        if len(asked) == 1:
            raise
        return maps_with_others(way, subject, task, ())  # maybe only those of another decision are not finite
    return dict(zip(asked, maps.unflatten(0, (-1, len(asked))).unbind(1), strict=True))


def maps_of_others(kind: str, way: Method, subject: Subject, task: Explained) -> Tensor:
    """(N, H, W): the maps of another decision of a kind in `OTHERS` about each picture of `task`, of any model.

    Raises NotApplicable where there is no such decision.
    """
    wanted = others_of(kind, task.decisions, task.outputs["teacher"], task.settings.seed)
    return maps_of(way, subject, task.pictures.images, wanted, task.settings.seed)


def other_decisions(decisions: Decisions, classes: int, seed: int = 0) -> Decisions:
    """For each of N decisions another one, drawn by `seed` alone: the same for every model that is compared.

    Any other of K = `classes` classes; where there are no classes, the decision of any other of the N pictures.
    Raises DataError where there is no other.
    """
    if isinstance(decisions, ClassDecisions):
        return ClassDecisions(_others(decisions.classes.cpu(), classes, "class", seed))
    return decisions.rows(_others(torch.arange(len(decisions)), len(decisions), "picture", seed))


def _others(own: Tensor, count: int, kind: str, seed: int) -> Tensor:
    """For each of `own` (N,) another number below `count`; all others are alike likely."""
    if count < 2:
        raise DataError(f"There is one {kind}, and no other to compare its maps with. Pass two or more.")
    steps = torch.randint(1, count, (len(own),), generator=torch.Generator().manual_seed(seed))
    return (own + steps) % count


def contrast(decided: Tensor, other: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """What maps (B, H, W) of the decision and of another one have inside masks (B, H, W), cut at one half: (B,) each.

    Returns:
        in_mask: share of the positive contribution inside the mask, in [0, 1].
        signed_share: sum inside the mask over the sum of sizes, in [-1, 1].
        pointing: whether the largest contribution is inside, in [0, 1].
        other_NAME: the same of the other map. NAME_contrast: the first minus the second, picture by picture.
    """
    values = {}
    for name, measure in MEASURES.items():
        ours, theirs = measure.value(decided, masks), measure.value(other, masks)
        values |= {name: ours, f"other_{name}": theirs, f"{name}_contrast": ours - theirs}
    return values
