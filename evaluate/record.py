"""evaluation.json: every number with its interval, what it was measured on, and what does not apply and why.

Schema 1. Readers refuse other numbers; a change that old readers would misread gets a new one. A measurement that does
not apply is a row with `value` null and a `reason`: never a zero, never left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.files import new_file, read_json
from ..core.settings import faults, parse
from . import registry
from .estimates import Estimate

__all__ = ["FILE", "REPORT", "SCHEMA", "Curve", "Evaluation", "Measurement", "Seconds", "read_evaluation", "written"]

SCHEMA = 1
FILE = "evaluation.json"
REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        section: `fidelity`, `faithfulness`, `localisation` or `probes`.
        metric: such as `deletion_auc`; `variant` tells it from others of its kind (`patches, grey`).
        model: `teacher`, `student`, or `both` for what compares them.
        method: how the model was explained; empty where nothing was.
        value, low, high, n: mean over n pictures and its 95 % interval; `reason` says why there is none.
    """

    section: str
    metric: str
    model: str
    method: str = ""
    variant: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    reason: str = ""

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.high is not None and self.high < 0

    def holding(self, estimate: Estimate) -> Measurement:
        return dataclasses.replace(self, **estimate._asdict())


@dataclasses.dataclass(frozen=True)
class Curve:
    """Mean confidence over the share of the picture that is gone, with the interval at every point."""

    model: str
    method: str
    variant: str
    order: str
    fractions: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What one step took."""

    step: str
    wall: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that `bcosify evaluate` found out.

    Attributes:
        model: what was evaluated: source, method, weights' digests, size.
        data: what on: pictures, masks, labels, digests.
        settings: what makes the numbers repeatable: seed, methods, units, fills.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    measurements: tuple[Measurement, ...]
    curves: tuple[Curve, ...] = ()
    seconds: tuple[Seconds, ...] = ()
    schema: int = SCHEMA

    def write(self, folder: Path) -> None:
        with new_file(folder / FILE) as scratch:
            scratch.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False))

    def find(self, metric: str, model: str, method: str = "", variant: str | None = None) -> Measurement | None:
        """The first measurement of that name; any variant where none is given."""
        for one in self.measurements:
            if (one.metric, one.model, one.method) == (metric, model, method) and variant in (None, one.variant):
                return one
        return None

    def headline(self) -> dict[str, float]:
        """The few numbers to begin with: name -> value, of those that were measured."""
        return {name: one.value for name, one in self.headlines().items() if one.value is not None}

    def headlines(self) -> dict[str, Measurement]:
        """The same with their intervals."""
        found = {
            line.name: self.find(one.name, line.model, line.method, line.variant) for line, one in registry.headlines()
        }
        return {name: one for name, one in found.items() if one is not None and one.value is not None}


def read_evaluation(path: Path) -> Evaluation:
    """Opens evaluation.json, or the one in a folder; raises DataError where it is none, or of another schema."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such evaluation. `bcosify evaluate DIR --data SHARDS` makes one.")
    found = read_json(path, DataError)
    schema = found.get("schema") if isinstance(found, dict) else type(found).__name__
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema}; this version reads {SCHEMA}. Evaluate again, or update bcosify.")
    if wrong := list(itertools.islice(faults(Evaluation, found, FILE), 3)):
        raise DataError(f"{path} is no evaluation of schema {SCHEMA}: {'; '.join(wrong)}. Evaluate again.")
    return parse(Evaluation, found)


def written(folder: Path) -> set[str] | None:
    """The names in `folder` that `bcosify evaluate` wrote there, by evaluation.json; None where there is none."""
    with contextlib.suppress(DataError):
        read_evaluation(folder / FILE)
        return {FILE, REPORT}
    return None
