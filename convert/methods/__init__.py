"""Target families: one file each, one frozen config, one Method."""

from __future__ import annotations

from typing import Any

from ...core.errors import PlanError, near_miss
from ..plan import Method
from . import bcos, ca_stream, coda, fa_cnn, kmeans

__all__ = ["METHODS", "find_method", "method_of"]

FAMILIES = (bcos.METHOD, coda.METHOD, fa_cnn.METHOD, ca_stream.METHOD, kmeans.METHOD)
METHODS: dict[str, Method] = {method.name: method for method in FAMILIES}


def find_method(name: str) -> Method:
    """The method called `name`; raises PlanError with near misses."""
    if name not in METHODS:
        raise PlanError(f"no method {name!r}.{near_miss(name, METHODS)} There are: {', '.join(METHODS)}.")
    return METHODS[name]


def method_of(config: Any) -> Method:
    """The method whose settings `config` are; raises PlanError for an object that is none."""
    for method in METHODS.values():
        if type(config) is method.config_class:
            return method
    known = ", ".join(f"{method.config_class.__name__} ({name})" for name, method in METHODS.items())
    raise PlanError(f"{type(config).__name__} is not the settings of a method. There are: {known}.")
