"""Dampened skips: a block may only change so much of what it is given.

With x what a block is given, y what it returns, f = y - x what it changes, and a dampening e that a schedule moves from
0, where every form is the block itself:

    bound      y = x + f |x| / max(|x|, e |f|)    the change is at most d = 1/e of x   (ours)
    convex     y = (1 + e) x + (1 - e) f          2 ((1 - a) x + a f) with a = (1 - e) / 2
    shortcut   y = (1 - e) x + f                  a x + f with a = 1 - e
    branch     y = x + (1 - e) f                  x + a f with a = 1 - e

|.| are norms of a whole picture's features. FA-CNN (Farvardin & Chapman, arXiv 2603.25798) has "dampened skip
connections", whose formula could not be had; the last three are what it may be. Without a bound they can be undone by
larger weights in f, so the bound is the default. Where a block ends in a ReLU and x >= 0, f is what changes after that
ReLU, and is at most what the branch adds before it.

What follows from the bound d < 1, inside a run of L such blocks: cos(x, y) >= sqrt(1 - d^2), and
|x_L - x_0| <= ((1 + d)^L - 1) |x_0|: maps morph slowly. In an explanation the factor of f is a gate, held fixed as all
norms are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...kernels.dispatch import is_exactly
from ...layers.scheduled import Scheduled

__all__ = ["FORMS", "DampenedSkip", "Dampening", "skipping"]

Dampening = Literal["bound", "convex", "shortcut", "branch"]


def _norm(features: Tensor) -> Tensor:
    """(B, 1, ...) float32 norm of every picture's features; in float16 a square of 300 is already infinite."""
    flat = features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))
    return torch.linalg.vector_norm(flat, dim=1).view(-1, *[1] * (features.dim() - 1))


def _bound(x: Tensor, y: Tensor, e: float | Tensor) -> Tensor:
    given, most = _norm(x), e * _norm(y - x)
    # The gradient goes through both norms: without it training would only make f larger, which the bound takes back.
    factor = given / torch.maximum(given, most).clamp_min(torch.finfo(given.dtype).tiny)
    return x.lerp(y, factor.to(y.dtype))


# Of x and y, so that f is not made and kept beside them.
FORMS: dict[Dampening, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    "bound": _bound,
    "convex": lambda x, y, e: (2 * e) * x + (1 - e) * y,
    "shortcut": lambda x, y, e: y - e * x,
    "branch": lambda x, y, e: e * x + (1 - e) * y,
}


class DampenedSkip(Scheduled):
    """Mixin over a block that returns a tensor of the shape of its first argument (B, ...)."""

    strength_names: ClassVar[tuple[str, ...]] = ("dampening",)
    dampening: Tensor
    _dampening: float
    form: Dampening = "bound"
    skipped: bool = False

    def set_strength(self, name: str, value: float) -> None:
        if self.form != "bound" and value > 1:
            raise ValueError(f"a dampening of the form {self.form} is at most 1; got {value}")
        super().set_strength(name, value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.skipped:
            return x
        y = super().forward(x, *args, **kwargs)
        e = self._strength("dampening")
        return y if is_exactly(e, 0) else FORMS[self.form](x, y, e)


@contextlib.contextmanager
def skipping(blocks: Iterable[DampenedSkip]) -> Iterator[None]:
    """Inside, `blocks` are their skips alone."""
    blocks = list(blocks)
    try:
        for block in blocks:
            block.skipped = True
        yield
    finally:
        for block in blocks:
            block.skipped = False
