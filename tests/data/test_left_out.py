"""What shards and folders hold beside pictures is counted and said, and what strangers' tars claim is bounded."""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import pytest
from bcosify.core.errors import DataError, DataWarning
from bcosify.data import index as index_module
from bcosify.data.folders import LeftOut, is_hidden, pictures_in, unique
from bcosify.data.index import index_shards
from bcosify.data.names import expand
from bcosify.data.pack import write_shards
from bcosify.data.stream import Stream
from PIL import Image

from tars import jpeg, simple_tar, write_tar


def indexed(paths: list[Path]) -> list[str]:
    index = index_shards(paths)
    return [index.key(i) for i in range(len(index))]


def read_through(paths: list[Path], count: int = 40) -> list[str]:
    """Keys of a stream, up to the first that comes again."""
    stream = Stream(paths, buffer=1)
    found = [picture.key for picture in stream.take(0, 0, count)]
    stream.close()
    return list(dict.fromkeys(found))


both = pytest.mark.parametrize("keys_of", [indexed, read_through])


# --------------------------------------------------------------------------------------------------------------- shards


@both
def test_names_with_dots_are_counted_and_said(tmp_path, keys_of):
    names = [f"p{i}.jpg" for i in range(6)] + [f"holiday 2.0 {i}.jpg" for i in range(6)]
    path = write_tar(tmp_path / "a.tar", [(name, jpeg(i)) for i, name in enumerate(names)])
    with pytest.warns(
        DataWarning, match=r"1 shard: 6 with another dot in the name \(such as 'holiday 2\.0 0\.jpg'\)\."
    ):
        assert keys_of([path]) == [f"p{i}" for i in range(6)]


@both
def test_a_key_with_several_pictures_is_said_and_a_mask_is_none_of_them(tmp_path, keys_of):
    members = [("a.jpg", jpeg()), ("a.0 0.jpg", jpeg(1)), ("a.mask.png", jpeg(2)), ("a.json", b"{}")]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.warns(DataWarning, match=r"shard: 1 beside the first picture of a key \(such as 'a\.0 0\.jpg'\)\.$"):
        assert keys_of([path]) == ["a"]


@both
def test_what_macs_write_beside_pictures_is_left_out(tmp_path, keys_of):
    members = [("pics/", b"")] + [(f"pics/{dot}p{i}.jpg", jpeg(i)) for i in range(3) for dot in ("._", "")]
    path = write_tar(tmp_path / "a.tar", [*members[1:], ("pics/.DS_Store", b"x"), ("README", b"x")])
    with pytest.warns(DataWarning, match=r"4 hidden \(such as 'pics/\._p0\.jpg'\), 1 without an ending"):
        assert keys_of([path]) == [f"pics/p{i}" for i in range(3)]


@both
def test_all_reasons_are_of_all_shards(tmp_path, keys_of):
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("f.jpg", tarfile.FIFOTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "k.jpg"
                archive.addfile(info)
            for name in (f"{number}.jpg", f"x{number}.cls"):
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert sorted(keys_of(paths)) == ["0", "1"]
    text = "Left out of 2 shards: 4 linked (such as 'l.jpg'), 2 no regular files (such as 'f.jpg'), 2 without a picture"
    assert str(said[-1].message).startswith(text)
    assert len(said) == (1 if keys_of is indexed else 2)  # a stream says what the first shard has, then the sum


def test_what_was_left_out_is_said_from_the_cache_too(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg()), ("b.1.jpg", jpeg())])
    for _ in range(2):
        with pytest.warns(DataWarning, match="1 with another dot"):
            assert index_shards([path]).left_out.counts == {"with another dot in the name": 1}


def test_nothing_is_said_where_nothing_is_left_out(tmp_path):
    members = [("d/a.jpg", jpeg()), ("d/a.json", b"{}"), ("d/a.mask.png", b""), ("__meta__/x.json", b"{}")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index_shards([write_tar(tmp_path / "a.tar", members)])


def test_a_poisoned_cache_drops_no_picture(tmp_path, own_cache):
    path = simple_tar(tmp_path / "a.tar")
    digest = index_shards([path]).digest
    (file,) = (own_cache / "bcosify" / "index").glob("*")
    found = json.loads(file.read_text())
    found["keys"].pop()
    found["columns"] = {name: values[:-1] for name, values in found["columns"].items()}
    file.write_text(json.dumps(found))
    assert index_shards([path]).digest == digest


def test_a_tar_of_the_same_size_and_time_is_indexed_again(tmp_path):
    path = simple_tar(tmp_path / "a.tar")
    stat = path.stat()
    digest = index_shards([path]).digest
    data = path.read_bytes()
    write_tar(path, [(f"other{i}"[:5] + ".jpg", jpeg(i)) for i in range(1)])
    path.write_bytes(data.replace(b"k0000.jpg", b"k9999.jpg", 1))
    other = bytearray(path.read_bytes())
    other[148:156] = b"%06o\0 " % (sum(other[:148]) + 8 * 32 + sum(other[156:512]))
    path.write_bytes(other)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    index = index_shards([path])
    assert index.key(0) == "k9999" and index.digest != digest


# -------------------------------------------------------------------------------------------------------------- hostile


def header(name: str, kind: bytes, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(text: bytes) -> bytes:
    record = b" " + text + b"\n"
    length = len(record) + 1
    while len(b"%d" % length) + len(record) != length:
        length += 1
    record = b"%d" % length + record
    return header("x", tarfile.XHDTYPE, len(record)) + record.ljust(-(-len(record) // 512) * 512, b"\0")


PICTURE = header("a.jpg", tarfile.REGTYPE, 512) + bytes(512)
END = bytes(1024)


@both
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (header("a.jpg", tarfile.GNUTYPE_SPARSE, 512) + bytes(512), r"'a\.jpg' is a sparse member.*again without -S"),
        (pax(b"GNU.sparse.major=1") + PICTURE, r"sparse member.*again without -S"),
        (header("x", tarfile.XHDTYPE, 6 << 30), r"broken at byte 0: extended headers without end"),
        (pax(b"comment=x") * 5000 + PICTURE, r"extended headers without end"),
        (header("x", tarfile.GNUTYPE_LONGNAME, 1 << 40), r"extended headers without end"),
        (pax(b"path=a\0b.jpg") + PICTURE, r"name 'a\\x00b\.jpg' holds a zero byte"),
        (pax(b"size=-5") + PICTURE, r"has a size below 0"),
        (header("a.jpg", tarfile.REGTYPE, 1 << 60), r"'a\.jpg' begins at byte 512 and has 1152921504606846976 bytes"),
    ],
    ids=["sparse", "sparse by pax", "a long header", "many headers", "a long name", "a zero byte", "negative", "a lie"],
)
def test_headers_that_lie_are_refused(tmp_path, keys_of, data, says):
    (tmp_path / "a.tar").write_bytes(data + END)
    with pytest.raises(DataError, match=r"(?s)a\.tar.*" + says):
        keys_of([tmp_path / "a.tar"])


@both
def test_headers_that_extend_others_are_read(tmp_path, keys_of):
    (tmp_path / "a.tar").write_bytes(pax(b"comment=x") * 5 + pax(b"path=" + b"d/" * 200 + b"long.jpg") + PICTURE + END)
    assert keys_of([tmp_path / "a.tar"]) == ["d/" * 200 + "long"]


@both
def test_a_fifo_is_no_shard(tmp_path, keys_of):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar is a pipe, a device or the like, and no regular file"):
        keys_of(expand(str(tmp_path / "a.tar")))


@both
def test_a_device_is_no_shard(keys_of):
    with pytest.raises(DataError, match=r"/dev/zero is a pipe, a device"):
        keys_of(expand("/dev/zero"))


def test_members_out_of_order_are_refused_with_advice_that_works_on_a_mac(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"3")])
    with pytest.raises(DataError, match=r"find \. -type f \| sort \| tar -cf OUT\.tar -T -$"):
        index_shards([path])


# ---------------------------------------------------------------------------------------------------------------- names


def test_what_macs_write_beside_shards_is_left_out(tmp_path):
    for name in ("00000.tar", "._00000.tar"):
        simple_tar(tmp_path / name)
    with pytest.warns(DataWarning, match=r"1 hidden \(such as '\._00000\.tar'\)"):
        assert [path.name for path in expand(tmp_path)] == ["00000.tar"]
    assert [path.name for path in expand(f"{tmp_path}/*.tar")] == ["00000.tar"]


@pytest.mark.parametrize("folder", ["br[1]", "a*b", "what?"])
def test_a_folder_with_signs_of_patterns_in_its_name(tmp_path, folder):
    (tmp_path / folder / "in").mkdir(parents=True)
    for i in range(2):
        (tmp_path / folder / "in" / f"{i}.tar").touch()
    for pattern in ("in/*.tar", "*/*.tar", "in/[01].tar", "in/{0..1}.tar", "**/*.tar"):
        assert [path.name for path in expand(f"{tmp_path}/{folder}/{pattern}")] == ["0.tar", "1.tar"]


def test_a_zero_byte_names_no_shard():
    with pytest.raises(DataError, match="zero byte"):
        expand("a\0b.tar")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_few_file_descriptors_are_enough_for_many_shards(tmp_path, monkeypatch):
    import resource

    index = index_shards([simple_tar(tmp_path / f"{i:03d}.tar", 1, i) for i in range(40)])
    index_module._opened.cache_clear()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 9, before[1]))
    try:
        assert len({index.read(i) for i in range(len(index))}) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (90, 90))
    assert index_module._kept_open() == 22


def test_too_few_file_descriptors_are_named(tmp_path, monkeypatch):
    index = index_shards([simple_tar(tmp_path / "a.tar")])

    def none_left(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("bcosify.data.index.os.open", none_left)
    with pytest.raises(DataError, match=r"a\.tar cannot be read .*Too many open files \(.*ulimit -n"):
        index.read(0)


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Classes, one of them linked; endings of all kinds; links that lead back and nowhere."""
    folder, away = tmp_path / "mixed", tmp_path / "away"
    for name in ("cats/a.JPG", "cats/b.jfif", "cats/c.jpe", "cats/d.tga", "._a.jpg", ".git/x.png", "n.txt", "none"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "TGA" if name.endswith("tga") else "JPEG")
    (folder / "cats" / "e.heic").write_bytes(b"x")
    away.mkdir()
    Image.new("RGB", (8, 8)).save(away / "dog.png")
    (folder / "dogs").symlink_to(away)
    (folder / "file.png").symlink_to(away / "dog.png")
    (folder / "cats" / "back").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return folder


def test_one_rule_for_what_belongs_to_a_folder(mixed):
    found = pictures_in(mixed)
    assert found.pictures == ("cats/a.JPG", "cats/b.jfif", "cats/c.jpe", "cats/d.tga", "dogs/dog.png", "file.png")
    assert found.left_out.counts == {
        "hidden": 2,
        "linked in a circle": 1,
        ".heic": 1,
        "linked to nowhere": 1,
        ".txt": 1,
        "without an ending": 1,
        "no regular files": 1,
    }
    assert "1 .heic (such as 'cats/e.heic')" in str(found.left_out)


def test_shards_pack_what_belongs_to_the_folder_and_count_the_rest(mixed, tmp_path):
    written = write_shards(mixed, tmp_path / "out")
    assert written.pictures == 6 and written.left_out == pictures_in(mixed).left_out.counts


def test_names_get_numbers_until_they_are_unique():
    assert list(unique(["a", "a", "a-2", "a", "A"])) == ["a", "a-2", "a-2-2", "a-3", "A"]
    assert list(unique(["a", "A", "a-2"], str.casefold)) == ["a", "A-2", "a-2-2"]


def test_hidden_is_a_part_that_begins_with_a_dot():
    assert all(map(is_hidden, [".a", "b/.a", ".b/a", "._a.jpg", "..a"]))
    assert not any(map(is_hidden, ["a.b", "./a", "../a", "a/..", "a"]))


def test_left_out_adds_up():
    found = LeftOut()
    found.add("hidden", ".a")
    found.update(LeftOut({"hidden": (2, ".b"), ".txt": (1, "c.txt")}))
    assert str(found) == "3 hidden (such as '.a'), 1 .txt (such as 'c.txt')" and bool(found) and not LeftOut()
