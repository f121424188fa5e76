"""How much of the teacher is left in the student, on held-out pictures.

Raw cosine flatters: features share a large mean, and two unrelated pictures can have cosine 0.7. So the centred cosine
(each side minus its own mean over the pictures), nearest-neighbour agreement and, for classifiers, top-1 agreement
stand beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fidelity"]


def fidelity(student: Tensor, teacher: Tensor, classifier: bool = False) -> dict[str, float]:
    """Agreement of outputs (N, D) on the same N > 1 pictures; every value is at most 1, chance is near 0.

    Returns:
        raw_cosine, centred_cosine: means over pictures.
        cka: linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414), of both as sets of pictures.
        neighbour_agreement: share of pictures whose nearest other picture (centred cosine) is the teacher's.
        top1_agreement: share of pictures with the teacher's largest logit; only for a classifier.
    """
    student, teacher = student.float(), teacher.float()
    centred, target = student - student.mean(0), teacher - teacher.mean(0)
    result = {
        "raw_cosine": F.cosine_similarity(student, teacher).mean(),
        "centred_cosine": F.cosine_similarity(centred, target).mean(),
        "cka": _cka(centred, target),
        "neighbour_agreement": (_nearest(centred) == _nearest(target)).float().mean(),
    }
    if classifier:
        result["top1_agreement"] = (student.argmax(1) == teacher.argmax(1)).float().mean()
    return {name: round(float(value), 4) for name, value in result.items()}


def _cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Of centred features (N, D) and (N, E); in [0, 1]. Gram matrices of pictures, as N is small beside D."""
    ours, theirs = student @ student.T, teacher @ teacher.T
    return (ours * theirs).sum() / (ours.norm() * theirs.norm()).clamp_min(torch.finfo(torch.float32).tiny)


def _nearest(features: Tensor) -> Tensor:
    """(N,) index of the nearest other row by cosine."""
    unit = F.normalize(features)
    similarity = unit @ unit.T
    return similarity.fill_diagonal_(-torch.inf).argmax(1)
