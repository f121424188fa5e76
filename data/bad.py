"""Broken pictures: counted, listed, and an error where they are too many."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import NamedTuple

from ..core.errors import DataError
from .index import ShardIndex

__all__ = ["BadSample", "BadSamples"]


class BadSample(NamedTuple):
    """A picture that could not be decoded, and why."""

    id: int
    key: str
    shard: str
    reason: str


class BadSamples:
    """Counts the broken pictures of `source`, lists each once in a JSON Lines file, and stops when they are too many.

    The limit is a share of all pictures (of a stream: of those that came), so that one early broken picture stops no
    run. A line of the list is {"key", "shard", "reason"}, and "id" where pictures are indexed; lines from before a
    resume count. A picture is known by its id, wherever its shard lies now; in a stream ids go on, so there it is known
    by key and shard. Every process of a run is told of the same broken pictures, and the main one `writes`.
    """

    def __init__(self, source: Sized, path: str | os.PathLike[str], limit: float = 0.01, writes: bool = True):
        self.source = source
        self.path = Path(path)
        self.limit = limit
        self.writes = writes
        self.indexed = isinstance(source, ShardIndex)
        self.known: set[int | tuple[str, str]] = set(map(self._name, _listed(self.path)))

    def __len__(self) -> int:
        return len(self.known)

    @property
    def share(self) -> float:
        return len(self.known) / len(self.source)

    def add(self, bad: Sequence[BadSample]) -> None:
        """Takes a batch's `bad`. Raises DataError when the share of broken pictures is above the limit."""
        for one in bad:
            if (name := self._name(one)) in self.known or self._old_name(one) in self.known:
                continue
            self.known.add(name)
            if self.writes:
                line = {"key": one.key, "shard": one.shard, "reason": one.reason}
                _append(self.path, json.dumps({"id": one.id, **line} if self.indexed else line) + "\n")
        if self.share > self.limit:
            raise DataError(
                f"{len(self.known)} of {len(self.source)} pictures ({self.share:.2%}) cannot be decoded; the limit is "
                f"{self.limit:.2%}. They are listed in {self.path}. Write the shards without them, or raise the limit."
            )

    def _name(self, bad: BadSample) -> int | tuple[str, str]:
        """What tells one picture from others."""
        return bad.id if self.indexed and bad.id >= 0 else self._old_name(bad)

    def _old_name(self, bad: BadSample) -> tuple[str, str]:
        """The same, in lists of older versions, which have no ids."""
        return (bad.key, Path(bad.shard).name if self.indexed else bad.shard)


def _listed(path: Path) -> list[BadSample]:
    """The lines of a list. One that a crash cut is left out: its picture is listed again when it comes."""
    known = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(line)
            known.append(BadSample(int(found.get("id", -1)), str(found["key"]), str(found["shard"]), ""))
    return known


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
