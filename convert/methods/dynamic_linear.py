"""Rules that all methods share which turn every linear map into a dynamic-linear one.

A method brings `Layers`, its own linear map and convolutions, and a function that prepares them. Dynamic-linear: stem,
convolutions, MLP layers, attention's output projection, head. Plain with a fading bias: query, key, value (the softmax
over them is a frozen gate in an explanation) and all norms. BatchNorm: uncentred. Everything else (activations, pools,
LayerScale, position tables, class and register tokens) stays, and what it adds is named in the ledger.

Rules are keyed by exact class (see `kinds`): a subclass may act differently in forward (`StdConv2d` does), so an
unknown one is refused by name, never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from ...core.errors import PlanError
from ...core.torch_internals import AnyBatchNorm
from ..layers import (
    BiasScheduled,
    SeparateAttention,
    SeparateAttentionPool2d,
    SixChannel,
    SixChannelInput,
    UncentredBatchNorm,
    convert_in_place,
    join,
)
from ..libraries import Preprocess
from ..plan import Decision, class_path
from ..swaps import NoArguments, Swap, swap
from ..trace import Trace
from . import kinds

__all__ = ["DynamicArguments", "Layers", "decide", "dynamic_swap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicArguments:
    """What the swap of any dynamic-linear layer must know; a method adds what its own need.

    Attributes:
        standardised: the weight is standardised in every forward pass of the source; that is folded into it.
    """

    standardised: bool = False


@dataclasses.dataclass(frozen=True)
class Layers:
    """The dynamic-linear layers of one method; `same` is over timm's `Conv2dSame`, `stem*` encode the picture."""

    linear: Swap
    convolution: Swap
    same: Swap
    stem: Swap
    stem_same: Swap

    @property
    def swaps(self) -> tuple[Swap, ...]:
        """All of them."""
        return self.linear, self.convolution, self.same, self.stem, self.stem_same


def dynamic_swap(
    id: str,
    layer: type[BiasScheduled],
    over: type[nn.Module],
    arguments: type[DynamicArguments],
    prepare: Callable[[Any, Any], None],
) -> Swap:
    """The swap to `layer`, which `prepare(layer, arguments)` ends."""

    @swap(id, layer, over, arguments)
    def change(module: nn.Module, preprocess: Preprocess, given: DynamicArguments) -> None:
        if given.standardised:
            _fold_standardisation(module)
        adopted = convert_in_place(module, layer)
        if isinstance(adopted, SixChannel):
            adopted.encode_with(preprocess.mean, preprocess.std)
        prepare(adopted, given)

    return change


# ------------------------------------------------------------------------------------------------------- shared swaps


@dataclasses.dataclass(frozen=True)
class FadingArguments:
    """Attributes: constants: parameters or buffers beside the bias that the source's forward adds, and that fade."""

    constants: tuple[str, ...] = ()


def _check_constants(module: nn.Module, names: tuple[str, ...]) -> None:
    """Raises PlanError for a name that is no tensor of the module: it would hide something else."""
    own = {*module._parameters, *module._buffers}
    if wrong := [name for name in names if name not in own]:
        raise PlanError(f"{type(module).__name__} has no parameter or buffer {', '.join(map(repr, wrong))} to fade")


@swap("common.fading_bias", BiasScheduled, arguments=FadingArguments)
def fading_bias(module: nn.Module, preprocess: Preprocess, given: FadingArguments) -> None:
    _check_constants(module, given.constants)
    convert_in_place(module, BiasScheduled, given.constants)


@swap("common.uncentred_batch_norm", UncentredBatchNorm, AnyBatchNorm)
def uncentred_batch_norm(module: nn.Module, preprocess: Preprocess, given: NoArguments) -> None:
    convert_in_place(module, UncentredBatchNorm)


@swap("common.separate_attention", SeparateAttention, nn.MultiheadAttention, FadingArguments)
def separate_attention(module: nn.Module, preprocess: Preprocess, given: FadingArguments) -> None:
    _check_constants(module, given.constants)
    convert_in_place(module, SeparateAttention, given.constants)


@swap("common.separate_attention_pool2d", SeparateAttentionPool2d)
def separate_attention_pool2d(module: nn.Module, preprocess: Preprocess, given: NoArguments) -> None:
    join(module, SeparateAttentionPool2d)


@swap("common.six_channel_input", SixChannelInput)
def six_channel_input(module: nn.Module, preprocess: Preprocess, given: NoArguments) -> None:
    join(module, SixChannelInput).encode_with(preprocess.mean, preprocess.std)


# -------------------------------------------------------------------------------------------------------------- rules


# Classes that carry weights which must not be converted by guess.
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.modules.batchnorm._NormBase, nn.MultiheadAttention)
# What computes nothing, in an adapter: containers without anything in them, too.
SILENT = (nn.Identity, nn.Dropout, nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclasses.dataclass(frozen=True)
class _Place:
    """A layer and where it sits, as rules see it."""

    name: str
    module: nn.Module
    model: nn.Module
    trace: Trace
    layers: Layers
    arguments: DynamicArguments

    @property
    def reads_picture(self) -> bool:
        """Whether it is given the picture itself, and will encode it."""
        return self.name in self.trace.readers and not _at_the_entrance(self.model, self.trace)

    @property
    def parent(self) -> nn.Module:
        return self.model.get_submodule(self.name.rpartition(".")[0])

    @property
    def called(self) -> bool:
        """Whether its forward runs, or will once the attention that it belongs to is taken apart."""
        return self.name in self.trace.called or class_path(self.parent) in kinds.ATTENTIONS


def _at_the_entrance(model: nn.Module, trace: Trace) -> bool:
    """Whether the picture is encoded before the model sees it: not all of it is read by layers that could do it."""
    return trace.elsewhere or not all(_can_encode(model.get_submodule(name)) for name in trace.readers)


def _can_encode(module: nn.Module) -> bool:
    known = (*kinds.CONVOLUTIONS, *kinds.SAME_CONVOLUTIONS, *kinds.STANDARDISED)
    return (
        class_path(module) in known
        and isinstance(module, nn.Conv2d)
        and (module.groups, module.in_channels, module.padding_mode) == (1, 3, "zeros")
    )


def _linear(place: _Place) -> Decision:
    if _is_projection(place):
        return Decision(
            fading_bias, "query, key and value stay linear: the softmax over them is a gate", FadingArguments()
        )
    _check_merged(place)
    return Decision(place.layers.linear, "linear layer", place.arguments)


def _is_projection(place: _Place) -> bool:
    """Whether it makes query, key or value, by its own name or that of a module put in the place of such a layer."""
    last, *outer = reversed(place.name.split("."))
    if last in kinds.PLAIN_PROJECTIONS:
        return True
    owners = [".".join(reversed(outer[n:])) for n in range(len(outer))]
    return any(
        name in kinds.PLAIN_PROJECTIONS and not class_path(place.model.get_submodule(owner)).startswith(kinds.LIBRARIES)
        for name, owner in zip(outer, owners, strict=True)
    )


def _check_merged(place: _Place) -> None:
    """Raises PlanError inside of a low-rank adapter, y = base(x) + up(down(x)).

    Its parts are one layer, and two layers that respond each in its own way would be another.
    """
    parts = place.name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        owner = place.model.get_submodule(".".join(parts[:n]))
        if class_path(owner).startswith((*kinds.LIBRARIES, "torch.")):
            continue
        if _is_low_rank(owner):
            raise PlanError(
                f"inside {'.'.join(parts[:n])} ({type(owner).__name__}), a low-rank adapter. Merge the adapters first, "
                "in peft with model.merge_and_unload(), and convert the merged model"
            )


def _is_low_rank(owner: nn.Module) -> bool:
    """Whether it holds one layer with pairs of narrow ones around it, and nothing else."""
    leaves = [module for module in owner.modules() if not [*module.children()]]
    layers = [module for module in leaves if any(True for _ in module.parameters())]
    if not all(isinstance(module, nn.Linear | nn.Conv2d) for module in layers):
        return False
    if not all(isinstance(module, SILENT) for module in leaves if module not in layers):
        return False
    widths = [_widths(module) for module in layers]
    for i, base in enumerate(widths):
        rest = widths[:i] + widths[i + 1 :]
        downs = sorted(out for into, out in rest if into == base[0] and out < min(base))
        ups = sorted(into for into, out in rest if out == base[1] and into < min(base))
        if downs and downs == ups and 2 * len(downs) == len(rest):
            return True
    return False


def _widths(module: Any) -> tuple[int, int]:
    """The channels of a linear layer or a convolution, in and out."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def _conv2d(place: _Place, same: bool = False) -> Decision:
    layers = place.layers
    if not place.reads_picture:
        _check_merged(place)
    if place.reads_picture:
        stem = layers.stem_same if same else layers.stem
        return Decision(stem, "reads the picture: [r, 1-r] with the normalisation folded in", place.arguments)
    return Decision(layers.same if same else layers.convolution, "convolution", place.arguments)


def _conv2d_same(place: _Place) -> Decision:
    return _conv2d(place, same=True)


def _standardised(place: _Place) -> Decision:
    decision = _conv2d(place, same=getattr(place.module, "same_pad", False))
    return Decision(
        decision.swap,
        f"{decision.reason}; its standardisation is folded into plain weights",
        dataclasses.replace(place.arguments, standardised=True),
    )


def _other_convolution(place: _Place) -> Decision:
    return Decision(
        fading_bias, "stays linear: only two-dimensional convolutions have a patch norm here", FadingArguments()
    )


def _norm(place: _Place) -> Decision:
    if getattr(place.module, "bias", None) is None:
        return Decision(None, "norm without a bias")
    return Decision(fading_bias, "norm; its bias fades", FadingArguments())


def _batch_norm(place: _Place) -> Decision:
    if getattr(place.module, "running_mean", None) is None:
        raise PlanError("keeps no running statistics, so it is a different function for every batch")
    return Decision(uncentred_batch_norm, "uncentred; bias and mean fade")


def _attention(place: _Place) -> Decision:
    own = {id(parameter) for parameter in place.module.parameters(recurse=False)}
    holders = {
        id(module)
        for module in place.model.modules()
        if any(id(parameter) in own for parameter in module.parameters(recurse=False))
    }
    if len(holders) > 1:
        raise PlanError("another module holds the same packed weights; taken apart, they would come untied")
    reason = "separate query, key, value and output layers"
    if class_path(place.module) in kinds.ATTENTION_POOLS:
        return Decision(separate_attention_pool2d, reason)
    return Decision(separate_attention, reason, FadingArguments(_present(place.module, ("bias_k", "bias_v"))))


def _constants(place: _Place) -> Decision | None:
    """Constants that the class adds by itself, beside the bias that any layer may have."""
    names = _present(place.module, kinds.FADING_CONSTANTS[class_path(place.module)])
    return Decision(fading_bias, f"{' and '.join(names)} fade", FadingArguments(names)) if names else None


def _present(module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if getattr(module, name, None) is not None)


RULES: dict[str, Callable[[_Place], Decision | None]] = {
    **dict.fromkeys(kinds.LINEARS, _linear),
    **dict.fromkeys(kinds.CONVOLUTIONS, _conv2d),
    **dict.fromkeys(kinds.SAME_CONVOLUTIONS, _conv2d_same),
    **dict.fromkeys(kinds.STANDARDISED, _standardised),
    **dict.fromkeys(kinds.OTHER_CONVOLUTIONS, _other_convolution),
    **dict.fromkeys(kinds.NORMS, _norm),
    **dict.fromkeys(kinds.BATCH_NORMS, _batch_norm),
    **dict.fromkeys(kinds.ATTENTIONS, _attention),
    **dict.fromkeys(kinds.FADING_CONSTANTS, _constants),
}


def decide(
    name: str, module: nn.Module, model: nn.Module, trace: Trace, layers: Layers, arguments: DynamicArguments
) -> Decision | None:
    """What becomes of one layer, as `Method.decide`, with `layers` and their `arguments` in place of a config."""
    if not name:
        reason = "the picture gets in by other ways than a convolution: [r, 1-r] is explained at the entrance"
        return Decision(six_channel_input, reason) if _at_the_entrance(model, trace) else None
    place = _Place(name, module, model, trace, layers, arguments)
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    rule = RULES.get(class_path(module))
    if rule is None:
        return _without_rule(module, own)
    if _inside_gate(name, model):
        return Decision(None, "inside a gate, which an explanation freezes")
    if own and not place.called:
        return Decision(None, "forward never calls it; its parent reads the weights")
    return rule(place)


def _without_rule(module: nn.Module, own: list[str]) -> Decision | None:
    if isinstance(module, RECURRENT):
        raise PlanError("a recurrent layer multiplies and squashes inside one call, which no ledger can follow")
    if isinstance(module, WEIGHTED):
        supported = sorted({path.rpartition(".")[2] for path in RULES})
        raise PlanError(f"not supported; supported are exactly {', '.join(supported)}")
    if own:
        return Decision(None, f"{', '.join(own)}: stays; what it adds is named in the ledger")
    return None if any(True for _ in module.children()) else Decision(None, "no weights")


def _inside_gate(name: str, model: nn.Module) -> bool:
    parts = name.split(".")
    return any(type(model.get_submodule(".".join(parts[:n]))).__name__ in kinds.GATES for n in range(1, len(parts)))


def _fold_standardisation(module: nn.Module) -> None:
    """Replaces the weight of a `StdConv2d` or a scaled one by what its forward makes of it."""
    assert isinstance(module, nn.Conv2d)
    settings: Any = module  # `scale` and `eps` are timm's
    gain = module._parameters.pop("gain", None)
    scale = None if gain is None else (gain.detach() * settings.scale).view(-1)
    flat = module.weight.detach().reshape(1, module.out_channels, -1)
    folded = nn.functional.batch_norm(flat, None, None, scale, training=True, momentum=0.0, eps=settings.eps)
    module.weight = nn.Parameter(folded.reshape_as(module.weight), module.weight.requires_grad)
