"""Controls: how a localisation figure looks where there is nothing to find. (Ours, after Adebayo et al. 2018.)

- Class contrast: what the map of the decision has in the mask, minus what the map of another class has there, picture
  by picture. A map that finds objects whatever it is asked has a large share and no contrast.
- Models that know less: the student with its last block, and with all blocks, randomised, and the untrained student.
- Paired gains: the student's figure minus its teacher's, on the same pictures. Only where the interval excludes zero is
  one better than the other.

Controls that are methods (`centre`, `edges`, `averaged`) are in `baselines`, and are measured as any method is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ...convert.taps import find_blocks
from ...core.errors import NotApplicable
from ..baselines import find_method, maps_of
from ..contrast import MEASURES, OTHERS, others_of
from ..record import Measurement
from ..registry import Headline, Job, Metric, measures
from ..subject import Subject
from ..task import OURS
from .randomisation import shuffle_weights

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Explained

__all__ = ["less_trained"]

RANDOM, RUNNER_UP = OTHERS
NO_MASKS = "the pictures have no masks; pass --masks SHARDS"


def less_trained(student: Subject, seed: int = 0) -> dict[str, Callable[[], Subject]]:
    """Name -> makes the student with what it learnt shuffled away: in its last block, and in all of them."""

    def shuffled(blocks: int | None) -> Subject:
        model = copy.deepcopy(student.model)
        names = find_blocks(model)
        if blocks is None:
            shuffle_weights(model, seed)
        elif not names:
            raise NotApplicable("the model has no blocks")
        else:
            shuffle_weights(model.get_submodule(names[-1]), seed)
        return dataclasses.replace(student, name="shuffled", model=model)

    return {"last block random": partial(shuffled, 1), "all blocks random": partial(shuffled, None)}


def _headlines(metric: str, place: int) -> tuple[Headline, ...]:
    return (
        Headline(metric, place, "student", OURS, RANDOM),
        Headline(f"{metric}_teacher", place, "teacher", OURS, RANDOM),
    )


@measures(
    *(
        Metric(one.contrast, "localisation", headlines=_headlines(one.contrast, -1) if name == "signed_share" else ())
        for name, one in MEASURES.items()
    ),
    *(Metric(name, "localisation") for one in MEASURES.values() for name in (one.gain, f"{one.contrast}_gain")),
    needs="pictures",
    place=12,
)
def _contrasts(notes: Notes, task: Explained) -> Iterator[Job]:
    yield "class contrast", partial(_measure_contrasts, notes, task)
    yield "student minus teacher", partial(_measure_gains, notes, task)


def _measure_contrasts(notes: Notes, task: Explained) -> None:
    for pair in task.maps:
        for kind in OTHERS:
            _contrast_rows(notes, task, pair, kind, task.maps[pair], partial(_other_maps, task, pair, kind))


def _contrast_rows(
    notes: Notes, task: Explained, pair: tuple[str, str], kind: str, maps: Tensor, other: Callable[[], Tensor]
) -> None:
    """For each measure, what `maps` (N, H, W) of the decisions have in the masks minus what those of others have."""
    masks = task.pictures.masks
    for one in MEASURES.values():
        row = Measurement("localisation", one.contrast, *pair, kind)
        if masks is None:
            notes.absent(row, NO_MASKS)
        else:
            notes.measure(row, lambda one=one: one.value(maps, masks) - one.value(other(), masks))


def _other_maps(task: Explained, pair: tuple[str, str], kind: str) -> Tensor:
    """Maps (N, H, W) of other decisions about the same pictures; raises NotApplicable where there are none."""
    if kind == RANDOM and pair in task.other_maps:
        return task.other_maps[pair]
    model, method = pair
    way = find_method(method)
    if not way.cheap:
        raise NotApplicable(f"maps of another class would take {way.passes} more passes a picture")

    def make() -> Tensor:
        wanted = others_of(kind, task.decisions, task.outputs["teacher"], task.settings.seed)
        images = task.pictures.images
        return maps_of(way, task.subjects[model], images, wanted, task.settings.seed)

    return task.once((pair, kind), make)


def _measure_gains(notes: Notes, task: Explained) -> None:
    masks = task.pictures.masks
    teacher, student = ("teacher", OURS), ("student", OURS)
    for one in MEASURES.values():
        gain = Measurement("localisation", one.gain, "both", OURS)
        contrast = dataclasses.replace(gain, metric=f"{one.contrast}_gain", variant=RANDOM)
        missing = NO_MASKS if masks is None else ""
        if not {teacher, student} <= {*task.maps}:
            missing = missing or "one of the two has no explanation"
        if missing or masks is None:
            for row in (gain, contrast):
                notes.absent(row, missing)
            continue
        ours, theirs = (one.value(task.maps[pair], masks) for pair in (student, teacher))
        notes.measure(gain, lambda ours=ours, theirs=theirs: ours - theirs)

        def difference(one=one, ours=ours, theirs=theirs, masks=masks) -> Tensor:
            others = [one.value(_other_maps(task, pair, RANDOM), masks) for pair in (student, teacher)]
            return (ours - others[0]) - (theirs - others[1])

        notes.measure(contrast, difference)


@measures(needs="pictures", place=45)
def _less_trained(notes: Notes, task: Explained) -> Iterator[Job]:
    for name, make in task.controls.items():
        yield f"control: {name}", partial(_measure_control, notes, task, name, make)


def _measure_control(notes: Notes, task: Explained, name: str, make: Callable[[], Subject]) -> None:
    """One model at a time: its exact maps of the same decisions, in the masks, and their class contrast."""
    masks, images, seed = task.pictures.masks, task.pictures.images, task.settings.seed
    rows = [Measurement("localisation", one.row, name, OURS) for one in MEASURES.values()]
    rows += [Measurement("localisation", one.contrast, name, OURS, RANDOM) for one in MEASURES.values()]
    if masks is None:
        for row in rows:
            notes.absent(row, NO_MASKS)
        return
    try:
        subject = make()
        method = find_method(OURS)
        maps = maps_of(method, subject, images, task.decisions, seed)
    except NotApplicable as error:
        for row in rows:
            notes.absent(row, str(error))
        return
    for one in MEASURES.values():
        row = Measurement("localisation", one.row, name, OURS)
        notes.measure(row, lambda one=one: one.value(maps, masks))

    def other() -> Tensor:
        def made() -> Tensor:
            wanted = others_of(RANDOM, task.decisions, task.outputs["teacher"], seed)
            return maps_of(method, subject, images, wanted, seed)

        return task.once((name, OURS, RANDOM), made)

    _contrast_rows(notes, task, (name, OURS), RANDOM, maps, other)
