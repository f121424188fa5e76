"""All metrics over a teacher, its student and the methods that explain them, on the same pictures: an Evaluation.

The metrics are those of `registry`; this runs their table. Costs are shared: random subsets are taken away once a
model, the ends of a curve are measured once a model and fill, every map is made once. What does not apply becomes a row
that says why; a fault of ours or of the data is an error. An evaluation is a sequence of named steps; each is kept as
soon as it is done (`store`), so that what was stopped can go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import DataError, NotApplicable
from ..data.labelled import Pictures
from .baselines import find_method, maps_of
from .contrast import OTHERS, others_of
from .decisions import Decisions, decide
from .features import cache_key, features_of
from .metrics.controls import less_trained
from .record import Evaluation
from .registry import Step, steps_of
from .store import Notes
from .subject import Subject, outputs_of
from .task import OURS, Compared, Explained, Settings

__all__ = ["Explained", "Pictures", "Settings", "evaluate_subjects"]


def evaluate_subjects(
    teacher: Subject,
    student: Subject,
    fidelity_on: Pictures,
    explained_on: Pictures,
    settings: Settings,
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    texts: Tensor | None = None,
    untrained: Mapping[str, Callable[[], Subject]] | None = None,
    work: Path | None = None,
    progress: bool = True,
) -> tuple[Evaluation, Explained]:
    """Measures everything that applies.

    Args:
        fidelity_on: pictures of the fidelity and probe sections.
        explained_on: pictures that are explained, with masks where there are some.
        model, data: facts for the record.
        texts: (K, D) embeddings of the label names, for zero-shot accuracy.
        untrained: name -> makes a further control, such as the student before its alignment.
        work: a folder that holds every step as soon as it is done. Given one with steps of the same model, data and
            settings, which `model` and `data` must tell apart, goes on after them.

    Returns:
        The evaluation, and the maps that it was made from.

    Raises:
        DataError: the models do not belong together, or there are no pictures.
    """
    unit = settings.unit or max(1, min(explained_on.images.shape[-2:]) // 8)
    facts = {
        "model": model or {},
        "data": {"pictures": len(fidelity_on), "explained": len(explained_on), **(data or {})},
        "settings": {**dataclasses.asdict(settings), "unit": unit},
    }
    notes = Notes(facts, work, settings.seed, progress)
    notes.step("fidelity", lambda: _fidelity(notes, teacher, student, fidelity_on, texts))
    explained = _explained(notes, teacher, student, explained_on, settings, unit, untrained)
    for needs, steps in itertools.groupby(steps_of("pictures", "model", "maps"), key=lambda step: step.needs):
        _run(notes, explained, needs, list(steps))
    return notes.evaluation(), explained


def _fidelity(notes: Notes, teacher: Subject, student: Subject, pictures: Pictures, texts: Tensor | None) -> None:
    """All that compares features: they are many, and are not kept, so it is one step."""
    subjects = {subject.name: subject for subject in (teacher, student)}
    features = {}
    for name, subject in subjects.items():
        batches = notes.bar(pictures.images.split(subject.batch_size), f"features, {name}")
        key = None if pictures.digest is None else cache_key(subject, pictures.digest)
        features[name] = features_of(subject, batches, key)
    compared = Compared(pictures, subjects, features, texts, notes.seed)
    for step in steps_of("features"):
        for _, job in step.run(notes, compared):
            job()


def _run(notes: Notes, explained: Explained, needs: str, steps: list[Step]) -> None:
    """Steps that need the same: all of them for one model or pair, then for the next."""
    each: dict[str, Callable[[], Any]] = {
        "pictures": lambda: [()],
        "model": lambda: [(model,) for model in explained.subjects],
        "maps": lambda: notes.bar(explained.maps, "faithfulness"),
    }
    for which in each[needs]():
        for step in steps:
            for name, job in step.run(notes, explained, *which):
                notes.step(name, job)


def _explained(
    notes: Notes,
    teacher: Subject,
    student: Subject,
    pictures: Pictures,
    settings: Settings,
    unit: int,
    untrained: Mapping[str, Callable[[], Subject]] | None,
) -> Explained:
    """Maps of every method for the same decisions: the teacher's own, or the labels where these are classes."""
    subjects = {"teacher": teacher, "student": student}
    outputs = {
        name: outputs_of(subject, pictures.images.split(subject.batch_size)) for name, subject in subjects.items()
    }
    theirs, ours = outputs.values()
    if theirs.shape[1] != ours.shape[1]:
        raise DataError(
            f"Teacher and student do not belong together: the teacher gives {theirs.shape[1]} numbers a picture, the "
            f"student {ours.shape[1]}. Pass the model that the student was converted from."
        )
    if not theirs.isfinite().all():
        raise DataError("The teacher's outputs hold NaN or infinity: its weights are broken, or the pictures are.")
    labels = pictures.labels if pictures.labels_are_classes else None
    decisions = decide(theirs, teacher.classifier, labels, teacher.output)
    maps: dict[tuple[str, str], Tensor] = {}
    for model, name in notes.bar(settings.pairs, "maps"):
        make = functools.partial(maps_of, find_method(name), subjects[model], pictures.images, decisions, settings.seed)
        if (found := notes.maps(model, name, make)) is not None:
            maps[model, name] = found
    others: dict[tuple[str, str], Tensor] = {}
    # Without masks there is no contrast to measure, and the page shows that of our own.
    for model, name in notes.bar([pair for pair in maps if find_method(pair[1]).cheap], "maps of another class"):
        if pictures.masks is not None or name == OURS:
            make = functools.partial(_other_map, name, subjects[model], pictures.images, decisions, theirs, settings)
            with contextlib.suppress(NotApplicable):  # the contrast's own row says why there is none
                others[model, name] = notes.kept(f"{model}-{name}-another", make)
    controls = less_trained(student, settings.seed) | dict(untrained or {}) if settings.controls else {}
    return Explained(pictures, outputs, decisions, subjects, maps, unit, settings, others, controls)


def _other_map(
    name: str, subject: Subject, images: Tensor, decisions: Decisions, outputs: Tensor, settings: Settings
) -> Tensor:
    wanted = others_of(OTHERS[0], decisions, outputs, settings.seed)
    return maps_of(find_method(name), subject, images, wanted, settings.seed)
