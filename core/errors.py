"""The one tree of errors that bcosify raises on purpose.

A message says what failed, where, what was found, what is supported, and what to type next. The command line prints the
message alone (no traceback) and exits with 1; wrong usage exits with 2.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

from .words import printable

__all__ = [
    "BcosifyError",
    "CheckpointError",
    "DataError",
    "DataWarning",
    "Incomplete",
    "LedgerError",
    "NotApplicable",
    "OptionError",
    "PlanError",
    "PublishError",
    "RecipeError",
    "SourceError",
    "TargetError",
    "first_line",
    "near_miss",
    "translated",
]


LONGEST, MOST = 200, 20_000  # of near misses


class BcosifyError(Exception):
    """Base of every error that bcosify raises on purpose. What files of others put into its message is printable."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SourceError(BcosifyError):
    """A model reference does not resolve: no such library, model or weights."""


class PlanError(BcosifyError):
    """A model cannot be converted as asked: nothing matched, or a layer is not supported."""


class LedgerError(BcosifyError):
    """Contributions and constants do not add up to the score, or a student is not its teacher at B = 1."""


class CheckpointError(BcosifyError):
    """A folder cannot be written, or what lies in it is not what was saved."""


class DataError(BcosifyError):
    """Shards or pictures are missing, empty, truncated or broken."""


class DataWarning(UserWarning):
    """What was left out, guessed or ignored of shards and pictures; the command prints it as one line."""


class Incomplete(BcosifyError):
    """A verb did what it could, and some of it failed: `result` is printed, then the message; the exit code is 1."""

    def __init__(self, message: str, result: object) -> None:
        super().__init__(message)
        self.result = result


class RecipeError(BcosifyError):
    """A recipe has unknown, missing or wrong keys, or differs from the run that it should resume."""


class PublishError(BcosifyError):
    """A model may not, or could not, be published; says what is on the hub now."""


class TargetError(BcosifyError):
    """A target to explain does not exist in this model."""


class OptionError(BcosifyError, ValueError):
    """Options are outside of their ranges: wrong usage, so the command line exits with 2.

    Attributes:
        wrong: option -> what it must be, and what it is.
    """

    def __init__(self, wrong: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {fault}" for name, fault in wrong.items()))
        self.wrong = dict(wrong)


class NotApplicable(BcosifyError):
    """A metric or a method has no meaning for this model or these pictures; a report says so, and why."""


def near_miss(word: str, known: Iterable[str], count: int = 3) -> str:
    """` Did you mean 'a', 'b'?` with the known words closest to `word`; empty where none is close.

    Words of more than `LONGEST` letters and known words beyond `MOST` are not compared: that takes no end.
    """
    if len(word) > LONGEST:
        return ""
    close = difflib.get_close_matches(word, list(itertools.islice(known, MOST)), n=count, cutoff=0.6)
    return f" Did you mean {', '.join(repr(item) for item in close)}?" if close else ""


def first_line(error: BaseException, count: int = 1) -> str:
    """The first line of what an error says, or the first `count` lines in one; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__


@contextlib.contextmanager
def translated(
    errors: type[Exception] | tuple[type[Exception], ...],
    to: type[BcosifyError],
    message: Callable[[Exception], str],
    *,
    ours: type[Exception] | tuple[type[Exception], ...] = BcosifyError,
    chained: bool = True,
) -> Iterator[None]:
    """Inside, what a library raises becomes one of our errors. Of several in one `with`, the last has the first word.

    Args:
        errors: what is translated.
        to: what it becomes.
        message: makes the message from the error: what failed, what the library said, and what to type next.
        ours: errors of these classes pass as they are.
        chained: whether a traceback shows the library's error too; False where that may hold a secret.
    """
    try:
        yield
    except ours:
        raise
    except errors as error:
        raise to(message(error)) from (error if chained else None)
