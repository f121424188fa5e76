"""The names of shards: webdataset's syntax, globs and folders become paths and sources."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

from ..core.errors import DataError, near_miss
from .folders import is_hidden
from .progress import say
from .remote import is_remote, refuse_scheme, shown

__all__ = ["expand"]


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
        if "\0" in pattern:
            raise DataError(f"{shown(pattern)!r} is no name of a shard: it holds a zero byte.")
        path = Path(pattern).expanduser()
        if is_remote(pattern):
            refuse_scheme(pattern)
            found.append(pattern)
        elif path.is_dir():
            found += _shards_in(path)
        elif path.exists():
            found.append(path)
        elif matches := _matches(path):
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
    if "\0" in item or os.path.exists(item):
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


def _matches(path: Path) -> list[str]:
    """The files that a glob names, sorted; its first folders are taken as they are where there are such."""
    there = next(parent for parent in (path, *path.parents) if parent.exists() or not parent.name)
    pattern = os.path.join(glob.escape(str(there)), *path.parts[len(there.parts) :])
    return sorted(match for match in glob.glob(pattern, recursive=True) if not os.path.isdir(match))


def _shards_in(folder: Path) -> list[Path]:
    """All *.tar of a folder, by name; hidden ones are left out."""
    every = sorted(path for path in folder.glob("*.tar") if path.is_file())
    shards = [path for path in every if not is_hidden(path.name)]
    if len(shards) < len(every):
        first = next(path.name for path in every if is_hidden(path.name))
        say(f"Left out of {folder}: {len(every) - len(shards)} hidden (such as {first!r}).")
    if shards:
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
