"""Reference gains: every converted layer keeps, per channel, the teacher's size on the same pictures.

|cos|^(B-1) takes size away from a response, and more where B rises; a norm behind the layer expects the teacher's. So

    gain = sqrt(E[teacher^2] / E[student^2]),    y = gain * response,

for every output channel, over the places of many batches and all processes; both responses are without their bias. The
teacher runs on the same pictures anyway. At B = 1 the gain is 1: the student is its teacher while it trains, too. At
rest the gains fold into the weights, because a cosine does not see them.

Gains of one batch alone would tell the student about the very pictures that it sees. A student of EfficientNet-Lite0
that was trained so agreed with its teacher on 88 % of pictures by gains of four pictures at a time, on 70 % by sixteen,
and on 44 % by the gains that it kept. So while it trains, gains come from a running mean over batches. (Ours.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ..kernels.squares import with_squares
from .scheduled import Rescalable

__all__ = [
    "ReferenceSized",
    "RunningGains",
    "estimate_gains",
    "fold_gains",
    "mean_sizes",
    "recording",
    "reference_gains",
]

SMALLEST, LARGEST = 1e-3, 1e3
# Mean squares below this are those of dead channels.
DEAD = 1e-30
# The mean square of what did not run yet. What runs twice has none: one gain cannot keep both sizes.
UNSEEN = -1.0


class ReferenceSized(Rescalable):
    """Mixin: a layer whose response, without its bias, can keep the size of its counterpart's in the teacher."""

    # (C,) the gain at rest; None is 1.
    resting: Tensor | None = None
    # (C,) mean square of the response: of the teacher's layer, which records it, and shares it with the student's; no
    # number where the layer ran more than once.
    energy: Tensor | None = None
    records: bool = False
    follows: bool = False
    # (2, C) sums of both mean squares over the batches of an estimate.
    sums: Tensor | None = None
    # (2, C) the running mean of both, by which a layer follows where it has one; and what it saw in the last pass.
    running: Tensor | None = None
    seen: Tensor | None = None

    @property
    def sized(self) -> bool:
        """Whether `_at_reference` does anything."""
        return self.records or self.follows or self.resting is not None

    def _at_reference(self, o: Tensor, dim: int) -> Tensor:
        """The response o, without its bias and with channels along `dim`, at the size of the reference."""
        if self.records:
            assert self.energy is not None
            self.energy.copy_(torch.where(self.energy == UNSEEN, _mean_square(o, dim)[1], torch.nan))
        if self.follows:
            theirs = self.energy
            assert theirs is not None
            o, ours = _mean_square(o, dim)
            both = _over_processes(torch.stack([theirs, ours]))
            theirs, ours = both
            if self.running is not None and self.sums is None:
                assert self.seen is not None
                self.seen.copy_(both.detach())
                gain = _gain(*self.running) * _one(ours)
                return o * _along(gain.to(o.dtype), o, dim)
            if self.sums is not None:
                self.sums.add_(both.detach())
            return o * _along(_gain(theirs, ours).to(o.dtype), o, dim)
        return o if self.resting is None else o * _along(self.resting.to(o.dtype), o, dim)


def _mean_square(o: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """o, to be read on, and the mean square (C,) of its channels along `dim`, in float32 at least."""
    others = tuple(axis for axis in range(o.dim()) if axis != dim % o.dim())
    o, squares = with_squares(o, others)
    return o, squares.flatten() / (o.numel() / o.shape[dim])


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1 - dim % like.dim()))


def _gain(theirs: Tensor, ours: Tensor) -> Tensor:
    """(C,) from both mean squares; 1 where the student's channel is dead, next to nothing where the teacher's is.

    It is 1, too, where the teacher's layer did not run, or more than once.
    """
    alive = (ours > DEAD) & (theirs >= 0)
    ratio = theirs.clamp_min(DEAD) / torch.where(alive, ours, 1)
    return torch.where(alive, ratio, 1).sqrt().clamp(SMALLEST, LARGEST)


def _one(ours: Tensor) -> Tensor:
    """(C,) ones, whose gradient is that of 1 / sqrt(ours): a step must not change a channel's size.

    (As in batch renormalisation, Ioffe, NeurIPS 2017: the value of a mean over batches, the gradient of the batch's.)
    """
    alive = ours > DEAD
    safe = torch.where(alive, ours, 1)
    return (safe.detach() / safe).sqrt()


def _over_processes(energies: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return all_reduce(energies) / torch.distributed.get_world_size()
    return energies


def _sized_layers(model: nn.Module) -> dict[str, ReferenceSized]:
    """Name -> layer that can keep a size."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ReferenceSized)}


def _place_for_energy(layer: ReferenceSized) -> Tensor:
    """Where `layer` records the size of its response; made once."""
    fresh = _zeros(layer)
    if layer.energy is None or layer.energy.device != fresh.device:
        layer.energy = fresh
    return layer.energy


def _zeros(layer: ReferenceSized, *more: int) -> Tensor:
    """(..., C) in float32, where the layer's weight is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.new_zeros(*more, len(weight), dtype=torch.float32)


@contextlib.contextmanager
def recording(teacher: nn.Module) -> Iterator[None]:
    """Inside, where `teacher` is to run once, every converted layer of it records the size of its response."""
    layers = _sized_layers(teacher).values()
    for layer in layers:
        _place_for_energy(layer).fill_(UNSEEN)
        layer.records = True
    try:
        yield
    finally:
        for layer in layers:
            layer.records = False


@contextlib.contextmanager
def reference_gains(student: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Inside, the layers of `student` keep the sizes that `teacher` had when it was last run under `recording`.

    Args:
        teacher: a copy of the student's own conversion at B = 1, beta = 1, which is the source's function.
    """
    layers, counterparts = _sized_layers(student), _sized_layers(teacher)
    missing = [name for name in layers if name not in counterparts]
    assert not missing, f"{missing[0]}: the teacher must be converted too"
    for name, layer in layers.items():
        layer.energy, layer.follows = _place_for_energy(counterparts[name]), True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.energy, layer.follows = None, False


@torch.no_grad()
def estimate_gains(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """Sets the gains at rest of every layer of `student`, from means over `batches`, each (B, 3, H, W).

    Returns the mean gain of each layer by name.
    """
    gains = {name: _gain(*sizes) for name, sizes in mean_sizes(student, teacher, batches).items()}
    for name, layer in _sized_layers(student).items():
        layer.resting = gains[name]
    return {name: float(gain.mean()) for name, gain in gains.items()}


class RunningGains:
    """Running means of both sizes, by which the layers of a student follow its teacher while it trains.

    Attributes:
        decay: what is left of the mean after a step.
        means: name -> (2, C), the mean squares of the teacher's and of the student's responses.
    """

    def __init__(self, student: nn.Module, decay: float, means: dict[str, Tensor]) -> None:
        self.decay, self.means = decay, means
        self._layers = _sized_layers(student)
        self._seen = {name: torch.zeros_like(mean) for name, mean in means.items()}
        self._sums = {name: torch.zeros_like(mean) for name, mean in means.items()}
        for name, layer in self._layers.items():
            layer.running, layer.seen = means[name], self._seen[name]

    @torch.no_grad()
    def collect(self, share: float) -> None:
        """After the passes of a part of a batch, which is `share` of it."""
        for name, seen in self._seen.items():
            self._sums[name].add_(seen, alpha=share)

    @torch.no_grad()
    def advance(self) -> None:
        """After a step: moves the means towards what was seen in it, by all processes."""
        for name, mean in self.means.items():
            mean.lerp_(self._sums[name], 1 - self.decay)
        self.forget()

    def forget(self) -> None:
        """After a step that is not kept."""
        for seen in self._sums.values():
            seen.zero_()

    def stop(self) -> None:
        """At the end of a phase: layers follow no more."""
        for layer in self._layers.values():
            layer.running = layer.seen = None


@torch.no_grad()
def mean_sizes(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Layer -> (2, C): the mean squares of the teacher's and the student's responses over `batches`, by name."""
    layers = _sized_layers(student)
    sums = {name: _zeros(layer, 2) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.sums = sums[name]
    try:
        for batch in batches:
            with recording(teacher):
                teacher(batch)
            with reference_gains(student, teacher):
                student(batch)
    finally:
        for layer in layers.values():
            layer.sums = None
    return {name: sizes / len(batches) for name, sizes in sums.items()}


@torch.no_grad()
def fold_gains(student: nn.Module) -> None:
    """Multiplies the gains at rest into the weights: the same function, with nothing left beside them."""
    for layer in student.modules():
        if isinstance(layer, ReferenceSized) and layer.resting is not None:
            layer.rescale(layer.resting)
            layer.resting = None
