"""What a rule is. See `rules` for what it must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..ledger import Ledger

__all__ = ["Operation", "Rule", "Run"]


Run = Callable[..., Any]


class Rule(Protocol):
    def __call__(self, ledger: Ledger, run: Run, /, *args: Any, **kwargs: Any) -> Any: ...


class Operation(NamedTuple):
    """What a torch function is called in messages, its affine form, and whether it writes to its first argument."""

    name: str
    rule: Rule
    in_place: bool
