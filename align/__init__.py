"""Training a converted student towards its frozen teacher. Called, the package aligns: `bcosify.align(RUN, data=...)`.

`align` and `demo` are the verbs. All is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import call_as_verb, lazy_exports

if TYPE_CHECKING:
    from .demonstration import Demonstration, demo
    from .recipe import Recipe, load_recipe
    from .run import AlignConfig
    from .verb import Aligned, align

__all__ = ["AlignConfig", "Aligned", "Demonstration", "Recipe", "align", "demo", "load_recipe"]

__getattr__ = lazy_exports(
    __name__,
    {
        "AlignConfig": ".run",
        "Aligned": ".verb",
        "Demonstration": ".demonstration",
        "Recipe": ".recipe",
        "align": ".verb",
        "demo": ".demonstration",
        "load_recipe": ".recipe",
    },
)
call_as_verb(__name__)
