"""Explain what a model computed: contributions of the input, named constants, and a proof that they add up."""

from .attribution import Explanation, SelfExplaining, attribute, explain
from .linearise import Linearised, dynamic_linear, gated, input_encoding
from .render import overlay, panel, rgba, signed_map
from .targets import (
    ClassTarget,
    DirectionTarget,
    PatchFeature,
    SelfTarget,
    SimilarityTarget,
    Target,
    TopTarget,
    ZeroShotTarget,
    find_class,
)

__all__ = [
    "ClassTarget",
    "DirectionTarget",
    "Explanation",
    "Linearised",
    "PatchFeature",
    "SelfExplaining",
    "SelfTarget",
    "SimilarityTarget",
    "Target",
    "TopTarget",
    "ZeroShotTarget",
    "attribute",
    "dynamic_linear",
    "explain",
    "find_class",
    "gated",
    "input_encoding",
    "overlay",
    "panel",
    "rgba",
    "signed_map",
]
