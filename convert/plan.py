"""Planning: pure, before anything is touched. Every layer gets a line: what it becomes, or why it stays.

Only `convert` plans. The swaps of a plan are saved with the student, and `load` carries them out as they are, whatever
rules have come or gone since.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import PlanError, near_miss
from ..core.settings import faults, parse
from .layers import STRENGTHS
from .swaps import NoArguments, Swap, find_swap
from .trace import trace_forward

if TYPE_CHECKING:
    from .libraries import Preprocess

__all__ = [
    "Decision",
    "Method",
    "Paper",
    "Plan",
    "Step",
    "apply_plan",
    "check_whole",
    "class_path",
    "kept_modules",
    "plan_conversion",
    "read_swaps",
    "written_swaps",
]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a rule says of one layer: a swap, or None to leave it, why, and the swap's arguments."""

    swap: Swap | None
    reason: str
    arguments: Any = NoArguments()


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a plan.

    Attributes:
        name: qualified name of the module; empty for the whole model. found: its class before the conversion.
        reason: why; of a model that was loaded it is no longer known, and two steps do not differ by it.
    """

    name: str
    found: str
    swap: Swap | None
    reason: str = dataclasses.field(default="", compare=False)
    arguments: Any = NoArguments()

    @property
    def becomes(self) -> str | None:
        """Class of the layer that it becomes, for people to read."""
        return None if self.swap is None else self.swap.layer.__name__


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will do, in the order of the model's modules. That of a loaded model has its swaps only."""

    method: str
    steps: tuple[Step, ...]

    @property
    def swaps(self) -> tuple[Step, ...]:
        """The steps that change something."""
        return tuple(step for step in self.steps if step.swap)

    def counts(self) -> dict[str, int]:
        """How often each kind of layer is made."""
        return dict(collections.Counter(step.becomes for step in self.swaps if step.becomes))


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper or preprint that a method comes from."""

    title: str
    authors: str
    venue: str
    link: str


@dataclasses.dataclass(frozen=True)
class Method:
    """One target family: a frozen config, a rule that decides on a layer, and what others say of it.

    Attributes:
        decide: (name, module, model, seen, config) -> Decision; None for a module with nothing to say (a container).
            Raises PlanError, with the reason alone, for a layer that it cannot convert.
        ends: config -> where alignment usually takes each strength of its layers (see `layers.STRENGTHS`).
        look: (model, size) -> what `decide` needs to have `seen` of a model that runs on a picture of this size.
        whole: whether a swap of the whole model is a conversion; else it only goes with swaps of layers.
        trains: the one module that alignment trains; empty for the whole model.
        objectives: swap -> the objectives of alignment that fit a model with it; empty for all that train.
        title, what: its name and a sentence on its layers, for model cards. papers: to cite there.
        hint: a few words, for the help of the command.
        recipes: those that `--recipe auto` tries, in this order.
    """

    name: str
    config_class: type
    decide: Callable[[str, nn.Module, nn.Module, Any, Any], Decision | None]
    ends: Callable[[Any], Mapping[str, float]]
    look: Callable[[nn.Module, tuple[int, int]], Any] = trace_forward
    whole: bool = False
    trains: str = ""
    objectives: Mapping[Swap, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    title: str = ""
    what: str = ""
    papers: tuple[Paper, ...] = ()
    hint: str = ""
    recipes: tuple[str, ...] = ()

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
            steps.append(Step(name, found, decision.swap, decision.reason, decision.arguments))
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


def apply_plan(model: nn.Module, plan: Plan, preprocess: Preprocess) -> None:
    """Carries out every swap of `plan` on `model`, in place."""
    for step in plan.swaps:
        assert step.swap is not None
        step.swap.change(model.get_submodule(step.name), preprocess, step.arguments)


def written_swaps(plan: Plan) -> list[dict[str, Any]]:
    """The swaps of `plan` as JSON has them: name of the module, id of the swap, and its arguments."""
    return [
        {"name": step.name, "swap": step.swap.id, "args": dataclasses.asdict(step.arguments)}
        for step in plan.swaps
        if step.swap
    ]


def read_swaps(rows: Sequence[Any], model: nn.Module) -> tuple[Step, ...]:
    """The steps that `written_swaps` wrote, for `model` as it was before any of them.

    Raises:
        PlanError: names the first rows that are none: no such swap or module, or arguments that it does not take.
    """
    modules, steps, wrong = dict(model.named_modules()), [], []
    for row in rows:
        try:
            steps.append(_read_step(row, modules))
            del modules[steps[-1].name]
        except PlanError as error:
            wrong.append(f"{row!r:.200}: {error}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PlanError("; ".join(wrong[:3]) + more)
    return tuple(steps)


def _read_step(row: Any, modules: Mapping[str, nn.Module]) -> Step:
    keys = {"name": str, "swap": str, "args": dict}
    if not isinstance(row, dict) or set(row) != set(keys) or not all(isinstance(row[k], keys[k]) for k in keys):
        raise PlanError("a swap has name, swap and args")
    swap, name = find_swap(row["swap"]), row["name"]
    if name not in modules:
        raise PlanError(f"the model has no module {name!r} that is still to be swapped.{near_miss(name, modules)}")
    if not isinstance(modules[name], swap.over):
        raise PlanError(f"{name or 'the model'} is a {type(modules[name]).__name__}, not a {swap.over.__name__}")
    if found := list(faults(swap.arguments, row["args"], "args")):
        raise PlanError("; ".join(found))
    return Step(name, type(modules[name]).__name__, swap, arguments=parse(swap.arguments, row["args"]))


def class_path(module: nn.Module) -> str:
    """`package.module.Class` of a module: the key of exact-type rules, which spares importing every library."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_whole(model: nn.Module) -> None:
    """Raises PlanError for a model on the meta device, where a rule must see what weights compute."""
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise PlanError(f"{type(model).__name__} has no weights to run it with; load it first")


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
