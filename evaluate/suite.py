"""All metrics over a teacher, its student and the methods that explain them, on the same pictures: an Evaluation.

The metrics are those of `registry`; this runs their table. Costs are shared: random subsets are taken away once a
model, the ends of a curve are measured once a model and fill, every map is made once. What does not apply becomes a row
that says why; a fault of ours or of the data is an error. An evaluation is a sequence of named steps; each is kept as
soon as it is done (`store`), so that what was stopped can go on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import DataError
from ..data.labelled import Pictures
from .baselines import Method, find_method
from .contrast import OTHERS, OWN, maps_with_others
from .decisions import decide
from .features import cache_key, features_of, kept
from .metrics.controls import less_trained
from .progress import announced
from .record import Evaluation
from .registry import Job, steps_of
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
    explained, seconds = _decided(teacher, student, explained_on, settings, unit, untrained)
    # Steps are named before there are maps; those of maps that turn out not to apply are not taken.
    names = _named(notes, explained)
    done = sum(map(notes.done, names))
    keys = {subject.name: _key(subject, fidelity_on) for subject in (teacher, student)}
    compared = {name: 0 if kept(key) else len(fidelity_on) for name, key in keys.items()}
    about = announced(settings, seconds, compared, len(names), done, len(explained_on), len(fidelity_on))
    notes.progress.start(len(names), done, about)
    try:
        notes.step("fidelity", lambda: _fidelity(notes, (teacher, student), keys, fidelity_on, texts))
        _add_maps(notes, explained)
        for name, job in _jobs(notes, explained):
            notes.step(name, job)
    finally:
        notes.progress.stop()
    return notes.evaluation(), explained


def _named(notes: Notes, explained: Explained) -> list[str]:
    """The names of all steps, were there maps of every method."""
    pairs = explained.settings.pairs
    whole = dataclasses.replace(explained, maps=dict.fromkeys(pairs))
    maps = [f"maps: {model}, {method}" for model, method in pairs]
    return ["fidelity", *maps, *(name for name, _ in _jobs(notes, whole))]


def _key(subject: Subject, pictures: Pictures) -> str | None:
    """What the features of `pictures` are kept under, where these can be told apart from others."""
    return None if pictures.digest is None else cache_key(subject, pictures.digest)


def _fidelity(
    notes: Notes, both: Sequence[Subject], keys: Mapping[str, str | None], pictures: Pictures, texts: Tensor | None
) -> None:
    """All that compares features: they are many, and are not kept, so it is one step."""
    subjects = {subject.name: subject for subject in both}
    features = {}
    for name, subject in subjects.items():
        count = -(-len(pictures) // subject.batch_size)
        batches = notes.progress.within(pictures.images.split(subject.batch_size), count, f"features of the {name}")
        features[name] = features_of(subject, batches, keys[name])
    compared = Compared(pictures, subjects, features, texts, notes.seed)
    for step in steps_of("features"):
        for _, job in step.run(notes, compared):
            job()


def _jobs(notes: Notes, explained: Explained) -> Iterator[Job]:
    """Of steps that need the same: all of them for one model or pair, then for the next."""
    each: dict[str, Callable[[], Any]] = {
        "pictures": lambda: [()],
        "model": lambda: [(model,) for model in explained.subjects],
        "maps": lambda: explained.maps,
    }
    for needs, group in itertools.groupby(steps_of("pictures", "model", "maps"), key=lambda step: step.needs):
        steps = list(group)
        for which in each[needs]():
            for step in steps:
                yield from step.run(notes, explained, *which)


def _decided(
    teacher: Subject,
    student: Subject,
    pictures: Pictures,
    settings: Settings,
    unit: int,
    untrained: Mapping[str, Callable[[], Subject]] | None,
) -> tuple[Explained, dict[str, float]]:
    """The decisions that are explained, without maps yet: the teacher's own, or the labels where these are classes.

    Also about how many seconds one picture's forward pass takes, for each model.
    """
    subjects = {"teacher": teacher, "student": student}
    outputs, seconds = {}, {}
    for name, subject in subjects.items():
        outputs_of(subject, [pictures.images[:1]])  # the first pass of a model takes longer
        start = time.perf_counter()
        outputs[name] = outputs_of(subject, pictures.images.split(subject.batch_size))
        seconds[name] = (time.perf_counter() - start) / len(pictures)
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
    controls = less_trained(student, settings.seed) | dict(untrained or {}) if settings.controls else {}
    return Explained(pictures, outputs, decisions, subjects, {}, unit, settings, {}, controls), seconds


def _add_maps(notes: Notes, explained: Explained) -> None:
    """Makes the maps of every method for the same decisions, and for other ones where that is cheap."""
    for model, name in explained.settings.pairs:
        way, subject = find_method(name), explained.subjects[model]
        kinds = _others_shown(explained, way)
        found = notes.maps(model, name, functools.partial(maps_with_others, way, subject, explained, kinds))
        if OWN in found:
            explained.maps[model, name] = found.pop(OWN)
            explained.other_maps.update({(model, name, kind): maps for kind, maps in found.items()})


def _others_shown(explained: Explained, way: Method) -> tuple[str, ...]:
    """Which other decisions are explained too. Without masks there is no contrast; the page shows one of our own."""
    if not way.cheap:
        return ()
    return OTHERS if explained.pictures.masks is not None else OTHERS[:1] if way.name == OURS else ()
