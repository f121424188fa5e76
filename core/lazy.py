"""Packages that import what they export on its first use, and packages that are called as the function of their name.

Each verb is a function in the package of the same name: `bcosify.align` is the package, and `bcosify.align.align` the
function. Python binds an imported package to its name in the parent, so `bcosify.align(...)` only works at any time,
whatever was imported before, where the package itself can be called.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

__all__ = ["VerbPackage", "call_as_verb", "lazy_exports"]


class VerbPackage(ModuleType):
    """A package that passes calls on to its function of the same name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _verb_of(self)(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_verb_of(self))


def _verb_of(package: ModuleType) -> Callable[..., Any]:
    return getattr(package, package.__name__.rpartition(".")[2])


def call_as_verb(package: str) -> None:
    """Makes an imported package callable; to be called in its `__init__` as `call_as_verb(__name__)`."""
    sys.modules[package].__class__ = VerbPackage


def lazy_exports(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose exports are imported when they are first asked for.

    Args:
        package: its `__name__`.
        places: exported name -> the module that has it, relative to the package (`.trainer`), with the name that it
            has there where that is another one (`.pack:write_shards`).
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, there = places[name].partition(":")
        found = getattr(importlib.import_module(module, package), there or name)
        setattr(sys.modules[package], name, found)
        return found

    return get
