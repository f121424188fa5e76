"""B-cos conversion: which layer becomes what (the rules of B-cosification, arXiv 2411.00715, with an exact start).

B-cos: stem, convolutions, MLP layers, attention's output projection, head. Plain with a fading bias: query, key,
value (the softmax over them is a frozen gate in an explanation) and all norms. BatchNorm: uncentred.
Everything else (activations, pools, LayerScale, position tables, class and register tokens) stays, and what it adds
is named in the ledger.

Rules are keyed by exact class: a subclass may act differently in forward (`StdConv2d` does), so an unknown one is
refused by name, never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from ...errors import PlanError, near_miss
from ..layers import (
    BcosConv2d,
    BcosConv2dSame,
    BcosLinear,
    BiasScheduled,
    SixChannelBcosConv2d,
    SixChannelBcosConv2dSame,
    UncentredBatchNorm,
    adopt,
)
from ..plan import Decision, Method, class_path
from ..sources import Preprocess
from ..trace import Trace

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


QUERY_KEY_VALUE = frozenset(
    "qkv q k v kv qk q_proj k_proj v_proj query key value to_q to_k to_v to_qkv to_kv q_lin k_lin v_lin".split()
)
# Modules whose output multiplies the features as a gate; their inside never reaches the score in an explanation.
GATES = frozenset("SEModule SqueezeExcite EffectiveSEModule EffectiveSqueezeExcite SqueezeExciteCl".split())
NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.GroupNorm",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
    "timm.layers.norm.LayerNorm2d",
    "timm.layers.norm.LayerNorm2dFp32",
    "timm.layers.norm.GroupNorm",
    "timm.layers.norm.GroupNorm1",
    "timm.layers.norm_act.GroupNormAct",
    "timm.layers.norm_act.GroupNorm1Act",
    "timm.layers.norm_act.LayerNormAct",
    "timm.layers.norm_act.LayerNormActFp32",
    "timm.layers.norm_act.LayerNormAct2d",
    "timm.layers.norm_act.LayerNormAct2dFp32",
)
BATCH_NORMS = (
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "timm.layers.norm_act.BatchNormAct2d",
)
# Classes that carry weights which must not be converted by guess.
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.modules.batchnorm._NormBase, nn.MultiheadAttention)


def _linear(name: str, module: nn.Module, reads_picture: bool) -> Decision:
    if reads_picture:
        raise PlanError("reads the picture through a linear layer; only convolutional stems are supported")
    if name.rpartition(".")[2] in QUERY_KEY_VALUE:
        return Decision("BiasScheduled", "query, key and value stay linear: the softmax over them is a gate")
    return Decision("BcosLinear", "linear layer")


def _conv2d(name: str, module: nn.Module, reads_picture: bool) -> Decision:  # noqa: ARG001 - one signature for all rules
    assert isinstance(module, nn.Conv2d)
    if not reads_picture:
        return Decision("BcosConv2d", "convolution")
    if module.groups != 1 or module.in_channels != 3 or module.padding_mode != "zeros":
        raise PlanError("reads the picture, but is not an ungrouped three-channel convolution with zero padding")
    return Decision("SixChannelBcosConv2d", "reads the picture: [r, 1-r] with the normalisation folded in")


def _conv2d_same(name: str, module: nn.Module, reads_picture: bool) -> Decision:
    decision = _conv2d(name, module, reads_picture)
    return Decision(f"{decision.becomes}Same", decision.reason)


def _norm(name: str, module: nn.Module, reads_picture: bool) -> Decision:  # noqa: ARG001
    if reads_picture:
        raise PlanError("normalises the picture before the stem, so the six channels cannot be folded in")
    if getattr(module, "bias", None) is None:
        return Decision(None, "norm without a bias")
    return Decision("BiasScheduled", "norm; its bias fades")


def _batch_norm(name: str, module: nn.Module, reads_picture: bool) -> Decision:  # noqa: ARG001
    if reads_picture:
        raise PlanError("normalises the picture before the stem, so the six channels cannot be folded in")
    if getattr(module, "running_mean", None) is None:
        raise PlanError("keeps no running statistics, so it is a different function for every batch")
    return Decision("UncentredBatchNorm", "uncentred; bias and mean fade")


RULES: dict[str, Callable[[str, nn.Module, bool], Decision]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "timm.layers.linear.Linear": _linear,
    "torch.nn.modules.conv.Conv2d": _conv2d,
    "timm.layers.conv2d_same.Conv2dSame": _conv2d_same,
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
}


def _decide(name: str, module: nn.Module, model: nn.Module, trace: Trace, config: BcosConfig) -> Decision | None:  # noqa: ARG001
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    rule = RULES.get(class_path(module))
    if rule is None:
        if isinstance(module, WEIGHTED):
            supported = sorted({path.rpartition(".")[2] for path in RULES})
            raise PlanError(f"not supported; supported are exactly {', '.join(supported)}")
        if own:
            return Decision(None, f"{', '.join(own)}: what it adds is named in the ledger")
        return None if any(True for _ in module.children()) else Decision(None, "no weights")
    if _inside_gate(name, model):
        return Decision(None, "inside a gate, which an explanation freezes")
    if own and name not in trace.called:
        return Decision(None, "forward never calls it; its parent reads the weights")
    return rule(name, module, name in trace.readers)


def _inside_gate(name: str, model: nn.Module) -> bool:
    parts = name.split(".")
    return any(type(model.get_submodule(".".join(parts[:n]))).__name__ in GATES for n in range(1, len(parts)))


def _bcos(layer: type[BcosLinear] | type[BcosConv2d]) -> Callable[..., None]:
    def swap(module: nn.Module, preprocess: Preprocess, config: BcosConfig) -> None:
        adopted = adopt(module, layer)
        adopted.bounded = config.scale == "cosine"
        if isinstance(adopted, SixChannelBcosConv2d | SixChannelBcosConv2dSame):
            adopted.encode_with(preprocess.mean, preprocess.std)

    return swap


def _scheduled(layer: type[BiasScheduled]) -> Callable[..., None]:
    def swap(module: nn.Module, preprocess: Preprocess, config: BcosConfig) -> None:  # noqa: ARG001
        adopt(module, layer)

    return swap


SWAPS: dict[str, Callable[..., None]] = {
    **{
        layer.__name__: _bcos(layer)
        for layer in (BcosLinear, BcosConv2d, BcosConv2dSame, SixChannelBcosConv2d, SixChannelBcosConv2dSame)
    },
    **{layer.__name__: _scheduled(layer) for layer in (BiasScheduled, UncentredBatchNorm)},
}
METHOD = Method(name="bcos", config_class=BcosConfig, decide=_decide, swaps=SWAPS)
