"""B-cos conversion (the rules of B-cosification, arXiv 2411.00715, with an exact start).

Which layer becomes what: `dynamic_linear`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from torch import nn

from ....core.errors import PlanError, near_miss
from ...layers import BcosConv2d, BcosConv2dSame, BcosLinear, SixChannelBcosConv2d, SixChannelBcosConv2dSame
from ...plan import Decision, Method, Paper
from ...trace import Trace
from .. import dynamic_linear
from ..dynamic_linear import DynamicArguments, dynamic_swap

__all__ = ["METHOD", "BcosConfig"]

Scale = Literal["cosine", "unbounded"]
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclasses.dataclass(frozen=True)
class BcosConfig:
    """Settings of a B-cos conversion.

    Attributes:
        keep: modules to leave as they are, with all below them: qualified names, or `re:` and a regular expression.
        scale: `cosine`, in [0, 1]; or `unbounded`, which leaves the weight's norm in it (B-cosification's own variant).
    """

    keep: tuple[str, ...] = ()
    scale: Scale = "cosine"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise PlanError(f"no scale {self.scale!r}.{near_miss(self.scale, SCALES)} There are: {', '.join(SCALES)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BcosArguments(DynamicArguments):
    """Attributes: bounded: whether the scale is a cosine; else the weight's norm stays in it."""

    bounded: bool


def _prepare(layer: BcosLinear | BcosConv2d, given: BcosArguments) -> None:
    layer.bounded = given.bounded


LAYERS = dynamic_linear.Layers(
    linear=dynamic_swap("bcos.linear", BcosLinear, nn.Linear, BcosArguments, _prepare),
    convolution=dynamic_swap("bcos.conv2d", BcosConv2d, nn.Conv2d, BcosArguments, _prepare),
    same=dynamic_swap("bcos.conv2d_same", BcosConv2dSame, nn.Conv2d, BcosArguments, _prepare),
    stem=dynamic_swap("bcos.stem_conv2d", SixChannelBcosConv2d, nn.Conv2d, BcosArguments, _prepare),
    stem_same=dynamic_swap("bcos.stem_conv2d_same", SixChannelBcosConv2dSame, nn.Conv2d, BcosArguments, _prepare),
)


def _decide(name: str, module: nn.Module, model: nn.Module, trace: Trace, config: BcosConfig) -> Decision | None:
    arguments = BcosArguments(bounded=config.scale == "cosine")
    return dynamic_linear.decide(name, module, model, trace, LAYERS, arguments)


PAPERS = (
    Paper("B-cos Networks: Alignment is All We Need for Interpretability", "Böhle, Fritz, Schiele", "CVPR 2022",
          "https://arxiv.org/abs/2205.10268"),
    Paper("B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers", "Böhle, Singh, Fritz, Schiele",
          "TPAMI 2024", "https://arxiv.org/abs/2306.10898"),
    Paper("B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable",
          "Arya, Rao, Böhle, Schiele", "NeurIPS 2024", "https://arxiv.org/abs/2411.00715"),
)  # fmt: skip

METHOD = Method(
    name="bcos",
    config_class=BcosConfig,
    decide=_decide,
    ends=lambda config: {"b": 2.0, "beta": 0.0},
    title="B-cos",
    what="Its convolutions and linear layers respond as far as input and weight point the same way, "
    "y = |cos(x, w)|^(B-1) · w·x, and their biases fade.",
    papers=PAPERS,
    hint="layers that respond as far as input and weight point the same way",
    recipes=("bcos/cnn", "bcos/vit"),
)
