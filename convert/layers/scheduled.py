"""Layers with strengths: buffers that a schedule moves, away from what the source computes.

Most fade their bias: y = f(x) with every additive constant multiplied by beta.

A layer is converted in place: its class becomes a subclass of the class it had, so that parameters keep name, dtype,
device and ties, and the library's own forward runs unchanged. The forward reads `self.bias`, which is now the property
beta * bias; nothing else is needed, for any layer that adds a bias. Constants of other names (`q_bias` of BEiT) fade
the same way.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import near_miss
from ...core.ranges import AMOUNT, EXPONENT, SHARE, WINDOW, Range
from ...linearise.mode import partly_carried
from ..kernels.dispatch import is_exactly

__all__ = [
    "STRENGTHS",
    "BiasScheduled",
    "Rescalable",
    "Scheduled",
    "at_start",
    "biased",
    "convert_in_place",
    "described",
    "faded",
    "faded_and_carried",
    "join",
    "scheduled_layers",
    "set_strength",
    "strength_spans",
]


def _silent(value: float) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Strength:
    """What a schedule may move.

    Attributes:
        start: where a layer is the source's own. range: which values it may have.
        words: what a value means, in words; empty where there is nothing to say.
    """

    start: float
    range: Range
    words: Callable[[float], str] = _silent


STRENGTHS = {
    "b": Strength(1.0, EXPONENT, lambda value: "" if value == 1 else f"B={value:g}"),
    "beta": Strength(
        1.0, SHARE, lambda value: {0.0: "biases removed", 1.0: "biases kept"}.get(value, f"{value:.0%} of biases")
    ),
    "dampening": Strength(0.0, AMOUNT, lambda value: f"dampening={value:g}" if value else ""),
    # The share of the biases that counts in proportion to the layer's own input.
    "carry": Strength(0.0, SHARE),
    # Where that proportion is taken.
    "window": Strength(0.0, WINDOW),
    # How much of the proportion is that of the whole map, where the window is smaller.
    "spread": Strength(0.0, SHARE),
}


class Scheduled(nn.Module):
    """Mixin: a layer that is the source's own where its strengths start, and something else elsewhere.

    `strength_names`: those that it has. Each is a buffer, which travels in the state dict; the float beside it spares a
    device synchronisation at every forward.
    """

    strength_names: ClassVar[tuple[str, ...]] = ()
    # Whether forward reads the buffers, not their mirrors: in a compiled model each new float is a new program.
    reads_buffers: bool = False

    def start_schedule(self) -> None:
        """Called once, by `convert_in_place`: every strength as in the source's own function."""
        for name in self.strength_names:
            self._register_strength(name, STRENGTHS[name].start)

    def _register_strength(self, name: str, value: float) -> None:
        device = next((t.device for t in [*self.parameters(False), *self.buffers(False)]), None)
        self.register_buffer(name, torch.tensor(value, device=device))
        setattr(self, f"_{name}", value)

    def set_strength(self, name: str, value: float) -> None:
        """Moves one buffer and its mirror, without reading the device."""
        getattr(self, name).fill_(value)
        self._mirror(name, float(np.float32(value)))

    def _mirror(self, name: str, value: float) -> None:
        # Rounded: 1.7 must come back as 1.7 from a float32 buffer, or a resumed run is not the same run.
        setattr(self, f"_{name}", round(value, 6))

    def strengths(self) -> dict[str, float]:
        """The current value of every buffer that the schedule moves."""
        return {name: getattr(self, f"_{name}") for name in self.strength_names}

    def _strength(self, name: str) -> float | Tensor:
        """What forward multiplies by: the mirror, or the buffer () itself."""
        return getattr(self, name if self.reads_buffers else f"_{name}")

    @property
    def natural_sizes(self) -> Mapping[str, float]:
        """Sizes of parameters that start at zero, by name: what a learning rate in units of a weight's size goes by."""
        return {}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # Half precision has no 1.7: the buffers stay float32, or a saved model would come back as another function.
        for name, value in self.strengths().items():
            buffer = getattr(self, name)
            if buffer.dtype != torch.float32:
                self._buffers[name] = torch.tensor(value, device=buffer.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.strengths():
            if not getattr(self, name).is_meta:
                self._mirror(name, float(getattr(self, name)))

    def extra_repr(self) -> str:
        values = ", ".join(f"{name}={value:g}" for name, value in self.strengths().items())
        return ", ".join(part for part in (super().extra_repr(), values) if part)


class BiasScheduled(Scheduled):
    """Mixin: the layer's bias counts beta + carry times, each in [0, 1].

    What is carried is a constant like the rest in all but explanation mode. There it counts as part of the layer's own
    response r, as  carry · bias · <r, sg(r)> / |r|²: the same value, as a linear function of the layer's input. This
    changes no value, only what the ledger calls it. (Ours. For a BatchNorm it does change the function, see there.)
    """

    strength_names: ClassVar[tuple[str, ...]] = ("beta", "carry")
    beta: Tensor
    carry: Tensor
    _beta: float
    _carry: float

    @property
    def bias(self) -> Tensor | None:
        """(C,) or None: beta + carry times the source's bias."""
        return self._counted(self._parameters.get("bias"))

    def _counted(self, constant: Tensor | None) -> Tensor | None:
        """What is left of a constant of the source."""
        beta, carry = self._strength("beta"), self._strength("carry")
        if constant is None or is_exactly(carry, 0):
            return faded(constant, beta)
        return faded_and_carried(constant, beta, carry)


class Rescalable(BiasScheduled):
    """Mixin: a scheduled layer whose response, without its bias, can be multiplied by a gain for every channel."""

    def rescale(self, gain: Tensor) -> None:
        """Multiplies the responses by `gain` (C,), positive; in the weight, in place."""
        weight = self._parameters["weight"]
        assert weight is not None
        weight.mul_(gain.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)))


def faded(bias: Tensor | None, beta: float | Tensor) -> Tensor | None:
    """beta times `bias`; None where nothing is left of it."""
    if bias is None or is_exactly(beta, 0):
        return None
    return bias if is_exactly(beta, 1) else bias * beta


@partly_carried
def faded_and_carried(bias: Tensor, beta: float | Tensor, carry: float | Tensor) -> Tensor:
    """(beta + carry) times `bias`."""
    total = beta + carry
    total = total if isinstance(total, Tensor) else round(total, 6)
    return bias if is_exactly(total, 1) else bias * total


def biased(y: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
    """`y` plus `bias` (C,) along its dimension `dim`, in the precision of y, as torch's own layers return it."""
    if bias is None:
        return y
    behind = y.dim() - 1 - dim % y.dim()
    return y + bias.to(y.dtype).view(-1, *[1] * behind)


def _fading(name: str) -> property:
    """The property beta * parameter (or buffer); at beta = 0 zeros, not None: the source asks for None at other times
    to choose what to compute."""

    def read(layer: BiasScheduled) -> Tensor | None:
        constant = layer._parameters.get(name, layer._buffers.get(name))
        counted = layer._counted(constant)
        return constant * 0.0 if counted is None and constant is not None else counted

    return property(read, doc=f"beta + carry times the source's {name}")


MixinT = TypeVar("MixinT", bound=nn.Module)
LayerT = TypeVar("LayerT", bound=Scheduled)


@functools.cache
def _joined(mixin: type[nn.Module], source: type[nn.Module], fading: tuple[str, ...]) -> type[nn.Module]:
    name = mixin.__name__ if mixin.__name__.endswith(source.__name__) else mixin.__name__ + source.__name__
    body: dict[str, object] = {
        "__module__": mixin.__module__,
        "__qualname__": f"{mixin.__qualname__}[{source.__module__}.{source.__qualname__}]",
        "__doc__": mixin.__doc__,
        "__reduce__": _reduced,
        JOINED: (mixin, source, fading),
    }
    return type(name, (mixin, source), body | {constant: _fading(constant) for constant in fading})


# Attribute of a joined class: what it was made of.
JOINED = "_joined_of"


def _reduced(layer: nn.Module) -> tuple[Any, ...]:
    """How to pickle and copy `layer`: its class is made at run time, so no module has it under a name."""
    kind = type(layer)
    if JOINED in vars(kind):
        return _blank, _parts(kind), layer.__getstate__()  # type: ignore[attr-defined]
    return copyreg.__newobj__, (kind,), layer.__getstate__()  # type: ignore[attr-defined] - a subclass of one


def _parts(kind: type[nn.Module]) -> tuple[Any, ...]:
    """Mixin, source and fading constants of a joined class; the parts of the source where that is joined too."""
    mixin, source, fading = vars(kind)[JOINED]
    return mixin, _parts(source) if JOINED in vars(source) else source, fading


def _blank(mixin: type[nn.Module], source: type[nn.Module] | tuple[Any, ...], fading: tuple[str, ...]) -> nn.Module:
    """A module of the joined class with these `_parts`, to be given its state."""
    kind = _class_of(mixin, source, fading)
    return kind.__new__(kind)


def _class_of(
    mixin: type[nn.Module], source: type[nn.Module] | tuple[Any, ...], fading: tuple[str, ...]
) -> type[nn.Module]:
    return _joined(mixin, _class_of(*source) if isinstance(source, tuple) else source, fading)


def join(module: nn.Module, mixin: type[MixinT], fading: tuple[str, ...] = ()) -> MixinT:
    """Turns `module` in place into `mixin` over the class it had, with properties for `fading`. Returns the module."""
    module.__class__ = _joined(mixin, type(module), fading)
    assert isinstance(module, mixin)
    return module


def convert_in_place(module: nn.Module, mixin: type[LayerT], fading: tuple[str, ...] = ()) -> LayerT:
    """As `join`, and starts the schedule at the source's own function.

    `fading` names parameters or buffers, beside `bias`, that the source's forward reads and that count beta times.
    """
    layer = join(module, mixin, fading)
    layer.start_schedule()
    return layer


def scheduled_layers(model: nn.Module) -> Iterator[tuple[str, Scheduled]]:
    """(qualified name, layer) of every layer of `model` that has strengths, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Scheduled))


def at_start(model: nn.Module) -> bool:
    """Whether every layer of `model` is still the source's own function."""
    moved = [item for _, layer in scheduled_layers(model) for item in layer.strengths().items()]
    return all(value == STRENGTHS[name].start for name, value in moved)


def described(strengths: Mapping[str, float]) -> str:
    """Strengths in words, such as `B=1, beta=1`; `the start` where there are none to move."""
    return ", ".join(f"{'B' if name == 'b' else name}={value:g}" for name, value in strengths.items()) or "the start"


def strength_spans(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Strength -> its least and its largest value in the layers of `model` that have it."""
    found: dict[str, list[float]] = {}
    for _, layer in scheduled_layers(model):
        for name, value in layer.strengths().items():
            found.setdefault(name, []).append(value)
    return {name: (min(values), max(values)) for name, values in found.items()}


def set_strength(model: nn.Module, b: float | None = None, beta: float | None = None, **others: float | None) -> None:
    """Sets strengths in all layers of `model` that have them; None leaves a value as it is.

    B is at least 1; beta, carry and spread lie in [0, 1]; dampening is at least 0; window is 0 (the whole map), a share
    of the map's side below 1, or an odd number of places. Example: `set_strength(student.model, b=1.5, beta=0.5)`.

    Raises:
        ValueError: for other values, and TypeError for other names.
    """
    given = {"b": b, "beta": beta, **others}
    wanted = {name: value for name, value in given.items() if value is not None}
    for name, value in wanted.items():
        if name not in STRENGTHS:
            raise TypeError(f"no strength {name!r}.{near_miss(name, STRENGTHS)} There are: {', '.join(STRENGTHS)}.")
        if value not in STRENGTHS[name].range:
            raise ValueError(f"{name} is {STRENGTHS[name].range}; got {value:g}")
    for _, layer in scheduled_layers(model):
        for name in wanted.keys() & layer.strength_names:
            layer.set_strength(name, wanted[name])
