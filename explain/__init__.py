"""Explain what a model computed: contributions of the input, named constants, and a proof that they add up.

Called, the package explains: `bcosify.explain(MODEL, PICTURES)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import call_as_verb, lazy_exports
from ..linearise import Linearised, dynamic_linear, gated, input_encoding
from .attribution import Explanation, attribute, explain_scores
from .render import ledger_bar, ledger_parts, overlay, panel, rgba, signed_map, smoothed, smoothing
from .self_explaining import SelfExplaining
from .targets import (
    ClassTarget,
    DirectionTarget,
    FunctionTarget,
    PatchFeature,
    SelfTarget,
    SimilarityTarget,
    Target,
    TopTarget,
    ZeroShotTarget,
    find_class,
)
from .views import Views, explain_views

if TYPE_CHECKING:
    from .explained import Explained, Share
    from .protocol import Attribution
    from .results import ScoreLedger
    from .verb import explain

__all__ = [
    "Attribution",
    "ClassTarget",
    "DirectionTarget",
    "Explained",
    "Explanation",
    "FunctionTarget",
    "Linearised",
    "PatchFeature",
    "ScoreLedger",
    "SelfExplaining",
    "SelfTarget",
    "Share",
    "SimilarityTarget",
    "Target",
    "TopTarget",
    "Views",
    "ZeroShotTarget",
    "attribute",
    "dynamic_linear",
    "explain",
    "explain_scores",
    "explain_views",
    "find_class",
    "gated",
    "input_encoding",
    "ledger_bar",
    "ledger_parts",
    "overlay",
    "panel",
    "rgba",
    "signed_map",
    "smoothed",
    "smoothing",
]

# The verb opens models, and `convert` reads the rules of this package: it is imported when it is first used.
__getattr__ = lazy_exports(
    __name__,
    {
        "Attribution": ".protocol",
        "Explained": ".explained",
        "ScoreLedger": ".results",
        "Share": ".explained",
        "explain": ".verb",
    },
)
call_as_verb(__name__)
