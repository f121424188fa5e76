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
