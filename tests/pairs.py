"""Cases that cover every pair of values of two factors, and not every combination of all factors."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

__all__ = ["pairs"]


def pairs(**factors: Collection[Any]) -> list[tuple[Any, ...]]:
    """Cases (one value of each factor, in their order), in which any two values of two factors meet at least once.

    Greedy: the next case is the one with the most pairs that are still missing. Deterministic.
    """
    every = list(itertools.product(*factors.values()))
    missing = {pair for case in every for pair in itertools.combinations(enumerate(case), 2)}
    cases = []
    while missing:
        case = max(every, key=lambda case: sum(pair in missing for pair in itertools.combinations(enumerate(case), 2)))
        missing.difference_update(itertools.combinations(enumerate(case), 2))
        cases.append(case)
    return cases
