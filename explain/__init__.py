"""Explain what a model computed: contributions of the input, named constants, and a proof that they add up."""

from .attribution import Explanation, attribute, explain
from .linearise import Linearised, gated, input_colours, input_encoding
from .render import overlay, panel, rgba, signed_map
from .targets import ClassTarget, DirectionTarget, SelfTarget, SimilarityTarget, Target, TopTarget, find_class

__all__ = [
    "ClassTarget",
    "DirectionTarget",
    "Explanation",
    "Linearised",
    "SelfTarget",
    "SimilarityTarget",
    "Target",
    "TopTarget",
    "attribute",
    "explain",
    "find_class",
    "gated",
    "input_colours",
    "input_encoding",
    "overlay",
    "panel",
    "rgba",
    "signed_map",
]
