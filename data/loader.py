"""Batches of unlabelled pictures that are a pure function of (data, seed, step).

Three things make a batch, and each is arithmetic: which pictures (`order.batch_indices`), how each is cropped (a
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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..core.errors import DataError, first_line
from ..core.torch_internals import end_workers
from .bad import BadSample
from .index import ShardIndex
from .order import batch_indices
from .pictures import decode, reason
from .runs import HeldOutRuns, Picture, Run, Runs, StreamedRuns, TrainingRuns
from .stream import Stream
from .views import Augment, CentreCrop, Mixing, mixed
from .workers import WorkersEnded, fork_server, start_worker, way_out

__all__ = [
    "Batch",
    "Batches",
    "PictureSet",
    "check_batch",
    "held_out_batches",
    "training_batches",
]


class Batch(NamedTuple):
    """B pictures; `ids` are the ids of those shown (see Picture), `bad` are those that others stand in for."""

    pictures: torch.Tensor  # (B, 3, S, S) uint8
    ids: torch.Tensor  # (B,) int64
    bad: tuple[BadSample, ...]


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
        except MemoryError:
            return DataError(f"there is no memory left to decode pictures of {run.pictures[0].shard}. --set workers=0")

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
        except MemoryError:
            raise  # the picture is not broken
        except Exception as error:  # noqa: BLE001 - on broken bytes Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
            return reason(error)
        torch.default_generator.manual_seed(_crop_seed(self.seed, run.epoch, picture.id))
        return self.views[run.size](image)


def _none_decodes(bad: BadSample, substitutes: int) -> DataError:
    return DataError(
        f"{bad.shard}: the picture {bad.key!r} cannot be decoded, nor can any of the "
        f"{substitutes} that would stand in for it ({bad.reason}). "
        "Check the shards; to write them again: bcosify shards DIR OUT"
    )


def _crop_seed(seed: int, epoch: int, id: int) -> int:
    """The same on every machine, and far cheaper than numpy's seed sequences, which cost a tenth of a crop."""
    return int.from_bytes(hashlib.blake2b(b"%d %d %d" % (seed, epoch, id), digest_size=8).digest(), "little")


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
        with self._told():
            batches = iter(self._loader(_until_failed(self.runs, failed)))
        try:
            for item in self._coming(batches):
                if isinstance(item, DataError):
                    # Not `item` itself: it would hold this frame, and this frame it.
                    raise DataError(str(item))
                yield item
        finally:
            # A traceback may hold them, and the garbage collector ends them in any order: it closes a queue, and then
            # the queue's thread closes the same descriptor once more, which by then may be another's.
            end_workers(batches)
        if failed:
            raise failed.pop()

    def _coming(self, batches: Iterator[Any]) -> Iterator[Any]:
        """What the DataLoader gives."""
        with self._told():
            yield from batches

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The one line for workers that cannot start, that ended, or that could not hand a batch over."""
        try:
            yield
        except (RuntimeError, OSError, MemoryError) as error:
            if not self.workers:
                raise
            raise WorkersEnded(
                f"the {self.workers} processes that read pictures failed: {first_line(error)[:200].rstrip('. ')}. "
                f"Most often the memory is full, or /dev/shm is. {way_out(self.workers)}."
            ) from error

    def _loader(self, runs: Iterator[Run]) -> DataLoader:
        return DataLoader(
            self.pictures,
            batch_size=None,  # an item is a batch
            sampler=runs,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            multiprocessing_context=fork_server() if self.workers else None,
            worker_init_fn=start_worker if self.workers else None,
            # A DataLoader draws a seed from the global generator each time it starts, unless it has its own.
            generator=torch.Generator(),
        )


def _until_failed(runs: Runs, failed: list[Exception]) -> Iterator[Run]:
    """`runs` up to an error, which is put into `failed`: raised in a DataLoader that starts, it would leave workers."""
    try:
        yield from runs
    except Exception as error:  # noqa: BLE001 - kept, and raised by who asks
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
    mixing: Mixing | None = None,
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
    these = (seed, global_batch, range(first_step, first_step + steps), rank, world_size, sizes, mixing or Mixing())
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
