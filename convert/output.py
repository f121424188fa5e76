"""What a model's output is: the one answer that explain, evaluate, align, publish, export and inspect go by.

A classifier needs no names: a class without one is called by its number, `class 3`. Names come from the configuration
that the weights were published with, or from the user, and never from how many classes there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ..core.errors import CheckpointError, DataError, SourceError, translated
from ..core.files import read_text
from .libraries import CLASSES, FEATURES, LABELS, REGRESSION, Teacher, find_library
from .student import Student

__all__ = ["KINDS", "OutputKind", "output_kind", "with_labels"]

KINDS = (CLASSES, LABELS, REGRESSION, FEATURES)

Opened = TypeVar("Opened", bound=Teacher | Student)


@dataclasses.dataclass(frozen=True)
class OutputKind:
    """What the output (B, D) of a model is.

    Attributes:
        kind: `classes` (logits that exclude each other), `multi-label` (logits of which several may hold),
            `regression` (values), or `features` (a feature or an embedding).
        count: D, but for features 0: they have no classes.
        names: one for each output, or None where they are known by their numbers.
        named_by: where the names come from, in words; empty without names, or where that was not recorded.
    """

    kind: str
    count: int = 0
    names: tuple[str, ...] | None = None
    named_by: str = ""

    @property
    def chooses(self) -> bool:
        """Whether the largest output is a decision."""
        return self.kind in (CLASSES, LABELS)

    def name(self, index: int) -> str:
        """What output `index` is called."""
        if self.names is not None:
            return self.names[index]
        if self.kind == REGRESSION:
            return "output" if self.count == 1 else f"output {index}"
        return f"class {index}"

    def __str__(self) -> str:
        if self.kind == FEATURES:
            return "features, no classes"
        noun = {CLASSES: "class", LABELS: "label", REGRESSION: "value"}[self.kind]
        several = f"{noun}{'es' if noun == 'class' else 's'}"
        kind = "" if self.kind == CLASSES else f" ({self.kind})"
        origin = f", named by {self.named_by}" if self.named_by else ", named" if self.names else ", without names"
        return f"{self.count:,} {noun if self.count == 1 else several}{kind}{origin}"


def output_kind(opened: Student | Teacher) -> OutputKind:
    """What the output of a model is.

    Raises:
        SourceError: it has other names than outputs, or its library is not known.
    """
    library, names = find_library(opened.source.library), opened.labels
    count = library.class_count(opened.source, opened.model) or len(names or ())
    kind = opened.output or library.output(opened.source, count)
    if kind == FEATURES:
        return OutputKind(FEATURES)
    if names is not None and len(names) != count:
        raise SourceError(
            f"{opened.source.reference} has {count:,} outputs and {len(names):,} names for them. Pass one name for "
            "each, in the order of the outputs: labels=..., or --labels FILE with one a line."
        )
    return OutputKind(kind, count, names, opened.named_by if names else "")


def with_labels(opened: Opened, labels: str | Path | Sequence[str]) -> Opened:
    """The same model with names for its classes: those given, or the lines of a text file, in the classes' order.

    Raises:
        DataError: the file cannot be read, or a name is empty.
        SourceError: the model has no classes, or another number of them.
    """
    names = _names(labels)
    named_by = f"--labels {Path(labels).name}" if isinstance(labels, str | Path) else "labels"
    found = output_kind(dataclasses.replace(opened, labels=None))
    where = f"--labels {labels}" if isinstance(labels, str | Path) else "--labels"
    if found.kind == FEATURES:
        raise SourceError(f"{where}: {opened.source.reference} returns features, which have no names. Leave it out.")
    if len(names) != found.count:
        raise SourceError(
            f"{where} has {len(names):,} names, but {opened.source.reference} has {found.count:,} outputs. Write one "
            "a line, in the order of the outputs."
        )
    return dataclasses.replace(opened, labels=names, named_by=named_by)


def _names(labels: str | Path | Sequence[str]) -> tuple[str, ...]:
    if isinstance(labels, str | Path):
        where = f"--labels {labels}"
        with translated(CheckpointError, DataError, lambda error: f"{where}: cannot be read: {error}", ours=DataError):
            lines = read_text(Path(labels)).removeprefix("\ufeff").rstrip().splitlines()
    else:
        lines, where = list(labels), "--labels"
    names = tuple(line.strip() for line in lines)
    # An empty line between others is not left out: all names after it would move by one class.
    if not names or not all(names):
        place = f"line {names.index('') + 1} is empty" if names else "there are no names"
        raise DataError(f"{where}: {place}. Write one name a line, in the order of the outputs.")
    return names
