"""The methods that a user would otherwise reach for, all on the same tensors: maps (B, H, W) of signed contributions.

`explanation` is our own: contributions in explanation mode, exact, of any model. On an unconverted transformer it is
the map of LibraGrad's rules (see `relevance`); AttnLRP's differ from them in attention, which it does not hold.
captum's are used where it has them; own code is for what no library carries.
"""

# Their order here is the order in which methods are listed.
# isort: off
from . import exact, gradients, perturbation, activations, attention, eclip, relevance, controls  # noqa: F401
from .attention import AttentionWeights, rollout
from .registry import METHODS, Method, find_method, maps_of

__all__ = ["CONTROLS", "METHODS", "AttentionWeights", "Method", "find_method", "maps_of", "rollout"]

CONTROLS = tuple(name for name, method in METHODS.items() if method.control)
