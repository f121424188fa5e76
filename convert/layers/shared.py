"""One sum of squares for layers that read the same input, within one forward pass."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Identity", "Share", "identity", "shares"]


class Identity(NamedTuple):
    """What tells a tensor's numbers from all others, for as long as this is held.

    In inference mode torch does not count who writes to a tensor: there the version is 0.
    """

    storage: StorageWeakRef
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    version: int


def identity(x: Tensor) -> Identity:
    """Of x; the storage is held weakly, so that no other can take its place."""
    version = 0 if x.is_inference() else x._version
    return Identity(StorageWeakRef(x.untyped_storage()), int(x.storage_offset()), x.shape, x.stride(), version)


class _Squares:
    """Of one input; empty between forward passes. Copied with its layers, it comes out empty."""

    def __init__(self) -> None:
        self.taken: tuple[Identity, Tensor] | None = None

    def __reduce__(self) -> tuple[type[_Squares], tuple[()]]:
        return _Squares, ()


@dataclasses.dataclass(frozen=True)
class Share:
    """A layer's part in sums of squares that several layers need.

    The first takes them in every forward pass, so that nothing outlives one: not even a picture whose memory is written
    to from outside torch is taken for the one before. The others take them only where they read something else than in
    the run that was watched. The last lets go of them.
    """

    squares: _Squares
    first: bool
    last: bool

    def known(self, x: Tensor) -> Tensor | None:
        """The sums of `x`, without a graph, if they have been taken."""
        taken = self.squares.taken
        if self.last:
            self.squares.taken = None
        return taken[1] if not self.first and taken is not None and taken[0] == identity(x) else None

    def keep(self, x: Tensor, squares: Tensor) -> None:
        """Remembers the sums of `x` for the others."""
        if self.first:
            self.squares.taken = (identity(x), squares.detach())


def shares(layers: int) -> list[Share | None]:
    """The parts of so many layers, in the order in which they run; None for one alone."""
    if layers < 2:
        return [None] * layers
    squares = _Squares()
    return [Share(squares, k == 0, k == layers - 1) for k in range(layers)]
