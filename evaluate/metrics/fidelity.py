"""How much of the teacher is left in the student, on held-out pictures.

Raw cosine flatters: features share a large mean, and two unrelated pictures can have cosine 0.7. So the centred cosine
(each side minus its own mean over the pictures), nearest-neighbour agreement and, for classifiers, top-1 agreement
stand beside it. Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, section 4) compares all distances at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...convert.libraries import LABELS
from ...core.errors import DataError, NotApplicable
from ..estimates import Estimate, jackknife
from ..features import DENSE, OUTPUT
from ..record import Measurement
from ..registry import Headline, Job, Metric, measures

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Compared

__all__ = [
    "agreement",
    "confident_agreement",
    "cosines",
    "dense_agreement",
    "fidelity",
    "linear_cka",
    "neighbour_agreement",
    "sameness",
]

T = TypeVar("T")


def fidelity(student: Tensor, teacher: Tensor, classifier: bool = False) -> dict[str, float]:
    """Agreement of outputs (N, D) on the same N > 1 pictures; every value is at most 1, chance is near 0.

    Returns:
        raw_cosine, centred_cosine: means over pictures.
        cka: `linear_cka`, of both as sets of pictures.
        neighbour_agreement: share of pictures whose nearest other picture (centred cosine) is the teacher's.
        top1_agreement: share of pictures with the teacher's largest logit; only for a classifier.
    """
    values = {
        **cosines(student, teacher),
        "cka": linear_cka(student, teacher),
        "neighbour_agreement": neighbour_agreement(student, teacher),
    }
    if classifier:
        values["top1_agreement"] = agreement(student, teacher)["top1_agreement"]
    return {name: round(float(value.mean()), 4) for name, value in values.items()}


def sameness(teacher: Tensor, classifier: bool) -> str:
    """Why agreeing with a teacher's outputs (N, D) says nothing; empty where it does.

    A student that looks at no picture agrees with a teacher that says the same of all of them.
    """
    count, teacher = len(teacher), teacher.float()
    if count < 2:
        return ""
    if bool((teacher - teacher[:1]).abs().max() <= 1e-6 * teacher.abs().max()):
        return f"the teacher gives all {count:,} pictures the same output"
    if classifier and bool((teacher.argmax(1) == teacher[0].argmax()).all()):
        return f"the teacher decides on the same class for all {count:,} pictures, so a constant would agree too"
    return ""


def cosines(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """raw_cosine, centred_cosine: (N,) for features (N, D) of each picture."""
    student, teacher = _pair(student, teacher)
    return {
        "raw_cosine": F.cosine_similarity(student, teacher),
        "centred_cosine": F.cosine_similarity(student - student.mean(0), teacher - teacher.mean(0)),
    }


def neighbour_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) whether each picture's nearest other one, by centred cosine of features (N, D), is the teacher's."""
    student, teacher = _pair(student, teacher)
    return (_nearest(student - student.mean(0)) == _nearest(teacher - teacher.mean(0))).float()


def agreement(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """What two classifiers' logits (N, K) have in common, (N,) each.

    Returns:
        top1_agreement: the same largest logit. top5_agreement: the teacher's largest is among the student's five.
        kl: KL(teacher || student) of the softmax distributions in nats, at least 0.
    """
    student, teacher = _pair(student, teacher)
    decided = teacher.argmax(1)
    five = student.topk(min(5, student.shape[1])).indices
    ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
    return {
        "top1_agreement": (student.argmax(1) == decided).float(),
        "top5_agreement": (five == decided[:, None]).any(1).float(),
        "kl": F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1),
    }


def confident_agreement(student: Tensor, teacher: Tensor, above: float = 0.5) -> Tensor:
    """(M,) top-1 agreement of logits (N, K), on the M <= N pictures to which the teacher's softmax gives a class more
    than `above`; what it says of the others is little to agree with."""
    return agreement(student, teacher)["top1_agreement"][_sure(teacher, above)]


def _sure(teacher: Tensor, above: float = 0.5) -> Tensor:
    """(N,) whether logits (N, K) give a class a softmax above `above`."""
    return teacher.float().softmax(1).amax(1) > above


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> Tensor:
    """() in [0, 1]: |mean confidence - share that is right|, mean over `bins` equal bins of confidence (M,) weighted by
    their pictures. (Expected calibration error, Guo et al. 2017, arXiv 1706.04599; right (M,) is agreement here.)"""
    place = (confidence.double() * bins).long().clamp(0, bins - 1)
    gaps = confidence.double().new_zeros(bins).index_add_(0, place, confidence.double() - right.double())
    return gaps.abs().sum() / max(1, len(confidence))


SURE = "teacher sure"


def _calibration(outputs: tuple[Tensor, Tensor], confident: bool, seed: int) -> Estimate:
    """Of the student's own confidence, as a guess of whether it decides like its teacher."""
    ours, theirs = outputs
    rows = _sure(theirs) if confident else slice(None)
    confidence, right = ours.float().softmax(1).amax(1)[rows], agreement(ours, theirs)["top1_agreement"][rows]
    if not len(confidence):
        raise NotApplicable("no picture is left to measure this on")
    return jackknife(lambda kept: calibration_error(confidence[kept], right[kept]), len(confidence), seed)


def dense_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) centred cosine of patch features (N, C, h, w), mean over the places; the mean feature is that of all."""
    student, teacher = _pair(student, teacher)
    centred = (features - features.mean((0, 2, 3), keepdim=True) for features in (student, teacher))
    return F.cosine_similarity(*centred, dim=1).mean((1, 2))


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear CKA () in [0, 1] of features (N, D) and (N, E): |Y'X|² / (|X'X| |Y'Y|), Frobenius, columns centred.

    It grows towards 1 where N is small beside D and E.
    """
    student, teacher = _rows(student, teacher)
    x, y = student.double() - student.double().mean(0), teacher.double() - teacher.double().mean(0)
    if len(x) <= x.shape[1] + y.shape[1]:
        # The same traces by Gram matrices (N, N), which are smaller then.
        of_x, of_y = x @ x.T, y @ y.T
        common = (of_x * of_y).sum()
    else:
        of_x, of_y = x.T @ x, y.T @ y
        common = (y.T @ x).square().sum()
    return common / (of_x.norm() * of_y.norm()).clamp_min(torch.finfo(torch.float64).tiny)


def _nearest(features: Tensor) -> Tensor:
    """(N,) index of the nearest other row by cosine."""
    unit = F.normalize(features)
    similarity = unit @ unit.T
    return similarity.fill_diagonal_(-torch.inf).argmax(1)


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32; raises DataError where they are not about the same pictures."""
    if len(student) != len(teacher) or not len(student):
        raise DataError(
            f"Fidelity compares both models on the same pictures: there are {len(student)} of the student and "
            f"{len(teacher)} of the teacher."
        )
    return student.float(), teacher.float()


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`_rows` of the same shape."""
    if student.shape[1:] != teacher.shape[1:]:
        raise DataError(
            f"Teacher and student do not belong together: a picture is {tuple(teacher.shape[1:])} to the teacher and "
            f"{tuple(student.shape[1:])} to the student. Pass the model that the student was converted from."
        )
    return _rows(student, teacher)


# ----------------------------------------------------------------------------------------------------- what is measured


@measures(
    Metric("raw_cosine", "fidelity"),
    Metric("centred_cosine", "fidelity", headlines=(Headline("centred_cosine", 0, "both", variant="output"),)),
    Metric("linear_cka", "fidelity", title="linear CKA"),
    Metric("neighbour_agreement", "fidelity"),
    Metric("top1_agreement", "fidelity", title="top-1 agreement", headlines=(Headline("top1_agreement", 1, "both"),)),
    Metric("calibration_error", "fidelity", better=-1),
    Metric("top5_agreement", "fidelity", title="top-5 agreement"),
    Metric("kl", "fidelity", better=-1, title="KL"),
    Metric("dense_agreement", "fidelity"),
    needs="features",
    place=0,
)
def _measured(notes: Notes, task: Compared) -> Iterator[Job]:
    yield "fidelity", partial(_fidelity, notes, task)


def _fidelity(notes: Notes, task: Compared) -> None:
    theirs, ours = task.features["teacher"], task.features["student"]
    subject = task.subjects["teacher"]
    nothing = sameness(theirs[OUTPUT], False)  # then no comparison of outputs says anything
    same = sameness(theirs[OUTPUT], subject.classifier)

    def row(metric: str, variant: str = "") -> Measurement:
        return Measurement("fidelity", metric, "both", variant=variant)

    for name, target in theirs.items():
        if name == DENSE or name not in ours:
            continue
        pair = ours[name], target
        if name == OUTPUT and nothing:
            for metric in ("raw_cosine", "centred_cosine", "linear_cka"):
                notes.absent(row(metric, name), nothing)
            continue
        for metric, values in cosines(*pair).items():
            notes.measure(row(metric, name), partial(_several, values))
        notes.measure(row("linear_cka", name), partial(_cka, pair, task.seed))
    outputs = ours[OUTPUT], theirs[OUTPUT]
    if nothing:
        notes.absent(row("neighbour_agreement"), nothing)
    else:
        notes.measure(row("neighbour_agreement"), lambda: _several(neighbour_agreement(*outputs)))
    for metric in ("top1_agreement", "top5_agreement", "kl"):
        if not subject.classifier:
            notes.absent(row(metric), "the model has no classes")
        elif metric == "kl" and subject.output == LABELS:
            notes.absent(row(metric), "its labels do not exclude each other, so they are no distribution")
        elif same and metric != "kl":
            notes.absent(row(metric), same)
        else:
            notes.measure(row(metric), lambda metric=metric: agreement(*outputs)[metric])
    reason = "" if subject.classifier else "the model has no classes"
    if subject.classifier and subject.output == LABELS:
        reason = "its labels do not exclude each other, so none has a share of all"
    measured = {
        row("top1_agreement", SURE): lambda: confident_agreement(*outputs),
        row("calibration_error"): partial(_calibration, outputs, False, task.seed),
        row("calibration_error", SURE): partial(_calibration, outputs, True, task.seed),
    }
    for one, value in measured.items():
        if same or reason:
            notes.absent(one, same or reason)
        else:
            notes.measure(one, value)
    if DENSE in theirs and DENSE in ours:
        notes.measure(row("dense_agreement"), lambda: dense_agreement(ours[DENSE], theirs[DENSE]))


def _cka(pair: tuple[Tensor, Tensor], seed: int) -> Estimate:
    ours, theirs = pair
    return _several(jackknife(lambda rows: linear_cka(ours[rows], theirs[rows]), len(ours), seed))


def _several(values: T) -> T:
    """As it is; one picture has no mean to be centred on."""
    if (values.n if isinstance(values, Estimate) else len(values)) < 2:  # type: ignore[arg-type]
        raise NotApplicable("one picture has no others to compare with")
    return values
