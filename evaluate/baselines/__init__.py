"""The methods that a user would otherwise reach for, all on the same tensors: maps (B, H, W) of signed contributions.

`explanation` is our own: contributions in explanation mode, exact, of any model. On an unconverted model its rules are
those of AttnLRP (Achtibat et al. 2024, arXiv 2402.05602) as a linearised gradient, and add up to the score.
captum's are used where it has them; own code is for what no library carries.
"""

# Their order here is the order in which methods are listed.
# isort: off
from . import exact, gradients, perturbation, activations, attention, controls  # noqa: F401
from .attention import AttentionWeights, rollout
from .registry import METHODS, Method, find_method, maps_of

__all__ = ["CONTROLS", "METHODS", "AttentionWeights", "Method", "find_method", "maps_of", "rollout"]

CONTROLS = tuple(name for name, method in METHODS.items() if method.control)
