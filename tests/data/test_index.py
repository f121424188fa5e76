"""The index of shards: what it finds, reads, caches and refuses. webdataset's own reader is the judge."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bcosify.core.errors import DataError
from bcosify.data import index as index_module
from bcosify.data.index import index_shards
from bcosify.data.names import expand
from bcosify.data.order import split

from tars import jpeg, samples_of, simple_tar, write_tar


def test_index_finds_what_webdataset_reads(tmp_path):
    members = []
    for i in range(6):
        members += [(f"dir.d/{i:03d}.jpg", jpeg(i)), (f"dir.d/{i:03d}.Mask.PNG", b"mask%d" % i)]
        members += [(f"dir.d/{i:03d}.json", b'{"i": %d}' % i)] if i % 2 else []
    paths = [write_tar(tmp_path / "a.tar", members), simple_tar(tmp_path / "b.tar")]
    index = index_shards(paths)
    expected = [sample for path in paths for sample in samples_of(path)]
    assert len(index) == len(expected) == 11
    for i, sample in enumerate(expected):
        kinds = [kind for kind in sample if not kind.startswith("__")]
        assert index.key(i) == sample["__key__"]
        assert sorted(index.extensions(i)) == sorted(kinds)
        assert all(index.read(i, kind) == sample[kind] for kind in kinds)
        assert index.read(i) == sample["jpg"]
        assert index.file(i).path == str(paths[i // 6])


def test_pictures_read_without_the_index(tmp_path):
    index = index_shards([simple_tar(tmp_path / "a.tar"), simple_tar(tmp_path / "b.tar", 3, 5)])
    positions = [7, 0, 4, 5]
    pictures = pickle.loads(pickle.dumps(index.pictures(positions)))
    assert [picture.id for picture in pictures] == positions
    for i, picture in zip(positions, pictures, strict=True):
        assert picture.read() == index.read(i)
        assert (picture.key, picture.shard) == (index.key(i), index.file(i).path)


@pytest.mark.parametrize("i", [-1, 5])
def test_a_position_outside_is_an_index_error(tmp_path, i):
    with pytest.raises(IndexError):
        index_shards([simple_tar(tmp_path / "a.tar")]).read(i)


def test_a_member_that_is_not_there_lists_those_that_are(tmp_path):
    with pytest.raises(DataError, match=r"a.tar: sample 'k0001' has no 'cls'; it has jpg"):
        index_shards([simple_tar(tmp_path / "a.tar")]).read(1, "cls")


def test_the_first_kind_of_picture_wins_and_samples_without_one_are_counted(tmp_path):
    members = [("a.png", b"p"), ("a.jpg", b"j"), ("b.json", b"{}"), ("c.mask.png", b"m"), ("d.webp", b"w")]
    index = index_shards([write_tar(tmp_path / "a.tar", members)])
    assert [(index.key(i), index.read(i)) for i in range(len(index))] == [("a", b"j"), ("d", b"w")]
    assert index.without_picture == 2


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    names = ["d/" * 90 + "x" * 150 + ".jpg", "猫/Ünïcode.jpg", "bad\udcff.jpg"]
    index = index_shards(
        [write_tar(tmp_path / "a.tar", [(name, name[-9:].encode("utf-8", "replace")) for name in names], format)]
    )
    again = index_shards([tmp_path / "a.tar"])  # from the cache
    assert [index.key(i) for i in range(3)] == [again.key(i) for i in range(3)] == [name[:-4] for name in names]
    assert [index.read(i) for i in range(3)] == [name[-9:].encode("utf-8", "replace") for name in names]


def test_folders_links_and_webdatasets_notes_are_no_samples(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("dir.jpg", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "k.jpg"
            archive.addfile(info)
        for name in ("__meta__/x.jpg", "._k.jpg", "README", "k.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    index = index_shards([path])
    assert [index.key(i) for i in range(len(index))] == [sample["__key__"] for sample in samples_of(path)] == ["k"]


def test_payloads_are_not_read_into_memory(tmp_path):
    path = tmp_path / "big.tar"
    info = tarfile.TarInfo("big.jpg")
    info.size = 1 << 30
    with open(path, "wb") as stream:  # a hole of 1 GiB
        stream.write(info.tobuf())
        stream.truncate(512 + info.size + 1024)
    tracemalloc.start()
    assert len(index_shards([path])) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# -------------------------------------------------------------------------------------------------------------- reading


def test_an_index_can_be_pickled_and_reads_on(tmp_path):
    index = index_shards([simple_tar(tmp_path / "a.tar")])
    expected = [index.read(i) for i in range(5)]
    copy = pickle.loads(pickle.dumps(index))
    assert [copy.read(i) for i in range(5)] == expected
    assert copy.digest == index.digest


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_open_files_are_limited(tmp_path):
    paths = [write_tar(tmp_path / f"{i:03d}.tar", [("k.jpg", b"%d" % i)]) for i in range(index_module.OPEN_FILES + 40)]
    index = index_shards(paths)
    index_module._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    assert [index.read(i) for i in range(len(paths))] == [b"%d" % i for i in range(len(paths))]
    assert len(os.listdir("/proc/self/fd")) - before == index_module.OPEN_FILES


def test_threads_never_read_through_a_closed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_opened", index_module.functools.lru_cache(2)(index_module._Open))
    index = index_shards([write_tar(tmp_path / f"{i}.tar", [("k.jpg", b"%d" % i * 50)]) for i in range(10)])
    wanted = np.random.default_rng(0).integers(0, 10, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(index.read, wanted)) == [b"%d" % i * 50 for i in wanted]


# ---------------------------------------------------------------------------------------------------------------- cache


def cached_files(cache: Path) -> list[Path]:
    return list((cache / "bcosify" / "index").glob("*"))


def test_a_second_index_comes_from_the_cache(tmp_path, own_cache, monkeypatch):
    path = simple_tar(tmp_path / "a.tar")
    first = index_shards([path])
    assert (
        len(cached_files(own_cache)) == 1 and json.loads(cached_files(own_cache)[0].read_text())["keys"][0] == "k0000"
    )
    monkeypatch.setattr(index_module, "_scan", lambda file: pytest.fail("scanned again"))
    again = index_shards([path])
    assert again.digest == first.digest
    assert [again.read(i) for i in range(5)] == [first.read(i) for i in range(5)]
    assert [again.key(i) for i in range(5)] == [first.key(i) for i in range(5)]


def test_a_touched_shard_is_scanned_again(tmp_path, own_cache, monkeypatch):
    path = simple_tar(tmp_path / "a.tar")
    index_shards([path])
    os.utime(path, ns=(1, 1))
    scanned = []
    scan = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda file: scanned.append(file) or scan(file))
    index_shards([path])
    assert len(scanned) == len(cached_files(own_cache)) == 1


@pytest.mark.parametrize("rubbish", ["", "{", "[]", '{"file": 1}', '{"keys": []}'])
def test_a_broken_cache_is_no_error(tmp_path, own_cache, rubbish):
    path = simple_tar(tmp_path / "a.tar")
    digest = index_shards([path]).digest
    (file,) = cached_files(own_cache)
    file.write_text(rubbish)
    assert index_shards([path]).digest == digest
    assert json.loads(file.read_text())["keys"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(index_shards([simple_tar(tmp_path / "a.tar")])) == 5


def test_a_broken_shard_is_not_cached(tmp_path, own_cache):
    path = simple_tar(tmp_path / "a.tar")
    os.truncate(path, 700)
    with pytest.raises(DataError):
        index_shards([path])
    assert not cached_files(own_cache)


# --------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_is_of_the_data_not_of_the_place(tmp_path):
    paths = [simple_tar(tmp_path / "here" / "a.tar"), simple_tar(tmp_path / "here" / "b.tar", 3, 9)]
    digest = index_shards(paths).digest
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert index_shards(expand(tmp_path / "there")).digest == digest
    others = [
        index_shards(paths[::-1]),
        index_shards(paths[:1]),
        split(index_shards(paths), 2)[0],
        split(index_shards(paths), 2)[1],
        index_shards([simple_tar(tmp_path / "c.tar", 5, 1), paths[1]]),
    ]
    assert len({digest, *(other.digest for other in others)}) == 6
