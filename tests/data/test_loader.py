"""Batches: the same for any workers and processes, resumable as a slice, and whole where pictures are broken."""

from __future__ import annotations

import errno
import io
import multiprocessing as mp
import os
import random
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from bcosify.core.errors import DataError
from bcosify.data import index as index_module
from bcosify.data.index import Indexed, ShardFile, ShardIndex
from bcosify.data.loader import Batches, held_out_batches, training_batches
from bcosify.data.order import batch_indices, order
from bcosify.data.runs import SUBSTITUTES, TrainingRuns
from bcosify.data.views import size_at
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batches import COUNT, SIZE, assert_same, shards_with_bad, train


def test_a_batch_is_what_the_order_says(index):
    batches = training_batches(index, seed=3, global_batch=4, steps=8, size=SIZE)
    assert len(batches) == 8
    for step, batch in enumerate(batches):
        assert batch.pictures.shape == (4, 3, SIZE, SIZE) and batch.pictures.dtype == torch.uint8
        assert batch.pictures.is_contiguous()
        assert batch.ids.tolist() == batch_indices(COUNT, 3, 4, step).positions.tolist()
        assert batch.bad == ()


def test_batches_can_be_gone_through_again(index):
    batches = training_batches(index, seed=3, global_batch=4, steps=3, size=SIZE)
    assert_same(list(batches), list(batches))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(index, workers):
    batches = training_batches(index, seed=3, global_batch=4, steps=8, size=SIZE, workers=workers)
    assert_same(train(index), list(batches))
    assert_same(train(index), list(batches))


def end_of_runs(batches: Batches) -> None:
    list(batches)


def leaving_early(batches: Batches) -> None:
    for _ in batches:
        break


def error_in_the_loop(batches: Batches) -> None:
    for _ in batches:
        raise DataError("in the loop")


def vanished_shard(batches: Batches) -> None:
    nowhere = Indexed(0, "0", ShardFile("none.tar", 0, 0), 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardIndex, "pictures", lambda self, ids: [nowhere] * len(ids))
        list(batches)


def error_of_the_runs(batches: Batches) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardIndex, "pictures", fails)
        list(batches)


def killed_worker(batches: Batches) -> None:
    for _ in batches:
        for worker in mp.active_children():
            worker.kill()
            worker.join()


def told_to_stop(batches: Batches) -> None:
    """The signal of a whole process group: the process that trains decides."""
    for number, _ in enumerate(batches):
        for worker in mp.active_children():
            os.kill(worker.pid, (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[number % 3])
    assert number == 7


def fails(*_: object) -> None:
    # Such an error holds its frame, which holds it: the garbage collector alone can free what its traceback holds.
    error = OSError("of the runs")
    raise error


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (end_of_runs, None),
        (leaving_early, None),
        (error_in_the_loop, "in the loop"),
        (vanished_shard, "none.tar cannot be read"),
        (error_of_the_runs, "of the runs"),
        (killed_worker, r"^the 2 processes that read .* exited unexpectedly\. .*\(--set workers=1\).*--set workers=0"),
        (told_to_stop, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_worker_outlives_an_iteration(index, how, says):
    """Even while the error is held, and everything in its frames with it."""
    assert not mp.active_children()
    batches = training_batches(index, seed=3, global_batch=4, steps=8, size=SIZE, workers=2)
    with pytest.raises((DataError, OSError), match=says) if says else nullcontext() as held:
        how(batches)
    assert not mp.active_children()
    assert (held is None) == (says is None)


def test_workers_that_cannot_start_are_one_line(index, monkeypatch):
    """As where shared memory is full when a phase begins: their queues lie there."""

    def full(self: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.data.dataloader.DataLoader._get_iterator", full)
    with pytest.raises(
        DataError, match=r"^the 2 processes that read pictures failed: .*No space left.*--set workers=1"
    ):
        train(index, workers=2)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_of_the_runs_comes_after_the_batches_before_it(index, monkeypatch, workers):
    """However far ahead of them it happened."""
    found, left = ShardIndex.pictures, iter(range(5))
    monkeypatch.setattr(
        ShardIndex, "pictures", lambda self, ids: fails() if next(left, None) is None else found(self, ids)
    )
    batches, seen = training_batches(index, seed=3, global_batch=4, steps=8, size=SIZE, workers=workers), []
    with pytest.raises(OSError, match="of the runs"):
        for batch in batches:
            seen.append(batch)
    monkeypatch.undo()
    assert_same(train(index)[:5], seen)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_same_global_batches(index, world_size):
    ranks = [train(index, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(train(index)):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.pictures for part in parts]), whole.pictures)
        assert torch.cat([part.ids for part in parts]).tolist() == whole.ids.tolist()


def test_steps_of_several_sizes_show_the_same_pictures(index):
    """Whatever the workers, the processes, and the step that a run is resumed at."""
    sizes = (32, SIZE)
    whole = train(index, size=sizes)
    assert {batch.pictures.shape[-1] for batch in whole} == set(sizes)
    for step, (batch, single) in enumerate(zip(whole, train(index), strict=True)):
        assert batch.ids.tolist() == single.ids.tolist()
        size = size_at(sizes, 3, step)
        assert batch.pictures.shape[-2:] == (size, size)
        assert size != SIZE or torch.equal(batch.pictures, single.pictures)
    assert_same(whole, train(index, size=sizes, workers=1))
    assert_same(whole, train(index, size=sizes, workers=2))
    assert_same(whole[3:], train(index, size=sizes, first_step=3, steps=5))
    ranks = [train(index, size=sizes, rank=rank, world_size=2) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), batch.pictures)


@pytest.mark.parametrize("step", [1, 6, 7])  # COUNT / 4 = 6 steps an epoch
def test_resuming_is_a_slice(index, step):
    assert_same(train(index)[step:], train(index, first_step=step, steps=8 - step))


def test_a_crop_depends_on_seed_epoch_and_picture_alone(index):
    def crops(**changes) -> dict[int, torch.Tensor]:
        batches = train(index, **changes)
        return {int(id): picture for batch in batches for id, picture in zip(batch.ids, batch.pictures, strict=True)}

    first = crops(steps=6)
    other_batches = crops(global_batch=8, steps=3)
    assert all(torch.equal(first[id], other_batches[id]) for id in range(COUNT))
    assert sum(torch.equal(first[id], picture) for id, picture in crops(first_step=6, steps=6).items()) == 0
    assert sum(torch.equal(first[id], picture) for id, picture in crops(seed=4, steps=6).items()) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_are_neither_used_nor_moved(index, workers):
    def states() -> tuple:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    torch.manual_seed(1)
    before = states()
    first = train(index, steps=2, workers=workers)
    list(held_out_batches(index, size=SIZE, limit=3, workers=workers))
    assert states() == before
    torch.manual_seed(2)
    assert_same(first, train(index, steps=2, workers=workers))


class Counted:
    """An index that knows only how many pictures it has."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def pictures(self, positions) -> list[int]:
        return [int(i) for i in positions]


@given(st.data(), st.integers(0, 2**40), st.integers(1, 4), st.integers(1, 6))
def test_rank_slices_make_up_the_global_batch(data, seed, world_size, share):
    batch = world_size * share
    count = data.draw(st.integers(batch, 80))
    first = data.draw(st.integers(0, 50))
    ranks = [
        TrainingRuns(Counted(count), seed, batch, range(first, first + 3), rank, world_size)
        for rank in range(world_size)
    ]
    for step, runs in enumerate(zip(*ranks, strict=True), first):
        asked = [id for run in runs for id in run.pictures[: run.count]]
        epoch, number, positions = batch_indices(count, seed, batch, step)
        assert asked == positions.tolist()
        ids = order(count, seed, epoch).tolist()
        for rank, run in enumerate(runs):
            at = number * batch + rank * share
            assert run.epoch == epoch
            assert run.pictures == [ids[(at + i) % count] for i in range(share + min(SUBSTITUTES, count - 1))]


def test_processes_must_share_the_batch_evenly(index):
    with pytest.raises(DataError, match="batch of 10 cannot be shared evenly by 4 processes. Use 8 or 12"):
        training_batches(index, seed=0, global_batch=10, steps=1, world_size=4)


def test_a_batch_larger_than_the_data_is_refused_at_once(index):
    with pytest.raises(DataError, match=f"batch of 32 needs as many pictures, and there are {COUNT}"):
        training_batches(index, seed=0, global_batch=32, steps=1)


# ------------------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("workers", [0, 2])
def test_held_out_pictures_come_once_and_in_order(index, workers):
    batches = held_out_batches(index, size=SIZE, batch_size=10, workers=workers)
    sizes = [batch.ids.tolist() for batch in batches]
    assert sizes == [list(range(10)), list(range(10, 20)), list(range(20, 24))] and len(batches) == 3
    limited = list(held_out_batches(index, size=SIZE, batch_size=10, limit=12, workers=workers))
    assert [batch.pictures.shape[0] for batch in limited] == [10, 2]
    assert torch.equal(limited[1].pictures, list(batches)[1].pictures[:2])


def test_no_held_out_pictures_is_an_error(index):
    with pytest.raises(DataError, match="No held-out pictures"):
        held_out_batches(index, limit=0)


# --------------------------------------------------------------------------------------------------------------- broken


def test_the_next_in_the_order_stands_in_for_a_broken_picture(broken):
    index, ids = broken
    first = order(COUNT, 3, 0).tolist()
    batches = train(index, steps=6)
    shown = [id for batch in batches for id in batch.ids.tolist()]
    expected = [
        next(first[(i + k) % COUNT] for k in range(COUNT) if first[(i + k) % COUNT] not in ids) for i in range(COUNT)
    ]
    assert shown == expected
    assert shown[1] == shown[2] == shown[3] == first[3] and shown[-1] == first[0]
    assert {item.id for batch in batches for item in batch.bad} == ids
    assert [item.id for item in batches[0].bad] == first[1:3]
    pictures = torch.cat([batch.pictures for batch in batches])
    assert torch.equal(pictures[1], pictures[3])
    assert all(item.reason for batch in batches for item in batch.bad)


@pytest.mark.parametrize("changes", [{"workers": 2}, {"first_step": 2, "steps": 6}])
def test_broken_pictures_change_no_guarantee(broken, changes):
    index, _ = broken
    assert_same(train(index)[changes.get("first_step", 0) :], train(index, **changes))


def test_ranks_agree_on_substitutes(broken):
    index, _ = broken
    halves = [train(index, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(train(index), *halves, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), whole.pictures)
        assert {item for part in parts for item in part.bad} == set(whole.bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_in_a_row_stop(folder, tmp_path, workers):
    good = int(order(COUNT, 3, 0)[0])
    index = shards_with_bad(folder, tmp_path / "bad.tar", {i: b"x" for i in range(COUNT) if i != good})
    with pytest.raises(DataError, match=rf"bad\.tar: the picture '\d+' .* any of the {SUBSTITUTES} that") as caught:
        train(index, workers=workers)
    assert "Traceback" not in str(caught.value)


def test_how_far_a_substitute_is_does_not_depend_on_the_processes(folder, tmp_path):
    """Exactly SUBSTITUTES broken ones before a good one: found from the first of them, in a batch of any size."""
    ids = order(COUNT, 3, 0)
    index = shards_with_bad(folder, tmp_path / "bad.tar", {int(ids[i]): b"x" for i in range(SUBSTITUTES)})
    (whole,) = train(index, global_batch=2, steps=1)
    assert whole.ids.tolist() == [ids[SUBSTITUTES]] * 2 and len(whole.bad) == SUBSTITUTES
    index = shards_with_bad(folder, tmp_path / "worse.tar", {int(ids[i]): b"x" for i in range(SUBSTITUTES + 1)})
    for world_size in (1, 2):
        with pytest.raises(DataError, match="cannot be decoded"):
            train(index, global_batch=2, steps=1, world_size=world_size)


def test_a_shard_that_vanishes_is_an_error_not_a_broken_picture(folder, tmp_path):
    index = shards_with_bad(folder, tmp_path / "gone.tar", {})
    os.unlink(tmp_path / "gone.tar")
    index_module._opened.cache_clear()
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"gone\.tar cannot be read") as caught:
            train(index, workers=workers)
        assert "Traceback" not in str(caught.value)


def test_a_picture_too_large_to_be_true_is_broken(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BCOSIFY_MAX_PIXELS", "1000")
    large, small = io.BytesIO(), io.BytesIO()
    Image.open(folder / "03.jpg").save(large, "PNG")
    Image.new("RGB", (30, 30)).save(small, "JPEG")
    bad = {i: small.getvalue() for i in range(1, COUNT)} | {0: large.getvalue()}
    index = shards_with_bad(folder, tmp_path / "bad.tar", bad)
    (batch,) = held_out_batches(index, size=SIZE, batch_size=2, limit=2)
    assert batch.ids.tolist() == [1, 1] and "130 x 90 pixels, and the limit is 1000" in batch.bad[0].reason
