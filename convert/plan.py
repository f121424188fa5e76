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

from ..core.errors import PlanError, near_miss
from .layers import STRENGTHS
from .trace import trace_forward

__all__ = ["Decision", "Method", "Plan", "Step", "class_path", "kept_modules", "plan_conversion"]


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
        decide: (name, module, model, seen, config) -> Decision, or None for a module with nothing to say (a
        container).
            Raises PlanError, with the reason alone, for a layer that it cannot convert.
        swaps: name of a swap -> function(module, preprocess, config) that changes the module in place.
        ends: config -> where alignment usually takes each strength of its layers (see `layers.STRENGTHS`).
        look: (model, size) -> what `decide` needs to have `seen` of a model that runs on a picture of this size. It
            must not depend on the weights, as a saved model is planned again before they are there.
        tries: whether `decide` tries parts of the model, so that it needs weights, whatever they are.
        whole: whether a swap of the whole model is a conversion; else it only goes with swaps of layers.
        trains: the one module that alignment trains; empty for the whole model.
        objectives: name of a swap -> the objectives of alignment that fit a model with it; empty for all that train.
    """

    name: str
    config_class: type
    decide: Callable[[str, nn.Module, nn.Module, Any, Any], Decision | None]
    swaps: dict[str, Callable[..., None]]
    ends: Callable[[Any], Mapping[str, float]]
    look: Callable[[nn.Module, tuple[int, int]], Any] = trace_forward
    tries: bool = False
    whole: bool = False
    trains: str = ""
    objectives: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def start(self, config: Any) -> dict[str, float]:
        """The strengths at which a student is its teacher."""
        return {name: STRENGTHS[name].start for name in self.ends(config)}


def plan_conversion(model: nn.Module, method: Method, config: Any, size: tuple[int, int]) -> Plan:
    """Decides on every layer of `model`, which runs on pictures of `size`, and changes nothing.

    Raises:
        PlanError: a layer is not supported, `config.keep` names nothing, or nothing would change.
    """
    kept = kept_modules(model, config.keep)
    seen = method.look(model, size)
    steps, refused = [], []
    for name, module in model.named_modules():
        found = type(module).__name__
        if name in kept:
            steps.append(Step(name, found, None, "kept as asked"))
            continue
        try:
            decision = method.decide(name, module, model, seen, config)
        except PlanError as error:
            refused.append(f"  {name or '(whole model)'} ({class_path(module)}): {error}")
            continue
        if decision is not None:
            steps.append(Step(name, found, decision.becomes, decision.reason))
    if refused:
        raise PlanError(
            f"{type(model).__name__} has {len(refused)} layer(s) that --method {method.name} "
            f"cannot convert; nothing was changed:\n"
            + "\n".join(refused[:10])
            + (f"\n  and {len(refused) - 10} more" if len(refused) > 10 else "")
            + ("" if method.whole else "\nTo leave a layer as it is, pass --keep NAME (or --keep 're:PATTERN').")
        )
    plan = Plan(method.name, tuple(steps))
    if not any(step.name or method.whole for step in plan.swaps):
        kinds = ", ".join(sorted({step.found for step in steps})) or "no layers"
        raise PlanError(f"nothing in {type(model).__name__} matches --method {method.name}. It has: {kinds}.")
    return plan


def class_path(module: nn.Module) -> str:
    """`package.module.Class` of a module: the key of exact-type rules, which spares importing every library."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def kept_modules(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Modules that a pattern names: the module and all below it, or `re:` and a regular expression (full match)."""
    names = [name for name, _ in model.named_modules() if name]
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
