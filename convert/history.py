"""What was done to a student and what was measured on the way: it travels with the model, and decides what may follow.

A student that was neither calibrated nor aligned is still its teacher, so alignment needs no other copy of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..core.settings import faults, parse

__all__ = ["VERSION", "Alignment", "Calibration", "Conversion", "History"]

VERSION = 1  # of the form that `to_json` writes


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` measured.

    Attributes:
        identity_error: largest difference of outputs to the teacher's, over its largest; None where nothing was run.
        teacher: evenly chosen outputs of the teacher on one noise picture, by which it is known again; may be absent.
        size: height and width of that picture, in pixels; absent in older folders.
        weights: the sum of all weights' sizes, by which it is seen whether one was changed since; may be absent.
        lossy_steps: what each step away from the teacher costs (see `student.lossy_steps`).
    """

    identity_error: float | None = None
    teacher: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    weights: float | None = None
    lossy_steps: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Layers were given the teacher's sizes on `pictures` pictures, at `strengths`; `layers` of them have a gain."""

    pictures: int
    strengths: dict[str, float]
    layers: int


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What `align` did.

    Attributes:
        pictures: views that were trained on. final, curve: held-out fidelity at the end, and as it went.
        kept: where a run with a floor ended. pressure: the recipe's own words for what it asks.
        fit: what a phase that solves found, such as nearest training pictures of prototypes.
    """

    pictures: int
    final: dict[str, Any] | None = None
    curve: tuple[dict[str, Any], ...] = ()
    kept: dict[str, Any] | None = None
    pressure: str = ""
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class History:
    """Of a student, in the order of its stages; None for one that it has not been through.

    Attributes:
        notes: facts of one's own, JSON values.
    """

    conversion: Conversion = Conversion()
    calibration: Calibration | None = None
    alignment: Alignment | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def unchanged(self) -> bool:
        """Whether no weight was changed since the conversion."""
        return self.calibration is None and self.alignment is None

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> History:
        """What `to_json` wrote; ValueError for another version, or with a line for everything that does not fit."""
        values = dict(record)
        if (version := values.pop("version", None)) != VERSION:
            raise ValueError(f"history has version {version}; this version of bcosify reads {VERSION}")
        if wrong := list(faults(cls, values, "history")):
            raise ValueError("; ".join(wrong))
        return parse(cls, values)
