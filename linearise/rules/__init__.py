"""The affine form of each torch operation, once gates are frozen. A file for each kind, and `table` of them all.

A rule is called as `rule(ledger, run, *arguments)`, where `run` is the operation itself (out of place) and at least
one argument moves with the input. It returns what `run` returns, value for value, as a graph that is affine in what
moves, with every summand that does not move entered in the ledger. With sg = stop-gradient:

- linear operations, max-pooling, selection of extremes (routing):   as they are
- pointwise activations with a(0) = 0:    a(x)             ->  x · sg(a(x) / x)
- tanh:                                   the same, but frozen where it multiplies something that moves
- normalisers:                            (x - μ) / σ      ->  (x - μ) / sg(σ)
- attention:                              softmax(qkᵀ) v   ->  sg(softmax(qkᵀ)) v
- products of m moving factors:           Π x_i            ->  Σ_i x_i · sg(Π_{j≠i} x_j) / m
- whole powers:                           x^n              ->  x · sg(x^(n-1)), which is the same
- quotients:                              x / y            ->  x / sg(y)
- other known non-linear operations:      f(x)             ->  sg(f(x)), a constant called "f output"
- operations that are not in the table:   f(x)             ->  sg(f(x)), which enters no ledger, so it cannot balance
"""

from __future__ import annotations

from .affine import linear
from .gates import carried_bias, carrier, gate, gate_by, with_energy_rule, with_mean_rule, with_statistics_rule
from .inputs import colours, encoding, linear_in_encoding
from .rule import Operation, Rule
from .table import IN_PLACE, OPERATIONS, PROPERTIES, resolve

__all__ = [
    "IN_PLACE",
    "OPERATIONS",
    "PROPERTIES",
    "Operation",
    "Rule",
    "carried_bias",
    "carrier",
    "colours",
    "encoding",
    "gate",
    "gate_by",
    "linear",
    "linear_in_encoding",
    "resolve",
    "with_energy_rule",
    "with_mean_rule",
    "with_statistics_rule",
]
