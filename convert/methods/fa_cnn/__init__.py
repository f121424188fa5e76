"""Conversion to an aligned CNN, after FA-CNN (Farvardin & Chapman, arXiv 2603.25798): which module becomes what.

The output layer moves before the pooling, so that the last maps are one for each class and are the explanation; blocks
that keep the shape of what they are given get dampened skips. The paper's body could not be had: what is published and
what is ours is told apart in docs/methods/fa-cnn.md.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

from torch import nn

from ....core.errors import PlanError, near_miss
from ...layers import convert_in_place, join
from ...libraries import Preprocess
from ...plan import Decision, Method, Paper, kept_modules
from ...swaps import NoArguments, Swap, swap
from ..anatomy import Anatomy, Head, Layout, look
from .class_maps import ClassMaps, LastMap, LastMapChannelsLast, LastTokens, PlaceClassifier, PlaceNorm
from .dampening import DampenedSkip, Dampening

__all__ = ["METHOD", "FaCnnConfig"]

DAMPENINGS: tuple[Dampening, ...] = get_args(Dampening)


@dataclasses.dataclass(frozen=True)
class FaCnnConfig:
    """Settings of a conversion after FA-CNN.

    Attributes:
        keep: modules to leave as they are, with all below them: qualified names, or `re:` and a regular expression.
            Where the output layer is kept there are no class maps, and what is converted are the skips alone.
        dampening: the form of the dampened skips (see `layers.dampening`).
    """

    keep: tuple[str, ...] = ()
    dampening: Dampening = "bound"

    def __post_init__(self) -> None:
        if self.dampening not in DAMPENINGS:
            raise PlanError(
                f"no dampening {self.dampening!r}.{near_miss(self.dampening, DAMPENINGS)} "
                f"There are: {', '.join(DAMPENINGS)}."
            )


@swap("fa-cnn.class_maps", ClassMaps)
def class_maps(module: nn.Module, preprocess: Preprocess, given: NoArguments) -> None:
    join(module, ClassMaps).class_maps = nn.Identity()


@dataclasses.dataclass(frozen=True)
class SkipArguments:
    """Attributes: form: of the dampening, as in `FaCnnConfig`."""

    form: Dampening


@swap("fa-cnn.dampened_skip", DampenedSkip, arguments=SkipArguments)
def dampened_skip(module: nn.Module, preprocess: Preprocess, given: SkipArguments) -> None:
    convert_in_place(module, DampenedSkip).form = given.form


def _part(id: str, part: type[nn.Module]) -> Swap:
    """The swap to a part of the head that needs nothing but its class."""

    @swap(id, part)
    def change(module: nn.Module, preprocess: Preprocess, given: NoArguments) -> None:
        join(module, part)

    return change


LAST_MAPS: dict[Layout, Swap] = {
    "BCHW": _part("fa-cnn.last_map", LastMap),
    "BHWC": _part("fa-cnn.last_map_channels_last", LastMapChannelsLast),
    "BNC": _part("fa-cnn.last_tokens", LastTokens),
}
PLACE_NORM = _part("fa-cnn.place_norm", PlaceNorm)
PLACE_CLASSIFIER = _part("fa-cnn.place_classifier", PlaceClassifier)


def _decide(name: str, module: nn.Module, model: nn.Module, seen: Anatomy, config: FaCnnConfig) -> Decision | None:
    if seen.head is None and name == (seen.output or ""):
        raise PlanError(f"no class maps can be made: {seen.problem}")
    head = _head(model, seen, config)
    if head:
        parts = {
            "": Decision(class_maps, "the output is the mean of its class maps"),
            head.last_map: Decision(LAST_MAPS[head.layout], f"class maps are made of it ({head.layout})"),
            head.norm: Decision(PLACE_NORM, "before the pooling; its sigma stays that of the pooled vector"),
            head.output: Decision(PLACE_CLASSIFIER, "before the pooling: one map for each class"),
        }
        if name in parts:
            return parts[name]
    if name in seen.blocks:
        why = seen.blocks[name]
        if why:
            return Decision(None, why)
        return Decision(dampened_skip, f"block; its skip, {config.dampening}", SkipArguments(config.dampening))
    return None


def _head(model: nn.Module, seen: Anatomy, config: FaCnnConfig) -> Head | None:
    """The head, if none of its parts is to be kept as it is."""
    head = seen.head
    parts = {head.last_map, head.norm, head.output} if head else set()
    return None if parts & kept_modules(model, config.keep) else head


def _ends(config: FaCnnConfig) -> dict[str, float]:
    """A bound of a quarter of what a block is given; half of the skip, or of the branch, in the other forms."""
    return {"dampening": 4.0 if config.dampening == "bound" else 0.5}


METHOD = Method(
    name="fa-cnn",
    config_class=FaCnnConfig,
    decide=_decide,
    ends=_ends,
    look=look,
    title="FA-CNN",
    what="Its classifier works before the pooling, so there is one map for each class.",
    papers=(Paper("FA-CNN", "Farvardin, Chapman", "2026", "https://arxiv.org/abs/2603.25798"),),
    hint="class maps before the pooling",
    recipes=("fa-cnn/cnn",),
)
