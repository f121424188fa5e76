"""Conversion to nearest prototypes, after Boubekki & Clemmensen (`layers.prototypes`).

Published (arXiv 2603.28466, of which only abstract and first page could be had; KMEx, arXiv 2312.07822): the linear
classifier replaced by k-means over its features, prototypes shown by their nearest training pictures, concepts of the
last stage (B4) and of the last three (B234). Ours: the start that is the teacher, classes taken from the teacher's
decisions instead of labels, temperature and offsets, and the shrinkage of thin classes.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ....core.errors import PlanError
from ....core.hooks import captured_inputs
from ....core.pictures import fitted, noise_pictures
from ....core.ranges import COUNT
from ....core.settings import check
from ...layers import join
from ...layers.stages import places
from ...libraries import Preprocess
from ...plan import Decision, Method, Paper, class_path
from ...randomise import randomise
from ...swaps import swap
from ...trace import Trace
from ..kinds import LINEARS
from ..timm_stages import check_timm, last_stages, seen_stages
from .layers import PrototypeLinear, PrototypeMaps

__all__ = ["METHOD", "KMeansConfig"]

CONCEPT_STAGES = 3


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
    """Settings of a conversion to nearest prototypes.

    Attributes:
        prototypes: most prototypes a class; a class gets one for every five pictures that the teacher decides on it.
        concepts: centres of places in the last stage (B4), and as many in the last three (B234).
        keep: no layer of the backbone is changed, so this must be empty.
    """

    prototypes: Annotated[int, COUNT] = 3
    concepts: Annotated[int, COUNT] = 16
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if self.keep:
            raise PlanError(f"--keep {self.keep[0]}: --method kmeans changes the classifier alone. Leave it out.")


@dataclasses.dataclass(frozen=True)
class ClassifierArguments:
    """Attributes: prototypes: room for so many a class."""

    prototypes: int


@swap("kmeans.prototype_linear", PrototypeLinear, nn.Linear, ClassifierArguments)
def prototype_linear(module: nn.Module, preprocess: Preprocess, given: ClassifierArguments) -> None:
    join(module, PrototypeLinear).start_prototypes(given.prototypes)


@dataclasses.dataclass(frozen=True)
class MapArguments:
    """Attributes: stages, widths: numbers and channels of the stages that have concepts. concepts: how many of each."""

    stages: tuple[int, ...]
    widths: tuple[int, ...]
    concepts: int


@swap("kmeans.prototype_maps", PrototypeMaps, arguments=MapArguments)
def prototype_maps(module: nn.Module, preprocess: Preprocess, given: MapArguments) -> None:
    join(module, PrototypeMaps).open_concepts(given.stages, given.widths, given.concepts)


def _classifier(model: Any) -> str:
    """Name of the linear classifier; raises PlanError where there is none."""
    name = type(model).__name__
    if (getattr(model, "num_classes", 0) or 0) < 2 or not hasattr(model, "get_classifier"):
        raise PlanError(f"{name} has no classifier, so there are no classes to have prototypes")
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Module) or class_path(classifier) not in LINEARS:
        raise PlanError(
            f"the classifier of {name} is a {type(classifier).__name__}; prototypes take the place of one Linear layer"
        )
    return next(path for path, module in model.named_modules() if module is classifier)


@torch.no_grad()
def _averages(model: Any, size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Numbers and widths of the last stages, where the classifier is fed the plain average of the last; else None."""
    # Under weights that count: a norm whose statistics are fresh would pass for no norm, and the plan for another.
    model = copy.deepcopy(model).float()
    pictures = fitted(noise_pictures(2, size), model)
    model, picture = randomise(model, pictures), pictures[:1]
    stages = last_stages(model, CONCEPT_STAGES)
    try:
        final, maps = seen_stages(model, picture, stages)
    except PlanError:
        return None
    pooled, average = model.forward_head(final, pre_logits=True), places(maps[-1]).mean(1)
    plain = pooled.shape == average.shape and torch.allclose(pooled, average, rtol=1e-4, atol=1e-5)
    fed = _fed(model, picture)
    same = plain and fed.shape == average.shape and torch.allclose(fed, average, rtol=1e-4, atol=1e-5)
    return (stages, tuple(stage.shape[1] for stage in maps)) if same else None


def _fed(model: Any, picture: Tensor) -> Tensor:
    """What the classifier is given."""
    with captured_inputs(model.get_classifier()) as given:
        model(picture)
    if not given:
        raise PlanError(f"the forward pass of {type(model).__name__} does not call its classifier")
    return given[0]


def _decide(name: str, module: nn.Module, model: nn.Module, trace: Trace, config: KMeansConfig) -> Decision | None:
    if not name:
        check_timm(model)
        _classifier(model)
        found = _averages(model, trace.size)
        if found is None:
            return None
        reason = "its classifier reads the average over places: maps without gradients"
        return Decision(prototype_maps, reason, MapArguments(*found, config.concepts))
    # What is wrong with the model is said once, of the whole.
    if class_path(module) not in LINEARS or module is not getattr(model, "get_classifier", lambda: None)():
        return None
    return Decision(
        prototype_linear,
        f"nearest of {config.prototypes} prototypes a class; at first the class's own weights",
        ClassifierArguments(config.prototypes),
    )


METHOD = Method(
    name="kmeans",
    config_class=KMeansConfig,
    decide=_decide,
    ends=lambda config: {},
    whole=True,
    objectives={prototype_linear: ("prototypes",)},
    title="k-means prototypes",
    what="The nearest prototype decides, in the place of the linear classifier.",
    papers=(Paper("KMEx", "Gautam et al.", "2024", "https://arxiv.org/abs/2312.07822"),),
    hint="prototypes in the place of the classifier",
    recipes=("kmeans/fit",),
)
