"""Pictures a second: our loader on local shards and as a stream, against webdataset's streaming loader.

Every side reads the same shards and makes the same uint8 batches with the same decoder, crop and resize; before
anything is timed, the centre views of all sides are compared, picture by picture, byte for byte. Then the sides take
turns in one process, several rounds, in an order that changes from round to round, so that other work on the machine
falls on all of them. What counts is the ratio within a round. CPU time is that of the process and all its workers, and
is less noisy than the clock. Starting workers and their first batches are not timed;
--pictures must be many batches of 64, or what was made ahead weighs too much.

    python benchmarks/data_path.py --data 'shards/train-{00000..00007}.tar' --out data_path.json
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import webdataset
from bcosify.align.loader import Augment, CentreCrop, held_out_batches, training_batches
from bcosify.align.shards import decode, expand, index_shards
from bcosify.align.stream import Stream
from bcosify.cli.console import show_table

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


def measure(options: argparse.Namespace, side: str, workers: int) -> dict[str, float]:
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
    """Of this process and of all its workers, which a fork server may have started."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def compare(options: argparse.Namespace, workers: int) -> list[dict[str, Any]]:
    """A row for each side, from all rounds."""
    rounds = []
    for number in range(options.rounds):
        turn = SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]
        rounds.append({side: measure(options, side, workers) for side in turn})
        print(f"workers {workers}: round {number + 1} of {options.rounds}", file=sys.stderr)

    return [_row(rounds, side, workers) for side in SIDES]


def _row(rounds: list[dict[str, dict[str, float]]], side: str, workers: int) -> dict[str, Any]:
    rates, costs = (
        {name: [each(found[name]) for found in rounds] for name in (SIDES[0], side)}
        for each in (lambda one: one["pictures"] / one["wall"], lambda one: 1e3 * one["cpu"] / one["pictures"])
    )
    return {
        "workers": workers,
        "side": side,
        "pictures_per_second": spread(rates[side]),
        "cpu_ms_per_picture": spread(costs[side]),
        "rate_ratio": spread([a / b for a, b in zip(rates[side], rates[SIDES[0]], strict=True)]),
        "cpu_ratio": spread([a / b for a, b in zip(costs[side], costs[SIDES[0]], strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="local shards")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pictures", type=int, default=1280, help="a side and round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--view", default="train", choices=["train", "centre"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    same = check_identical(options.data, options.size)
    print(f"{same} pictures are the same bytes on all sides", file=sys.stderr)
    rows = [row for workers in options.workers for row in compare(options, workers)]
    columns = ["workers", "side", "pictures/s", "CPU ms/picture", "rate ratio", "lowest", "highest"]
    columns += ["CPU ratio", "lowest", "highest"]
    cells = [
        [row["workers"], row["side"], row["pictures_per_second"]["median"], row["cpu_ms_per_picture"]["median"]]
        + [*row["rate_ratio"].values(), *row["cpu_ratio"].values()]
        for row in rows
    ]
    show_table(f"{options.rounds} rounds, {options.size} px, medians; ratios to webdataset, paired", columns, cells)
    if options.out:
        versions = {
            "torch": torch.__version__,
            "webdataset": webdataset.__version__,
            "python": platform.python_version(),
        }
        settings = {k: v for k, v in vars(options).items() if k not in ("data", "out")}
        result = {"settings": settings, "versions": versions, "cores": os.cpu_count(), "identical": same, "rows": rows}
        options.out.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
