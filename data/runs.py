"""Which pictures one process shows in which batch: the orders of `order` and `stream`, cut into runs.

Each process takes a contiguous slice of every global batch, so processes together show what one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from .index import ShardIndex
from .order import batch_indices, order
from .stream import Stream
from .views import Mix, Mixing, size_at

__all__ = ["SUBSTITUTES", "HeldOutRuns", "Picture", "Run", "Runs", "StreamedRuns", "TrainingRuns"]

SUBSTITUTES = 16  # how many pictures in a row may be broken


class Picture(Protocol):
    """A picture that can be read, wherever it is. `id`: its position in the index, or in the sequence of a stream."""

    @property
    def id(self) -> int: ...

    @property
    def key(self) -> str: ...

    @property
    def shard(self) -> str: ...

    def read(self) -> bytes: ...


class Run(NamedTuple):
    """A piece of an order: the first `count` pictures are asked for, those after them are their substitutes."""

    epoch: int
    size: int  # side of the views in pixels
    count: int
    pictures: Sequence[Picture]  # count + SUBSTITUTES
    mix: Mix | None = None
    before: Sequence[Picture] = ()  # where it is mixed: the one that comes before in the global batch + SUBSTITUTES


class Runs(Protocol):
    """Which runs one process goes through, in order."""

    def __iter__(self) -> Iterator[Run]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class TrainingRuns:
    """One rank's contiguous slice of the global batches of some steps."""

    index: ShardIndex
    seed: int
    global_batch: int
    steps: range
    rank: int
    world_size: int
    sizes: tuple[int, ...] = (224,)
    mixing: Mixing = Mixing()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Run]:
        share = self.global_batch // self.world_size
        for step in self.steps:
            epoch, batch, _ = batch_indices(len(self.index), self.seed, self.global_batch, step)
            begin, ids = batch * self.global_batch, order(len(self.index), self.seed, epoch)
            size = size_at(self.sizes, self.seed, step)
            run = _run(self.index, ids, epoch, size, begin + self.rank * share, share)
            if mix := self.mixing.at(self.seed, step):
                place = begin + _before(self.rank * share, self.global_batch)
                run = run._replace(mix=mix, before=_run(self.index, ids, epoch, size, place, 1).pictures)
            yield run


@dataclass(frozen=True)
class StreamedRuns:
    """The same of a stream, whose epochs have no length: its sequence goes on over their ends."""

    stream: Stream
    seed: int
    global_batch: int
    steps: range
    rank: int
    world_size: int
    sizes: tuple[int, ...]
    mixing: Mixing = Mixing()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Run]:
        share = self.global_batch // self.world_size
        for step in self.steps:
            begin, first = step * self.global_batch, self.rank * share
            size, mix = size_at(self.sizes, self.seed, step), self.mixing.at(self.seed, step)
            if mix is None:
                yield Run(0, size, share, self.stream.take(self.seed, begin + first, share + SUBSTITUTES))
                continue
            # A stream does not go back: of the whole batch, what this process needs.
            batch = self.stream.take(self.seed, begin, self.global_batch + SUBSTITUTES)
            place = _before(first, self.global_batch)
            own, before = (batch[a : a + n + SUBSTITUTES] for a, n in ((first, share), (place, 1)))
            yield Run(0, size, share, own, mix, before)


@dataclass(frozen=True)
class HeldOutRuns:
    """The first `count` pictures as they lie in the shards."""

    index: ShardIndex
    count: int
    batch_size: int
    size: int

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Run]:
        ids = np.arange(self.count)
        for first in range(0, self.count, self.batch_size):
            yield _run(self.index, ids, 0, self.size, first, min(self.batch_size, self.count - first))


def _before(place: int, global_batch: int) -> int:
    """The place before `place` in a global batch; before the first is the last."""
    return (place - 1) % global_batch


def _run(index: ShardIndex, ids: np.ndarray, epoch: int, size: int, first: int, count: int) -> Run:
    """`count` pictures of `ids` from `first` on, and the substitutes behind them (from the front again at the end)."""
    picked = ids.take(range(first, first + count + min(SUBSTITUTES, len(ids) - 1)), mode="wrap")
    return Run(epoch, size, count, index.pictures(picked))
