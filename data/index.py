"""Tar shards as a table that can be read in any order: which pictures there are, and where they lie.

A shard is a plain tar as webdataset writes it; members that share a key (the path up to the first dot of the file name)
are one sample. Reading shards as streams ties the order of pictures to the number of workers and processes, and makes
resuming a replay. So each tar's headers are scanned once, and from then on a picture is one `pread(offset, length)`.

The index takes about 30 bytes and a key for each picture. Each shard's part of it is cached as JSON, and holds as long
as the tar's path, size and times of change do, and its own digest.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, FileSizeColumn, Progress, TextColumn, TransferSpeedColumn

from ..core.errors import BcosifyError, DataError
from ..core.files import cache_root, check_file, new_file
from . import tar
from .folders import PICTURES, LeftOut
from .progress import say, tracked, watched
from .remote import fetch, is_remote

__all__ = ["Indexed", "Shard", "ShardFile", "ShardIndex", "index_shards", "read_at"]

SCHEMA = 2  # of the cached index; a new number makes the old files unused
OPEN_FILES = 128  # kept per process; below the usual limit of 256 on macOS and 1024 on Linux
FEW = 8  # no progress bar for fewer shards
THREADS = 8
LISTED = 10  # errors in one message


# --------------------------------------------------------------------------------------------------------------- tables


class ShardFile(NamedTuple):
    """A tar as it was when it was indexed."""

    path: str
    size: int
    mtime_ns: int


class Indexed(NamedTuple):
    """Where a picture is: all that a worker needs to read it."""

    id: int  # its position in the index
    key: str
    file: ShardFile
    offset: int
    length: int

    @property
    def shard(self) -> str:
        return self.file.path

    def read(self) -> bytes:
        return read_at(self.file, self.offset, self.length)


COLUMNS = {"first": np.uint32, "picture": np.uint32, "kinds": np.uint16, "offsets": np.int64, "lengths": np.int64}


@dataclass(frozen=True, eq=False)
class Shard:
    """The samples of one tar that have a picture: N samples with M members in all, as columns.

    Sample i owns the rows first[i] to first[i + 1] of the members' columns; picture[i] is its picture's row.
    """

    file: ShardFile
    keys: np.ndarray  # (N,) bytes, UTF-8
    first: np.ndarray  # (N + 1,)
    picture: np.ndarray  # (N,)
    kinds: np.ndarray  # (M,) numbers in extensions
    offsets: np.ndarray  # (M,) of the payload
    lengths: np.ndarray  # (M,)
    extensions: tuple[str, ...]
    without_picture: int  # samples that are not in the table
    left_out: LeftOut  # what else the tar holds and no one looks at

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def digest(self) -> bytes:
        """sha256 over what the tar holds, wherever it lies."""
        parts = [b"\0".join(self.keys.tolist()), "\0".join(self.extensions).encode("utf-8", "surrogateescape")]
        parts += [getattr(self, name).astype("<i8").tobytes() for name in COLUMNS]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """All pictures of some shards, or those that `ids` picks. It holds no open files, so it can be pickled."""

    shards: tuple[Shard, ...]
    ids: np.ndarray | None = None  # ascending; None: all

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """(S + 1,) how many pictures lie before each shard."""
        return np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.ids is None else len(self.ids)

    @property
    def files(self) -> tuple[ShardFile, ...]:
        return tuple(shard.file for shard in self.shards)

    @property
    def without_picture(self) -> int:
        """Samples in these shards that hold no picture (all shards, whatever `ids` picks)."""
        return sum(shard.without_picture for shard in self.shards)

    @property
    def left_out(self) -> LeftOut:
        """What these shards hold beside pictures and their own members (all shards, whatever `ids` picks)."""
        found = LeftOut()
        for shard in self.shards:
            found.update(shard.left_out)
        return found

    @functools.cached_property
    def digest(self) -> str:
        """The identity of the data: sha256 over keys, offsets and lengths in order, without any path."""
        whole = hashlib.sha256(b"".join(shard.digest for shard in self.shards))
        if self.ids is not None:
            whole.update(self.ids.astype("<i8").tobytes())
        return whole.hexdigest()

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(N,) bytes of every picture."""
        every = [shard.lengths[shard.picture] for shard in self.shards]
        sizes = np.concatenate(every) if every else np.zeros(0, np.int64)
        return sizes if self.ids is None else sizes[self.ids]

    def key(self, i: int) -> str:
        shard, row = self._find(i)
        return self.shards[shard].keys[row].decode("utf-8", "surrogateescape")

    def file(self, i: int) -> ShardFile:
        return self.shards[self._find(i)[0]].file

    def extensions(self, i: int) -> tuple[str, ...]:
        """The members of sample i, such as ('jpg', 'mask.png', 'json')."""
        shard, row = self._find(i)
        table = self.shards[shard]
        return tuple(table.extensions[kind] for kind in table.kinds[table.first[row] : table.first[row + 1]])

    def read(self, i: int, extension: str | None = None) -> bytes:
        """The bytes of sample i's picture, or of its member with this extension."""
        shard, row = self._find(i)
        table = self.shards[shard]
        member = table.picture[row] if extension is None else self._member(i, table, row, extension)
        return read_at(table.file, int(table.offsets[member]), int(table.lengths[member]))

    def pictures(self, positions: Iterable[int]) -> list[Indexed]:
        """Where these pictures are, without the index."""
        found = []
        for i in map(int, positions):
            shard, row = self._find(i)
            table = self.shards[shard]
            member = table.picture[row]
            key = table.keys[row].decode("utf-8", "surrogateescape")
            found.append(Indexed(i, key, table.file, int(table.offsets[member]), int(table.lengths[member])))
        return found

    def _find(self, i: int) -> tuple[int, int]:
        """Shard and row of position i."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        number = i if self.ids is None else int(self.ids[i])
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def _member(self, i: int, table: Shard, row: int, extension: str) -> int:
        kinds = self.extensions(i)
        if extension not in kinds:
            raise DataError(
                f"{table.file.path}: sample {self.key(i)!r} has no {extension!r}; it has {', '.join(kinds)}."
            )
        return int(table.first[row]) + kinds.index(extension)


# ---------------------------------------------------------------------------------------------------------------- bytes


class _Open:
    """A file descriptor that is closed once nobody holds it, so that leaving the cache never closes one in use."""

    def __init__(self, file: ShardFile):
        self.descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        stat = os.fstat(self.descriptor)
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
            raise DataError(f"{file.path} has changed since it was indexed. Start again, so that it is indexed anew.")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.descriptor)


def _kept_open() -> int:
    """How many files to keep open: a quarter of what the system lets a process have, and at most OPEN_FILES."""
    try:
        import resource  # not on Windows
    except ImportError:
        return OPEN_FILES
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft // 4))


# A forked child may use its parent's descriptors, since pread moves no position; a spawned one starts with none.
_opened = functools.lru_cache(_kept_open())(_Open)


def read_at(file: ShardFile, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`. A disk that fails is an error, not a broken picture: no run may depend on it."""
    try:
        try:
            opened = _opened(file)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            _opened.cache_clear()  # others in this process have taken theirs
            opened = _opened(file)
        data = os.pread(opened.descriptor, length, offset)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read at byte {offset}: {_said(error)}.") from error
    if len(data) != length:
        raise DataError(
            f"{file.path} ends at byte {offset + len(data)}; it was longer when it was indexed. Start again."
        )
    return data


def _said(error: OSError) -> str:
    """What the system said, and what to type where it has no more open files to give."""
    few = " (raise the limit in this shell: ulimit -n 1024)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    return f"{error.strerror or error}{few}"


# ------------------------------------------------------------------------------------------------------------- scanning


def index_shards(
    shards: Iterable[str | os.PathLike[str]], progress: bool = True, cache: Path | None = None
) -> ShardIndex:
    """Scans the headers of each tar, once: what was scanned before comes from the cache. Payloads are not read.

    Remote shards are downloaded into `cache` first (see `remote.fetch`). Warns of what is left out. Raises DataError
    that lists shards that cannot be downloaded, are truncated, no tar, without pictures, or have a key twice.
    """
    sources = list(shards)
    remote = [str(source) for source in sources if is_remote(source)]
    files = dict(zip(remote, _fetched(remote, cache, progress), strict=True))
    paths = [Path(files.get(str(source), source)).absolute() for source in sources]
    found = _each(_indexed, paths, lambda futures: tracked(futures, len(paths), "indexing shards", progress, FEW))
    if not found:
        raise DataError("No shards to index.")
    index = ShardIndex(tuple(found))
    if index.left_out:
        say(of_shards(len(paths), index.left_out))
    return index


def of_shards(count: int, left_out: LeftOut) -> str:
    """What was left out of so many shards, and what to do about it."""
    advice = " Keys end at the first dot of a file name; `bcosify shards FOLDER OUT` writes names without dots."
    shards = "1 shard" if count == 1 else f"{count} shards"
    return f"Left out of {shards}: {left_out}.{advice if tar.DOTTED in left_out.counts else ''}"


def _fetched(sources: Sequence[str], cache: Path | None, progress: bool) -> list[Path]:
    """The files of remote shards, with a bar that counts shards and bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), FileSizeColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not watched(console, progress)) as bar:
        task = bar.add_task("downloading shards", total=None)

        stopped = threading.Event()

        def counted(futures: Iterable[Future]) -> Iterator[Future]:
            for done, future in enumerate(futures):
                bar.update(task, description=f"downloading shards, {done} of {len(sources)} done")
                yield future

        def came(count: int) -> None:
            bar.advance(task, count)
            if stopped.is_set():
                raise DataError("stopped")

        return _each(lambda source: fetch(source, cache, came), sources, counted, stopped)


def _each(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    tracked: Callable[[Sequence[Future]], Iterable[Future]],
    stopped: threading.Event | None = None,
) -> list[Any]:
    """`work` of each item, in order. DataError lists what failed, and after LISTED failures the rest is left out.

    `stopped` is set where the end is not waited for, so that what takes long can end early.
    """
    results: list[Any] = []
    errors: list[DataError] = []
    # Scanning waits for the disk, downloading for the net, so threads pay although Python runs one of them at a time.
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for future in tracked([pool.submit(work, item) for item in items]):
                try:
                    results.append(future.result())
                except DataError as error:
                    errors.append(error)
                    if len(errors) == LISTED:
                        break
        finally:  # all are done, or it was enough, or the user has interrupted
            if stopped:
                stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
    if errors:
        listed = "\n".join(f"  {error}" for error in errors)
        more = "\n  ... the shards after these were not tried" if len(errors) == LISTED else ""
        raise DataError(f"{len(errors)} of {len(items)} shards cannot be used:\n{listed}{more}")
    return results


def _indexed(path: Path) -> Shard:
    try:
        stat = path.stat()  # says itself what is missing
        check_file(path, raises=DataError)
        file = ShardFile(str(path), stat.st_size, stat.st_mtime_ns)
        return _cached(file, stat.st_ctime_ns) or _remember(_scan(file), stat.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_said(error)}.") from error


def _scan(file: ShardFile) -> Shard:
    """Groups the members of one tar by key."""
    left_out = LeftOut()
    with open(file.path, "rb") as stream:
        samples = {
            sample.key: {kind: (member.offset, member.length) for kind, member in sample.members.items()}
            for sample in tar.samples(tar.members(stream, file.path, left_out), file.path, left_out)
        }
    pictured = {key: members for key, members in samples.items() if tar.picture(members)}
    if not pictured:
        raise DataError(_no_picture(file, samples, left_out))
    return _columns(file, pictured, len(samples) - len(pictured), left_out)


def _columns(
    file: ShardFile, samples: dict[str, dict[str, tuple[int, int]]], without_picture: int, left_out: LeftOut
) -> Shard:
    extensions = sorted({kind for members in samples.values() for kind in members})
    number = {kind: i for i, kind in enumerate(extensions)}
    first = np.cumsum([0, *map(len, samples.values())])
    # The row of a sample's picture, counted from the sample's first row.
    picture = [list(members).index(tar.picture(members)) for members in samples.values()]
    rows = [(number[kind], *place) for members in samples.values() for kind, place in members.items()]
    kinds, offsets, lengths = zip(*rows, strict=True)
    columns = {"first": first, "picture": first[:-1] + picture, "kinds": kinds, "offsets": offsets, "lengths": lengths}
    return _shard(file, list(samples), columns, extensions, without_picture, left_out)


def _shard(
    file: ShardFile,
    keys: Sequence[str],
    columns: Mapping[str, Any],
    extensions: Sequence[str],
    without_picture: int,
    left_out: LeftOut,
) -> Shard:
    arrays = {name: np.array(columns[name], kind) for name, kind in COLUMNS.items()}
    names = np.array([key.encode("utf-8", "surrogateescape") for key in keys])
    for array in (names, *arrays.values()):
        array.setflags(write=False)
    rest = {"extensions": tuple(extensions), "without_picture": without_picture, "left_out": left_out}
    return Shard(file, names, **arrays, **rest)


def _no_picture(file: ShardFile, samples: dict[str, dict[str, tuple[int, int]]], left_out: LeftOut) -> str:
    kinds = Counter(kind for members in samples.values() for kind in members)
    if not kinds:
        others = f" ({left_out})" if left_out else ""
        return f"{file.path} holds no samples{others}. Leave it out, or write it again: bcosify shards DIR OUT"
    found = ", ".join(f".{kind}" for kind, _ in kinds.most_common(5))
    dotted = any(kind.rpartition(".")[2] in PICTURES for kind in kinds)
    why = " An extension begins at the first dot of a file name, so names must have no other dots." if dotted else ""
    wanted = ", ".join(f".{kind}" for kind in PICTURES)
    return f"{file.path} holds {len(samples)} samples but no picture: found {found}; wanted one of {wanted}.{why}"


# ---------------------------------------------------------------------------------------------------------------- cache


def _cache_file(file: ShardFile) -> Path:
    """One for each path, so that what is out of date is written over."""
    name = hashlib.sha256(json.dumps([SCHEMA, file.path]).encode()).hexdigest()[:32]
    return cache_root() / "index" / f"{name}.json"


def _cached(file: ShardFile, changed: int) -> Shard | None:
    """What an earlier scan found; None where there is nothing that can be used. `changed`: when the tar was, in ns."""
    try:
        found = json.loads(_cache_file(file).read_text("utf-8"))
        if found.pop("digest") != _digest(found) or [found["file"], found["changed"]] != [list(file), changed]:
            return None
        rest = (found["columns"], found["extensions"], found["without_picture"], LeftOut(found["left_out"]))
        return _shard(file, found["keys"], *rest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _remember(shard: Shard, changed: int) -> Shard:
    found = {
        "file": shard.file,
        "changed": changed,
        "keys": [key.decode("utf-8", "surrogateescape") for key in shard.keys.tolist()],
        "columns": {name: getattr(shard, name).tolist() for name in COLUMNS},
        "extensions": shard.extensions,
        "without_picture": shard.without_picture,
        "left_out": shard.left_out.found,
    }
    text = json.dumps({**found, "digest": _digest(found)}, separators=(",", ":"))
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(BcosifyError, OSError), new_file(_cache_file(shard.file)) as scratch:
        scratch.write_text(text, "utf-8")
    return shard


def _digest(found: Mapping[str, Any]) -> str:
    """Of what is cached: a file that was cut, or changed by anything else, is not believed."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
