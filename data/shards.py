"""Tar shards as a table that can be read in any order: which pictures there are, where they lie, and who is next.

A shard is a plain tar as webdataset writes it; members that share a key (the path up to the first dot of the file name)
are one sample. Reading shards as streams ties the order of pictures to the number of workers and processes, and makes
resuming a replay. So each tar's headers are scanned once, and from then on a picture is one `pread(offset, length)`.

With random access, order is arithmetic. With N pictures, seed s and global batch G, let E = floor(N / G). Step t shows

    batch(t) = order(N, s, e)[b·G : (b + 1)·G]    with e = t div E (the epoch) and b = t mod E

whatever the workers, the processes, and where a run was interrupted. The N mod G pictures at the end of an epoch's
order are left out of that epoch; they are others in each.

The index takes about 30 bytes and a key for each picture. Each shard's part of it is cached as JSON, and holds as long
as the tar's path, size and modification time do.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, FileSizeColumn, Progress, TextColumn, TransferSpeedColumn, track
from webdataset.shardlists import expand_urls
from webdataset.writer import ShardWriter

from ..core.errors import BcosifyError, DataError, near_miss
from ..core.files import cache_root, check_free, new_file, new_folder
from . import tar
from .remote import fetch, is_remote, refuse_scheme, shown
from .tar import PICTURES

__all__ = [
    "GlobalBatch",
    "Indexed",
    "Shard",
    "ShardFile",
    "ShardIndex",
    "Skipped",
    "Written",
    "batch_indices",
    "decode",
    "expand",
    "index_shards",
    "order",
    "overlap",
    "read_at",
    "reason",
    "split",
    "write_shards",
]

SCHEMA = 1  # of the cached index; a new number makes the old files unused
OPEN_FILES = 128  # per process; below the usual limit of 256 on macOS and 1024 on Linux
COMPARED = 100_000  # pictures that are read to find out whether train and val overlap
FEW = 8  # no progress bar for fewer shards
THREADS = 8
LISTED = 10  # errors in one message


# -------------------------------------------------------------------------------------------------------------- naming


def expand(data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path | str]:
    """The shards that `data` names, in the order named; a shard named twice counts once.

    Takes webdataset's syntax (`train-{0000..0099}.tar`, `a.tar::b.tar`), globs, a folder (all *.tar directly in it),
    `http://`, `https://` and `pipe:COMMAND` (these stay strings), and lists of all that. Raises DataError where any of
    it names nothing.
    """
    items = [data] if isinstance(data, str | os.PathLike) else list(data)
    found: list[Path | str] = []
    missing: list[Path] = []
    for pattern in (pattern for item in items for pattern in _patterns(os.fspath(item))):
        path = Path(pattern).expanduser()
        if is_remote(pattern):
            refuse_scheme(pattern)
            found.append(pattern)
        elif path.is_dir():
            found += _shards_in(path)
        elif path.exists():
            found.append(path)
        elif matches := sorted(match for match in glob.glob(str(path), recursive=True) if not os.path.isdir(match)):
            found += map(Path, matches)
        else:
            missing.append(path)
    if missing:
        raise DataError(_missing(missing, len(found)))
    if not found:
        raise DataError("No shards: --data is empty. Pass a folder of .tar files, or a pattern such as 'shards/*.tar'.")
    return list(dict.fromkeys(found))


def _patterns(item: str) -> list[str]:
    """`item` split at `::` and with its braces expanded; a path that exists is taken as it is."""
    if os.path.exists(item):
        return [item]
    if not item:
        raise DataError(
            "An empty name among the shards. Pass a folder of .tar files, or a pattern such as 'shards/*.tar'."
        )
    try:
        parts = expand_urls(item)
    except (ValueError, AssertionError) as error:  # unbalanced braces; ${NAME} without WDS_NAME in the environment
        raise DataError(
            f"{shown(item)!r} is no pattern of shards: {error}. Write for example 'train-{{0000..0099}}.tar'."
        ) from error
    return [re.sub(r"^file:(//)?", "", part) for part in parts if part]


def _shards_in(folder: Path) -> list[Path]:
    """All *.tar of a folder, by name."""
    if shards := sorted(path for path in folder.glob("*.tar") if path.is_file()):
        return shards
    kinds = Counter(path.suffix.lower() or "no suffix" for path in folder.iterdir())
    holds = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
    raise DataError(
        f"{folder} holds no .tar files (it holds: {holds}). "
        f"To make shards from a folder of pictures: bcosify shards {folder} OUT"
    )


def _missing(missing: list[Path], found: int) -> str:
    """What was looked for in vain, and what lies near it."""
    path = missing[0]
    named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    what = (
        f"No shard {named}." if not found else f"{len(missing)} of {len(missing) + found} shards do not exist: {named}."
    )
    if not path.parent.is_dir():
        return f"{what} There is no folder {path.parent}." if not glob.has_magic(str(path.parent)) else what
    others = sorted(other.name for other in path.parent.iterdir() if other.suffix == ".tar")
    return f"{what} {path.parent} holds {len(others)} .tar files.{near_miss(path.name, others)}"


# --------------------------------------------------------------------------------------------------------------- index


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
    without_picture: int  # samples that were left out

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


def index_shards(
    shards: Iterable[str | os.PathLike[str]], progress: bool = True, cache: Path | None = None
) -> ShardIndex:
    """Scans the headers of each tar, once: what was scanned before comes from the cache. Payloads are not read.

    Remote shards are downloaded into `cache` first (see `remote.fetch`). Raises DataError that lists shards that cannot
    be downloaded, are truncated, no tar, without pictures, or have a key twice.
    """
    sources = list(shards)
    remote = [str(source) for source in sources if is_remote(source)]
    files = dict(zip(remote, _fetched(remote, cache, progress), strict=True))
    paths = [Path(files.get(str(source), source)).absolute() for source in sources]
    found = _each(_indexed, paths, lambda futures: _tracked(futures, len(paths), "indexing shards", progress, FEW))
    if not found:
        raise DataError("No shards to index.")
    return ShardIndex(tuple(found))


def _fetched(sources: Sequence[str], cache: Path | None, progress: bool) -> list[Path]:
    """The files of remote shards, with a bar that counts shards and bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), FileSizeColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not _watched(console, progress)) as bar:
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
        stat = path.stat()
        file = ShardFile(str(path), stat.st_size, stat.st_mtime_ns)
        return _cached(file) or _remember(_scan(file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _scan(file: ShardFile) -> Shard:
    """Groups the members of one tar by key."""
    with open(file.path, "rb") as stream:
        samples = {
            key: {kind: (member.offset, member.length) for kind, member in members.items()}
            for key, members in tar.samples(tar.members(stream, file.path), file.path)
        }
    pictured = {key: members for key, members in samples.items() if tar.picture(members)}
    if not pictured:
        raise DataError(_no_picture(file, samples))
    return _columns(file, pictured, len(samples) - len(pictured))


def _columns(file: ShardFile, samples: dict[str, dict[str, tuple[int, int]]], without_picture: int) -> Shard:
    extensions = sorted({kind for members in samples.values() for kind in members})
    number = {kind: i for i, kind in enumerate(extensions)}
    first = np.cumsum([0, *map(len, samples.values())])
    # The row of a sample's picture, counted from the sample's first row.
    picture = [list(members).index(tar.picture(members)) for members in samples.values()]
    rows = [(number[kind], *place) for members in samples.values() for kind, place in members.items()]
    kinds, offsets, lengths = zip(*rows, strict=True)
    columns = {"first": first, "picture": first[:-1] + picture, "kinds": kinds, "offsets": offsets, "lengths": lengths}
    return _shard(file, list(samples), columns, extensions, without_picture)


def _shard(
    file: ShardFile, keys: Sequence[str], columns: Mapping[str, Any], extensions: Sequence[str], without_picture: int
) -> Shard:
    arrays = {name: np.array(columns[name], kind) for name, kind in COLUMNS.items()}
    names = np.array([key.encode("utf-8", "surrogateescape") for key in keys])
    for array in (names, *arrays.values()):
        array.setflags(write=False)
    return Shard(file, names, extensions=tuple(extensions), without_picture=without_picture, **arrays)


def _no_picture(file: ShardFile, samples: dict[str, dict[str, tuple[int, int]]]) -> str:
    kinds = Counter(kind for members in samples.values() for kind in members)
    if not kinds:
        return f"{file.path} holds no samples. Leave it out, or write it again: bcosify shards DIR OUT"
    found = ", ".join(f".{kind}" for kind, _ in kinds.most_common(5))
    dotted = any(kind.rpartition(".")[2] in PICTURES for kind in kinds)
    why = " An extension begins at the first dot of a file name, so names must have no other dots." if dotted else ""
    wanted = ", ".join(f".{kind}" for kind in PICTURES)
    return f"{file.path} holds {len(samples)} samples but no picture: found {found}; wanted one of {wanted}.{why}"


# --------------------------------------------------------------------------------------------------------------- bytes


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


# A forked child may use its parent's descriptors, since pread moves no position; a spawned one starts with none.
_opened = functools.lru_cache(OPEN_FILES)(_Open)


def read_at(file: ShardFile, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`. A disk that fails is an error, not a broken picture: no run may depend on it."""
    try:
        opened = _opened(file)
        data = os.pread(opened.descriptor, length, offset)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read at byte {offset}: {error.strerror or error}.") from error
    if len(data) != length:
        raise DataError(
            f"{file.path} ends at byte {offset + len(data)}; it was longer when it was indexed. Start again."
        )
    return data


def decode(data: bytes) -> Image.Image:
    """A picture as RGB, turned upright as its EXIF says. Raises whatever Pillow raises on broken bytes."""
    image = Image.open(io.BytesIO(data))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion clips to white
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def reason(error: Exception) -> str:
    """What Pillow said, without the memory addresses that it sometimes says too."""
    return f"{type(error).__name__}: {re.sub(r' <[^>]* at 0x[^>]*>', '', str(error))}"


# --------------------------------------------------------------------------------------------------------------- cache


def _cache_file(file: ShardFile) -> Path:
    """One for each path, so that what is out of date is written over."""
    name = hashlib.sha256(json.dumps([SCHEMA, file.path]).encode()).hexdigest()[:32]
    return cache_root() / "index" / f"{name}.json"


def _cached(file: ShardFile) -> Shard | None:
    """What an earlier scan found; None where there is nothing that can be used."""
    try:
        found = json.loads(_cache_file(file).read_text("utf-8"))
        if found["file"] != list(file):
            return None
        return _shard(file, found["keys"], found["columns"], found["extensions"], found["without_picture"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(shard: Shard) -> Shard:
    found = {
        "file": shard.file,
        "keys": [key.decode("utf-8", "surrogateescape") for key in shard.keys.tolist()],
        "columns": {name: getattr(shard, name).tolist() for name in COLUMNS},
        "extensions": shard.extensions,
        "without_picture": shard.without_picture,
    }
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(BcosifyError, OSError), new_file(_cache_file(shard.file)) as scratch:
        scratch.write_text(json.dumps(found, separators=(",", ":")), "utf-8")
    return shard


# --------------------------------------------------------------------------------------------------------------- order


class GlobalBatch(NamedTuple):
    """What all processes together see in one step."""

    epoch: int
    index: int  # of the batch in its epoch
    positions: np.ndarray  # (batch_size,)


@functools.lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..count-1 for one epoch (read-only: it is shared between calls)."""
    permutation = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    permutation.setflags(write=False)
    return permutation


def batch_indices(count: int, seed: int, batch_size: int, step: int) -> GlobalBatch:
    """The global batch of a step; an epoch has floor(count / batch_size) of them, and the remainder is left out."""
    if not 1 <= batch_size <= count:
        raise DataError(
            f"A global batch of {batch_size} needs as many pictures, and there are {count}. "
            f"Use more pictures, or a batch of at most {count}."
        )
    epoch, index = divmod(step, count // batch_size)
    return GlobalBatch(epoch, index, order(count, seed, epoch)[index * batch_size : (index + 1) * batch_size])


def split(index: ShardIndex, held_out: float | int, seed: int = 0) -> tuple[ShardIndex, ShardIndex]:
    """The other pictures, and the held-out ones: a fraction (float) or a count (int), by the hash of their keys.

    By fraction, a key falls on the same side whatever else is in the shards, also after more are added, and pictures
    that share a key stay together; the fraction is met as nearly as chance allows. A count is met exactly.
    """
    salt = f"{seed}:".encode()
    numbers = np.arange(len(index)) if index.ids is None else index.ids
    keys = (key for shard in index.shards for key in shard.keys.tolist())
    digests = (hashlib.blake2b(salt + key, digest_size=8).digest() for key in keys)
    everything = np.frombuffer(b"".join(digests), "<u8")
    hashes = everything[numbers]
    chosen = np.zeros(len(index), bool)
    if isinstance(held_out, int):
        chosen[np.argsort(hashes, kind="stable")[:held_out]] = True
    else:
        chosen = hashes / 2.0**64 < held_out
    if not 0 < held_out or not 0 < chosen.sum() < len(index):
        raise DataError(
            f"Holding out {held_out} of {len(index)} pictures leaves one side empty. "
            "Use a fraction between 0 and 1, or a count below that of the pictures."
        )
    return ShardIndex(index.shards, numbers[~chosen]), ShardIndex(index.shards, numbers[chosen])


def overlap(train: ShardIndex, val: ShardIndex) -> list[tuple[str, str]]:
    """(key in train, key in val) of pictures that are the same bytes.

    Only training pictures as long as one of `val`'s are read, and of these at most COMPARED.
    """
    held_out = {hashlib.sha256(val.read(i)).digest(): val.key(i) for i in range(len(val))}
    alike = np.flatnonzero(np.isin(train.sizes, val.sizes))[:COMPARED]
    found = ((train.key(i), held_out.get(hashlib.sha256(train.read(i)).digest())) for i in map(int, alike))
    return [(ours, theirs) for ours, theirs in found if theirs is not None]


# ------------------------------------------------------------------------------------------------------------- writing


class Skipped(NamedTuple):
    """A file that could not be read as a picture."""

    path: str
    reason: str


class Written(NamedTuple):
    """What `write_shards` did."""

    out: str
    pictures: int
    shards: int
    bytes: int
    skipped: tuple[Skipped, ...]


def write_shards(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int | None = 256,
    per_shard: int = 1000,
    quality: int = 92,
    overwrite: bool = False,
    progress: bool = True,
) -> Written:
    """Packs all pictures under `folder`, in the order of their paths, as JPEGs into `out`/00000.tar, 00001.tar, ...

    The shorter side becomes `size` (never enlarged; None keeps sizes). A JPEG that needs no change is copied as it is.
    Keys are the paths below `folder` without dots. The same pictures give the same bytes. What cannot be read is
    skipped, and listed in the result and in `out`/skipped.jsonl. Raises DataError where nothing can be packed.
    """
    folder, out = Path(folder), Path(out).absolute()
    if (size is not None and size < 1) or per_shard < 1 or not 1 <= quality <= 100:
        raise DataError(
            f"size {size}, per_shard {per_shard} and quality {quality}: at least 1 each, and quality at most 100."
        )
    check_free(out, overwrite)
    names = _pictures_in(folder)
    keys = list(_unique_keys(names))
    jpeg = functools.partial(_as_jpeg, size=size, quality=quality)
    skipped: list[Skipped] = []
    with new_folder(out, overwrite) as scratch:
        pattern = str(scratch).replace("%", "%%") + "/%05d.tar"
        fixed = {"mtime": 0, "user": "bcosify", "group": "bcosify", "format": "PAX_FORMAT"}
        with ShardWriter(pattern, maxcount=per_shard, maxsize=float("inf"), verbose=0, **fixed) as writer:
            paths = [folder / name for name in names]
            packed = _tracked(_mapped(jpeg, paths), len(names), "packing pictures", progress)
            for name, key, data in zip(names, keys, packed, strict=True):
                if isinstance(data, bytes):
                    writer.write({"__key__": key, "jpg": data})
                else:
                    skipped.append(Skipped(name, reason(data)))
        if len(skipped) == len(names):
            raise DataError(
                f"None of the {len(names)} pictures in {folder} can be read. "
                f"The first is {skipped[0].path} ({skipped[0].reason})."
            )
        tars = sorted(scratch.glob("*.tar"))
        total = sum(tar.stat().st_size for tar in tars)
        if skipped:
            lines = "".join(json.dumps(item._asdict()) + "\n" for item in skipped)
            (scratch / "skipped.jsonl").write_text(lines, "utf-8")
    return Written(str(out), len(names) - len(skipped), len(tars), total, tuple(skipped))


def _pictures_in(folder: Path) -> list[str]:
    """The pictures below a folder by relative path, sorted; hidden ones left out."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Pass a folder of pictures.")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    seen = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    pictures = sorted(path.as_posix() for path in seen if path.suffix[1:].lower() in PICTURES)
    if not pictures:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in files).most_common(5)
        holds = ", ".join(f"{count} {kind}" for kind, count in kinds) or "no files"
        raise DataError(f"{folder} holds no pictures (it holds: {holds}); wanted one of .{', .'.join(PICTURES)}.")
    return pictures


def _unique_keys(names: Iterable[str]) -> Iterator[str]:
    """A key for each path: dots and odd characters replaced, and a number added where two would be the same."""
    taken: set[str] = set()
    for name in names:
        parts = unicodedata.normalize("NFC", name).rpartition(".")[0].split("/")
        # Letters of any script, digits, - and _; webdataset drops names that begin with two underscores.
        base = "/".join(re.sub(r"[^\w-]+", "_", part).lstrip("_") or "x" for part in parts)
        key, number = base, 1
        while key in taken:
            number += 1
            key = f"{base}-{number}"
        taken.add(key)
        yield key


def _as_jpeg(path: Path, size: int | None, quality: int) -> bytes | Exception:
    """The picture as an RGB JPEG, or why it cannot be read."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as source:
            upright = source.getexif().get(0x0112, 1) == 1
            plain = source.format == "JPEG" and source.mode == "RGB" and upright
        picture = decode(data)
        shorter = min(picture.size)
        if size is None or shorter <= size:
            if plain:
                return data
        else:
            width, height = (max(size, round(side * size / shorter)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return stream.getvalue()
    except Exception as error:  # on broken files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        return error


def _mapped(function: Callable[[Path], Any], paths: Sequence[Path]) -> Iterator[Any]:
    """`function` of each path, in order, on all cores, with no more than a few hundred results waiting."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), 256):
            yield from pool.map(function, paths[start : start + 256])


def _tracked(items: Iterable[Any], total: int, title: str, progress: bool, few: int = 256) -> Iterable[Any]:
    """`items` with a progress bar, where there is much to do and someone to look at it."""
    console = Console(stderr=True)
    show = total > few and _watched(console, progress)
    return track(items, title, total, console=console, transient=True) if show else items


def _watched(console: Console, progress: bool) -> bool:
    """Whether there is a terminal, and this is the process that may write on it."""
    return progress and console.is_terminal and os.environ.get("LOCAL_RANK", "0") == "0"
