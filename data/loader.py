"""Batches of unlabelled pictures that are a pure function of (data, seed, step).

Three things make a batch, and each is arithmetic: which pictures (`shards.batch_indices`), how each is cropped (a
random state made from seed, epoch and picture), and what stands in for a broken one (the next picture in the epoch's
order that decodes). Where batches are mixed, each view is mixed with the one before it in the global batch, in a way
drawn from seed and step; so a process makes one view more than its slice has. So the same seed gives the same batches
for any number of workers, and for any number of processes that divides the global batch; and resuming at step t is a
slice: nothing is replayed, and no state is saved.

The process that trains holds the index and sends each worker the places of a whole batch; workers hold no index, they
read with `pread`, decode and crop. They start from a fork server, so they inherit no threads, no GPU context and no
random state. As with any such process, a script that asks for workers needs the usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing as mp
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.transforms import InterpolationMode, v2

from ..core.errors import DataError
from .shards import ShardIndex, batch_indices, decode, order, reason
from .stream import Stream

__all__ = [
    "Augment",
    "BadSample",
    "BadSamples",
    "Batch",
    "Batches",
    "CentreCrop",
    "Mix",
    "Mixing",
    "Picture",
    "PictureSet",
    "Run",
    "check_batch",
    "held_out_batches",
    "size_at",
    "to_model_input",
    "training_batches",
]

SUBSTITUTES = 16  # how many pictures in a row may be broken
GREY = 127  # of 255: the corners of turned pictures


# ----------------------------------------------------------------------------------------------------------- contracts


class Picture(Protocol):
    """A picture that can be read, wherever it is. `id`: its position in the index, or in the sequence of a stream."""

    @property
    def id(self) -> int: ...

    @property
    def key(self) -> str: ...

    @property
    def shard(self) -> str: ...

    def read(self) -> bytes: ...


class BadSample(NamedTuple):
    """A picture that could not be decoded, and why."""

    id: int
    key: str
    shard: str
    reason: str


class Batch(NamedTuple):
    """B pictures; `ids` are the ids of those shown (see Picture), `bad` are those that others stand in for."""

    pictures: torch.Tensor  # (B, 3, S, S) uint8
    ids: torch.Tensor  # (B,) int64
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class Augment:
    """A random crop of `scale` (share of the area) and `ratio` (width to height), flipped with probability `flip`.

    It is turned by at most `turn` degrees (0 to 180) either way, with grey corners, and its colours are changed with
    strength `colour` (0 to 1; SimCLR's, arXiv 2002.05709 appendix A). Neither changes which crops are drawn. On
    tensors: torchvision then resizes in half the time that Pillow takes.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    turn: float = 0.0
    colour: float = 0.0

    def view(self, size: int) -> torch.nn.Module:
        crop = v2.RandomResizedCrop(size, self.scale, self.ratio, InterpolationMode.BICUBIC, antialias=True)
        steps = [v2.PILToTensor(), crop, v2.RandomHorizontalFlip(self.flip)]
        if self.turn:
            steps.append(v2.RandomRotation((-self.turn, self.turn), InterpolationMode.BILINEAR, fill=GREY))
        if self.colour:
            strong, weak = 0.8 * self.colour, 0.2 * self.colour
            steps.append(v2.ColorJitter(strong, strong, strong, hue=weak))
        return v2.Compose(steps)


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side resized to size / crop_pct, then the centre; on Pillow's pictures, exactly as timm evaluates."""

    crop_pct: float = 1.0

    def view(self, size: int) -> torch.nn.Module:
        resize = v2.Resize(int(size / self.crop_pct), InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


class Mix(NamedTuple):
    """How the pictures of one step are mixed: a key of MIXES, and the seed of its share and its box."""

    how: str
    seed: int


@dataclass(frozen=True)
class Mixing:
    """With which chance the pictures of a batch are mixed, and how; `mixup` + `cutmix` is at most 1."""

    mixup: float = 0.0
    cutmix: float = 0.0

    def at(self, seed: int, step: int) -> Mix | None:
        """How step `step` of a run with this seed is mixed, if it is."""
        if not self.mixup + self.cutmix:
            return None
        drawn = np.random.default_rng([seed, step, 1])  # two numbers are those of `size_at`
        chance, own = float(drawn.random()), int(drawn.integers(2**63))
        if chance < self.mixup:
            return Mix("mixup", own)
        return Mix("cutmix", own) if chance < self.mixup + self.cutmix else None


# Of torchvision's classes the parts that need no labels.
MIXES: dict[str, v2.MixUp | v2.CutMix] = {"mixup": v2.MixUp(), "cutmix": v2.CutMix()}


def mixed(views: torch.Tensor, before: torch.Tensor, mix: Mix) -> torch.Tensor:
    """`views` (B, 3, S, S) uint8, each mixed with the one before it; before the first comes `before` (3, S, S).

    Draws from the global generator, which it seeds.
    """
    torch.default_generator.manual_seed(mix.seed)
    transform, batch = MIXES[mix.how], torch.cat([before[None], views])
    params = {"labels": None, "batch_size": len(batch), **transform.make_params([batch])}
    # It mixes each row with the one before, the first with the last: of no use here, so the first is left out.
    return transform.transform(batch.float(), params)[1:].round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------ pictures


class Run(NamedTuple):
    """A piece of an order: the first `count` pictures are asked for, those after them are their substitutes."""

    epoch: int
    size: int  # side of the views in pixels
    count: int
    pictures: Sequence[Picture]  # count + SUBSTITUTES
    mix: Mix | None = None
    before: Sequence[Picture] = ()  # where it is mixed: the one that comes before in the global batch + SUBSTITUTES


class PictureSet(Dataset):
    """Runs to batches: reads, decodes and crops. An item is a Batch, or the DataError that stopped it."""

    def __init__(self, sizes: Iterable[int], augment: Augment | CentreCrop, seed: int = 0):
        self.views = {size: augment.view(size) for size in sizes}
        self.seed = seed

    def __getitem__(self, run: Run) -> Batch | DataError:
        # An error that a worker raises arrives wrapped in a traceback; one that it returns arrives as it is.
        try:
            return self._batch(run)
        except DataError as error:
            return error

    def _batch(self, run: Run) -> Batch:
        bad: dict[int, BadSample] = {}
        substitutes = len(run.pictures) - run.count
        # torchvision draws from the global generator: lend it states of the pictures' own. Only the CPU's is touched.
        with torch.random.fork_rng(devices=[]):
            # As many substitutes for each picture, wherever in a run it is.
            asked = (run.pictures[place : place + 1 + substitutes] for place in range(run.count))
            views, ids = zip(*(self._first(run, pictures, bad) for pictures in asked), strict=True)
            pictures = torch.stack(views)
            if run.mix is not None:
                before, _ = self._first(run, run.before, bad)
                pictures = mixed(pictures, before, run.mix)
        return Batch(pictures, torch.tensor(ids), tuple(bad.values()))

    def _first(self, run: Run, pictures: Sequence[Picture], bad: dict[int, BadSample]) -> tuple[torch.Tensor, int]:
        """View and id of the first of `pictures` that decodes; those before it are noted in `bad`."""
        for picture in pictures:
            view = self._view(run, picture)
            if isinstance(view, torch.Tensor):
                return view, picture.id
            bad[picture.id] = BadSample(picture.id, picture.key, picture.shard, view)
        raise _none_decodes(bad[pictures[0].id], len(pictures) - 1)

    def _view(self, run: Run, picture: Picture) -> torch.Tensor | str:
        """The picture as (3, S, S) uint8, or why it cannot be decoded."""
        data = picture.read()
        try:
            image = decode(data)
        except Exception as error:  # on broken bytes Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            return reason(error)
        torch.default_generator.manual_seed(_crop_seed(self.seed, run.epoch, picture.id))
        return self.views[run.size](image)


def _none_decodes(bad: BadSample, substitutes: int) -> DataError:
    return DataError(
        f"{bad.shard}: the picture {bad.key!r} cannot be decoded, nor can any of the "
        f"{substitutes} that would stand in for it ({bad.reason}). "
        "Check the shards; to write them again: bcosify shards DIR OUT"
    )


def size_at(sizes: Sequence[int], seed: int, step: int) -> int:
    """The one of `sizes` that step `step` of a run with this seed trains at; all are drawn alike often."""
    if len(sizes) == 1:
        return sizes[0]
    return sizes[int(np.random.default_rng([seed, step]).integers(len(sizes)))]


def _crop_seed(seed: int, epoch: int, id: int) -> int:
    """The same on every machine, and far cheaper than numpy's seed sequences, which cost a tenth of a crop."""
    return int.from_bytes(hashlib.blake2b(b"%d %d %d" % (seed, epoch, id), digest_size=8).digest(), "little")


def to_model_input(
    pictures: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 (B, 3, S, S) to what models take, (x / 255 - mean) / std, computed on the device."""
    pictures = pictures.to(device, non_blocking=True).to(torch.float32) / 255
    mean_, std_ = (torch.tensor(value, device=pictures.device).view(-1, 1, 1) for value in (mean, std))
    return ((pictures - mean_) / std_).to(dtype)


# ------------------------------------------------------------------------------------------------------------- batches


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


class Batches:
    """Batches in order. It can be gone through again, and gives the same.

    Workers live as long as an iteration: they have ended when it has, also by an error or because it was left early.
    An error of the runs comes after the batches before it, however far workers read ahead.
    """

    def __init__(self, pictures: PictureSet, runs: Runs, workers: int, pin_memory: bool):
        self.pictures = pictures
        self.runs = runs
        self.workers = min(workers, len(runs))
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Batch]:
        failed: list[Exception] = []
        batches = iter(self._loader(_until_failed(self.runs, failed)))
        try:
            for item in batches:
                if isinstance(item, DataError):
                    # Not `item` itself: it would hold this frame, and this frame it.
                    raise DataError(str(item))
                yield item
        finally:
            # A traceback may hold them, and the garbage collector ends them in any order: it closes a queue, and then
            # the queue's thread closes the same descriptor once more, which by then may be another's.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()
        if failed:
            raise failed.pop()

    def _loader(self, runs: Iterator[Run]) -> DataLoader:
        return DataLoader(
            self.pictures,
            batch_size=None,  # an item is a batch
            sampler=runs,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            multiprocessing_context=_fork_server() if self.workers else None,
            worker_init_fn=_one_thread if self.workers else None,
            # A DataLoader draws a seed from the global generator each time it starts, unless it has its own.
            generator=torch.Generator(),
        )


def _until_failed(runs: Runs, failed: list[Exception]) -> Iterator[Run]:
    """`runs` up to an error, which is put into `failed`: raised in a DataLoader that starts, it would leave workers."""
    try:
        yield from runs
    except Exception as error:
        failed.append(error)


def training_batches(
    source: ShardIndex | Stream,
    *,
    seed: int,
    global_batch: int,
    first_step: int = 0,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
    size: int | Sequence[int] = 224,
    augment: Augment | CentreCrop | None = None,
    mixing: Mixing = Mixing(),
    workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """This rank's share of the global batches of `steps` steps, the first of which is `first_step`.

    To resume a run of n steps at step t: first_step=t, steps=n - t. `augment` None means Augment(). Of several sizes,
    each step takes one (`size_at`); pictures and crops are the same at every size. `mixing` mixes the views of a batch.
    Raises DataError where the processes
    cannot share the global batch evenly, or where there are fewer pictures than that.
    """
    check_batch(source, global_batch, world_size)
    if not 0 <= rank < world_size or first_step < 0 or steps < 0:
        raise ValueError(f"rank {rank} of {world_size}, first step {first_step}, {steps} steps")
    sizes = (size,) if isinstance(size, int) else tuple(size)
    these = (seed, global_batch, range(first_step, first_step + steps), rank, world_size, sizes, mixing)
    runs = StreamedRuns(source, *these) if isinstance(source, Stream) else TrainingRuns(source, *these)
    return Batches(PictureSet(sizes, augment or Augment(), seed), runs, workers, pin_memory)


def check_batch(source: ShardIndex | Stream, global_batch: int, world_size: int) -> None:
    """Raises DataError where processes cannot share a global batch evenly, or pictures are fewer than it takes.

    How many a stream has is not known before it was read.
    """
    if global_batch % world_size:
        lower = global_batch - global_batch % world_size
        fits = " or ".join(str(batch) for batch in (lower, lower + world_size) if batch)
        raise DataError(
            f"A global batch of {global_batch} cannot be shared evenly by {world_size} processes. Use {fits}."
        )
    if isinstance(source, ShardIndex):
        batch_indices(len(source), 0, global_batch, 0)


def held_out_batches(
    index: ShardIndex,
    *,
    size: int = 224,
    crop_pct: float = 1.0,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    pin_memory: bool = False,
) -> Batches:
    """The pictures of `index` (the first `limit` of them) once, in their order, resized and centre-cropped.

    The last batch may be smaller. The next picture stands in for a broken one, as in training, and `bad` names it.
    """
    count = len(index) if limit is None else min(limit, len(index))
    if count < 1 or batch_size < 1:
        raise DataError(f"No held-out pictures: {len(index)} in the shards, limit {limit}, batch size {batch_size}.")
    return Batches(
        PictureSet((size,), CentreCrop(crop_pct)), HeldOutRuns(index, count, batch_size, size), workers, pin_memory
    )


def _as_it_is(item: Any) -> Any:
    return item


def _one_thread(worker: int) -> None:
    """Workers are the parallelism; threads inside them only fight for the same cores."""
    torch.set_num_threads(1)


def _fork_server() -> BaseContext:
    """Clean processes that are cheap to start: a server imports this module once, and workers are forked from it."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


# --------------------------------------------------------------------------------------------------------- bad samples


class BadSamples:
    """Counts the broken pictures of `source`, lists each once in a JSON Lines file, and stops when they are too many.

    The limit is a share of all pictures (of a stream: of those that came), so that one early broken picture stops no
    run. A line of the list is {"key", "shard", "reason"}; lines from before a resume count. Processes may share the
    list: a line is one write.
    """

    def __init__(self, source: Sized, path: str | os.PathLike[str], limit: float = 0.01):
        self.source = source
        self.path = Path(path)
        self.limit = limit
        self.known = _listed(self.path)

    def __len__(self) -> int:
        return len(self.known)

    @property
    def share(self) -> float:
        return len(self.known) / len(self.source)

    def add(self, bad: Sequence[BadSample]) -> None:
        """Takes a batch's `bad`. Raises DataError when the share of broken pictures is above the limit."""
        for _, key, shard, why in bad:
            if (key, shard) not in self.known:
                self.known.add((key, shard))
                _append(self.path, json.dumps({"key": key, "shard": shard, "reason": why}) + "\n")
        if self.share > self.limit:
            raise DataError(
                f"{len(self.known)} of {len(self.source)} pictures ({self.share:.2%}) cannot be decoded; the limit is "
                f"{self.limit:.2%}. They are listed in {self.path}. Write the shards without them, or raise the limit."
            )


def _listed(path: Path) -> set[tuple[str, str]]:
    """Key and shard of each line. A line that a crash cut is left out: its picture is listed again when it comes."""
    known = set()
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(line)
            known.add((found["key"], found["shard"]))
    return known


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
