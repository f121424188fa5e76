"""Reading tars strictly: a tar is whole, or it is an error that says where it ends.

The standard library's own loop, and webdataset's on top of it, end quietly at the first header that they cannot read,
so a cut or damaged shard looks like a shorter one. The loop is written out here, once for files and streams.

Headers are strangers' numbers. The standard library reads extended headers (of pax and GNU) whole, whatever size they
say, and calls itself for each, so they are counted here before it sees them.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from typing import BinaryIO, NamedTuple, Protocol

from webdataset.tariterators import base_plus_ext

from ..core.errors import DataError
from .folders import PICTURES, LeftOut, is_hidden

__all__ = ["DOTTED", "MASKS", "Member", "Sample", "members", "picture", "samples", "streamed"]

MASKS = ("mask.png", "mask.webp", "mask.jpg")  # members that hold the mask of their sample's picture

BLOCK = 512  # a tar is made of blocks of this many bytes; two zero ones end it
AGAIN = "Download or write the shard again."
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\3\4": "unzip, then tar",
}


# Kinds of headers that extend the one after them.
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
EXTENDED += (tarfile.GNUTYPE_LONGLINK,)
MOST_EXTENDED, MOST_BYTES = 32, 16 << 20  # headers and bytes that may extend one; Macs keep attributes of files there
DOTTED = "with another dot in the name"  # so the key is not what people mean
LARGEST = 1 << 30  # bytes of a member that is read


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of the payload
    length: int
    data: bytes = b""  # the payload, where a stream was read


class Sample(NamedTuple):
    """Members that share a key, by their extensions."""

    key: str
    members: dict[str, Member]


def members(stream: BinaryIO, name: str, left_out: LeftOut | None = None) -> Iterator[Member]:
    """The regular files of a tar that can be read anywhere; payloads are not read.

    What else is in it, but for folders and webdataset's own notes, is counted in `left_out`. Raises DataError, which
    begins with `name`, where the tar is not whole, has sparse members, or headers without end.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    return _members(_Seekable(stream, size), name, LeftOut() if left_out is None else left_out)


def streamed(stream: BufferedReader, name: str, left_out: LeftOut | None = None) -> Iterator[Member]:
    """The regular files of a tar that is read once from front to end, with their payloads; as `members` does."""
    return _members(_Streamed(stream), name, LeftOut() if left_out is None else left_out)


def samples(found: Iterable[Member], name: str, left_out: LeftOut | None = None) -> Iterator[Sample]:
    """Samples in their order: neighbours that share the path up to the file name's first dot.

    What no one will look at is counted in `left_out`: see `_count`. Raises DataError where a member is there twice, or
    members of one key are apart.
    """
    left_out = LeftOut() if left_out is None else left_out
    places: dict[str, dict[str, int]] = {}  # key, extension -> byte
    sample: Sample | None = None
    for member in found:
        key, extension = base_plus_ext(member.name)
        if key is None or extension is None:
            left_out.add("without an ending", member.name)  # as webdataset does
            continue
        known = places.setdefault(key, {})
        if (extension := extension.lower()) in known:
            raise DataError(
                f"{name}: {member.name!r} is there twice, at byte {known[extension]} and at byte {member.offset}. "
                f"Write the shard again with one {extension!r} a key."
            )
        if known and (sample is None or key != sample.key):
            raise DataError(
                f"{name}: the members of key {key!r} are not next to each other: one is at byte "
                f"{min(known.values())}, {member.name!r} at byte {member.offset}. Write the shard again with its "
                "members sorted: find . -type f | sort | tar -cf OUT.tar -T -"
            )
        if sample is None or key != sample.key:
            if sample is not None:
                _count(sample, left_out)
                yield sample
            sample = Sample(key, {})
        sample.members[extension] = member
        known[extension] = member.offset
    if sample is not None:
        _count(sample, left_out)
        yield sample


def _count(sample: Sample, left_out: LeftOut) -> None:
    """Counts pictures of a sample that are not the one that is read, and samples without any picture."""
    chosen = picture(sample.members)
    others = [
        member.name
        for extension, member in sample.members.items()
        if extension != chosen and extension not in MASKS and extension.rpartition(".")[2] in PICTURES
    ]
    if others:
        why = "beside the first picture of a key" if chosen else DOTTED
        left_out.add(why, others[0], len(others))
    elif not chosen:
        left_out.add("without a picture", sample.key)


def picture(sample: Mapping[str, object]) -> str:
    """The extension of a sample's picture, empty where it has none."""
    return next((kind for kind in PICTURES if kind in sample), "")


def _refuse(head: bytes, name: str) -> None:
    """DataError where a file begins as something that people take for a tar."""
    if not head:
        raise DataError(f"{name} is empty (0 bytes). {AGAIN}")
    for magic, tool in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{name} is compressed, so its pictures have no offsets. Unpack it to a plain tar: {tool}.")
    if re.match(rb"\s*<(!doctype|html|\?xml|head|body)", head, re.IGNORECASE):
        start = head[:60].decode("utf-8", "replace").strip()
        raise DataError(f"{name} is a web page or an error message, no tar archive: it begins with {start!r}.")


# ------------------------------------------------------------------------------------------------------------- reading


class _Source(Protocol):
    """A tar's bytes, from front to end. `place`: how many were taken."""

    place: int

    @property
    def size(self) -> int | None:
        """How many there are, where that is known."""
        ...

    def take(self, count: int) -> bytes:
        """The next bytes; fewer only at the end."""
        ...

    def payload(self, count: int) -> bytes | None:
        """Goes on after the next bytes, and gives them where they cannot be read later; None where they end early."""
        ...


class _Seekable:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.place = stream, size, 0

    def take(self, count: int) -> bytes:
        self.stream.seek(self.place)
        data = self.stream.read(count)
        self.place += len(data)
        return data

    def payload(self, count: int) -> bytes | None:
        if count > self.size - self.place:
            return None
        self.place += count
        return b""


class _Streamed:
    def __init__(self, stream: BufferedReader) -> None:
        self.stream, self.size, self.place = stream, None, 0

    def take(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.place += len(data)
        return data

    def payload(self, count: int) -> bytes | None:
        """What is larger than LARGEST is read past, and not given."""
        parts, left = [], count
        while left:  # piece by piece: `count` is a stranger's number
            if not (data := self.take(min(left, 1 << 20))):
                return None
            left -= len(data)
            if count <= LARGEST:
                parts.append(data)
        return b"".join(parts)


def _members(source: _Source, name: str, left_out: LeftOut) -> Iterator[Member]:
    archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)))  # an empty one, that keeps what headers say of all
    while (found := _header(source, archive, name)) is not None:
        member, length = found
        begin = source.place
        data = source.payload(member.size) if member.size <= length else None
        if data is None or len(source.take(length - member.size)) < length - member.size:
            end = f"at byte {source.place if source.size is None else source.size}"
            raise DataError(
                f"{name} is truncated: {member.name!r} begins at byte {begin} and has {member.size} bytes, "
                f"but the file ends {end}. {AGAIN}"
            )
        if why := _why_not(member):
            left_out.add(why, member.name)
        elif member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own notes
            yield Member(member.name, begin, member.size, data)


def _why_not(member: tarfile.TarInfo) -> str:
    """Why a member that may be meant as a picture is none, empty where it may be one, or is a folder."""
    if member.isdir():
        return ""
    if is_hidden(member.name):
        return "hidden"
    if member.issym() or member.islnk():
        return "linked"
    if not member.isreg():
        return "no regular files"
    return f"larger than {LARGEST} bytes" if member.size > LARGEST else ""


def _header(source: _Source, archive: tarfile.TarFile, name: str) -> tuple[tarfile.TarInfo, int] | None:
    """The next member, and the bytes up to the header after it; None at the end of the archive."""
    begin, blocks = source.place, []
    while True:
        here = source.place
        block = source.take(BLOCK)
        if not here:
            _refuse(block, name)
        if len(block) < BLOCK:
            raise DataError(
                f"{name} is truncated: it ends at byte {source.place}, and at byte {here} there should be another "
                f"member or the end of the archive. {AGAIN}"
            )
        if not blocks and not block.strip(b"\0"):
            return _check_end(source, name)
        blocks.append(block)
        with _placed(source, here, name):
            head = tarfile.TarInfo.frombuf(block, archive.encoding or "utf-8", archive.errors)
        if head.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(name, head.name)
        if head.type not in EXTENDED:
            break
        if len(blocks) > 2 * MOST_EXTENDED or not 0 <= head.size <= MOST_BYTES - sum(map(len, blocks)):
            raise DataError(
                f"{name} is broken at byte {here}: extended headers without end (more than {MOST_EXTENDED} of them, or "
                f"{MOST_BYTES} bytes, for one member). {AGAIN}"
            )
        blocks.append(source.take(_padded(head.size)))
        if len(blocks[-1]) < _padded(head.size):
            raise DataError(f"{name} is truncated: it ends at byte {source.place}, inside the header {here}. {AGAIN}")
        if b"GNU.sparse." in blocks[-1]:
            raise _sparse(name, "")
    archive.fileobj, archive.offset = io.BytesIO(b"".join(blocks)), 0
    with _placed(source, begin, name):
        member = tarfile.TarInfo.fromtarfile(archive)
    length = archive.offset - (source.place - begin)
    if member.size < 0 or length < 0:
        raise DataError(f"{name} is broken at byte {begin}: {member.name!r} has a size below 0. {AGAIN}")
    if "\0" in member.name:
        raise DataError(f"{name} is broken at byte {begin}: the name {member.name!r} holds a zero byte. {AGAIN}")
    # A link or a folder may say a size, and has no bytes.
    member.size = min(member.size, length) if not member.isreg() else member.size
    return member, length


@contextlib.contextmanager
def _placed(source: _Source, here: int, name: str) -> Iterator[None]:
    """Inside, what the standard library says of a header becomes a DataError with its place."""
    try:
        yield
    except (tarfile.TarError, ValueError, OverflowError, IndexError) as error:
        of = f" of {source.size}" if source.size is not None else ""
        if not here:
            raise DataError(f"{name} is no tar archive ({error} at byte 0{of}). {AGAIN}") from error
        raise DataError(f"{name} is broken at byte {here}{of}: {error}. {AGAIN}") from error


def _check_end(source: _Source, name: str) -> None:
    """Raises DataError where anything but zeros comes after the end of the archive."""
    while chunk := source.take(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            raise DataError(
                f"{name} goes on after its end, at byte {source.place - len(rest)}: two tars were joined, and "
                "readers stop at the end of the first. Keep them as two files."
            )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _sparse(name: str, member: str) -> DataError:
    which = f"{member!r} is" if member else "it has"
    return DataError(
        f"{name}: {which} a sparse member, whose bytes are not in one piece. "
        "Write the shard again without -S (--sparse)."
    )
