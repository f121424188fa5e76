"""CoDA conversion: linear maps become dynamic alignment units (`layers.coda`; which ones: `dynamic_linear`).

CoDA-Nets (arXiv 2104.00032) are trained from scratch; that a pretrained network becomes one, at a start that is exactly
the network, is ours, and so are ViTs. All layers, or only those of the last stages: a pretrained network below and
alignment units above it is the hybrid of the paper's longer version (arXiv 2109.13004).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_args

from torch import nn

from ....core.errors import PlanError, near_miss
from ....core.ranges import ANY_COUNT, COUNT
from ....core.settings import check
from ...plan import Decision, Method, Paper
from ...trace import Trace
from .. import dynamic_linear
from ..dynamic_linear import DynamicArguments, dynamic_swap
from .layers import CodaConv2d, CodaConv2dSame, CodaLinear, SixChannelCodaConv2d, SixChannelCodaConv2dSame, Squash

__all__ = ["METHOD", "CodaConfig"]

SQUASHES: tuple[str, ...] = get_args(Squash)


@dataclasses.dataclass(frozen=True)
class CodaConfig:
    """Settings of a CoDA conversion.

    Attributes:
        keep: modules to leave as they are, with all below them: qualified names, or `re:` and a regular expression.
        squash: what bounds the weights: `l2` to a norm of 1, or `sq`, which the paper calls SQ, below 1.
        rank: numbers that a layer reads from a patch to make its weights of; at most the units of a group in grouped
            layers, so that depthwise ones do not grow by this factor.
        basis: directions in which all units of a layer move their weights; 0 gives each unit its own, which costs
            memory and time in proportion to `rank`.
        last_stages: convert only what runs in the last so many stages, and after them, by timm's `feature_info`; 0
            converts all.
    """

    keep: tuple[str, ...] = ()
    squash: Squash = "l2"
    rank: Annotated[int, COUNT] = 4
    basis: Annotated[int, ANY_COUNT] = 4
    last_stages: Annotated[int, ANY_COUNT] = 0

    def __post_init__(self) -> None:
        if self.squash not in SQUASHES:
            raise PlanError(
                f"no squash {self.squash!r}.{near_miss(self.squash, SQUASHES)} There are: {', '.join(SQUASHES)}."
            )
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodaArguments(DynamicArguments):
    """Attributes: squash, rank, basis: as in `CodaConfig`."""

    squash: Squash
    rank: int
    basis: int


def _prepare(layer: CodaLinear | CodaConv2d, given: CodaArguments) -> None:
    layer.start_alignment(given.rank, given.basis, given.squash)


LAYERS = dynamic_linear.Layers(
    linear=dynamic_swap("coda.linear", CodaLinear, nn.Linear, CodaArguments, _prepare),
    convolution=dynamic_swap("coda.conv2d", CodaConv2d, nn.Conv2d, CodaArguments, _prepare),
    same=dynamic_swap("coda.conv2d_same", CodaConv2dSame, nn.Conv2d, CodaArguments, _prepare),
    stem=dynamic_swap("coda.stem_conv2d", SixChannelCodaConv2d, nn.Conv2d, CodaArguments, _prepare),
    stem_same=dynamic_swap("coda.stem_conv2d_same", SixChannelCodaConv2dSame, nn.Conv2d, CodaArguments, _prepare),
)


def _decide(name: str, module: nn.Module, model: nn.Module, trace: Trace, config: CodaConfig) -> Decision | None:
    early = _early(model, trace, config.last_stages)
    if early and not name:
        return None  # whatever reads the picture stays as it is
    if name in early:
        return Decision(None, f"runs before the last stages (last_stages={config.last_stages})")
    arguments = CodaArguments(squash=config.squash, rank=config.rank, basis=config.basis)
    decision = dynamic_linear.decide(name, module, model, trace, LAYERS, arguments)
    return _checked(decision, module, model) if decision is not None and decision.swap in LAYERS.swaps else decision


def _checked(decision: Decision, module: Any, model: nn.Module) -> Decision:
    """The same decision with a word on zero kernels; refused where the weight is not this layer's alone."""
    weight = module.weight
    holders = [other for other in model.modules() if any(own is weight for own in other.parameters(recurse=False))]
    if len(holders) > 1:
        raise PlanError("another module holds the same weight; as alignment units they would come untied")
    silent = 0 if weight.is_meta else int((~weight.flatten(1).any(1)).sum())
    if not silent:
        return decision
    note = f"{silent} of its {len(weight)} kernels are zero and stay silent"
    return dataclasses.replace(decision, reason=f"{decision.reason}; {note}")


def _early(model: nn.Module, trace: Trace, last: int) -> frozenset[str]:
    """Names of the layers that run before the last `last` stages; none where that is 0, for all.

    Raises PlanError where the model does not say what its stages are, or has fewer.
    """
    if not last:
        return frozenset()
    info = getattr(model, "feature_info", None)
    stages = [entry["module"] for entry in info] if isinstance(info, list) else list(info.module_name()) if info else []
    if last > len(stages):
        found = f"has {len(stages)}" if stages else "does not say what its stages are (no feature_info)"
        raise PlanError(f"last_stages={last}: {type(model).__name__} {found}. Name layers with --keep instead.")
    before = _positions(trace, stages[:-last])
    # Stages that hold no weights, such as the activation behind a stem, say nothing of the order.
    first = max(before) + 1 if before else min(_positions(trace, stages[-last:])) if last < len(stages) else 0
    return frozenset(trace.called[:first])


def _positions(trace: Trace, stages: list[str]) -> list[int]:
    """Places of these modules, and of all below them, in the order of calls."""
    return [
        place
        for place, name in enumerate(trace.called)
        if any(name == stage or name.startswith(f"{stage}.") for stage in stages)
    ]


PAPERS = (
    Paper("Convolutional Dynamic Alignment Networks for Interpretable Classifications", "Böhle, Fritz, Schiele",
          "CVPR 2021", "https://arxiv.org/abs/2104.00032"),
)  # fmt: skip

METHOD = Method(
    name="coda",
    config_class=CodaConfig,
    decide=_decide,
    ends=lambda config: {"beta": 0.0},
    title="CoDA",
    what="Its convolutions and linear layers are dynamic alignment units, whose weights follow the patch.",
    papers=PAPERS,
    hint="dynamic alignment units",
    recipes=("coda/cnn", "coda/vit"),
)
