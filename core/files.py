"""Folders and files that are either whole or not there: written aside, flushed to disk, then renamed.

What is there already is replaced on request only, and only where it is what the same verb wrote, with nothing else in
it. Also how files of others are opened: regular ones alone, and no larger than they may be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import BcosifyError, CheckpointError

__all__ = [
    "Own",
    "all_of_it",
    "cache_root",
    "check_file",
    "check_free",
    "file_digest",
    "finite",
    "json_text",
    "new_file",
    "new_folder",
    "none_of_it",
    "paths_in",
    "read_json",
    "read_text",
]

TEXT_LIMIT = 2**26  # bytes of a text file that is read whole


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


# ------------------------------------------------------------------------------------------------- files of strangers


def check_file(path: Path, most: int | None = None, raises: type[BcosifyError] = CheckpointError) -> Path:
    """`path`; raises where it is missing, no regular file (a pipe never ends, nor does a device), or too large.

    Args:
        most: bytes that such a file has at most; None for what is not read whole.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise raises(f"{path} is missing.") from error
        raise raises(f"{path} cannot be read: {error}.") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a device or the like"
        raise raises(f"{path} is {kind}, and no regular file. It is not opened.")
    if most is not None and found.st_size > most:
        raise raises(f"{path} has {found.st_size:,} bytes; such a file has at most {most:,}.")
    return path


def read_text(path: Path, raises: type[BcosifyError] = CheckpointError, most: int = TEXT_LIMIT) -> str:
    """The text in a regular file of at most `most` bytes, UTF-8; raises `raises` where it is none."""
    try:
        return check_file(path, most, raises).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise raises(f"{path} cannot be read as text: {error}.") from error


def read_json(path: Path, raises: type[BcosifyError] = CheckpointError, most: int = TEXT_LIMIT) -> Any:
    """The JSON values in a regular file of at most `most` bytes; raises `raises` where they are none."""
    try:
        return json.loads(check_file(path, most, raises).read_bytes())
    except OSError as error:
        raise raises(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a number of more digits than Python reads
        raise raises(f"{path} is not JSON: {error}") from error


# ------------------------------------------------------------------------------------------------- what may be replaced

# (file or folder) -> the names in it that a verb wrote; none of a file; None of what the verb did not write.
Own = Callable[[Path], set[str] | None]


def all_of_it(folder: Path) -> set[str] | None:
    """For what lies in a folder of the program's own, such as a cache: nobody else writes there."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def none_of_it(folder: Path) -> set[str] | None:
    """For what a verb cannot know again: it is never replaced."""
    return None


def check_free(
    out: Path, overwrite: bool = False, own: Own = none_of_it, inputs: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Raises CheckpointError where `out` exists and may not be replaced; call it before long work starts.

    Args:
        overwrite: it may be replaced where it is what `own` says, with nothing else in it.
        inputs: what the verb reads: paths, shards (globs, braces, several behind `::`), references. None of them may be
            `out`, or lie in it.
    """
    out = Path(out)
    if out == Path() or "\0" in str(out):
        raise CheckpointError(
            "--out is empty, or no name of a file or folder. Nothing was written; pass another --out."
        )
    for given in inputs:
        if any(place.is_relative_to(out.resolve()) for place in _places(given)):
            raise CheckpointError(
                f"{out} is, or holds, what is read ({given}). Nothing was written; pass another --out."
            )
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out} exists already. Nothing was written; pass another --out, or --overwrite to replace it."
        )
    if why := _not_replaced(out, own):
        raise CheckpointError(
            f"{out} {why}, so --overwrite does not replace it. Nothing was written; move it away, or pass another "
            "--out."
        )


def _not_replaced(out: Path, own: Own) -> str:
    """Why `out` is not what may be replaced; empty where it is."""
    if out.is_symlink():
        return "is a link"
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if out.is_dir() and not names:
        return ""
    ours = own(out)
    if ours is None:
        return "was not written by this command"
    others = sorted(names - ours)
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"holds what this command did not write ({', '.join(others[:3])}{more})" if others else ""


def paths_in(*given: Any) -> Iterator[str | os.PathLike[str]]:
    """The texts and paths among options, and in lists of them: what `check_free` takes as inputs."""
    for one in given:
        if isinstance(one, str | os.PathLike):
            yield one
        elif isinstance(one, list | tuple):
            yield from paths_in(*one)


LOCAL = re.compile(r"(?:\w+:)?(?:dir|local-dir|hf):")


def _places(given: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The files and folders here that an input names: without its scheme, and of a pattern the folder in front."""
    for part in [] if given is None else os.fspath(given).split("::"):
        fixed = re.split(r"[*?\[{]", part, maxsplit=1)[0]
        # The name itself is looked for too: it may have a colon, or a sign of a pattern, in it.
        names = {part, LOCAL.sub("", part, count=1)} | ({os.path.dirname(fixed) or "."} if fixed != part else set())
        for name in names - {""}:
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: ~ of nobody
                place = Path(name).expanduser()
                if place.exists():
                    yield place.resolve()


# ----------------------------------------------------------------------------------------------------- written aside


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False, own: Own = none_of_it) -> Iterator[Path]:
    """A scratch folder beside `out` to fill; it becomes `out` when the block ends, and is gone when the block fails.

    Raises CheckpointError where `out` exists and may not be replaced (see `check_free`), or the disk refuses (full,
    read-only).
    """
    out = Path(out)
    check_free(out, overwrite, own)
    with _aside(out) as scratch:
        scratch.mkdir()
        mode = stat.S_IMODE(scratch.stat().st_mode)  # as the umask has it
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            # What was copied, or written by safetensors, may be the owner's alone.
            path.chmod(mode if path.is_dir() else mode & 0o666)
            _flush(path)
        check_free(out, overwrite, own)  # again: the work may have taken hours
        _put(scratch, out)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A scratch path beside `out` to write; it replaces `out` when the block ends, and is gone when the block fails."""
    out = Path(out)
    with _aside(out) as scratch:
        scratch.touch()
        mode = stat.S_IMODE(scratch.stat().st_mode)  # as the umask has it
        scratch.unlink()
        yield scratch
        scratch.chmod(mode)  # safetensors and some others make files that are the owner's alone
        _flush(scratch)
        os.replace(scratch, out)
        _flush(out.parent)


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A path of the name of `out`, in a folder beside it that nobody else can foresee or enter, gone afterwards."""
    holder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        yield holder / out.name
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(f"{out} could not be written: {error}. Nothing was left behind.") from error
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def _put(scratch: Path, out: Path) -> None:
    """Renames `scratch` to `out`; what was there is put back where that fails, and else is gone."""
    if not os.path.lexists(out):
        os.rename(scratch, out)
    else:
        old = scratch.with_name(f"{out.name}.old")
        os.rename(out, old)
        try:
            os.rename(scratch, out)
        except OSError:
            os.rename(old, out)
            raise
    _flush(out.parent)


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
