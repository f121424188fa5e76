"""What a run is asked for, what all its parts share, and how far it came."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..convert import Student
from ..convert.taps import first_tensor
from .learner import Learner
from .pictures import Pictures
from .probe import Probe, make_probe
from .recipe import Recipe
from .state import Progress

__all__ = ["AlignConfig", "AlignRun", "Outcome"]


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Where a run reads and writes.

    Attributes:
        run: folder of a converted model.
        data, val: shards (brace syntax, globs, folders); without `val`, some pictures of `data` are held out.
        out: the aligned model; `<out>.run` beside it holds recipe.yaml, metrics.jsonl and checkpoints.
        resume: go on from the newest complete checkpoint.
        init_from: another student of the same conversion, whose weights the run starts from.
        weights: the teacher's own state dict, where it was converted from one and is no longer in the student.
        trackers: names of trackers that show what metrics.jsonl holds.
        stream: read `data` from front to end and keep nothing of it (see `stream`); `val` is then needed.
        cache: where remote shards are kept; None is the user's cache.
    """

    run: Path
    data: str
    out: Path
    recipe: Recipe
    val: str | None = None
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    weights: Path | None = None
    init_from: Path | None = None
    trackers: tuple[str, ...] = ()
    stream: bool = False
    cache: Path | None = None

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.run")


@dataclasses.dataclass(frozen=True, eq=False)
class AlignRun:
    """What the parts of a run share.

    Attributes:
        student: as it was loaded; its model is the one that `learner` trains.
        checkpoint: what a resumed run goes on from.
        signals: numbers of the stop signals that came (see `stopping`).
    """

    config: AlignConfig
    accelerator: Accelerator
    student: Student
    teacher: nn.Module
    pictures: Pictures
    learner: Learner
    checkpoint: Path | None
    signals: list[int] = dataclasses.field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe

    def outputs(self, model: nn.Module) -> Tensor:
        """(N, D): what `model` makes of the N held-out pictures."""
        return torch.cat([first_tensor(model(batch)) for batch in self.pictures.held_out()])

    @functools.cached_property
    def teacher_outputs(self) -> Tensor:
        return self.outputs(self.teacher)

    @functools.cached_property
    def probe(self) -> Probe:
        """The held-out pictures that are explained as the run goes."""
        return make_probe(self.teacher, self.pictures, self.student.labels)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the phases so far came to.

    Attributes:
        stopped: a signal ended the run; its last step is in a checkpoint.
        guarded: held-out agreement fell below `Recipe.min_agreement`, which ends the run.
        seconds: spent on steps.
        fitted: what a phase that solves found.
    """

    progress: Progress
    stopped: bool = False
    guarded: bool = False
    seconds: float = 0.0
    fitted: dict[str, Any] = dataclasses.field(default_factory=dict)
