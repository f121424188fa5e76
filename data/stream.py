"""Shards that are read from front to end, for sources that cannot be cached: `--stream`.

Epoch e reads the shards in the order `order(S, seed, e)`, each as it comes, through a seeded buffer that mixes pictures
within reach (webdataset's own). The sequence of pictures is that of epoch 0, then epoch 1, and so on, and step t shows

    batch(t) = sequence[t·G : (t + 1)·G]

This depends on the seed and on what the shards give, on nothing else. Every process reads the whole sequence and
decodes only its own slice, so batches are the same for any number of processes and workers, and each epoch shows each
picture once: none is dropped or doubled, whether or not shards divide. The price: bytes are read once per process,
resuming reads again up to its place, and mixing reaches no farther than the buffer. What must hold, and is checked from
one epoch to the next: a shard gives the same pictures each time it is read.
"""

from __future__ import annotations

import hashlib
import os
import queue
import random
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from webdataset.filters import shuffle

from ..core.errors import DataError
from . import tar
from .folders import LeftOut
from .index import ShardIndex, of_shards
from .order import order
from .progress import say
from .remote import PATIENCE, Patience, chunks, reader, shown

__all__ = ["Stream", "Streamed", "fingerprints"]

BUFFER = 1000  # pictures that are mixed
AHEAD = 256  # pictures that are read before they are asked for
SURE = 1000  # with fewer pictures seen, the share of broken ones says nothing


class Streamed(NamedTuple):
    """A picture's bytes, as they came; `id` is its place in the sequence."""

    id: int
    key: str
    shard: str
    data: bytes

    def read(self) -> bytes:
        return self.data


class Stream:
    """Shards as a sequence without end. What was taken cannot be taken again but by reading from the beginning."""

    def __init__(
        self,
        shards: Sequence[str | os.PathLike[str]],
        held_out: Collection[tuple[int, bytes]] = (),
        buffer: int = BUFFER,
        patience: Patience = PATIENCE,
    ):
        """Args: held_out: `fingerprints` of pictures that must not occur. buffer: pictures that are mixed."""
        self.shards = tuple(os.fspath(shard) for shard in shards)
        self.held_out, self.lengths = frozenset(held_out), {length for length, _ in held_out}
        self.buffer, self.patience = buffer, patience
        self.count: int | None = None  # pictures in an epoch, once one was read
        self._seen = 0
        self._contents: dict[str, str] = {}  # shard -> digest of its keys
        self.left_out = LeftOut()  # of the shards in _contents
        self._said = 0  # for how many of them it was said
        self._open: dict[int, _Sequence] = {}  # seed -> where it is

    def __len__(self) -> int:
        """How many pictures are known, at least SURE, so that one early broken picture is no large share."""
        return max(self._seen, SURE)

    @property
    def digest(self) -> str:
        """The identity of the order: names of shards and size of the buffer; what the shards hold is not known."""
        names = "\n".join(["stream", str(self.buffer), *self.shards])
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def take(self, seed: int, first: int, count: int) -> list[Streamed]:
        """`count` pictures of the sequence from `first` on. Going on is cheap; going back begins again."""
        found = self._open.get(seed)
        if found is None or first < found.start:
            if found:
                found.close()
            found = self._open[seed] = _Sequence(self._from(seed, first), first)
        return found.take(first, count)

    def close(self) -> None:
        """Ends the reading threads."""
        while self._open:
            self._open.popitem()[1].close()

    def _from(self, seed: int, first: int) -> Iterator[Streamed]:
        epoch = position = 0
        while True:
            if self.count and first - position >= self.count:  # whole epochs need not be read to be skipped
                skipped = (first - position) // self.count
                epoch, position = epoch + skipped, position + skipped * self.count
            begin = position
            for picture in self._epoch(seed, epoch):
                if position >= first:
                    yield picture._replace(id=position)
                position += 1
                self._seen = max(self._seen, position - begin)
            self._check_count(position - begin)
            self._say_left_out()
            epoch += 1

    def _epoch(self, seed: int, epoch: int) -> Iterator[Streamed]:
        pictures = (picture for i in order(len(self.shards), seed, epoch) for picture in self._shard(self.shards[i]))
        mix = shuffle(self.buffer, initial=self.buffer, rng=random.Random(f"{seed}:{epoch}"))
        return iter(mix(pictures))

    def _shard(self, source: str) -> Iterator[Streamed]:
        name, keys, left_out = shown(source), hashlib.sha256(), LeftOut()
        tarred = reader(chunks(source, self.patience))
        for key, members in tar.samples(tar.streamed(tarred, name, left_out), name, left_out):
            if not (kind := tar.picture(members)):
                continue
            data = members[kind].data
            self._refuse_held_out(data, key, name)
            keys.update(f"{key}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
            yield Streamed(-1, key, name, data)
        if source not in self._contents:
            self.left_out.update(left_out)
        if self._contents.setdefault(source, keys.hexdigest()) != keys.hexdigest():
            raise DataError(
                f"{name} gave other pictures than when it was read before, so an epoch has no meaning. "
                "--stream needs sources that give the same bytes each time."
            )

        if not self._said:
            self._say_left_out()  # as soon as there is something; the rest after the first epoch

    def _say_left_out(self) -> None:
        read = len(self._contents)
        if self.left_out and self._said < read:
            say(of_shards(read, self.left_out))
            self._said = read

    def _check_count(self, count: int) -> None:
        if count == 0:
            raise DataError(f"There is no picture in any of the {len(self.shards)} shards.")
        self.count = count

    def _refuse_held_out(self, data: bytes, key: str, name: str) -> None:
        if len(data) in self.lengths and (len(data), hashlib.sha256(data).digest()) in self.held_out:
            raise DataError(
                f"--val is no measure: its picture {key!r} of {name} is in --data too. Take it out of one of the two."
            )


def fingerprints(index: ShardIndex) -> set[tuple[int, bytes]]:
    """(length, sha256) of all pictures of `index`."""
    return {(len(data), hashlib.sha256(data).digest()) for data in map(index.read, range(len(index)))}


class _Sequence:
    """A window that moves over an iterator, which a thread reads ahead."""

    def __init__(self, pictures: Iterator[Streamed], start: int):
        self.start = start  # of the window
        self.window: deque[Streamed] = deque()
        self.ready: queue.Queue[Streamed | BaseException] = queue.Queue(AHEAD)
        self.stopped = threading.Event()
        threading.Thread(target=self._read, args=(pictures,), daemon=True, name="shard stream").start()

    def take(self, first: int, count: int) -> list[Streamed]:
        while self.start < first:
            _ = self.window.popleft() if self.window else self._next()
            self.start += 1
        while len(self.window) < count:
            self.window.append(self._next())
        return [self.window[i] for i in range(count)]

    def _next(self) -> Streamed:
        item = self.ready.get()
        if isinstance(item, BaseException):
            self.ready.put(item)  # whoever asks again gets the same answer
            raise item
        return item

    def _read(self, pictures: Iterator[Streamed]) -> None:
        try:
            for picture in pictures:
                self._put(picture)
                if self.stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that asks
            self._put(error)

    def _put(self, item: Streamed | BaseException) -> None:
        while not self.stopped.is_set():
            try:
                return self.ready.put(item, timeout=0.5)
            except queue.Full:
                continue

    def close(self) -> None:
        self.stopped.set()
