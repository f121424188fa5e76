"""Folders and files that are either whole or not there: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError

__all__ = ["cache_root", "check_free", "file_digest", "finite", "json_text", "new_file", "new_folder"]


def cache_root() -> Path:
    """Where bcosify keeps what can be made again: $BCOSIFY_CACHE, else `bcosify` in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("BCOSIFY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "bcosify"


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON that every reader takes: a number that is none (nan, infinity) is null. Options are `json.dumps`'s."""
    return json.dumps(finite(value), indent=indent, allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Plain values with None in the place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def check_free(out: Path, overwrite: bool = False) -> None:
    """Raises CheckpointError where `out` exists and may not be replaced; call it before long work starts."""
    if os.path.lexists(out) and not overwrite:
        raise CheckpointError(
            f"{out} exists already. Nothing was written; pass another --out, or --overwrite to replace it."
        )


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside `out` to fill; it becomes `out` when the block ends, and is gone when the block fails.

    Raises CheckpointError where `out` exists (without `overwrite`) or the disk refuses (full, read-only).
    """
    out = Path(out)
    check_free(out, overwrite)
    scratch = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        yield scratch
        scratch.chmod(0o755)  # mkdtemp's, or what was copied into it, may be the owner's alone
        for path in [*scratch.rglob("*"), scratch]:
            _flush(path)
        if overwrite and os.path.lexists(out):
            replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            os.rename(out, replaced / "old")
            os.rename(scratch, out)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(scratch, out)
        _flush(out.parent)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(f"{out} could not be written: {error}. Nothing was left behind.") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A scratch path beside `out` to write; it replaces `out` when the block ends, and is gone when the block fails."""
    out = Path(out)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        _flush(scratch)
        os.replace(scratch, out)
        _flush(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}. Nothing was left behind.") from error
    finally:
        scratch.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
