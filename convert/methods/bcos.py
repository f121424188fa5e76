"""B-cos conversion (the rules of B-cosification, arXiv 2411.00715, with an exact start).

Which layer becomes what: `dynamic_linear`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from torch import nn

from ...core.errors import PlanError, near_miss
from ..layers import BcosConv2d, BcosConv2dSame, BcosLinear, SixChannelBcosConv2d, SixChannelBcosConv2dSame
from ..plan import Decision, Method
from ..trace import Trace
from . import dynamic_linear

__all__ = ["METHOD", "BcosConfig"]

Scale = Literal["cosine", "unbounded"]
SCALES: tuple[Scale, ...] = get_args(Scale)
LAYERS = dynamic_linear.Layers(BcosLinear, BcosConv2d, BcosConv2dSame, SixChannelBcosConv2d, SixChannelBcosConv2dSame)


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


def _decide(name: str, module: nn.Module, model: nn.Module, trace: Trace, config: BcosConfig) -> Decision | None:  # noqa: ARG001
    return dynamic_linear.decide(name, module, model, trace, LAYERS)


def _prepare(layer: BcosLinear | BcosConv2d, config: BcosConfig) -> None:
    layer.bounded = config.scale == "cosine"


METHOD = Method(
    "bcos", BcosConfig, _decide, dynamic_linear.swaps(LAYERS, _prepare), ends=lambda config: {"b": 2.0, "beta": 0.0}
)
