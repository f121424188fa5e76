"""Swaps: what a layer can be turned into, each under an id that saved models keep.

A swap changes a module in place: its class becomes a subclass, and what the new class needs is added. The id and the
arguments of every swap of a student are in its folder, so they are a file format: an id never comes to mean something
else, and a new argument has a default. Classes, functions and files may be renamed freely, and so may an id, if its
old name goes into `ALIASES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import PlanError, near_miss

if TYPE_CHECKING:
    from .libraries import Preprocess

__all__ = ["ALIASES", "SWAPS", "NoArguments", "Swap", "find_swap", "swap"]


@dataclasses.dataclass(frozen=True)
class NoArguments:
    """Of a swap that needs to know nothing but the module."""


@dataclasses.dataclass(frozen=True)
class Swap:
    """One kind of change.

    Attributes:
        id: `family.name`, as files have it.
        layer: the class that a module has among its bases afterwards. over: what it must be before.
        arguments: a frozen dataclass of values that JSON has, fixed when a model is planned.
        change: (module, preprocess, arguments) -> None, in place. The module may be on the meta device.
    """

    id: str
    layer: type[nn.Module]
    over: type[nn.Module]
    arguments: type
    change: Callable[[Any, Preprocess, Any], None]


# All swaps of this version, by id. They are made beside the rules that ask for them, in `methods`.
SWAPS: dict[str, Swap] = {}
# Earlier id -> id of now.
ALIASES: dict[str, str] = {}


def swap(
    id: str,
    layer: type[nn.Module],
    over: type[nn.Module] = nn.Module,
    arguments: type = NoArguments,
) -> Callable[[Callable[[Any, Preprocess, Any], None]], Swap]:
    """Decorator that makes a `Swap` of its `change` and adds it to `SWAPS`; ValueError for an id that is taken."""

    def register(change: Callable[[Any, Preprocess, Any], None]) -> Swap:
        if id in SWAPS or id in ALIASES:
            raise ValueError(f"there is a swap {id!r} already")
        SWAPS[id] = Swap(id, layer, over, arguments, change)
        return SWAPS[id]

    return register


def find_swap(id: str) -> Swap:
    """The swap of an id, of now or earlier; raises PlanError with near misses."""
    found = SWAPS.get(ALIASES.get(id, id))
    if found is None:
        raise PlanError(f"no swap {id!r}.{near_miss(id, SWAPS)}")
    return found
