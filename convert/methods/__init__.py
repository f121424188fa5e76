"""Target families: one file each, one frozen config, one Method."""

from __future__ import annotations

from ...core.errors import PlanError, near_miss
from ..plan import Method
from . import bcos, ca_stream, coda, fa_cnn, kmeans

__all__ = ["METHODS", "find_method"]

FAMILIES = (bcos.METHOD, coda.METHOD, fa_cnn.METHOD, ca_stream.METHOD, kmeans.METHOD)
METHODS: dict[str, Method] = {method.name: method for method in FAMILIES}


def find_method(name: str) -> Method:
    """The method called `name`; raises PlanError with near misses."""
    if name not in METHODS:
        raise PlanError(f"no method {name!r}.{near_miss(name, METHODS)} There are: {', '.join(METHODS)}.")
    return METHODS[name]
