"""Shards as a sequence: the same for any processes and workers, nothing dropped or doubled, resumed by reading on."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from bcosify.core.errors import DataError
from bcosify.data.bad import BadSamples
from bcosify.data.index import index_shards
from bcosify.data.loader import training_batches
from bcosify.data.order import order
from bcosify.data.runs import SUBSTITUTES
from bcosify.data.stream import SURE, Stream, fingerprints
from bcosify.data.views import Mixing
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loopback import QUICK, Server, cut, first, whole

SIZE = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("BCOSIFY_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def tar_bytes(samples: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write(folder: Path, sizes: list[int], body=picture) -> list[Path]:
    """Shards of so many pictures; the keys count through."""
    paths, number = [], 0
    for i, size in enumerate(sizes):
        names = [(f"{number + k:03d}", body(number + k)) for k in range(size)]
        number += size
        paths.append(folder / f"{i:02d}.tar")
        paths[-1].write_bytes(
            tar_bytes([item for key, data in names for item in ((f"{key}.json", b"{}"), (f"{key}.png", data))])
        )
    return paths


def keys(stream: Stream, count: int, seed: int = 1, first: int = 0) -> list[str]:
    found = [picture.key for picture in stream.take(seed, first, count)]
    stream.close()
    return found


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(tmp_path):
    stream = Stream(write(tmp_path, [3, 1, 5]), buffer=4)
    shown = keys(stream, 27)
    epochs = [shown[i : i + 9] for i in (0, 9, 18)]
    assert all(sorted(epoch) == [f"{i:03d}" for i in range(9)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and keys(Stream(stream.shards, buffer=4), 27) == shown
    assert keys(stream, 27, seed=2) != shown
    assert [picture.id for picture in stream.take(1, 5, 3)] == [5, 6, 7]
    stream.close()


def test_without_a_buffer_shards_come_as_they_are_in_the_epochs_order(tmp_path):
    paths = write(tmp_path, [3, 2, 4])
    expected = [
        sample["__key__"]
        for epoch in range(3)
        for i in order(3, 1, epoch)
        for sample in webdataset.WebDataset(str(paths[i]), shardshuffle=False)
    ]
    assert keys(Stream(paths, buffer=1), 27) == expected


def test_what_is_taken_is_what_the_shards_hold(tmp_path):
    paths = write(tmp_path, [3, 2])
    index, stream = index_shards(paths), Stream(paths)
    held = {index.key(i): (index.read(i), index.file(i).path) for i in range(5)}
    assert {p.key: (p.read(), p.shard) for p in stream.take(0, 0, 5)} == held
    stream.close()


class Numbers(Stream):
    """A stream without files: shard i of S has sizes[i] pictures."""

    def __init__(self, sizes: list[int], buffer: int):
        super().__init__([str(i) for i in range(len(sizes))], buffer=buffer)
        self.sizes = sizes

    def _shard(self, source):
        from bcosify.data.stream import Streamed

        yield from (Streamed(-1, f"{source}-{k}", source, b"") for k in range(self.sizes[int(source)]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 30),
)
def test_any_shards_any_processes_nothing_dropped_or_doubled(sizes, buffer, world_size, share, first):
    count, batch, steps = sum(sizes), world_size * share, 12
    whole = Numbers(sizes, buffer)
    sequence = keys(whole, (first + steps) * batch)
    # Each epoch is a permutation, however the shards divide.
    for begin in range(0, len(sequence) - count + 1, count):
        assert len(set(sequence[begin : begin + count])) == count
    # The ranks' slices, from any first step on, are the sequence.
    seen = []
    ranks = [Numbers(sizes, buffer) for _ in range(world_size)]
    for step in range(first, first + steps):
        for rank, stream in enumerate(ranks):
            seen += [p.key for p in stream.take(1, step * batch + rank * share, share + SUBSTITUTES)[:share]]
    for stream in ranks:
        stream.close()
    assert seen == sequence[first * batch :]


def batches(stream: Stream, **changes) -> list:
    with_defaults = {"seed": 3, "global_batch": 4, "steps": 7, "size": SIZE} | changes
    found = list(training_batches(stream, **with_defaults))
    stream.close()
    return found


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.ids.tolist() == b.ids.tolist() and torch.equal(a.pictures, b.pictures) and a.bad == b.bad


@pytest.mark.parametrize("changes", [{"workers": 1}, {"workers": 2}, {"first_step": 3, "steps": 4}])
def test_workers_and_resuming_change_nothing(tmp_path, changes):
    paths = write(tmp_path, [3, 1, 5])
    expected = batches(Stream(paths, buffer=4))
    assert_same(expected[changes.get("first_step", 0) :], batches(Stream(paths, buffer=4), **changes))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_same_global_batches(tmp_path, world_size):
    paths = write(tmp_path, [3, 1, 5])
    ranks = [batches(Stream(paths, buffer=4), rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole_, *parts in zip(batches(Stream(paths, buffer=4)), *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), whole_.pictures)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mixed_batches_are_the_same_and_nothing_is_read_twice(tmp_path, monkeypatch, world_size):
    begun = []
    begin = Stream._from
    monkeypatch.setattr(Stream, "_from", lambda self, *place: begun.append(place) or begin(self, *place))
    paths, mixing = write(tmp_path, [3, 1, 5]), Mixing(mixup=0.3, cutmix=0.4)
    assert {getattr(mixing.at(3, step), "how", None) for step in range(7)} == {"mixup", "cutmix", None}
    plain = batches(Stream(paths, buffer=4))
    expected = batches(Stream(paths, buffer=4), mixing=mixing)
    for step, (left, right) in enumerate(zip(plain, expected, strict=True)):
        assert left.ids.tolist() == right.ids.tolist()
        assert torch.equal(left.pictures, right.pictures) == (mixing.at(3, step) is None)
    begun.clear()
    ranks = [
        batches(Stream(paths, buffer=4), mixing=mixing, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len(begun) == world_size
    for whole_, *parts in zip(expected, *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), whole_.pictures)
    assert_same(expected[3:], batches(Stream(paths, buffer=4), mixing=mixing, first_step=3, steps=4, workers=1))


def test_phases_go_on_without_reading_again(tmp_path, monkeypatch):
    begun = []
    begin = Stream._from
    monkeypatch.setattr(Stream, "_from", lambda self, *place: begun.append(place) or begin(self, *place))
    stream = Stream(write(tmp_path, [30, 30]), buffer=2)
    parts = [
        list(training_batches(stream, seed=0, global_batch=4, first_step=i, steps=3, size=SIZE)) for i in (0, 3, 6)
    ]
    stream.close()
    assert begun == [(0, 0)]
    whole_ = batches(Stream(stream.shards, buffer=2), seed=0, steps=9)
    assert_same([batch for part in parts for batch in part], whole_)


def test_whole_epochs_are_not_read_to_be_skipped(tmp_path):
    log = tmp_path / "log"
    (path,) = write(tmp_path, [6])
    stream = Stream([f"pipe:echo x >> {log}; cat {path}"], buffer=2)
    late = stream.take(1, 6 * 1000 + 2, 3)
    stream.close()
    assert len(log.read_text().split()) < 100
    other = Stream([path], buffer=2)
    assert [p.key for p in late] == [p.key for p in islice(other._epoch(1, 1000), 2, 5)]


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_broken_picture_has_a_substitute_and_is_listed(tmp_path):
    bad_ones = {2, 5}
    paths = write(tmp_path, [5, 4], lambda i: b"broken" if i in bad_ones else picture(i))
    whole_ = batches(Stream(paths, buffer=3))
    ranks = [batches(Stream(paths, buffer=3), rank=rank, world_size=2) for rank in range(2)]
    for one, *parts in zip(whole_, *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), one.pictures)
        assert len(one.pictures) == 4
    stream = Stream(paths, buffer=3)
    listed = BadSamples(stream, tmp_path / "bad.jsonl", limit=2 / SURE)
    for batch in whole_:
        listed.add(batch.bad)
    assert listed.known == {("002", str(paths[0])), ("005", str(paths[1]))}
    listed.limit = 1.5 / SURE
    with pytest.raises(DataError, match="2 of 1000 pictures"):
        listed.add(())


@pytest.mark.parametrize("at", [0.3, 0.6, 0.97])
def test_a_cut_shard_stops_instead_of_looking_shorter(tmp_path, at):
    data = tar_bytes([(f"{i}.png", picture(i)) for i in range(9)])
    data = data[: data.rindex(b"IEND") + 600]  # without the zeros that tar pads with
    path = tmp_path / "cut.tar"
    path.write_bytes(data[: int(len(data) * at)])
    for source in (path, f"pipe:cat {path}"):
        with pytest.raises(DataError, match=r"cut\.tar is truncated"):
            keys(Stream([source]), 30)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("source", "says"),
    [("pipe:cat {}/a.tar; exit 9", "exit status 9"), ("{}/none.tar", "cannot be read"), ("{}/empty.tar", "no picture")],
)
def test_a_source_that_fails_is_an_error_in_the_loop(tmp_path, source, says, workers):
    (tmp_path / "a.tar").write_bytes(tar_bytes([("1.png", picture(1)), ("2.png", picture(2))]))
    (tmp_path / "empty.tar").write_bytes(tar_bytes([("1.json", b"{}")]))
    stream = Stream([source.format(tmp_path)], buffer=1)
    with pytest.raises(DataError, match=says):
        batches(stream, workers=workers)
    stream.close()


def test_a_source_that_gives_other_pictures_the_next_time_is_refused(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.tar").write_bytes(tar_bytes([(f"{i}-{k}.png", picture(k)) for k in range(3)]))
    source = (
        f"pipe:touch {tmp_path}/x; echo >> {tmp_path}/x; cat {tmp_path}/$(( ($(wc -l < {tmp_path}/x) - 1) % 2 )).tar"
    )
    with pytest.raises(DataError, match="gave other pictures than when it was read before"):
        keys(Stream([source], buffer=1), 9)


def test_a_picture_that_is_measured_on_is_not_trained_on(tmp_path):
    paths = write(tmp_path, [3, 4])
    (tmp_path / "val.tar").write_bytes(tar_bytes([("other-name.png", picture(5)), ("new.png", picture(99))]))
    held_out = fingerprints(index_shards([tmp_path / "val.tar"]))
    with pytest.raises(DataError, match=r"--val is no measure: its picture '005' of .*01\.tar is in --data too"):
        keys(Stream(paths, held_out), 7)
    assert Counter(keys(Stream(paths[:1], held_out), 6)) == Counter({f"{i:03d}": 2 for i in range(3)})


def test_a_lost_connection_goes_on_where_it_stopped(server, tmp_path):
    body = write(tmp_path, [40])[0].read_bytes()
    server.answers["/a.tar"] = first(cut(body, len(body) // 3), cut(body, len(body) // 2), whole(body))
    stream = Stream([f"{server.url}/a.tar"], buffer=1, patience=QUICK)
    assert keys(stream, 40) == [f"{i:03d}" for i in range(40)]


def test_the_identity_is_of_names_and_buffer(tmp_path):
    a, b = Stream(["x.tar", "y.tar"]), Stream(["y.tar", "x.tar"])
    assert len({a.digest, b.digest, Stream(["x.tar", "y.tar"], buffer=7).digest}) == 3
    assert Stream(["x.tar", Path("y.tar")]).digest == a.digest
