"""Which values a setting may have: one object, beside the field's type or over a function's parameters.

    @dataclasses.dataclass(frozen=True)
    class Config:
        batch_size: Annotated[int, COUNT] = 8

    @ranged(batch_size=COUNT)
    def explain(model, batch_size=8): ...

`core.settings.faults` reads them in dataclasses. Nothing else in bcosify asks whether a number is in its range.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

from .errors import OptionError

__all__ = [
    "AMOUNT",
    "ANY_COUNT",
    "ASCENDING",
    "BELOW_ONE",
    "COUNT",
    "EXPONENT",
    "FACTOR",
    "MANY",
    "PART",
    "SEED",
    "SHARE",
    "SIDE",
    "WINDOW",
    "Bound",
    "Length",
    "Range",
    "Rising",
    "ranged",
]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
MANY = 2**40  # more than anything that is counted here; arithmetic on it stays in 64 bits


class Bound(Protocol):
    """What stands beside a type: says in words what a value must be, where it is not."""

    def fault(self, value: Any, /) -> str:
        """What is wrong with `value`, after the setting's name; empty where nothing is."""
        ...


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; what is no number is in no range.

    Attributes:
        above, below: `least`, `most` themselves are outside.
        infinite: infinity is inside. whole: only whole numbers are.
        allows: a further condition, which `words` then names.
        words: the range in words, after "must be".
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False
    whole: bool = False
    allows: Callable[[float], bool] = lambda value: True
    words: str = ""

    def __str__(self) -> str:
        if self.words:
            return self.words
        low = f"{'above' if self.above else 'at least'} {self.least:.10g}"
        high = f"{'below' if self.below else 'at most'} {self.most:.10g}"
        if self.most >= MANY:
            return "a finite number" if math.isinf(self.least) else low
        return f"{low} and {high}" if self.above or self.below else f"between {self.least:.10g} and {self.most:.10g}"

    def __contains__(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and (self.infinite or value not in (math.inf, -math.inf)) and self.allows(value)

    def fault(self, value: Any) -> str:
        kind: Any
        kind, name = (numbers.Integral, "a whole number, ") if self.whole else (numbers.Real, "a number, ")
        if isinstance(value, bool) or not isinstance(value, kind):
            return f"must be {name}{self}; got {repr(value)[:60]}"
        return "" if value in self else f"must be {self}; got {_short(value)}"


def _short(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:60]


@dataclasses.dataclass(frozen=True)
class Length:
    """Lists of `least` to `most` items; `what` they are, in the plural."""

    least: int
    most: int
    what: str = "values"

    def fault(self, value: Sequence[Any]) -> str:
        if self.least <= len(value) <= self.most:
            return ""
        return f"must have from {self.least} to {self.most} {self.what}; got {len(value)}"


@dataclasses.dataclass(frozen=True)
class Rising:
    """Lists of numbers none of which is smaller than the one before it."""

    def fault(self, value: Sequence[float]) -> str:
        return "" if list(value) == sorted(value) else f"must not fall from one value to the next; got {list(value)}"


COUNT = Range(1, MANY, whole=True)  # of things of which there must be one
ANY_COUNT = Range(0, MANY, whole=True)  # of things of which there may be none
# What every generator takes; the calibration's is one more.
SEED = Range(0, 2**63 - 2, whole=True, words="at least 0 and below 2^63")
SIDE = Range(1, 8192, whole=True)  # of a picture, in pixels: what models of pictures are far below
SHARE = Range(0, 1)
PART = Range(0, 1, above=True)  # a share that is not nothing
BELOW_ONE = Range(0, 1, below=True)
AMOUNT = Range(0)  # a weight, a rate: no negative one means anything
FACTOR = Range(0, above=True)
EXPONENT = Range(1)  # B
WINDOW = Range(
    0,
    allows=lambda value: value < 1 or value % 2 == 1,
    words="0 (the whole map), a share below 1 of its side, or an odd number of places",
)
ASCENDING = Rising()


def ranged(**ranges: Range) -> Callable[[FunctionT], FunctionT]:
    """Checks these parameters of a function, all at once, before it does anything. None, not given, is in every range.

    Raises OptionError (in the function that is made).
    """

    def decorate(function: FunctionT) -> FunctionT:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # the function says so itself
                return function(*args, **kwargs)
            told = {name: given[name] for name in ranges if given.get(name) is not None}
            if wrong := {name: fault for name, value in told.items() if (fault := ranges[name].fault(value))}:
                raise OptionError(wrong)
            return function(*args, **kwargs)

        checked.__dict__["ranges"] = ranges
        return cast(FunctionT, checked)

    return decorate
