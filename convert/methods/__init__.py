"""Target families: a folder each, with its config, its rule, its own layers and one `Method`; and a line here."""

from __future__ import annotations

from typing import Any

from ...core.errors import PlanError, near_miss
from ..plan import Method
from . import bcos, ca_stream, coda, fa_cnn, kmeans

__all__ = ["METHODS", "find_method", "method_of", "register"]

METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Adds a method; ValueError for a name that is taken."""
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    METHODS[method.name] = method


for _family in (bcos, coda, fa_cnn, ca_stream, kmeans):
    register(_family.METHOD)


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
