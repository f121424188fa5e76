"""The helper that chooses test cases covers what it says."""

from __future__ import annotations

import itertools

from pairs import pairs


def test_any_two_values_meet_and_there_are_few_cases():
    factors = {"kind": range(9), "b": (1.5, 2.0), "layout": "ab", "size": "xyz"}
    cases = pairs(**factors)
    for (i, first), (j, second) in itertools.combinations(enumerate(factors.values()), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(first, second))
    assert 27 <= len(cases) <= 30 and len(set(cases)) == len(cases)
