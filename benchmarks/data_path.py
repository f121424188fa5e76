"""Pictures a second: our loader on local shards and as a stream, against webdataset's streaming loader.

Every side reads the same shards and makes the same uint8 batches with the same decoder, crop and resize; before
anything is timed, the centre views of all sides are compared, picture by picture, byte for byte. Then the sides take
turns in one process, several rounds, in an order that changes from round to round, so that other work on the machine
falls on all of them. What counts is the ratio within a round. CPU time is that of the process and all its workers, and
is less noisy than the clock. Starting workers and their first batches are not timed;
--pictures must be many batches of 64, or what was made ahead weighs too much.

    python benchmarks/data_path.py --data 'shards/train-{00000..00007}.tar'
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measure
import psutil
import torch
import webdataset
from bcosify.data.index import index_shards
from bcosify.data.loader import held_out_batches, training_batches
from bcosify.data.names import expand
from bcosify.data.pictures import decode
from bcosify.data.stream import Stream
from bcosify.data.views import Augment, CentreCrop

SIDES = ("webdataset", "indexed", "stream")
BATCH = 64


class View:
    """What webdataset maps over its samples: the same decoder and view as ours."""

    def __init__(self, augment: Augment | CentreCrop, size: int):
        self.view = augment.view(size)

    def __call__(self, sample: tuple[bytes]) -> torch.Tensor:
        return self.view(decode(sample[0]))


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def batches(side: str, data: str, augment: Augment | CentreCrop, size: int, workers: int) -> Iterator[torch.Tensor]:
    """(B, 3, S, S) uint8 batches without end."""
    if side == "webdataset":
        shards = [os.fspath(path) for path in expand(data)]
        # As its documentation has it: shards and a buffer shuffled, batches made in the workers, WebLoader around it.
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
            .shuffle(1000)
            .to_tuple("jpg;jpeg;png")
            .map(View(augment, size))
            .batched(BATCH, collation_fn=stacked, partial=False)
            .repeat()
        )
        start = one_thread if workers else None
        yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=start)
        return
    source = index_shards(expand(data), progress=False) if side == "indexed" else Stream(expand(data))
    many = 10**6
    made = training_batches(source, seed=0, global_batch=BATCH, steps=many, size=size, augment=augment, workers=workers)
    try:
        yield from (batch.pictures for batch in made)
    finally:
        if isinstance(source, Stream):
            source.close()


def stacked(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples)


# ----------------------------------------------------------------------------------------------------------- identity


def digests(pictures: Iterator[torch.Tensor]) -> list[str]:
    return sorted(hashlib.sha256(picture.numpy().tobytes()).hexdigest() for batch in pictures for picture in batch)


def check_identical(data: str, size: int) -> int:
    """All sides show the same centre views of one epoch; returns how many."""
    shards = [os.fspath(path) for path in expand(data)]
    view = View(CentreCrop(), size)
    theirs = webdataset.WebDataset(shards, shardshuffle=False).to_tuple("jpg;jpeg;png").map(view)
    index = index_shards(expand(data), progress=False)
    expected = digests(picture[None] for picture in theirs)
    ours = digests(batch.pictures for batch in held_out_batches(index, size=size, batch_size=BATCH))
    stream = Stream(expand(data))
    streamed = digests(
        batch.pictures
        for batch in training_batches(stream, seed=0, global_batch=1, steps=len(index), size=size, augment=CentreCrop())
    )
    stream.close()
    if not expected == ours == streamed:
        raise SystemExit("the sides do not show the same pictures: there is nothing to compare")
    return len(expected)


# ------------------------------------------------------------------------------------------------------------- timing


def timed(options: argparse.Namespace, side: str, workers: int) -> dict[str, float]:
    """One side, once: pictures, wall seconds and CPU seconds after the first batch of every worker."""
    augment = Augment() if options.view == "train" else CentreCrop()
    made = batches(side, options.data, augment, options.size, workers)
    for _ in range(1 + workers):
        next(made)
    begin, cpu = time.perf_counter(), cpu_seconds()
    count = sum(len(batch) for batch in itertools.islice(made, options.pictures // BATCH))
    found = {"pictures": count, "wall": time.perf_counter() - begin, "cpu": cpu_seconds() - cpu}
    del made  # ends its workers
    return found


def cpu_seconds() -> float:
    """Also of the workers that still run, which a fork server may have started."""
    times = [worker.cpu_times() for worker in psutil.Process().children(recursive=True)]
    return measure.cpu_seconds() + sum(each.user + each.system for each in times)


def compare(options: argparse.Namespace, workers: int) -> list[dict[str, Any]]:
    """A row for each side, from all rounds."""
    rounds = []
    for turn in measure.turns(SIDES, options.rounds):
        rounds.append({side: timed(options, side, workers) for side in turn})
        print(f"workers {workers}: round {len(rounds)} of {options.rounds}", file=sys.stderr)
    return [{"workers": workers, "side": side, **_figures(rounds, side)} for side in SIDES]


def _figures(rounds: list[dict[str, dict[str, float]]], side: str) -> dict[str, dict[str, float]]:
    def of_rounds(figure: Callable[[dict[str, float]], float], name: str) -> dict[str, dict[str, float]]:
        ours, theirs = ([figure(found[each]) for found in rounds] for each in (side, SIDES[0]))
        ratio = [a / b for a, b in zip(ours, theirs, strict=True)]
        return {name: measure.extent(ours), f"{name}_ratio": measure.extent(ratio)}

    return {
        **of_rounds(lambda one: one["pictures"] / one["wall"], "pictures_per_second"),
        **of_rounds(lambda one: 1e3 * one["cpu"] / one["pictures"], "cpu_ms_per_picture"),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["workers", "loader", "pictures/s", "CPU ms a picture"]
    heads += ["pictures/s over webdataset's", "CPU over webdataset's"]
    figures = {"pictures_per_second": 0, "cpu_ms_per_picture": 2}
    figures |= {"pictures_per_second_ratio": 2, "cpu_ms_per_picture_ratio": 2}
    cells = [
        [str(row["workers"]), row["side"], *(_cell(row[name], digits) for name, digits in figures.items())]
        for row in rows
    ]
    return measure.markdown(heads, cells)


def _cell(extent: dict[str, float], digits: int) -> str:
    median, low, high = (f"{extent[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def main() -> None:
    parser = measure.outputs(__doc__, "data_path", rounds=6)
    parser.add_argument("--data", required=True, help="local shards")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pictures", type=int, default=1280, help="a side and round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--view", default="train", choices=["train", "centre"])
    options = parser.parse_args()
    torch.set_num_threads(1)  # and memory as it is: of the sides only some have workers that would inherit its settings
    same = check_identical(options.data, options.size)
    print(f"{same} pictures are the same bytes on all sides", file=sys.stderr)
    run = {"view": options.view, "size": options.size, "pictures": options.pictures, "rounds": options.rounds}
    run |= {"identical": same, **measure.machine(), "webdataset": webdataset.__version__}
    rows = [run | row for workers in options.workers for row in compare(options, workers)]
    every = measure.merged(options.json, rows, ("view", "size", "workers", "side"))
    shown = table([row for row in every if (row["view"], row["size"]) == (options.view, options.size)])
    measure.write_section(options.page, "data_path.py", shown)
    print(shown)


if __name__ == "__main__":
    main()
