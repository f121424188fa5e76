"""Shards from a folder of pictures: `write_shards`."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from webdataset.writer import ShardWriter

from ..core.errors import BcosifyError, DataError
from ..core.files import check_file, check_free, new_folder
from ..core.ranges import COUNT, Range, ranged
from .folders import Skipped, pictures_in, unique
from .pictures import decode, is_plain_jpeg, pixel_limit, reason
from .progress import say, tracked

__all__ = ["Written", "write_shards"]


class Written(NamedTuple):
    """What `write_shards` did.

    Attributes:
        skipped: pictures that could not be read.
        left_out: how many other files there are, by what they are.
    """

    out: str
    pictures: int
    shards: int
    bytes: int
    skipped: tuple[Skipped, ...]
    left_out: dict[str, int]


@ranged(size=COUNT, per_shard=COUNT, max_pixels=COUNT, quality=Range(1, 100, whole=True))
def write_shards(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int | None = 256,
    per_shard: int = 1000,
    quality: int = 92,
    max_pixels: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Written:
    """Packs all pictures under `folder`, in the order of their paths, as JPEGs into `out`/00000.tar, 00001.tar, ...

    What belongs to a folder: `pictures_in`. The shorter side becomes `size` (never enlarged; None keeps sizes). A JPEG
    that needs no change is copied as it is. `max_pixels`: see `pixel_limit`.
    Keys are the paths below `folder` without dots. The same pictures give the same bytes. What cannot be read is
    skipped, and listed in the result and in `out`/skipped.jsonl. Raises DataError where nothing can be packed.
    """
    folder, out = Path(folder), Path(out).absolute()
    check_free(out, overwrite, _written, [folder])
    names, left_out = pictures_in(folder)
    if left_out:
        say(f"Left out of {folder}: {left_out}.")
    keys = list(unique(map(_key, names)))
    jpeg = functools.partial(_as_jpeg, size=size, quality=quality, max_pixels=pixel_limit(max_pixels))
    skipped: list[Skipped] = []
    with new_folder(out, overwrite, _written) as scratch:
        pattern = str(scratch).replace("%", "%%") + "/%05d.tar"
        fixed = {"mtime": 0, "user": OWNER, "group": OWNER, "format": "PAX_FORMAT"}
        with ShardWriter(pattern, maxcount=per_shard, maxsize=float("inf"), verbose=0, **fixed) as writer:
            paths = [folder / name for name in names]
            packed = tracked(_mapped(jpeg, paths), len(names), "packing pictures", progress)
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
    return Written(str(out), len(names) - len(skipped), len(tars), total, tuple(skipped), left_out.counts)


def _key(name: str) -> str:
    """A path as a key: without its ending, dots and odd characters."""
    parts = unicodedata.normalize("NFC", name).rpartition(".")[0].split("/")
    # Letters of any script, digits, - and _; webdataset drops names that begin with two underscores.
    return "/".join(re.sub(r"[^\w-]+", "_", part).lstrip("_") or "x" for part in parts)


# The owner of every member of a shard, by which shards written here are known again.
OWNER = "bcosify"


def _written(folder: Path) -> set[str] | None:
    """The names of the shards in `folder` that were packed here, and of their list of skipped files."""
    names: set[str] = set()
    for path in folder.glob("*.tar"):
        with contextlib.suppress(BcosifyError, OSError, tarfile.TarError):
            with tarfile.open(check_file(path)) as tar:
                first = tar.next()
            if first is not None and first.uname == OWNER:
                names.add(path.name)
    return names | {"skipped.jsonl"} if names else None


def _as_jpeg(path: Path, size: int | None, quality: int, max_pixels: int) -> bytes | Exception:
    """The picture as an RGB JPEG, or why it cannot be read."""
    try:
        data = path.read_bytes()
        picture = decode(data, f"{path}: ", max_pixels)
        shorter = min(picture.size)
        if size is None or shorter <= size:
            if is_plain_jpeg(data, max_pixels):
                return data
        else:
            width, height = (max(size, round(side * size / shorter)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return stream.getvalue()
    except Exception as error:  # noqa: BLE001 - on broken files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        return error


def _mapped(function: Callable[[Path], Any], paths: Sequence[Path]) -> Iterator[Any]:
    """`function` of each path, in order, on all cores, with no more than a few hundred results waiting."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), 256):
            yield from pool.map(function, paths[start : start + 256])
