"""Planning: pure, before anything is touched. Every layer gets a line: what it becomes, or why it stays."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import PlanError, near_miss
from .trace import Trace

__all__ = ["Decision", "Method", "Plan", "Step", "class_path", "plan_conversion"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a rule says of one layer: the name of a swap, or None to leave it, and why."""

    becomes: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a plan."""

    name: str
    found: str
    becomes: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will do, in the order of the model's modules."""

    method: str
    steps: tuple[Step, ...]

    @property
    def swaps(self) -> tuple[Step, ...]:
        """The steps that change something."""
        return tuple(step for step in self.steps if step.becomes)

    @property
    def digest(self) -> str:
        """sha256 of the swaps: two plans that change the same layers in the same way share it."""
        swaps = [[step.name, step.found, step.becomes] for step in self.swaps]
        return hashlib.sha256(json.dumps([self.method, swaps]).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How often each kind of swap happens."""
        return dict(collections.Counter(step.becomes for step in self.swaps if step.becomes))


@dataclasses.dataclass(frozen=True)
class Method:
    """One target family: a frozen config, a rule that decides on a layer, and the swaps that its decisions name.

    Attributes:
        decide: (name, module, model, trace, config) -> Decision, or None for a module with nothing to say (a
        container).
            Raises PlanError, with the reason alone, for a layer that it cannot convert.
        swaps: name of a swap -> function(module, preprocess, config) that changes the module in place.
        ends: strength of its layers -> where alignment usually takes it; all start at 1, where the student is its
            teacher.
    """

    name: str
    config_class: type
    decide: Callable[[str, nn.Module, nn.Module, Trace, Any], Decision | None]
    swaps: dict[str, Callable[..., None]]
    ends: Mapping[str, float]

    @property
    def start(self) -> str:
        """Where a student is its teacher, in words, such as `B=1, beta=1`."""
        return ", ".join(f"{'B' if name == 'b' else name}=1" for name in self.ends)


def plan_conversion(model: nn.Module, method: Method, config: Any, trace: Trace) -> Plan:
    """Decides on every layer of `model` and changes nothing.

    Raises:
        PlanError: a layer is not supported, `config.keep` names nothing, or nothing would change.
    """
    names = [name for name, _ in model.named_modules() if name]
    kept = _matching(config.keep, names)
    steps, refused = [], []
    for name, module in model.named_modules():
        found = type(module).__name__
        if name in kept:
            steps.append(Step(name, found, None, "kept as asked"))
            continue
        try:
            decision = method.decide(name, module, model, trace, config)
        except PlanError as error:
            refused.append(f"  {name} ({class_path(module)}): {error}")
            continue
        if decision is not None:
            steps.append(Step(name, found, decision.becomes, decision.reason))
    if refused:
        raise PlanError(
            f"{type(model).__name__} has {len(refused)} layer(s) that --method {method.name} "
            f"cannot convert; nothing was changed:\n"
            + "\n".join(refused[:10])
            + (f"\n  and {len(refused) - 10} more" if len(refused) > 10 else "")
            + "\nTo leave a layer as it is, pass --keep NAME (or --keep 're:PATTERN')."
        )
    plan = Plan(method.name, tuple(steps))
    if not any(step.name for step in plan.swaps):
        kinds = ", ".join(sorted({step.found for step in steps})) or "no layers"
        raise PlanError(f"nothing in {type(model).__name__} matches --method {method.name}. It has: {kinds}.")
    return plan


def class_path(module: nn.Module) -> str:
    """`package.module.Class` of a module: the key of exact-type rules, which spares importing every library."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _matching(patterns: Iterable[str], names: list[str]) -> set[str]:
    """Names that a pattern names: the module and all below it, or `re:` and a regular expression (full match)."""
    matched: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                found = {name for name in names if re.fullmatch(pattern[3:], name)}
            except re.error as error:
                raise PlanError(f"--keep {pattern} is no regular expression: {error}.") from error
        else:
            found = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
        if not found:
            raise PlanError(f"--keep {pattern} names no module of the model.{near_miss(pattern, names)}")
        matched |= found
    return matched
