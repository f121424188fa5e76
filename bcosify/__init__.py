"""Inherently interpretable vision models from pretrained ones. Its stages are `bcosify.convert`, `bcosify.align`...

`bcosify.load` opens a converted model, and lets timm, transformers and open_clip open them too (see `bcosify.publish`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .publish import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load` on its first use: importing one stage must not import all libraries."""
    if name == "load":
        from .publish import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
