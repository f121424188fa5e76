"""Who is next: the order of pictures as arithmetic, and which of them are held out.

With random access, order is arithmetic. With N pictures, seed s and global batch G, let E = floor(N / G). Step t shows

    batch(t) = order(N, s, e)[b·G : (b + 1)·G]    with e = t div E (the epoch) and b = t mod E

whatever the workers, the processes, and where a run was interrupted. The N mod G pictures at the end of an epoch's
order are left out of that epoch; they are others in each.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..core.errors import DataError
from .index import ShardIndex

__all__ = ["COMPARED", "GlobalBatch", "batch_indices", "copies", "order", "overlap", "split", "without"]

COMPARED = 100_000  # pictures that are read to find out whether train and val overlap
READERS = 8  # threads that wait for the disk


class GlobalBatch(NamedTuple):
    """What all processes together see in one step."""

    epoch: int
    index: int  # of the batch in its epoch
    positions: np.ndarray  # (batch_size,)


@functools.lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..count-1 for one epoch (read-only: it is shared between calls)."""
    permutation = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    permutation.setflags(write=False)
    return permutation


def batch_indices(count: int, seed: int, batch_size: int, step: int) -> GlobalBatch:
    """The global batch of a step; an epoch has floor(count / batch_size) of them, and the remainder is left out."""
    if not 1 <= batch_size <= count:
        raise DataError(
            f"A global batch of {batch_size} needs as many pictures, and there are {count}. "
            f"Use more pictures, or a batch of at most {count}."
        )
    epoch, index = divmod(step, count // batch_size)
    return GlobalBatch(epoch, index, order(count, seed, epoch)[index * batch_size : (index + 1) * batch_size])


def split(index: ShardIndex, held_out: float | int, seed: int = 0) -> tuple[ShardIndex, ShardIndex]:
    """The other pictures, and the held-out ones: a fraction (float) or a count (int), by the hash of their keys.

    By fraction, a key falls on the same side whatever else is in the shards, also after more are added, and pictures
    that share a key stay together; the fraction is met as nearly as chance allows. A count is met exactly.
    """
    salt = f"{seed}:".encode()
    numbers = np.arange(len(index)) if index.ids is None else index.ids
    keys = (key for shard in index.shards for key in shard.keys.tolist())
    digests = (hashlib.blake2b(salt + key, digest_size=8).digest() for key in keys)
    everything = np.frombuffer(b"".join(digests), "<u8")
    hashes = everything[numbers]
    chosen = np.zeros(len(index), bool)
    if isinstance(held_out, int):
        chosen[np.argsort(hashes, kind="stable")[:held_out]] = True
    else:
        chosen = hashes / 2.0**64 < held_out
    if not held_out > 0 or not 0 < chosen.sum() < len(index):
        raise DataError(
            f"Holding out {held_out} of {len(index)} pictures leaves one side empty. "
            "Use a fraction between 0 and 1, or a count below that of the pictures."
        )
    return ShardIndex(index.shards, numbers[~chosen]), ShardIndex(index.shards, numbers[chosen])


def overlap(train: ShardIndex, val: ShardIndex) -> list[tuple[str, str]]:
    """(key in train, key in val) of pictures that are the same bytes: see `copies`."""
    return [(train.key(ours), val.key(theirs)) for ours, theirs in copies(train, val)]


def copies(train: ShardIndex, val: ShardIndex) -> list[tuple[int, int]]:
    """(position in train, position in val) of pictures that are the same bytes, whatever their keys are.

    Only training pictures as long as one of `val`'s are read, and of these at most COMPARED.
    """
    held_out = {digest: i for i, digest in _digests(val, range(len(val)))}
    alike = np.flatnonzero(np.isin(train.sizes, val.sizes))[:COMPARED].tolist()
    return [(i, held_out[digest]) for i, digest in _digests(train, alike) if digest in held_out]


def without(index: ShardIndex, positions: Sequence[int]) -> ShardIndex:
    """The same pictures but for those at `positions`."""
    numbers = np.arange(len(index)) if index.ids is None else index.ids
    return ShardIndex(index.shards, np.delete(numbers, positions))


def _digests(index: ShardIndex, positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Position and sha256 of pictures."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda i: (i, hashlib.sha256(index.read(i)).digest()), positions)
