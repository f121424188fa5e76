"""What is explained of every picture: the teacher's own decision, without labels, or a label.

A decision has a score, linear in the model's output, which is what methods explain, and a confidence in [0, 1], which
is what is watched while parts of the picture are taken away.

- Classifiers: a class. Score: its logit. Confidence: its softmax probability, of labels that do not exclude each other
  its sigmoid.
- A regression with one output: its value. Score: the value. Confidence: how much is left of what sets the value of the
  whole picture apart from the mean value, 1 for all of it. (Ours.)
- Models without classes: the direction of the teacher's own feature after subtracting the mean feature. Score: the
  projection on it. Confidence: the cosine of the centred feature with it, 0 where negative. (Ours.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..convert.libraries import LABELS, REGRESSION
from ..core.errors import DataError
from ..explain.targets import ClassTarget, DirectionTarget, SideBySide, Target

__all__ = [
    "ClassDecisions",
    "Decisions",
    "DirectionDecisions",
    "ValueDecisions",
    "decide",
    "interleaved",
    "side_by_side",
]


class Decisions(Protocol):
    """One decision for each of N pictures."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Decisions:
        """The decisions of some pictures, in that order, repeated where `index` (M,) repeats."""
        ...

    def target(self) -> Target:
        """The scores (N, 1) as a target of `explain`."""
        ...

    def scores(self, outputs: Tensor) -> Tensor:
        """(N,) scores of outputs (N, D)."""
        ...

    def confidence(self, outputs: Tensor) -> Tensor:
        """(N,) in [0, 1], of outputs (N, D)."""
        ...

    def alike(self, i: int, j: int) -> bool:
        """Whether two pictures' decisions are too alike to be told apart by an explanation."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ClassDecisions:
    """A class (N,) for each picture; `exclusive` unless several may hold at once."""

    classes: Tensor
    exclusive: bool = True

    def __len__(self) -> int:
        return len(self.classes)

    def rows(self, index: Tensor) -> ClassDecisions:
        return dataclasses.replace(self, classes=self.classes[index.cpu()])

    def target(self) -> Target:
        return ClassTarget(self.classes[:, None])

    def scores(self, outputs: Tensor) -> Tensor:
        return outputs.gather(1, self.classes.to(outputs.device)[:, None]).squeeze(1)

    def confidence(self, outputs: Tensor) -> Tensor:
        return self.scores(outputs.softmax(1) if self.exclusive else outputs.sigmoid())

    def alike(self, i: int, j: int) -> bool:
        return bool(self.classes[i] == self.classes[j])


@dataclasses.dataclass(frozen=True, eq=False)
class ValueDecisions:
    """The one value of a regression: the teacher's (N,) for each picture, and their mean ()."""

    values: Tensor
    mean: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, index: Tensor) -> ValueDecisions:
        return dataclasses.replace(self, values=self.values[index.cpu()])

    def target(self) -> Target:
        return ClassTarget(0)

    def scores(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]

    def confidence(self, outputs: Tensor) -> Tensor:
        mean = self.mean.to(outputs)
        apart = self.values.to(outputs) - mean
        left = (outputs[:, 0] - mean) / torch.where(apart == 0, torch.ones_like(apart), apart)
        return torch.where(apart == 0, torch.zeros_like(left), left).clamp(0, 1)

    def alike(self, i: int, j: int) -> bool:
        return True  # there is one output, and no other to be told apart from it


@dataclasses.dataclass(frozen=True, eq=False)
class DirectionDecisions:
    """A unit direction (N, D) for each picture, and the mean feature (D,) that it was taken from."""

    directions: Tensor
    mean: Tensor
    limit: float = 0.3
    """Cosine above which two pictures are alike."""

    def __len__(self) -> int:
        return len(self.directions)

    def rows(self, index: Tensor) -> DirectionDecisions:
        return dataclasses.replace(self, directions=self.directions[index.cpu()])

    def target(self) -> Target:
        return DirectionTarget(self.directions[:, None])

    def scores(self, outputs: Tensor) -> Tensor:
        return (outputs * self.directions.to(outputs)).sum(1)

    def confidence(self, outputs: Tensor) -> Tensor:
        return F.cosine_similarity(outputs - self.mean.to(outputs), self.directions.to(outputs)).clamp_min(0)

    def alike(self, i: int, j: int) -> bool:
        return float(self.directions[i] @ self.directions[j]) > self.limit


def interleaved(several: Sequence[Decisions]) -> Decisions:
    """K decisions of one kind about each of N pictures, side by side: N·K, from K times N."""
    first = several[0]
    if isinstance(first, ClassDecisions):
        classes = [one.classes for one in several if isinstance(one, ClassDecisions)]
        return dataclasses.replace(first, classes=torch.stack(classes, 1).flatten())
    if isinstance(first, DirectionDecisions):
        directions = [one.directions for one in several if isinstance(one, DirectionDecisions)]
        return dataclasses.replace(first, directions=torch.stack(directions, 1).flatten(0, 1))
    return first.rows(torch.arange(len(first)).repeat_interleave(len(several)))


def side_by_side(decisions: Decisions, pictures: int) -> Target:
    """The scores (N, K) of N·K `decisions` about N `pictures`, of K about each, as a target of `explain`."""
    several = len(decisions) // pictures
    if several == 1:
        return decisions.target()
    return SideBySide(tuple(decisions.rows(torch.arange(k, len(decisions), several)).target() for k in range(several)))


def decide(teacher: Tensor, classifier: bool, labels: Tensor | None = None, output: str | None = None) -> Decisions:
    """The decisions that a teacher's outputs (N, D) stand for, or those of `labels` (N,) for a classifier.

    `output` is what the outputs are, where that is not `classes` or `features` (see `Subject`).

    Raises DataError where there is no picture, or only one for a model without classes: it has no mean to differ from.
    """
    if not len(teacher):
        raise DataError("There are no pictures to evaluate on. Pass --data with some.")
    if classifier:
        return ClassDecisions(teacher.argmax(1) if labels is None else labels, output != LABELS)
    if len(teacher) == 1:
        raise DataError(
            "One picture has no mean to differ from, and a model without classes is explained by what sets its "
            "features apart from it. Pass two pictures or more."
        )
    mean = teacher.mean(0)
    if output == REGRESSION and teacher.shape[1] == 1:
        return ValueDecisions(teacher[:, 0], mean[0])
    return DirectionDecisions(F.normalize(teacher - mean), mean)
