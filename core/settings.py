"""Frozen dataclasses from plain values (YAML, JSON, the command line), strictly: all faults at once, a line each."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import yaml

from .errors import PlanError, near_miss

__all__ = ["faults", "from_assignments", "parse"]


def from_assignments(kind: type, assignments: Sequence[str], **given: Any) -> Any:
    """The config `kind` with `given` and what `key=value` texts say; values are read as YAML.

    Raises:
        PlanError: a text that is no assignment, or settings that `kind` does not have or take (all of them).
    """
    values = dict(given)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise PlanError(f"--set {assignment}: write it as key=value.")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlanError(f"--set {assignment}: the value is not YAML: {error}") from error
    if found := list(faults(kind, values)):
        known = ", ".join(field.name for field in dataclasses.fields(kind))
        raise PlanError(
            "\n".join([f"--set: {len(found)} fault(s):", *(f"  {fault}" for fault in found), f"There are: {known}."])
        )
    return parse(kind, values)


def faults(kind: Any, value: Any, where: str = "") -> Iterator[str]:
    """One line for everything in `value` that does not fit the annotation `kind`; `where` says what it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if dataclasses.is_dataclass(kind):
        yield from _dataclass_faults(kind, value, where)
    elif origin is Literal:
        if value not in arguments:
            hint = near_miss(str(value), map(str, arguments))
            yield f"{where}: must be one of {', '.join(map(repr, arguments))}; got {value!r}.{hint}"
    elif origin is tuple:
        if not isinstance(value, list | tuple):
            yield f"{where}: must be a list; got {value!r}"
        elif arguments[-1] is not Ellipsis and len(value) != len(arguments):
            yield f"{where}: must have {len(arguments)} values; got {value!r}"
        else:
            for i, item in enumerate(value):
                yield from faults(arguments[0], item, f"{where}.{i}")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where}: must be keys and values; got {value!r}"
        else:
            for key, item in value.items():
                yield from faults(arguments[1], item, f"{where}.{key}")
    elif origin in (typing.Union, types.UnionType):
        if not any(not list(faults(option, value, where)) for option in arguments):
            yield f"{where}: must be {kind}; got {value!r}"
    elif kind is float and isinstance(value, str) and _is_number(value):
        return  # YAML reads 3e-4, without a point, as text
    else:
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not fits:
            yield f"{where}: must be {kind.__name__}; got {value!r}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _dataclass_faults(kind: Any, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where or 'the file'}: must be keys and values; got {value!r}"
        return
    prefix, hints = f"{where}." if where else "", typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            yield f"unknown key {prefix}{key}.{near_miss(str(key), fields, 1)}"
        else:
            yield from faults(hints[key], value[key], f"{prefix}{key}")
    for key, field in fields.items():
        if key not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield f"missing key {prefix}{key}"


def parse(kind: Any, value: Any) -> Any:
    """`value`, in which `faults` finds nothing, as an object of the annotation `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{key: parse(hints[key], item) for key, item in value.items()})
    if origin is tuple:
        return tuple(parse(arguments[0], item) for item in value)
    if origin is dict:
        return {key: parse(arguments[1], item) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        return parse(next(option for option in arguments if not list(faults(option, value))), value)
    return float(value) if kind is float else value
