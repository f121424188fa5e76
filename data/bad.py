"""Broken pictures: counted, listed, and an error where they are too many."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import NamedTuple

from ..core.errors import DataError

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
    run. A line of the list is {"key", "shard", "reason"}; lines from before a resume count. Processes may share the
    list: a line is one write.
    """

    def __init__(self, source: Sized, path: str | os.PathLike[str], limit: float = 0.01):
        self.source = source
        self.path = Path(path)
        self.limit = limit
        self.known = _listed(self.path)

    def __len__(self) -> int:
        return len(self.known)

    @property
    def share(self) -> float:
        return len(self.known) / len(self.source)

    def add(self, bad: Sequence[BadSample]) -> None:
        """Takes a batch's `bad`. Raises DataError when the share of broken pictures is above the limit."""
        for _, key, shard, why in bad:
            if (key, shard) not in self.known:
                self.known.add((key, shard))
                _append(self.path, json.dumps({"key": key, "shard": shard, "reason": why}) + "\n")
        if self.share > self.limit:
            raise DataError(
                f"{len(self.known)} of {len(self.source)} pictures ({self.share:.2%}) cannot be decoded; the limit is "
                f"{self.limit:.2%}. They are listed in {self.path}. Write the shards without them, or raise the limit."
            )


def _listed(path: Path) -> set[tuple[str, str]]:
    """Key and shard of each line. A line that a crash cut is left out: its picture is listed again when it comes."""
    known = set()
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(line)
            known.add((found["key"], found["shard"]))
    return known


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
