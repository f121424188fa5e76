"""What three models say of one photograph: the teacher, its class maps, and the student, with the student's ledgers.

Every rectangle of a grid of cells is erased in turn, so that its share by the map stands beside what it really does.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..convert import FaCnnConfig, Student, Teacher, convert, fold, load_teacher
from ..convert.output import OutputKind, output_kind
from ..evaluate.baselines import find_method, maps_of
from ..evaluate.decisions import ClassDecisions
from ..evaluate.fills import FILLS
from ..evaluate.subject import Subject
from ..explain import ClassTarget, Explanation, explain_scores, overlay, smoothed, smoothing

__all__ = ["CELLS", "SQUARES", "Models", "Shown", "show"]

SIDE = 320  # pixels of a shown picture
SQUARES = 16  # a side of what maps are averaged over, before they are shown: one smoothing for all
ABSENT = ("banana", "castle", "violin, fiddle")  # the first of these that neither model sees anything of is absent
CELLS = 4  # regions are rectangles of cells of a grid of so many a side


@dataclasses.dataclass(frozen=True)
class Models:
    """Those that are asked: the teacher, the same with class maps (which decides alike), and the student, folded."""

    teacher: Teacher
    class_maps: Student
    student: Student

    @classmethod
    def of(cls, student: Student) -> Models:
        """The student, and its teacher by its source; raises SourceError where that cannot be had."""
        teacher = load_teacher(student.source.reference)
        other = dataclasses.replace(teacher, model=copy.deepcopy(teacher.model))  # conversion takes the model it gets
        quick = dataclasses.replace(student, model=fold(student))
        return cls(teacher, convert(other, FaCnnConfig()), quick)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Of a classifier: the class, its probability (softmax), and the next class."""

    label: str
    probability: float
    second: str


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A score as pixels for it, pixels against it, and constants, which add up to it but for `residual`.

    For and against are sums over the map as it is shown. Of both together `carried` goes through biases that count in
    proportion to their layer's input, and `direct` through none.
    """

    label: str
    score: float
    pixels_for: float
    pixels_against: float
    constants: float
    direct: float
    carried: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Region:
    """A rectangle of cells, and what became of the score when its pixels were erased.

    Attributes:
        box: left, top, right, bottom in cells. share: what it adds to the score, by the map.
        erased: the score with the region in the mean colour. decides: what the student then decides.
    """

    box: tuple[int, int, int, int]
    share: float
    erased: float
    decides: str


@dataclasses.dataclass(frozen=True)
class Shown:
    """A photograph and what the models say of it. `student` and the ledgers are of the student's own decision, and of
    the class that comes next; `absent` is the ledger of a class that is not there; `regions` are of the decision."""

    name: str
    teacher: Decision
    class_maps: Decision
    student: Decision
    agrees: bool
    ledgers: tuple[Ledger, Ledger]
    absent: Ledger
    regions: tuple[Region, ...]


def show(name: str, photograph: Image.Image, models: Models) -> tuple[Shown, dict[str, Image.Image]]:
    """What the models say of a photograph, and pictures of it: as it was `seen`, and one for each map.

    The maps are `grad_cam` of the teacher, its `class_maps`, and the student's of its `decision`, of the `second`
    class, and of one that is `absent`. All models see the photograph as the student prepares it, so at its size.
    """
    teacher, class_maps, student = models.teacher, models.class_maps, models.student
    output = output_kind(student)
    image = student.preprocess.transform()(photograph)[None]
    original, ours = (
        _subject(name, model.model, student) for name, model in (("teacher", teacher), ("student", student))
    )
    with torch.no_grad():
        decided = teacher.model(image)
        found = student.model(image)
    best, second = found[0].topk(2).indices.tolist()
    absent = _absent(torch.cat([decided, found]), output)
    cam = maps_of(find_method("grad-cam"), original, image, ClassDecisions(decided.argmax(1)))[0]
    free = explain_scores(class_maps.model, image, ClassTarget(decided.argmax(1, keepdim=True)))
    explanation = explain_scores(student.model, image, ClassTarget(torch.tensor([[best, second, absent]])))
    seen = student.preprocess.seen(image[0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    tiles = {
        "seen": seen,
        "grad_cam": _tile(seen, cam),
        "class_maps": _tile(seen, free.contributions[0, 0]),
        "decision": _tile(seen, explanation.contributions[0, 0]),
        "second": _tile(seen, explanation.contributions[0, 1]),
        "absent": _tile(seen, explanation.contributions[0, 2]),
    }
    facts = Shown(
        name=name,
        teacher=_decision(decided[0], output),
        class_maps=_decision(free.outputs[0], output),
        student=_decision(explanation.outputs[0], output),
        agrees=int(decided.argmax()) == best,
        ledgers=(_ledger(explanation, 0, output.name(best)), _ledger(explanation, 1, output.name(second))),
        absent=_ledger(explanation, 2, output.name(absent)),
        regions=_regions(ours, image, explanation, best, output),
    )
    return facts, tiles


def _subject(name: str, model: nn.Module, student: Student) -> Subject:
    return Subject(name, model, None, student.preprocess.mean, student.preprocess.std, classifier=True)


def _absent(outputs: Tensor, names: OutputKind) -> int:
    """The first class of `ABSENT` that is in no model's first five; outputs: (models, D)."""
    seen = {names.name(number) for number in outputs.topk(5).indices.flatten().tolist()}
    wanted = next((name for name in ABSENT if name not in seen), ABSENT[0])
    return (names.names or ()).index(wanted)


def _decision(output: Tensor, names: OutputKind) -> Decision:
    best, second = output.topk(2).indices.tolist()
    return Decision(names.name(best), float(output.softmax(0)[best]), names.name(second))


def _ledger(explanation: Explanation, score: int, label: str) -> Ledger:
    row, shown = explanation.row(0, score), _averaged(explanation.contributions[0, score]).double()
    return Ledger(
        label=label,
        score=row["score"],
        pixels_for=float(shown.clamp_min(0).sum()),
        pixels_against=float(shown.clamp_max(0).sum()),
        constants=sum(row["constants"].values()),
        direct=row.get("direct", row["input"]),
        carried=row.get("carried", 0.0),
        residual=row["residual"],
    )


@torch.no_grad()
def _regions(
    subject: Subject, image: Tensor, explanation: Explanation, decision: int, output: OutputKind
) -> tuple[Region, ...]:
    """Every rectangle of cells of `image` (1, 3, H, W): its exact share, and what erasing it really does."""
    contributions = explanation.contributions[0, 0]
    fill = FILLS["mean"](subject, image)
    spans = [(start, stop) for start in range(CELLS) for stop in range(start + 1, CELLS + 1)]
    boxes = [(left, top, right, bottom) for top, bottom in spans for left, right in spans]
    masks = torch.stack([_mask(box, image.shape[-2:]) for box in boxes])
    outputs = torch.cat([subject.model(torch.where(part[:, None], fill, image)) for part in masks.split(25)])
    return tuple(
        Region(box, float(contributions[mask].sum()), float(row[decision]), output.name(int(row.argmax())))
        for box, mask, row in zip(boxes, masks, outputs, strict=True)
    )


def _mask(box: tuple[int, int, int, int], shape: Sequence[int]) -> Tensor:
    """(H, W), true inside a box in cells."""
    height, width = shape
    left, top, right, bottom = box
    rows, columns = (torch.arange(length) * CELLS // length for length in (height, width))
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))


def _tile(seen: Image.Image, contributions: Tensor) -> Image.Image:
    large = F.interpolate(_averaged(contributions)[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
    return overlay(seen, large, smooth=1)


def _averaged(contributions: Tensor) -> Tensor:
    """A map (H, W) as all maps are shown: averaged over small squares, with the sum that it had."""
    return smoothed(contributions, smoothing(contributions.shape[-1], SQUARES))
