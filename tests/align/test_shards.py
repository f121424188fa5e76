"""Shards: naming, indexing, reading, ordering, splitting and writing. webdataset's own reader is the judge."""

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
import skimage.data
import webdataset
from bcosify.cli.shards import shards as shards_verb
from bcosify.core.errors import CheckpointError, DataError
from bcosify.data import shards
from bcosify.data.shards import batch_indices, decode, expand, index_shards, order, overlap, split, write_shards
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """Each test has a cache of its own, away from the user's."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def jpeg(seed: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def simple_tar(path: Path, count: int = 5, first: int = 0) -> Path:
    return write_tar(path, [(f"k{i:04d}.jpg", jpeg(i)) for i in range(first, first + count)])


def samples_of(path: Path) -> list[dict]:
    """What webdataset reads."""
    return list(webdataset.WebDataset(str(path), shardshuffle=False))


# -------------------------------------------------------------------------------------------------------------- naming


@pytest.fixture
def three(tmp_path) -> Path:
    for i in range(3):
        (tmp_path / f"train-{i:05d}.tar").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["{}/train-{{00000..00002}}.tar", "{}/*.tar", "{}", "{0}/train-00000.tar::{0}/train-0000[12].tar", "file:{}/*.tar"],
)
def test_expand_takes_every_way_to_name_shards(three, pattern):
    assert [path.name for path in expand(pattern.format(three))] == [f"train-{i:05d}.tar" for i in range(3)]


def test_expand_takes_lists_in_their_order_and_each_shard_once(three):
    names = [path.name for path in expand([three / "train-00002.tar", f"{three}/*.tar"])]
    assert names == ["train-00002.tar", "train-00000.tar", "train-00001.tar"]


def test_expand_takes_a_name_that_exists_as_it_is(tmp_path):
    path = tmp_path / "odd{1,2}[x]::name.tar"
    path.touch()
    assert expand(str(path)) == [path]


def test_expand_says_which_shards_are_missing(three):
    with pytest.raises(DataError, match=r"2 of 5 shards do not exist: .*train-00003.tar.*holds 3 \.tar files"):
        expand(f"{three}/train-{{00000..00004}}.tar")


def test_expand_names_the_near_miss(three):
    with pytest.raises(DataError, match=r"No shard .*trian-00001.tar.*Did you mean 'train-00001.tar'"):
        expand(f"{three}/trian-00001.tar")


def test_expand_says_that_the_folder_is_missing(tmp_path):
    with pytest.raises(DataError, match="There is no folder .*nowhere"):
        expand(f"{tmp_path}/nowhere/a.tar")


def test_expand_leaves_remote_shards_as_they_are_spelt(three):
    data = [f"http://host/{{0..1}}.tar?v=2::pipe:cat {three}/train-{{00000..00001}}.tar | cat", three]
    assert expand(data) == [
        "http://host/0.tar?v=2",
        "http://host/1.tar?v=2",
        f"pipe:cat {three}/train-00000.tar | cat",
        f"pipe:cat {three}/train-00001.tar | cat",
        *sorted(three.glob("*.tar")),
    ]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("s3://b/a.tar", r"s3:// are not supported; .* Read it as 'pipe:aws s3 cp s3://b/a.tar -'"),
        ("htps://b/a.tar", "htps:// are not supported; .* Did you mean 'https'"),
        ("pipe: ", "names no command"),
        ("https:///a.tar", "a URL is https://HOST/PATH"),
        ("https://me:secret@host/a.tar?key=hidden", "password is needed: 'pipe:curl"),
    ],
)
def test_expand_refuses_what_it_cannot_read(source, says):
    with pytest.raises(DataError, match=says) as caught:
        expand(source)
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["", [], "a{0..1.tar", "${NOT_SET_ANYWHERE}/a.tar"])
def test_expand_refuses_what_is_no_pattern(pattern):
    with pytest.raises(DataError):
        expand(pattern)


def test_a_folder_of_pictures_is_told_how_to_become_shards(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=r"no \.tar files \(it holds: 1 \.jpg\).*bcosify shards"):
        expand(tmp_path)


# --------------------------------------------------------------------------------------------------------------- index


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


# ------------------------------------------------------------------------------------------------------- broken shards


def whole_length(path: Path) -> int:
    """Bytes up to the end of the last member, after which the zeros begin."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    data = simple_tar(tmp_path / "whole.tar", 3).read_bytes()
    end = whole_length(tmp_path / "whole.tar")
    path = tmp_path / "cut.tar"
    for length in [*range(0, end + 512, 41), 511, 512, 513, end - 1, end, end + 511]:
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"cut\.tar .*byte"):
            index_shards([path])
    path.write_bytes(data[: end + 512])
    assert len(index_shards([path])) == 3


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_cut_inside_an_extended_header_is_refused(tmp_path, format):
    members = [(f"{'long' * 60}{i}.jpg", jpeg(i)) for i in range(2)]
    data = write_tar(tmp_path / "whole.tar", members, format).read_bytes()
    end = whole_length(tmp_path / "whole.tar")
    path = tmp_path / "cut.tar"
    for length in range(1, end + 512, 67):
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            index_shards([path])


def test_a_cut_member_is_named_with_its_place(tmp_path):
    path = simple_tar(tmp_path / "a.tar", 3)
    with tarfile.open(path) as archive:
        member = archive.getmembers()[2]
    os.truncate(path, member.offset_data + 10)
    start, size = member.offset_data, member.size
    found = rf"'k0002.jpg' begins at byte {start} and has {size} bytes, .* ends at byte {start + 10}"
    with pytest.raises(DataError, match=found):
        index_shards([path])


def test_a_cut_header_is_placed(tmp_path):
    path = simple_tar(tmp_path / "a.tar", 3)
    with tarfile.open(path) as archive:
        header = archive.getmembers()[2].offset
    os.truncate(path, header + 100)
    with pytest.raises(DataError, match=rf"truncated: it ends at byte {header + 100}, and at byte {header}"):
        index_shards([path])


def test_a_broken_header_in_the_middle_is_refused_where_the_standard_library_stops_quietly(tmp_path):
    path = simple_tar(tmp_path / "a.tar", 3)
    with tarfile.open(path) as archive:
        header = archive.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    data[header + 3] ^= 0xFF
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 1
    with pytest.raises(DataError, match=rf"a\.tar is broken at byte {header} of"):
        index_shards([path])


def test_joined_tars_are_refused(tmp_path):
    first, second = (simple_tar(tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    (tmp_path / "ab.tar").write_bytes(first + second)
    with pytest.raises(DataError, match=rf"ab\.tar goes on after its end, at byte {len(first)}"):
        index_shards([tmp_path / "ab.tar"])


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a.jpg", b"1"), ("a.jpg", b"2")], r"'a\.jpg' is there twice, at byte 512 and at byte 1536"),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")], r"'a\.jpg' is there twice"),
        (
            [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"3")],
            r"key 'a' are not next to each other.*'a\.json' at byte 2560",
        ),
        ([("a.json", b"{}"), ("b.cls", b"1")], r"holds 2 samples but no picture: found \.json, \.cls"),
        ([("img.0.jpg", b"1"), ("img.1.jpg", b"2")], r"no picture: found \.0\.jpg, \.1\.jpg.*first dot"),
        ([], r"holds no samples"),
    ],
)
def test_samples_that_make_no_sense_are_refused(tmp_path, members, says):
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=r"(?s)bad\.tar.*" + says):
        index_shards([path])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"no tar " * 200, "is no tar archive"),
        (b"\x1f\x8b" + bytes(2000), "is compressed.*gunzip"),
        (b"PK\3\4" + bytes(2000), "is compressed.*unzip"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, data, says):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar " + says):
        index_shards([tmp_path / "x.tar"])


def test_all_bad_shards_are_listed_at_once(tmp_path):
    paths = [simple_tar(tmp_path / f"{i}.tar") for i in range(4)]
    os.truncate(paths[1], 600)
    paths[3].unlink()
    with pytest.raises(
        DataError, match=r"(?s)2 of 4 shards cannot be used:.*1\.tar is truncated.*3\.tar cannot be read: No such"
    ):
        index_shards(paths)


def test_a_shard_that_changes_after_indexing_is_refused(tmp_path):
    index = index_shards([simple_tar(tmp_path / "a.tar")])
    simple_tar(tmp_path / "a.tar", 9)
    with pytest.raises(DataError, match=r"a\.tar has changed since it was indexed"):
        index.read(0)
    assert len(index_shards([tmp_path / "a.tar"])) == 9


# ------------------------------------------------------------------------------------------------------------- reading


def test_an_index_can_be_pickled_and_reads_on(tmp_path):
    index = index_shards([simple_tar(tmp_path / "a.tar")])
    expected = [index.read(i) for i in range(5)]
    copy = pickle.loads(pickle.dumps(index))
    assert [copy.read(i) for i in range(5)] == expected
    assert copy.digest == index.digest


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_open_files_are_limited(tmp_path):
    paths = [write_tar(tmp_path / f"{i:03d}.tar", [("k.jpg", b"%d" % i)]) for i in range(shards.OPEN_FILES + 40)]
    index = index_shards(paths)
    shards._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    assert [index.read(i) for i in range(len(paths))] == [b"%d" % i for i in range(len(paths))]
    assert len(os.listdir("/proc/self/fd")) - before == shards.OPEN_FILES


def test_threads_never_read_through_a_closed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_opened", shards.functools.lru_cache(2)(shards._Open))
    index = index_shards([write_tar(tmp_path / f"{i}.tar", [("k.jpg", b"%d" % i * 50)]) for i in range(10)])
    wanted = np.random.default_rng(0).integers(0, 10, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(index.read, wanted)) == [b"%d" % i * 50 for i in wanted]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_decode_gives_rgb(mode):
    stream = io.BytesIO()
    source = Image.fromarray(skimage.data.chelsea()[::8, ::8]).convert(mode)
    source.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode(stream.getvalue()), source.convert("RGB"))


def test_decode_keeps_the_greys_of_sixteen_bits():
    stream = io.BytesIO()
    Image.fromarray((np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)).save(stream, "PNG")
    assert np.array_equal(np.asarray(decode(stream.getvalue()))[..., 1], (np.arange(64) * 4).reshape(8, 8))


def test_decode_turns_pictures_upright():
    source = Image.fromarray(skimage.data.astronaut()[::8, ::4])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by a quarter
    stream = io.BytesIO()
    source.save(stream, "PNG", exif=exif)
    assert np.array_equal(decode(stream.getvalue()), source.transpose(Image.Transpose.ROTATE_270))


# --------------------------------------------------------------------------------------------------------------- cache


def cached_files(cache: Path) -> list[Path]:
    return list((cache / "bcosify" / "index").glob("*"))


def test_a_second_index_comes_from_the_cache(tmp_path, own_cache, monkeypatch):
    path = simple_tar(tmp_path / "a.tar")
    first = index_shards([path])
    assert (
        len(cached_files(own_cache)) == 1 and json.loads(cached_files(own_cache)[0].read_text())["keys"][0] == "k0000"
    )
    monkeypatch.setattr(shards, "_scan", lambda file: pytest.fail("scanned again"))
    again = index_shards([path])
    assert again.digest == first.digest
    assert [again.read(i) for i in range(5)] == [first.read(i) for i in range(5)]
    assert [again.key(i) for i in range(5)] == [first.key(i) for i in range(5)]


def test_a_touched_shard_is_scanned_again(tmp_path, own_cache, monkeypatch):
    path = simple_tar(tmp_path / "a.tar")
    index_shards([path])
    os.utime(path, ns=(1, 1))
    scanned = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda file: scanned.append(file) or scan(file))
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


# -------------------------------------------------------------------------------------------------------------- digest


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


# --------------------------------------------------------------------------------------------------------------- order

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


# --------------------------------------------------------------------------------------------------------------- split


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


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def photos(tmp_path) -> Path:
    """Real photographs, in several formats, and two files that are no pictures."""
    folder = tmp_path / "photos"
    (folder / "a.b").mkdir(parents=True)
    Image.fromarray(skimage.data.chelsea()).save(folder / "cat.1.png")
    Image.fromarray(skimage.data.coffee()).save(folder / "coffee.jpeg", quality=95)
    Image.fromarray(skimage.data.rocket()).save(folder / "a.b" / "rocket.webp")
    Image.fromarray(skimage.data.camera()).save(folder / "a.b" / "camera.JPG")
    Image.fromarray(skimage.data.astronaut()[:40, :30]).save(folder / "small.jpg")
    (folder / "broken.jpg").write_bytes((folder / "coffee.jpeg").read_bytes()[:20000])
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("not even meant to be one")
    (folder / ".hidden.jpg").write_text("not seen")
    return folder


def test_written_shards_hold_the_pictures(photos, tmp_path):
    written = write_shards(photos, tmp_path / "out", size=64, per_shard=2)
    assert (written.pictures, written.shards) == (5, 3)
    assert [item.path for item in written.skipped] == ["broken.jpg", "text.png"]
    assert "truncated" in written.skipped[0].reason
    paths = expand(tmp_path / "out")
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert written.bytes == sum(path.stat().st_size for path in paths)
    index = index_shards(paths)
    samples = [sample for path in paths for sample in samples_of(path)]
    assert [sample["__key__"] for sample in samples] == ["a_b/camera", "a_b/rocket", "cat_1", "coffee", "small"]
    assert [index.read(i) for i in range(5)] == [sample["jpg"] for sample in samples]
    sizes = [decode(sample["jpg"]).size for sample in samples]
    assert sizes == [(64, 64), (96, 64), (96, 64), (96, 64), (30, 40)]
    cat = np.asarray(decode(samples[2]["jpg"]), float)
    expected = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((96, 64), Image.Resampling.BICUBIC), float)
    assert np.abs(cat - expected).mean() < 4
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["broken.jpg", "text.png"]


def test_the_same_pictures_give_the_same_bytes(photos, tmp_path):
    write_shards(photos, tmp_path / "one", size=64)
    for path in photos.rglob("*"):
        os.utime(path, (1, 1))
    shutil.copytree(photos, tmp_path / "elsewhere")
    write_shards(tmp_path / "elsewhere", tmp_path / "two", size=64)
    assert (tmp_path / "one" / "00000.tar").read_bytes() == (tmp_path / "two" / "00000.tar").read_bytes()


def test_a_jpeg_that_needs_no_change_is_copied(photos, tmp_path):
    write_shards(photos, tmp_path / "out", size=None)
    samples = {sample["__key__"]: sample["jpg"] for sample in samples_of(tmp_path / "out" / "00000.tar")}
    assert samples["coffee"] == (photos / "coffee.jpeg").read_bytes()
    assert decode(samples["cat_1"]).size == (451, 300)
    camera = Image.open(io.BytesIO(samples["a_b/camera"]))
    assert camera.mode == "RGB" and camera.format == "JPEG"


def test_a_turned_jpeg_is_stored_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "in" / "a.jpg", exif=exif)
    write_shards(tmp_path / "in", tmp_path / "out", size=None)
    (sample,) = samples_of(tmp_path / "out" / "00000.tar")
    stored = Image.open(io.BytesIO(sample["jpg"]))
    assert stored.size == (300, 451) and stored.getexif().get(0x0112, 1) == 1


def test_keys_are_unique_and_survive_webdataset(tmp_path):
    names = [
        "a.jpg",
        "a.png",
        "a-2.png",
        "x.y.jpg",
        "x_y.jpg",
        "__m__.jpg",
        "ü ß.jpg",
        "...jpg",
        "d.e/f g.jpg",
        "n" * 150 + ".jpg",
    ]
    for name in names:
        path = tmp_path / "100% in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")
    written = write_shards(tmp_path / "100% in", tmp_path / "100%d out")
    keys = [sample["__key__"] for sample in samples_of(Path(written.out) / "00000.tar")]
    assert len(keys) == len(set(keys)) == written.pictures == len(names) - 1  # "...jpg" is hidden
    assert not any("." in key or " " in key for key in keys)
    assert len(index_shards(expand(written.out))) == len(keys)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="holds no pictures .it holds: no files"):
        write_shards(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.txt").touch()
    with pytest.raises(DataError, match="it holds: 1 .txt"):
        write_shards(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="is no folder"):
        write_shards(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in" / "a.jpg").write_text("x")
    with pytest.raises(DataError, match=r"None of the 1 pictures .* can be read. The first is a\.jpg"):
        write_shards(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_an_existing_folder_is_kept_unless_told(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        write_shards(photos, out)
    assert os.listdir(out) == ["mine"]
    write_shards(photos, out, size=32, overwrite=True)
    assert sorted(os.listdir(out)) == ["00000.tar", "skipped.jsonl"]


@pytest.mark.parametrize("wrong", [{"size": 0}, {"per_shard": 0}, {"quality": 0}, {"quality": 101}])
def test_numbers_out_of_range_are_refused(photos, tmp_path, wrong):
    with pytest.raises(DataError, match="at least 1"):
        write_shards(photos, tmp_path / "out", **wrong)


def test_the_verb_returns_its_result_and_leaves_stdout_to_the_command(photos, tmp_path, capsys):
    result = shards_verb(photos, tmp_path / "out", size=32, json=True)
    printed = capsys.readouterr()
    assert printed.out == "" and json.loads(json.dumps(result))["pictures"] == 5
    assert "5 pictures in 1 shards" in printed.err and "broken.jpg" in printed.err


def test_overlap_finds_the_same_bytes_under_any_key(photos, tmp_path):
    write_shards(photos, tmp_path / "all", size=32)
    everything = index_shards(expand(tmp_path / "all"))
    train, val = split(everything, 2)
    assert overlap(train, val) == []
    assert sorted(overlap(everything, val)) == sorted((val.key(i), val.key(i)) for i in range(len(val)))
    assert everything.sizes.tolist() == [len(everything.read(i)) for i in range(len(everything))]
