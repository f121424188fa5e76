"""A method, and the list of all of them: each family's file puts its own on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ...core.errors import NotApplicable, TargetError, near_miss
from ...core.pictures import fitted
from ..decisions import Decisions
from ..subject import Subject

__all__ = ["METHODS", "Method", "find_method", "maps_of", "method"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to explain a decision.

    Attributes:
        run: (subject, images (B, 3, H, W), decisions of B, seed) -> signed maps (B, H, W).
        several: whether `run` also takes K decisions about each picture, side by side (B·K), and gives a map of each
            (B·K, H, W), from one forward pass.
        of_decision: whether the map depends on the decision; else it is the same for all.
        passes: forward and backward passes for one picture, roughly: how dear it is.
        backward: whether half of them are backward passes; else none is.
        in_score_units: whether a region's contributions say by how much the score would fall without it.
        shared: whether several decisions about one picture, standing side by side in a batch, share their passes.
        control: it knows nothing of the decision, or is what calmer maps look like: what others should beat.
        source: paper.
    """

    name: str
    run: Callable[[Subject, Tensor, Decisions, int], Tensor]
    passes: int
    source: str
    in_score_units: bool = True
    shared: bool = False
    control: bool = False
    several: bool = False
    of_decision: bool = True
    backward: bool = True

    @property
    def cheap(self) -> bool:
        """Cheap enough for what explains every picture many times over."""
        return self.passes <= 4

    def forwards(self, decisions: int = 1) -> float:
        """About how many forward passes of one picture it costs to explain so many decisions about it, by time."""
        if not self.of_decision:
            return 0.0 if self.control else self.passes
        if not self.backward:
            return self.passes * (1 if self.shared else decisions)
        return self.passes / 2 * ((1 if self.several else decisions) + BACKWARD * decisions)


# What a backward pass costs, in forward passes that keep nothing: about this on CPUs.
BACKWARD = 1.5

METHODS: dict[str, Method] = {}


def find_method(name: str) -> Method:
    """The method of that name; raises TargetError with what comes close."""
    if name not in METHODS:
        raise TargetError(f"no method is called {name!r}.{near_miss(name, METHODS)} There are: {', '.join(METHODS)}.")
    return METHODS[name]


def maps_of(method: Method, subject: Subject, images: Tensor, decisions: Decisions, seed: int = 0) -> Tensor:
    """Maps (M, H, W) on the CPU, a batch at a time; each picture's is the same whatever the batch size.

    Args:
        images: (N, 3, H, W). decisions: M = N·K, of K about each picture, side by side; they share its forward pass
            where the method can (`several`), and its map where the method knows no decision (`of_decision`).

    Raises NotApplicable where the method has no meaning for the model, or gives maps that are not finite.
    """
    together = copies = len(decisions) // len(images)
    if not method.of_decision:
        decisions, together = decisions.rows(torch.arange(0, len(decisions), copies)), 1
    elif not method.several:
        images, together, copies = images.repeat_interleave(copies, 0), 1, 1
    parts = []
    # Of several decisions as few pictures: what is held of a batch is of as many maps.
    for rows in torch.arange(len(images)).split(max(1, subject.batch_size // together)):
        batch = fitted(images[rows], subject.model)
        asked = decisions.rows((rows[:, None] * together + torch.arange(together)).flatten())
        parts.append(method.run(subject, batch, asked, seed).detach().float().cpu())
    maps = torch.cat(parts)
    if not method.of_decision:
        maps = maps.repeat_interleave(copies, 0)
    if wrong := int((~maps.isfinite()).flatten(1).any(1).sum()):
        raise NotApplicable(f"{wrong} of {len(maps)} maps hold NaN or infinite contributions")
    return maps


def method(
    name: str, passes: int, source: str, **facts: bool
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Lists a function under `name`; `facts` are those of `Method`."""

    def keep(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = Method(name, run, passes, source, **facts)
        return run

    return keep
