"""The first thing to see: a finished student on photographs. Called, the package shows it: `bcosify.demo()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import call_as_verb, lazy_exports

if TYPE_CHECKING:
    from .verb import Demonstration, demo

__all__ = ["Demonstration", "demo"]

__getattr__ = lazy_exports(__name__, {"Demonstration": ".verb", "demo": ".verb"})
call_as_verb(__name__)
