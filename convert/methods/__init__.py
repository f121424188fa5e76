"""Target families: one file each, one frozen config, one Method."""

from __future__ import annotations

from ...errors import PlanError, near_miss
from ..plan import Method
from . import bcos, coda

__all__ = ["METHODS", "find_method"]

METHODS: dict[str, Method] = {method.name: method for method in (bcos.METHOD, coda.METHOD)}


def find_method(name: str) -> Method:
    """The method called `name`; raises PlanError with near misses."""
    if name not in METHODS:
        raise PlanError(f"no method {name!r}.{near_miss(name, METHODS)} There are: {', '.join(METHODS)}.")
    return METHODS[name]
