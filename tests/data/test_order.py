"""Who is next: orders, splits and overlaps."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from bcosify.align.prepare import _parted
from bcosify.core.errors import DataError, DataWarning
from bcosify.data.index import index_shards
from bcosify.data.names import expand
from bcosify.data.order import batch_indices, copies, order, overlap, split, without
from bcosify.data.pack import write_shards
from hypothesis import given
from hypothesis import strategies as st

from tars import jpeg, simple_tar, write_tar

counts = st.integers(1, 300)
seeds = st.integers(0, 2**40)


@given(counts, seeds, st.integers(0, 1000))
def test_order_is_a_permutation_that_repeats(count, seed, epoch):
    first = order(count, seed, epoch).copy()
    order.cache_clear()
    assert np.array_equal(order(count, seed, epoch), first)
    assert np.array_equal(np.sort(first), np.arange(count))


def test_order_is_the_same_on_every_machine_and_in_every_version():
    # A change here breaks resuming the runs of earlier versions.
    assert order(10, 0, 0).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert order(10, 7, 3).tolist() == [3, 5, 4, 7, 8, 0, 9, 2, 1, 6]


def test_order_moves_with_seed_and_epoch_and_cannot_be_spoilt():
    assert len({tuple(order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}) == 9
    with pytest.raises(ValueError):
        order(50, 0, 0)[0] = 1


@given(counts, seeds, st.data())
def test_an_epoch_shows_no_picture_twice(count, seed, data):
    batch_size = data.draw(st.integers(1, count))
    epoch = data.draw(st.integers(0, 3))
    per_epoch = count // batch_size
    batches = [batch_indices(count, seed, batch_size, epoch * per_epoch + i) for i in range(per_epoch)]
    assert [(batch.epoch, batch.index) for batch in batches] == [(epoch, i) for i in range(per_epoch)]
    seen = np.concatenate([batch.positions for batch in batches])
    assert len(seen) == len(set(seen.tolist())) == per_epoch * batch_size
    assert np.array_equal(seen, order(count, seed, epoch)[: len(seen)])


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_needs_its_pictures(batch_size):
    with pytest.raises(DataError, match=f"batch of {batch_size} .* there are 10"):
        batch_indices(10, 0, batch_size, 0)


# ---------------------------------------------------------------------------------------------------------------- split


def keys_of(index) -> list[str]:
    return [index.key(i) for i in range(len(index))]


@pytest.fixture
def many(tmp_path) -> list[Path]:
    names = [[(f"s{shard}k{i}.jpg", b"%d" % i) for i in range(200)] for shard in range(3)]
    return [write_tar(tmp_path / f"{shard}.tar", members) for shard, members in enumerate(names)]


def test_split_shares_out_every_picture(many):
    index = index_shards(many)
    for held_out in (0.2, 120):
        rest, held = split(index, held_out)
        assert sorted(keys_of(rest) + keys_of(held)) == sorted(keys_of(index))
        assert keys_of(held) == keys_of(split(index, held_out)[1]) != keys_of(split(index, held_out, seed=1)[1])
        for part in (rest, held):
            assert all(part.read(i).decode() == part.key(i).partition("k")[2] for i in range(len(part)))
    assert len(split(index, 120)[1]) == 120
    assert 70 < len(split(index, 0.2)[1]) < 170


def test_split_by_fraction_does_not_move_when_shards_are_added(many):
    few, more = (split(index_shards(paths), 0.3)[1] for paths in (many[:2], many))
    assert set(keys_of(few)) == {key for key in keys_of(more) if not key.startswith("s2")}


def test_split_keeps_equal_keys_together(tmp_path):
    index = index_shards([simple_tar(tmp_path / f"{i}.tar", 40) for i in range(3)])
    rest, held = split(index, 0.5)
    assert not set(keys_of(rest)) & set(keys_of(held))


def test_a_part_can_be_split_again(many):
    rest, held = split(index_shards(many), 100)
    inner, outer = split(rest, 50, seed=1)
    assert sorted(keys_of(inner) + keys_of(outer) + keys_of(held)) == sorted(keys_of(index_shards(many)))


@pytest.mark.parametrize("held_out", [0, -3, 600, 0.0, 1.0, -0.1, 1e-9])
def test_split_refuses_an_empty_side(many, held_out):
    with pytest.raises(DataError, match="leaves one side empty"):
        split(index_shards(many), held_out)


# -------------------------------------------------------------------------------------------------------------- overlap


def test_overlap_finds_the_same_bytes_under_any_key(photos, tmp_path):
    write_shards(photos, tmp_path / "all", size=32)
    everything = index_shards(expand(tmp_path / "all"))
    train, val = split(everything, 2)
    assert overlap(train, val) == []
    assert sorted(overlap(everything, val)) == sorted((val.key(i), val.key(i)) for i in range(len(val)))
    assert everything.sizes.tolist() == [len(everything.read(i)) for i in range(len(everything))]


def test_copies_go_to_one_side(tmp_path):
    """Each picture under two keys: split by keys alone, most held-out ones would be trained on."""
    data = [jpeg(i) for i in range(60)]
    index = index_shards([write_tar(tmp_path / f"{side}.tar", [(f"{side}{i}.jpg", one) for i, one in enumerate(data)])
                          for side in "ab"])  # fmt: skip
    train, val = split(index, 40)
    with pytest.warns(DataWarning, match=r"^\d+ pictures of --data are copies of held-out ones .* not trained on"):
        rest, held = _parted(train, val)
    assert keys_of(held) == keys_of(val) and len(val) == 40
    assert len(train) - len(rest) == len(copies(train, val)) > 20 and copies(rest, held) == []
    shown, measured = ({part.read(i) for i in range(len(part))} for part in (rest, held))
    assert not shown & measured and shown | measured == set(data)


def test_parts_without_copies_stay_as_they_are(many):
    train, val = split(index_shards([simple_tar(many[0].parent / "x.tar", 30)]), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _parted(train, val) == (train, val)
    assert keys_of(without(train, [0, 2])) == keys_of(train)[1:2] + keys_of(train)[3:]


def test_data_of_nothing_but_copies_is_refused(tmp_path):
    index = index_shards([write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"the same") for i in range(9)])])
    with pytest.warns(DataWarning), pytest.raises(DataError, match="All pictures of --data are copies"):
        _parted(*split(index, 3))
