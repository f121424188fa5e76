"""What belongs to a folder of pictures, what is left out and why, and names that do not collide: for every verb."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..core.errors import DataError

__all__ = ["PICTURES", "LeftOut", "PictureFolder", "Skipped", "is_hidden", "pictures_in", "unique"]

# The endings of pictures. Where a sample of a shard has several pictures, the first of these is the one.
PICTURES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff", "gif", "jp2", "avif")
PICTURES += ("jpe", "jfif", "mpo", "pbm", "pnm", "pfm", "tga", "j2k", "j2c", "jpc", "jpf", "jpx", "apng", "avifs")
PICTURES += ("dib", "ico", "pcx", "psd", "qoi", "sgi")


class Skipped(NamedTuple):
    """A picture that could not be read, and why."""

    path: str
    reason: str


class LeftOut:
    """How many things were left out for each reason, and the first of them by name."""

    def __init__(self, found: Mapping[str, tuple[int, str]] | None = None) -> None:
        self.found = {reason: (int(count), str(first)) for reason, (count, first) in (found or {}).items()}

    def add(self, reason: str, first: str, count: int = 1) -> None:
        """`reason`: what is so about them, whether one or many."""
        known, name = self.found.get(reason, (0, first))
        self.found[reason] = (known + count, name)

    def update(self, other: LeftOut) -> None:
        for reason, (count, first) in other.found.items():
            self.add(reason, first, count)

    def __bool__(self) -> bool:
        return bool(self.found)

    @property
    def counts(self) -> dict[str, int]:
        return {reason: count for reason, (count, _) in self.found.items()}

    def __str__(self) -> str:
        """`3 hidden (such as '.DS_Store'), 1 .txt (such as ...)`."""
        return ", ".join(f"{count} {reason} (such as {first!r})" for reason, (count, first) in self.found.items())


class PictureFolder(NamedTuple):
    """The pictures below a folder, by paths relative to it, sorted; and what else lies there."""

    pictures: tuple[str, ...]
    left_out: LeftOut


def pictures_in(folder: str | os.PathLike[str]) -> PictureFolder:
    """All files below `folder` that end like a picture, whatever they hold.

    Links are followed, to files and to folders, as torchvision's ImageFolder does; one that leads back to a folder that
    it lies in is left out. Hidden files and folders are left out, so what Macs write (`._name`) is too. Raises
    DataError where there is no such folder, or no picture in it.
    """
    folder, left_out = Path(folder), LeftOut()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Pass a folder of pictures.")
    pictures = tuple(sorted(_walked(folder, "", (), left_out)))
    if not pictures:
        holds = left_out if left_out else "no files"
        raise DataError(f"{folder} holds no pictures (it holds: {holds}); wanted one of .{', .'.join(PICTURES)}.")
    return PictureFolder(pictures, left_out)


def _walked(folder: Path, below: str, above: tuple[tuple[int, int], ...], left_out: LeftOut) -> Iterator[str]:
    """Relative paths of the pictures below `folder`, which lies at `below`; `above`: the folders that it lies in."""
    try:
        here, entries = os.stat(folder), sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        left_out.add("unreadable", below)
        return
    place = (here.st_dev, here.st_ino)
    if place in above:
        left_out.add("linked in a circle", below)
        return
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        ending = os.path.splitext(entry.name)[1][1:].lower()
        if is_hidden(entry.name):
            left_out.add("hidden", name)
        elif entry.is_dir():
            yield from _walked(folder / entry.name, name, (*above, place), left_out)
        elif not entry.is_file():
            left_out.add("linked to nowhere" if entry.is_symlink() else "no regular files", name)
        elif ending in PICTURES:
            yield name
        else:
            left_out.add(f".{ending}" if ending else "without an ending", name)


def is_hidden(name: str) -> bool:
    """Whether a path has a part that begins with a dot, such as `._cat.jpg`, which Macs write beside `cat.jpg`."""
    return any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def unique(names: Iterable[str], alike: Callable[[str], str] = str) -> Iterator[str]:
    """The same names; one that is `alike` an earlier one gets a number that makes it another: a, a-2, a-3."""
    taken: set[str] = set()
    for name in names:
        key, number = name, 1
        while alike(key) in taken:
            number += 1
            key = f"{name}-{number}"
        taken.add(alike(key))
        yield key
