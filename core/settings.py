"""Frozen dataclasses from plain values (YAML, JSON, the command line), strictly: all faults at once, a line each.

A field's annotation says its type and which values it may have: `batch_size: Annotated[int, COUNT]` (`core.ranges`).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml

from .errors import BcosifyError, PlanError, near_miss

__all__ = ["check", "faults", "from_assignments", "parse", "read_yaml", "shown"]

# A recipe has about a hundred values, four deep.
MOST_VALUES, MOST_DEPTH, MOST_CHARACTERS = 10_000, 20, 1_000_000


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text of a person's size: what aliases stand for counts each time, so none can blow up.

    Raises yaml.YAMLError for what is not YAML, is larger or deeper than any settings are, or holds itself.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters; settings have at most {MOST_CHARACTERS}")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _size(node, {}, ())
        return yaml.safe_load(text)
    except RecursionError as error:
        raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} deep") from error
    except ValueError as error:  # a date that does not exist, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _size(node: yaml.Node, known: dict[int, int], inside: tuple[int, ...]) -> int:
    """How many values `node` stands for; what was counted is kept in `known`."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in inside or len(inside) >= MOST_DEPTH:
        found = "holds itself" if id(node) in inside else f"is nested more than {MOST_DEPTH} deep"
        raise yaml.YAMLError(f"a value {found} (line {node.start_mark.line + 1})")
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_size(part, known, (*inside, id(node))) for part in parts)
        if known[id(node)] > MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MOST_VALUES} values (line {node.start_mark.line + 1})")
    return known[id(node)]


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


def shown(value: Any) -> str:
    """A value as Python writes it, cut to what a line of a message holds."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


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
            values[key] = read_yaml(text)
        except yaml.YAMLError as error:
            raise PlanError(f"--set {assignment}: the value is not YAML: {error}") from error
    if found := list(faults(kind, values)):
        known = ", ".join(field.name for field in dataclasses.fields(kind))
        raise PlanError(
            "\n".join([f"--set: {len(found)} fault(s):", *(f"  {fault}" for fault in found), f"There are: {known}."])
        )
    return parse(kind, values)


def faults(kind: Any, value: Any, where: str = "") -> Iterator[str]:
    """One line for everything in `value` that does not fit the annotation `kind`; `where` says what it is.

    Objects of dataclasses are checked as the plain values that they are made of.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if origin is Annotated:
        if wrong := list(faults(arguments[0], value, where)):
            yield from wrong
            return
        parsed = parse(arguments[0], value)
        yield from (f"{where}: {fault}" for bound in arguments[1:] if (fault := bound.fault(parsed)))
    elif dataclasses.is_dataclass(kind):
        yield from _dataclass_faults(kind, value, where)
    elif origin is Literal:
        if value not in arguments:
            hint = near_miss(str(value)[:80], map(str, arguments))
            yield f"{where}: must be one of {', '.join(map(repr, arguments))}; got {shown(value)}.{hint}"
    elif origin is tuple:
        if not isinstance(value, list | tuple):
            yield f"{where}: must be a list; got {shown(value)}"
        elif arguments[-1] is not Ellipsis and len(value) != len(arguments):
            yield f"{where}: must have {len(arguments)} values; got {shown(value)}"
        else:
            for i, item in enumerate(value):
                yield from faults(arguments[0], item, f"{where}.{i}")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where}: must be keys and values; got {shown(value)}"
        else:
            for key, item in value.items():
                yield from faults(arguments[1], item, f"{where}.{key}")
    elif origin in (typing.Union, types.UnionType):
        if type(None) in arguments and len(arguments) == 2:
            if value is not None:
                yield from faults(next(option for option in arguments if option is not type(None)), value, where)
        elif not any(not list(faults(option, value, where)) for option in arguments):
            yield f"{where}: must be {kind}; got {shown(value)}"
    elif kind is float and isinstance(value, str | int) and not isinstance(value, bool) and _is_number(value):
        return  # YAML reads 3e-4, without a point, as text
    else:
        wanted = {float: numbers.Real, int: numbers.Integral}.get(kind, kind)
        fits = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
        fits &= not (kind is float and isinstance(value, int))  # what is left is too large for one
        if not fits:
            yield f"{where}: must be {kind.__name__}; got {shown(value)}"


def _is_number(value: str | int) -> bool:
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _dataclass_faults(kind: Any, value: Any, where: str) -> Iterator[str]:
    if isinstance(value, kind):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
    if not isinstance(value, Mapping):
        yield f"{where or 'the file'}: must be keys and values; got {shown(value)}"
        return
    prefix, hints = f"{where}." if where else "", typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            name = key if isinstance(key, str) and key.isprintable() and len(key) < 80 else shown(key)
            yield f"unknown key {prefix}{name}.{near_miss(str(key)[:80], fields, 1)}"
        else:
            yield from faults(hints[key], value[key], f"{prefix}{key}")
    for key, field in fields.items():
        if key not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield f"missing key {prefix}{key}"


def check(config: Any, error: type[BcosifyError] = PlanError) -> None:
    """Raises `error` with all that is wrong with a dataclass's values, as they would be in a file."""
    if wrong := list(faults(type(config), config)):
        raise error(f"{type(config).__name__}: {'; '.join(wrong)}")


def parse(kind: Any, value: Any) -> Any:
    """`value`, in which `faults` finds nothing, as an object of the annotation `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return parse(arguments[0], value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        hints = typing.get_type_hints(kind)
        return kind(**{key: parse(hints[key], item) for key, item in value.items()})
    if origin is tuple:
        return tuple(parse(arguments[0], item) for item in value)
    if origin is dict:
        return {key: parse(arguments[1], item) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        return parse(next(option for option in arguments if not list(faults(option, value))), value)
    return kind(value) if kind in (int, float) else value
