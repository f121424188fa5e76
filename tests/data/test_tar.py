"""Tars that are cut, broken, joined or no tars are refused, with the place."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from bcosify.core.errors import DataError
from bcosify.data.index import index_shards

from tars import jpeg, simple_tar, write_tar


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
