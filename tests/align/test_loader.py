"""Batches: the same for any workers and processes, resumable as a slice, and whole where pictures are broken."""

from __future__ import annotations

import io
import json
import multiprocessing as mp
import os
import random
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm.data
import torch
from bcosify.core.errors import DataError
from bcosify.data import shards
from bcosify.data.loader import (
    SUBSTITUTES,
    Augment,
    BadSample,
    BadSamples,
    Batch,
    Batches,
    CentreCrop,
    Mixing,
    TrainingRuns,
    held_out_batches,
    size_at,
    to_model_input,
    training_batches,
)
from bcosify.data.shards import (
    Indexed,
    ShardFile,
    ShardIndex,
    batch_indices,
    decode,
    expand,
    index_shards,
    order,
    write_shards,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

SIZE = 16
COUNT = 24


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Pieces of real photographs, all different."""
    folder = tmp_path_factory.mktemp("pictures")
    photos = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.astronaut()]
    for i in range(COUNT):
        y, x = 40 * (i // 6), 40 * (i % 6)
        Image.fromarray(photos[i % 3][y : y + 90, x : x + 130]).save(folder / f"{i:02d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def index(folder, tmp_path_factory) -> ShardIndex:
    out = tmp_path_factory.mktemp("shards") / "good"
    write_shards(folder, out, size=48, per_shard=7)
    return index_shards(expand(out))


def shards_with_bad(folder: Path, out: Path, bad: dict[int, bytes]) -> ShardIndex:
    """The pictures of `folder` in one shard, some of them with other bytes."""
    with tarfile.open(out, "w") as archive:
        for i, path in enumerate(sorted(folder.iterdir())):
            data = bad.get(i, path.read_bytes())
            info = tarfile.TarInfo(path.name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return index_shards([out])


def train(index: ShardIndex, **changes) -> list[Batch]:
    return list(training_batches(index, **{"seed": 3, "global_batch": 4, "steps": 8, "size": SIZE} | changes))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.equal(a.pictures, b.pictures)
        assert a.bad == b.bad


# --------------------------------------------------------------------------------------------- a pure function of step


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
        (killed_worker, "exited unexpectedly"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_worker_outlives_an_iteration(index, how, says):
    """Even while the error is held, and everything in its frames with it."""
    assert not mp.active_children()
    batches = training_batches(index, seed=3, global_batch=4, steps=8, size=SIZE, workers=2)
    with pytest.raises((DataError, OSError, RuntimeError), match=says) if says else nullcontext() as held:
        how(batches)
    assert not mp.active_children()
    assert (held is None) == (says is None)


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
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

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


# --------------------------------------------------------------------------------------------------------------- views


def test_the_whole_picture_is_the_picture(index):
    whole = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48), flip=0)
    flipped = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48), flip=1)
    plain, mirrored = (train(index, augment=view, steps=1, size=32)[0] for view in (whole, flipped))
    assert torch.equal(plain.pictures.flip(-1), mirrored.pictures)
    for id, picture in zip(plain.ids.tolist(), plain.pictures, strict=True):
        source = decode(index.read(id))
        assert source.size == (69, 48)
        expected = torch.from_numpy(np.array(source.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        assert (picture.int() - expected.int()).abs().max() <= 2


def test_views_are_turned_within_the_angle_with_grey_corners(index):
    still = train(index, steps=24, size=33)
    turned = train(index, augment=Augment(turn=45), steps=24, size=33)
    same, grey = 0, 0
    for before, after in zip(still, turned, strict=True):
        for left, right in zip(before.pictures, after.pictures, strict=True):
            # The crop is the same one: its centre stays where it is.
            assert (left[:, 16, 16].int() - right[:, 16, 16].int()).abs().max() <= 2
            same += torch.equal(left, right)
            grey += bool((right[:, 0, 0] == 127).all())
    assert same <= 1 and 60 < grey <= 96
    slightly = train(index, augment=Augment(turn=2), steps=1, size=33)[0].pictures
    assert (slightly.int() - still[0].pictures.int()).abs().float().mean() < 12
    assert not torch.equal(slightly, still[0].pictures)


def test_colours_change_with_strength_and_places_do_not(index):
    plain = train(index, steps=6, size=32)

    def far(strength: float) -> float:
        changed = train(index, augment=Augment(colour=strength), steps=6, size=32)
        pairs = [(a.pictures.float(), b.pictures.float()) for a, b in zip(plain, changed, strict=True)]
        for a, b in pairs:  # brighter or greyer, but light stays where it was
            rows = torch.stack([a.mean(1).flatten(1), b.mean(1).flatten(1)], 1)
            found = [float(torch.corrcoef(row)[0, 1]) for row in rows if row.std(1).min() > 1]
            assert sum(found) / len(found) > 0.7
        return sum(float((a - b).abs().mean()) for a, b in pairs)

    weak, strong = far(0.1), far(1.0)
    assert 0 < weak < 0.5 * strong


# -------------------------------------------------------------------------------------------------------------- mixing


VIEW = Augment(turn=20, colour=0.3)
BOTH = Mixing(mixup=0.4, cutmix=0.4)


def test_mixup_and_cutmix_are_torchvisions_on_the_global_batch(index):
    plain = train(index, steps=24)
    for mixing, how in ((Mixing(mixup=1), v2.MixUp()), (Mixing(cutmix=1), v2.CutMix())):
        found, kinds = train(index, steps=24, mixing=mixing), set()
        for step, (view, got) in enumerate(zip(plain, found, strict=True)):
            assert got.ids.tolist() == view.ids.tolist() and got.pictures.dtype == torch.uint8
            mix = mixing.at(3, step)
            assert mix is not None
            with torch.random.fork_rng():
                torch.manual_seed(mix.seed)
                labels = torch.eye(4)
                wanted, shares = how(view.pictures.float(), labels)
            assert torch.equal(wanted.round().to(torch.uint8), got.pictures)
            kinds.add(round(float(shares[0, 0]), 3))
        assert len(kinds) > 12  # another share in every step


def test_so_many_batches_are_mixed_as_the_chances_say():
    steps = [Mixing(0.3, 0.2).at(5, step) for step in range(2000)]
    share = {how: sum(mix is not None and mix.how == how for mix in steps) / 2000 for how in ("mixup", "cutmix")}
    assert share == {"mixup": pytest.approx(0.3, abs=0.04), "cutmix": pytest.approx(0.2, abs=0.04)}
    assert all(Mixing().at(5, step) is None for step in range(50))
    assert all(Mixing(0.5, 0.5).at(5, step) is not None for step in range(50))
    assert steps != [Mixing(0.3, 0.2).at(6, step) for step in range(2000)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mixed_batches_are_the_same_for_any_processes_workers_and_resume(index, world_size):
    """A share of one picture too: its neighbour is another process's."""
    mixed = {"augment": VIEW, "mixing": BOTH, "size": (SIZE, 24)}
    whole = train(index, **mixed)
    assert {getattr(BOTH.at(3, step), "how", None) for step in range(8)} == {"mixup", "cutmix", None}
    ranks = [train(index, rank=rank, world_size=world_size, **mixed) for rank in range(world_size)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), batch.pictures)
        assert torch.cat([part.ids for part in parts]).tolist() == batch.ids.tolist()
    assert_same(whole, train(index, workers=world_size, **mixed))
    for step in (1, 5, 7):
        assert_same(whole[step:], train(index, first_step=step, steps=8 - step, **mixed))


def test_a_broken_neighbour_is_stood_in_for_alike_in_all_processes(folder, tmp_path):
    index = shards_with_bad(folder, tmp_path / "bad.tar", {4: b"no picture", 11: b"nor this", 17: b""})
    whole = train(index, mixing=Mixing(cutmix=1), steps=12)
    assert {sample.id for batch in whole for sample in batch.bad} == {4, 11, 17}
    ranks = [train(index, mixing=Mixing(cutmix=1), steps=12, rank=rank, world_size=4) for rank in range(4)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), batch.pictures)
        assert {sample for part in parts for sample in part.bad} == set(batch.bad)


def test_no_chance_of_mixing_is_the_run_without(index):
    assert_same(train(index), train(index, mixing=Mixing(), augment=Augment(turn=0, colour=0)))


def test_half_of_the_pictures_are_flipped(index):
    view = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48))
    never = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48), flip=0)
    pairs = zip(train(index, augment=view, steps=24), train(index, augment=never, steps=24), strict=True)
    flipped = [
        not torch.equal(a, b) for left, right in pairs for a, b in zip(left.pictures, right.pictures, strict=True)
    ]
    assert 30 < sum(flipped) < 66  # of 96


@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), (32, 1.0), (40, 0.9)])
def test_held_out_pictures_are_what_timm_shows(index, size, crop_pct):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shown = timm.data.create_transform(size, interpolation="bicubic", mean=mean, std=std, crop_pct=crop_pct)
    for batch in held_out_batches(index, size=size, crop_pct=crop_pct, batch_size=10):
        expected = torch.stack([shown(decode(index.read(id))) for id in batch.ids.tolist()])
        assert torch.allclose(to_model_input(batch.pictures, mean, std, "cpu"), expected, atol=1e-6)


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


def test_training_can_take_the_centre_too(index):
    (batch,) = train(index, augment=CentreCrop(), steps=1)
    (held_out,) = held_out_batches(index, size=SIZE, batch_size=COUNT)
    assert torch.equal(batch.pictures, held_out.pictures[batch.ids])


def test_model_input_is_normalised():
    pictures = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    shown = to_model_input(pictures, (0.0, 0.5, 0.5), (1.0, 0.5, 0.25), "cpu")
    assert shown.dtype == torch.float32
    assert torch.allclose(shown.flatten(), torch.tensor([0, 2 * 128 / 255 - 1, 2.0]), atol=1e-7)
    assert to_model_input(pictures, (0, 0, 0), (1, 1, 1), "cpu", torch.bfloat16).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------------- broken


def bad_bytes(folder: Path) -> list[bytes]:
    """A picture that was cut, text, nothing, and a header that lies."""
    whole = (folder / "00.jpg").read_bytes()
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    return [whole[: len(whole) // 2], b"<html>404</html>", b"", png.getvalue()[:40] + b"\0" * 30]


@pytest.fixture
def broken(folder, tmp_path) -> tuple[ShardIndex, set[int]]:
    """Four broken pictures, two of them neighbours in the order of epoch 0."""
    first = order(COUNT, 3, 0)
    ids = [int(first[i]) for i in (1, 2, 9, COUNT - 1)]
    return shards_with_bad(folder, tmp_path / "bad.tar", dict(zip(ids, bad_bytes(folder), strict=True))), set(ids)


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
    shards._opened.cache_clear()
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"gone\.tar cannot be read") as caught:
            train(index, workers=workers)
        assert "Traceback" not in str(caught.value)


def test_a_picture_too_large_to_be_true_is_broken(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    good = (folder / "03.jpg").read_bytes()
    stream = io.BytesIO()
    Image.new("RGB", (30, 30)).save(stream, "JPEG")
    index = shards_with_bad(folder, tmp_path / "bad.tar", {i: stream.getvalue() for i in range(1, COUNT)} | {0: good})
    (batch,) = held_out_batches(index, size=SIZE, batch_size=2, limit=2)
    assert batch.ids.tolist() == [1, 1] and "DecompressionBomb" in batch.bad[0].reason


# --------------------------------------------------------------------------------------------------------- bad samples


def test_bad_samples_are_counted_and_listed_once(broken, tmp_path):
    index, ids = broken
    bad = BadSamples(index, tmp_path / "run" / "bad_samples.jsonl", limit=0.2)
    for batch in train(index, steps=18):
        bad.add(batch.bad)
    assert len(bad) == 4 and bad.share == 4 / COUNT
    lines = [json.loads(line) for line in bad.path.read_text().splitlines()]
    assert {line["key"] for line in lines} == {index.key(id) for id in ids} and len(lines) == 4
    assert all(line["shard"].endswith("bad.tar") and line["reason"] for line in lines)


def test_a_run_that_resumes_goes_on_counting(broken, tmp_path):
    index, _ = broken
    path = tmp_path / "bad_samples.jsonl"
    first, second = BadSamples(index, path, limit=1), None
    first.add([BadSample(0, "a", "s.tar", "x"), BadSample(1, "b", "s.tar", "y")])
    with path.open("a") as stream:
        stream.write('{"key": "cut he')  # a crash in the middle of a line
    second = BadSamples(index, path, limit=1)
    assert len(second) == 2
    second.add([BadSample(0, "a", "s.tar", "x"), BadSample(1, "b", "s.tar", "y")])
    assert len(second) == 2 and len(path.read_text().splitlines()) == 3


def test_too_many_bad_samples_stop(broken, tmp_path):
    index, _ = broken
    bad = BadSamples(index, tmp_path / "bad_samples.jsonl", limit=3 / COUNT)
    bad.add([BadSample(i, str(i), "s.tar", "x") for i in range(3)])
    with pytest.raises(DataError, match=r"4 of 24 pictures \(16\.67%\) .* limit is 12\.50%.*bad_samples\.jsonl"):
        bad.add([BadSample(3, "3", "s.tar", "x")])
    assert len(bad.path.read_text().splitlines()) == 4


def test_no_bad_sample_makes_no_list(index, tmp_path):
    bad = BadSamples(index, tmp_path / "bad_samples.jsonl", limit=0)
    bad.add([])
    assert not bad.path.exists()
