"""Ranges: what is in them, how they say it, and that no number of a setting or an option is without one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import typing
from typing import Annotated, Any

import numpy as np
import pytest
import yaml
from bcosify.align.objectives import FITS, OBJECTIVES
from bcosify.align.recipe import Phase, Recipe
from bcosify.cli.main import VERBS
from bcosify.convert.methods import METHODS
from bcosify.core.errors import BcosifyError, OptionError, PlanError
from bcosify.core.files import json_text
from bcosify.core.ranges import ASCENDING, BELOW_ONE, COUNT, PART, SEED, SHARE, WINDOW, Length, Range, ranged
from bcosify.core.settings import check, faults, parse, read_yaml, shown

import bcosify


@pytest.mark.parametrize(
    ("range_", "inside", "outside", "words"),
    [
        (SHARE, (0, 0.5, 1), (-0.1, 1.1, math.nan, math.inf), "must be between 0 and 1; got "),
        (PART, (1e-9, 1), (0, 1.5), "must be above 0 and at most 1; got "),
        (BELOW_ONE, (0, 0.999), (1, -1), "must be at least 0 and below 1; got "),
        (COUNT, (1, 10**6, np.int64(3)), (0, -1, 2**41), "must be at least 1; got "),
        (SEED, (0, 2**62), (-1, 2**63), "must be at least 0 and below 2^63; got "),
        (Range(0, above=True, infinite=True), (0.1, math.inf), (0, -math.inf, math.nan), "must be above 0; got "),
        (WINDOW, (0, 0.3, 7), (2, 1.5, -1), "must be 0 (the whole map), a share below 1 of its side, or an odd "),
    ],
    ids=str,
)
def test_what_is_in_a_range_and_what_is_said(range_, inside, outside, words):
    assert not any(map(range_.fault, inside))
    assert all(range_.fault(value).startswith(words) for value in outside)


@pytest.mark.parametrize("value", [True, "3", None, [1]])
def test_what_is_no_number_is_said(value):
    assert SHARE.fault(value).startswith("must be a number, between 0 and 1; got ")
    assert COUNT.fault(2.5) == "must be a whole number, at least 1; got 2.5"


def test_lists_have_lengths_and_orders():
    assert Length(1, 3, "phases").fault([]) == "must have from 1 to 3 phases; got 0"
    assert ASCENDING.fault((0.2, 0.2, 1)) == "" and "must not fall" in ASCENDING.fault((1.0, 0.5))


@dataclasses.dataclass(frozen=True)
class Config:
    size: Annotated[int, COUNT] = 1
    share: Annotated[float, SHARE] | None = None
    ends: Annotated[tuple[Annotated[float, SHARE], Annotated[float, SHARE]], ASCENDING] = (0.0, 1.0)


def test_all_faults_of_a_dataclass_are_found_in_values_and_in_objects():
    wrong = {"size": 0, "share": ".nan", "ends": [0.5, 2]}
    assert list(faults(Config, wrong)) == [
        "size: must be at least 1; got 0",
        "share: must be float; got '.nan'",
        "ends.1: must be between 0 and 1; got 2",
    ]
    assert list(faults(Config, Config(0, math.nan, (1.0, 0.0)))) == [
        "size: must be at least 1; got 0",
        "share: must be between 0 and 1; got nan",
        "ends: must not fall from one value to the next; got [1.0, 0.0]",
    ]
    assert parse(Config, {"size": np.int64(2), "share": "1e-1"}) == Config(2, 0.1)
    assert list(faults(Config, {"share": 10**400})) != [] == list(faults(Config, {"share": None}))
    with pytest.raises(PlanError, match="^Config: size: must be at least 1; got 0$"):
        check(Config(0))


def test_a_function_is_not_entered_with_numbers_out_of_range():
    entered = []

    @ranged(size=COUNT, share=SHARE)
    def function(name: str, size: int = 8, *, share: float | None = None) -> None:
        entered.append((name, size, share))

    function("a")
    function("b", 3, share=0.5)
    with pytest.raises(
        OptionError, match="^size: must be at least 1; got -1; share: must be between 0 and 1; got nan$"
    ):
        function("c", -1, share=math.nan)
    with pytest.raises(TypeError, match="missing"):
        function()
    assert entered == [("a", 8, None), ("b", 3, 0.5)] and issubclass(OptionError, BcosifyError)


def numbers_of(hint: Any) -> list[Any]:
    """The number types in an annotation that stand beside no range."""
    if typing.get_origin(hint) is Annotated:
        inner, *bounds = typing.get_args(hint)
        return [] if any(isinstance(bound, Range) for bound in bounds) else numbers_of(inner)
    arguments = typing.get_args(hint)
    return [one for item in arguments for one in numbers_of(item)] if arguments else [hint] * (hint in (int, float))


@pytest.mark.parametrize(
    "kind",
    [Recipe, Phase, *(known.config_class for known in (OBJECTIVES | FITS).values()),
     *(method.config_class for method in METHODS.values())],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_every_number_of_a_setting_has_a_range(kind):
    hints = typing.get_type_hints(kind, include_extras=True)
    assert not {name: found for name, hint in hints.items() if (found := numbers_of(hint))}


@pytest.mark.parametrize("verb", VERBS)
def test_every_number_of_a_command_has_a_range(verb):
    command = getattr(importlib.import_module(f"bcosify.cli.{verb}"), verb)
    hints = typing.get_type_hints(command)
    counted = {name for name in inspect.signature(command).parameters if numbers_of(hints[name])}
    found = getattr(bcosify, verb)  # a package that can be called, or the function
    assert counted <= set(getattr(getattr(found, verb, found), "ranges", {}))


NESTED = "[" * 3000
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 10000 values"),
        ("phases: &p [*p]", "holds itself"),
        (NESTED, "nested more than 20 deep"),
        ("{a: " * 30 + "1" + "}" * 30, "nested more than 20 deep"),
        ("day: 2020-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "digits"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
        ("a: " + "x" * 1_000_001, "settings have at most"),
        ("? {a: 1}\n: 2", "unhashable"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_no_person_writes_is_refused_in_a_line(text, said):
    with pytest.raises(yaml.YAMLError, match=said):
        read_yaml(text)


def test_yaml_of_a_person_is_read():
    assert read_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]} and read_yaml("") is None
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep] * 50
    assert len(shown(deep)) < 300 and len(shown("x" * 10**6)) < 100


def test_json_has_null_for_what_is_no_number():
    assert json_text({"a": [math.nan, 1.5], "b": (math.inf, {"c": -math.inf})}) == (
        '{"a": [null, 1.5], "b": [null, {"c": null}]}'
    )
