"""What an objective is, and how it is registered.

An objective is one file here: a frozen config with its settings, and a class.

    @dataclasses.dataclass(frozen=True)
    class LogitsConfig(ObjectiveConfig):
        power: float = 2.0

    @objective("logits", LogitsConfig)
    class Logits(Objective):
        whole = True

        def __init__(self, student, config):
            super().__init__(student, config, taps=())
            self.power = config.power

        def forward(self, pictures, calls, output):
            loss = (first_tensor(self.student(pictures)) - output).abs().pow(self.power).mean()
            return {"output": loss, "total": loss}

A recipe then says `objective: {logits: {power: 1.5}}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from ...convert.taps import Call, channels_last, check_taps, first_tensor, record
from ...core.errors import RecipeError, near_miss
from ...core.settings import faults, parse, shown
from ..losses import cosine_distance, unexplained

if TYPE_CHECKING:
    from ..recipe import Recipe

__all__ = [
    "FITS",
    "OBJECTIVES",
    "FeatureConfig",
    "Objective",
    "ObjectiveConfig",
    "Registered",
    "changed",
    "deviations",
    "fit",
    "moved_settings",
    "objective",
    "observe",
    "with_settings",
]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of an objective; all have defaults. A recipe has them in its phases."""


@dataclasses.dataclass(frozen=True)
class FeatureConfig(ObjectiveConfig):
    """Settings of an objective that compares features.

    Attributes:
        centre: cosines are taken after subtracting the teacher's mean feature of the calibration
            pictures.
        standardise: what end-to-end and block-own make of features before they compare them, from the teacher's
            on the calibration pictures. `none`; `channel`: cosines after each channel is divided by its
            standard deviation, so that all channels count alike; `phi-s`: in the place of cosines, the squared
            error as a share of the teacher's variance (PHI-S, arXiv 2410.01680: with one scale for all channels
            cosines are the same as with `centre` alone, so it is what PHI-S makes of a squared error; it sees
            sizes too, and no `centre`).
    """

    centre: bool = False
    standardise: Literal["none", "channel", "phi-s"] = "none"


@dataclasses.dataclass(frozen=True)
class Registered:
    """An objective by its name: what is made of a student and a config, or of a recipe and a phase's own settings.

    A config may also name keys of a whole recipe, such as `seed`.
    """

    name: str
    config_class: type
    make: Callable[[nn.Module, Any], Any]

    def config(self, recipe: Recipe | ObjectiveConfig, own: Mapping[str, Any] = {}) -> Any:
        """The settings of a phase: its `own`, and what else the config takes of the recipe; or a config as it is.

        Raises RecipeError for a setting that the objective does not have, or that is outside of its range.
        """
        if isinstance(recipe, self.config_class):
            return recipe
        names = [field.name for field in dataclasses.fields(self.config_class) if hasattr(recipe, field.name)]
        values = {name: getattr(recipe, name) for name in names} | dict(own)
        if wrong := list(faults(self.config_class, values, self.name)):
            raise RecipeError(f"objective {'; '.join(wrong)}")
        return parse(self.config_class, values)

    def __call__(self, student: nn.Module, settings: Recipe | ObjectiveConfig, own: Mapping[str, Any] = {}) -> Any:
        """Args: own: settings of the phase, where `settings` is a recipe."""
        return self.make(student, self.config(settings, own))


OBJECTIVES: dict[str, Registered] = {}
# Phases that gather features of their pictures and solve, instead of descending.
FITS: dict[str, Registered] = {}


def objective(name: str, config_class: type = ObjectiveConfig) -> Callable[[type[T]], type[T]]:
    """Registers a class of objectives that are made of a student and a `config_class`."""

    def keep(kind: type[T]) -> type[T]:
        OBJECTIVES[name] = Registered(name, config_class, kind)
        return kind

    return keep


def fit(name: str, config_class: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Registers what makes a solver of a student and a `config_class`."""

    def keep(make: Callable[..., T]) -> Callable[..., T]:
        FITS[name] = Registered(name, config_class, make)
        return make

    return keep


class Objective(nn.Module):
    """Base: `taps` names what must be recorded in the teacher; forward gives named losses, `total` among them.

    Made of the student and the objective's own config.

    Attributes:
        whole: the student runs as a whole, with a gradient through all of it, so `Phase.blend` can help it.
        fed: parts of the student run on the teacher's inputs, so `Phase.own_inputs` can take their place.
    """

    whole: ClassVar[bool] = False
    fed: ClassVar[bool] = False

    def __init__(self, student: nn.Module, config: ObjectiveConfig, taps: tuple[str, ...]) -> None:
        super().__init__()
        check_taps(student, taps)
        self.student = student
        self.taps = taps
        features = config if isinstance(config, FeatureConfig) else FeatureConfig()
        self.centred, self.standardise = features.centre, features.standardise
        self.means: dict[str, Tensor] = {}
        self.deviations: dict[str, Tensor] = {}

    @property
    def asks_teacher(self) -> bool:
        """Whether `centre_on` takes anything from what the teacher makes of a few pictures."""
        return self.centred or self.standardise != "none"

    def centre_on(self, calls: dict[str, Call], output: Tensor) -> None:
        """Takes note of the teacher's mean features on a few pictures, and how far they are from it, if asked to."""
        rows = {name: channels_last(calls[name].output) for name in self.taps if name in calls} | {"output": output}
        if self.centred:
            self.means = {name: features.mean(0) for name, features in rows.items()}
        if self.standardise != "none":
            least = 0.1 if self.standardise == "channel" else 0.0  # a sum of all channels' is not ruled by any
            self.deviations = {name: deviations(features, least) for name, features in rows.items()}

    def begin(self) -> dict[str, float]:
        """At the start of a phase: what a resumed run must be told of the student as it is now."""
        return {}

    def go_on(self, begun: dict[str, float]) -> None:
        """In a resumed run: what `begin` said at the start of the phase."""

    def run(self, pictures: Tensor, calls: dict[str, Call]) -> None:
        """Runs the student as this objective feeds it."""
        self.student(pictures)

    def _distance(self, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.standardise == "phi-s":
            return unexplained(ours, theirs, self.deviations[name].square().sum())
        mean, deviation = self.means.get(name, 0.0), self.deviations.get(name, 1.0)
        return cosine_distance((ours - mean) / deviation, (theirs - mean) / deviation)

    def _compared(self, pictures: Tensor, calls: dict[str, Call]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Runs the student: (its rows, the teacher's) at every tap, and its output."""
        with record(self.student, self.taps) as ours:
            output = first_tensor(self.student(pictures))
        return {n: (channels_last(ours[n].output), channels_last(calls[n].output)) for n in self.taps}, output


def deviations(features: Tensor, least: float) -> Tensor:
    """(C,): standard deviation of each channel of features (R, C), at least `least` of their root mean square.

    So a channel in which the teacher says nothing does not rule what is divided by it.
    """
    found = features.float().std(0, correction=0)
    return found.clamp_min(least * found.square().mean().sqrt()).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def observe(teacher: nn.Module, pictures: Tensor, taps: tuple[str, ...]) -> tuple[dict[str, Call], Tensor]:
    """The teacher's calls at `taps` and its output on pictures (B, 3, H, W), without a graph.

    (Not in inference mode: a loss that compares with these tensors could not keep them for its backward pass.)
    """
    with record(teacher, taps) as calls:
        output = first_tensor(teacher(pictures))
    return calls, output


def with_settings(values: Any) -> tuple[Any, list[str]]:
    """A recipe's plain values, `objective: {name: {...}}` of each phase as name and settings; and all faults of it."""
    known, wrong = {**OBJECTIVES, **FITS}, []
    phases = values.get("phases") if isinstance(values, dict) else None
    if not isinstance(phases, list):
        return values, wrong
    read = []
    for number, phase in enumerate(phases):
        (name, own), where = _parts(phase), f"phases.{number}.objective"
        if isinstance(name, str) and name not in known:
            wrong.append(
                f"{where}: must be one of {', '.join(map(repr, sorted(known)))}; got {shown(name)}."
                f"{near_miss(name[:80], known)}"
            )
        elif isinstance(name, str):
            kind = known[name].config_class
            if found := list(faults(kind, own, f"{where}.{name}")):
                wrong += found
            parsed = None if found else parse(kind, own)
            settings = {} if parsed is None else changed(name, {key: getattr(parsed, key) for key in own})
            phase = {**phase, "objective": name, "settings": settings}
        read.append(phase)
    return {**values, "phases": read}, wrong


def _parts(phase: Any) -> tuple[Any, Any]:
    """Objective and settings of a phase's plain values, in both of their forms."""
    if not isinstance(phase, dict):
        return None, {}
    objective = phase.get("objective")
    if isinstance(objective, dict) and len(objective) == 1:
        ((name, own),) = objective.items()
        return name, {} if own is None else own
    return objective, phase.get("settings") or {}


def moved_settings(values: Any, over: bool = False) -> tuple[Any, dict[str, list[int]]]:
    """A recipe's plain values with the settings that older ones have beside their phases in the phases that take them.

    Args: over: they come before a phase's own, as what was typed last does.
    Returns: the values, and key -> numbers of the phases where it is now.
    """
    from ..recipe import MOVED

    flat = {key: values[key] for key in MOVED if key in values} if isinstance(values, dict) else {}
    if not flat:
        return values, {}
    known = {**OBJECTIVES, **FITS}
    phases: Any = values.get("phases")
    moved: dict[str, list[int]] = {key: [] for key in flat}
    read = []
    for number, phase in enumerate(phases if isinstance(phases, list) else []):
        name, own = _parts(phase)
        if isinstance(name, str) and name in known and isinstance(own, dict):
            takes = {field.name for field in dataclasses.fields(known[name].config_class)}
            taken = {key: value for key, value in flat.items() if key in takes}
            for key in taken:
                moved[key].append(number)
            others = {key: value for key, value in phase.items() if key != "settings"}
            phase = {**others, "objective": {name: {**own, **taken} if over else {**taken, **own}}}
        read.append(phase)
    rest = {key: value for key, value in values.items() if key not in flat}
    return ({**rest, "phases": read} if isinstance(phases, list) else rest), moved


def changed(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `settings` that are not the defaults of the objective `name`."""
    fields = dataclasses.fields({**OBJECTIVES, **FITS}[name].config_class)
    given = {field.name: settings[field.name] for field in fields if field.name in settings}
    defaults = {field.name: field.default for field in fields}
    return {key: value for key, value in given.items() if _plain(value) != _plain(defaults[key])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
