"""Reading tars strictly: a tar is whole, or it is an error that says where it ends.

The standard library's own loop, and webdataset's on top of it, end quietly at the first header that they cannot read,
so a cut or damaged shard looks like a shorter one. The loop is written out here, once for files and once for streams.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

from ..core.errors import DataError

__all__ = ["PICTURES", "Member", "members", "picture", "samples", "streamed"]

# Where a sample has several pictures, the first of these names is the one.
PICTURES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff", "gif", "jp2", "avif")

BLOCK = 512  # a tar is made of blocks of this many bytes; two zero ones end it
AGAIN = "Download or write the shard again."
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\3\4": "unzip, then tar",
}


CUT = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # pyright: ignore[reportAttributeAccessIssue]


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of the payload
    length: int
    data: bytes = b""  # the payload, where a stream was read


def members(stream: BinaryIO, name: str) -> Iterator[Member]:
    """The regular files of a tar that can be read anywhere; payloads are not read.

    Raises DataError, which begins with `name`, where the tar is not whole.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    _refuse(stream.read(BLOCK), name)
    stream.seek(0)
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{name} is no tar archive ({error} at byte 0 of {size}). {AGAIN}") from error
    here = 0
    while not _at_end(stream, here, size, name):
        stream.seek(here)
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise DataError(f"{name} is broken at byte {here} of {size}: {error}. {AGAIN}") from error
        if member.size < 0 or member.offset_data + member.size > size:
            raise DataError(
                f"{name} is truncated: {member.name!r} begins at byte {member.offset_data} and has "
                f"{member.size} bytes, but the file ends at byte {size}. {AGAIN}"
            )
        if _is_sample(member):
            yield Member(member.name, member.offset_data, member.size)
        here = archive.offset


def streamed(stream: BufferedReader, name: str) -> Iterator[Member]:
    """The regular files of a tar that is read once from front to end, with their payloads; raises as `members` does."""
    _refuse(stream.peek(BLOCK), name)
    try:
        archive = tarfile.open(fileobj=stream, mode="r|")
        member = archive.next()  # the first, which opening has read already
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{name} is no tar archive ({error} at byte 0). {AGAIN}") from error
    while member is not None:
        # A stream's members have no end to compare with, so each is read to see whether it is whole.
        data = _payload(archive, member, name)
        if _is_sample(member):
            yield Member(member.name, member.offset_data, member.size, data)
        member = _next(archive, name)
    assert archive.fileobj is not None
    while rest := archive.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(_joined(name, "its end"))


def samples(found: Iterable[Member], name: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and members by extension of each sample: neighbours that share the path up to the file name's first dot.

    Raises DataError where a member is there twice, or members of one key are apart.
    """
    places: dict[str, dict[str, int]] = {}  # key, extension -> byte
    last, sample = None, {}
    for member in found:
        key, extension = base_plus_ext(member.name)
        if key is None or extension is None:
            continue  # no extension, as webdataset does
        known = places.setdefault(key, {})
        if (extension := extension.lower()) in known:
            raise DataError(
                f"{name}: {member.name!r} is there twice, at byte {known[extension]} and at byte {member.offset}. "
                f"Write the shard again with one {extension!r} a key."
            )
        if known and key != last:
            raise DataError(
                f"{name}: the members of key {key!r} are not next to each other: one is at byte "
                f"{min(known.values())}, {member.name!r} at byte {member.offset}. Write the shard again: "
                "tar --sort=name -cf ..."
            )
        if key != last:
            if last is not None:
                yield last, sample
            last, sample = key, {}
        sample[extension] = member
        known[extension] = member.offset
    if last is not None:
        yield last, sample


def picture(sample: Mapping[str, object]) -> str:
    """The extension of a sample's picture, empty where it has none."""
    return next((kind for kind in PICTURES if kind in sample), "")


def _is_sample(member: tarfile.TarInfo) -> bool:
    """A regular file, and none of what webdataset takes for its own notes."""
    return member.isreg() and not re.match(r"__[^/]*__($|/)", member.name)


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


def _at_end(stream: BinaryIO, here: int, size: int, name: str) -> bool:
    """Whether a tar ends here as it should: with a block of zeros, and nothing but zeros after it."""
    stream.seek(here)
    block = stream.read(BLOCK)
    if len(block) < BLOCK:
        raise DataError(
            f"{name} is truncated: it ends at byte {size}, and at byte {here} there should be another member "
            f"or the end of the archive. {AGAIN}"
        )
    if block.strip(b"\0"):
        return False
    while chunk := stream.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            raise DataError(_joined(name, f"its end, at byte {stream.tell() - len(rest)}"))
    return True


def _joined(name: str, where: str) -> str:
    return (
        f"{name} goes on after {where}: two tars were joined, and "
        "readers stop at the end of the first. Keep them as two files."
    )


# -------------------------------------------------------------------------------------------------------------- streams


def _payload(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
    try:
        file = archive.extractfile(member) if member.isreg() else None
        return file.read() if file else b""
    except tarfile.TarError as error:
        raise DataError(
            f"{name} is truncated: {member.name!r} begins at byte {member.offset_data} and has {member.size} bytes "
            f"({error}). {AGAIN}"
        ) from error


def _next(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
    """The next header, None at the end as it should be."""
    here = archive.offset
    assert archive.fileobj is not None
    try:
        archive.fileobj.seek(here)
        return tarfile.TarInfo.fromtarfile(archive)
    except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    except CUT as error:
        raise DataError(
            f"{name} is truncated: at byte {here} there should be another member or the end of the archive. {AGAIN}"
        ) from error
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is broken at byte {here}: {error}. {AGAIN}") from error
