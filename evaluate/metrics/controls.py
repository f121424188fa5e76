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
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...convert.taps import find_blocks
from ...core.errors import NotApplicable
from ..baselines import find_method
from ..contrast import MEASURES, OTHERS, OWN, Measure, maps_of_others, maps_with_others
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


def less_trained(student: Subject, seed: int = 0) -> dict[str, Callable[[], Subject]]:
    """Name -> makes the student with what it learnt shuffled away: in its last block, and in all of them."""

    def last_block(model: nn.Module) -> nn.Module:
        if not (names := find_blocks(model)):
            raise NotApplicable("the model has no blocks")
        return model.get_submodule(names[-1])

    def shuffled(part: Callable[[nn.Module], nn.Module]) -> Subject:
        model = copy.deepcopy(student.model)
        shuffle_weights(part(model), seed)
        return dataclasses.replace(student, name="shuffled", model=model)

    return {
        "last block random": partial(shuffled, last_block),
        "all blocks random": partial(shuffled, lambda model: model),
    }


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
            own = partial(task.maps.__getitem__, pair)
            _contrast_rows(notes, task, pair, kind, own, partial(_other_maps, task, pair, kind))


def _contrast_rows(
    notes: Notes,
    task: Explained,
    pair: tuple[str, str],
    kind: str,
    maps: Callable[[], Tensor],
    other: Callable[[], Tensor],
) -> None:
    """For each measure, what `maps` (N, H, W) of the decisions have in the masks minus what those of others have."""
    for one in MEASURES.values():
        row = Measurement("localisation", one.contrast, *pair, kind)
        notes.measure(row, lambda one=one: _difference(one, task.masks, maps(), other()))


def _inside(one: Measure, masks: Tensor, maps: Tensor) -> Tensor:
    return one.value(maps, masks)  # masks come first where this is called: without them, no map is made


def _difference(one: Measure, masks: Tensor, maps: Tensor, others: Tensor) -> Tensor:
    return one.value(maps, masks) - one.value(others, masks)


def _other_maps(task: Explained, pair: tuple[str, str], kind: str) -> Tensor:
    """Maps (N, H, W) of other decisions about the same pictures; raises NotApplicable where there are none."""
    if (*pair, kind) in task.other_maps:
        return task.other_maps[*pair, kind]
    way = find_method(pair[1])
    if not way.cheap:
        raise NotApplicable(f"maps of another class would take {way.passes} more passes a picture")
    return task.once((pair, kind), lambda: maps_of_others(kind, way, task.subjects[pair[0]], task))


def _measure_gains(notes: Notes, task: Explained) -> None:
    def own(model: str) -> Tensor:
        if (model, OURS) not in task.maps:
            raise NotApplicable("one of the two has no explanation")
        return task.maps[model, OURS]

    def contrasted(one: Measure, masks: Tensor, model: str) -> Tensor:
        return _difference(one, masks, own(model), _other_maps(task, (model, OURS), RANDOM))

    for one in MEASURES.values():
        gain = Measurement("localisation", one.gain, "both", OURS)
        notes.measure(gain, lambda one=one: _difference(one, task.masks, own("student"), own("teacher")))
        contrast = dataclasses.replace(gain, metric=f"{one.contrast}_gain", variant=RANDOM)
        two = partial(contrasted, one)
        notes.measure(contrast, lambda two=two: two(task.masks, "student") - two(task.masks, "teacher"))


@measures(needs="pictures", place=45)
def _less_trained(notes: Notes, task: Explained) -> Iterator[Job]:
    for name, make in task.controls.items():
        yield f"control: {name}", partial(_measure_control, notes, task, name, make)


def _measure_control(notes: Notes, task: Explained, name: str, make: Callable[[], Subject]) -> None:
    """One model at a time: its exact maps of the same decisions, in the masks, and their class contrast."""
    way, subject = find_method(OURS), functools.cache(make)

    @functools.cache
    def found() -> dict[str, Tensor]:
        return maps_with_others(way, subject(), task, (RANDOM,))

    def maps() -> Tensor:
        return found()[OWN]

    def others() -> Tensor:
        return found()[RANDOM] if RANDOM in found() else maps_of_others(RANDOM, way, subject(), task)

    for one in MEASURES.values():
        row = Measurement("localisation", one.row, name, OURS)
        notes.measure(row, lambda one=one: _inside(one, task.masks, maps()))
    _contrast_rows(notes, task, (name, OURS), RANDOM, maps, others)
