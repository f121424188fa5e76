"""Which metrics there are, what they need, and how they are shown. Each is registered next to its function.

A metric of one value for each picture is a function and a decorator, in a new file of `metrics`:

    @metric("positive_share", "faithfulness", needs="maps")
    def positive_share(task, model, method):
        return (task.maps[model, method] > 0).float().mean((1, 2))

What shares its cost with others, or is resumed in pieces, registers a step that measures several (`measures`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from . import metrics

if TYPE_CHECKING:
    from torch import Tensor

    from .estimates import Estimate
    from .store import Notes

__all__ = [
    "METRICS",
    "Headline",
    "Job",
    "Metric",
    "Step",
    "all_metrics",
    "declare",
    "headlines",
    "measures",
    "metric",
    "steps_of",
]

# What a step is called with, after the notes:
#   features   Compared: both models' features of the pictures for fidelity. All of these are one resumable step.
#   pictures   Explained: once.
#   model      Explained, and a model: `teacher`, `student`.
#   maps       Explained, a model and a method: for every pair that has maps.
Needs = Literal["features", "pictures", "model", "maps"]
Section = Literal["fidelity", "probes", "faithfulness", "localisation"]
# The name of a step that can be resumed, and what it does.
Job = tuple[str, Callable[[], None]]


@dataclasses.dataclass(frozen=True)
class Headline:
    """One of the few numbers to begin with: its name, of which measurement it is, and its place among them."""

    name: str
    place: int
    model: str
    method: str = ""
    variant: str | None = ""


@dataclasses.dataclass(frozen=True)
class Metric:
    """Attributes:
    better: whether more (1) or less (-1) is better; 0: neither is.
    title: in tables; empty for the name without underscores.
    headlines: what of it is told first.
    """

    name: str
    section: Section
    better: Literal[-1, 0, 1] = 1
    title: str = ""
    headlines: tuple[Headline, ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """What measures some metrics: run(notes, *what it needs) gives jobs. `place` orders steps."""

    metrics: tuple[Metric, ...]
    needs: Needs
    place: int
    run: Callable[..., Iterable[Job]]


METRICS: dict[str, Metric] = {}
STEPS: list[Step] = []


def declare(*metrics: Metric) -> None:
    """Registers metrics that no step of a plain evaluation measures."""
    for one in metrics:
        if one.name in METRICS:
            raise ValueError(f"two metrics are called {one.name!r}; give one of them another name")
        METRICS[one.name] = one


def measures(*metrics: Metric, needs: Needs, place: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function that measures several metrics: (notes, *what it needs) -> (name, job) pairs."""

    def keep(run: Callable[..., Any]) -> Callable[..., Any]:
        declare(*metrics)
        STEPS.append(Step(metrics, needs, place, run))
        return run

    return keep


def metric(
    name: str,
    section: Section,
    better: Literal[-1, 0, 1] = 1,
    *,
    needs: Needs,
    title: str = "",
    headlines: tuple[Headline, ...] = (),
    place: int = 100,
) -> Callable[[Callable[..., Tensor | Estimate]], Callable[..., Tensor | Estimate]]:
    """Registers a function of what it `needs` that gives a value for each picture (N,), or an Estimate.

    It raises NotApplicable, with the reason, where there is no such number.
    """

    def keep(value: Callable[..., Tensor | Estimate]) -> Callable[..., Tensor | Estimate]:
        def run(notes: Notes, task: Any, *which: str) -> Iterator[Job]:
            from .record import Measurement

            model, method = (*which, "")[:2] if which else ("both", "")
            row = Measurement(section, name, model, method)
            yield (
                f"{name.replace('_', ' ')}: {', '.join(which) or 'both'}",
                functools.partial(notes.measure, row, functools.partial(value, task, *which)),
            )

        measures(Metric(name, section, better, title, headlines), needs=needs, place=place)(run)
        return value

    return keep


@functools.cache
def load_all() -> None:
    """Imports every file of `metrics`, which registers what is in it."""
    for module in pkgutil.iter_modules(metrics.__path__):
        importlib.import_module(f"{metrics.__name__}.{module.name}")


def all_metrics() -> dict[str, Metric]:
    """Name -> metric, of all that there are."""
    load_all()
    return METRICS


def steps_of(*needs: Needs) -> list[Step]:
    """The steps that need one of these, in their order."""
    load_all()
    return sorted((step for step in STEPS if step.needs in needs), key=lambda step: step.place)


def headlines() -> list[tuple[Headline, Metric]]:
    """The numbers to begin with, in their order."""
    found = [(line, one) for one in all_metrics().values() for line in one.headlines]
    return sorted(found, key=lambda pair: pair[0].place)
