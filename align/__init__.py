"""Training a converted student towards its frozen teacher. Called, the package aligns: `bcosify.align(RUN, data=...)`.

All is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import call_as_verb, lazy_exports

if TYPE_CHECKING:
    from .recipe import Recipe, load_recipe
    from .run import AlignConfig
    from .verb import Aligned, align

__all__ = ["AlignConfig", "Aligned", "Recipe", "align", "load_recipe"]

__getattr__ = lazy_exports(
    __name__,
    {
        "AlignConfig": ".run",
        "Aligned": ".verb",
        "Recipe": ".recipe",
        "align": ".verb",
        "load_recipe": ".recipe",
    },
)
call_as_verb(__name__)
