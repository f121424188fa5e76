"""Losses between a student's and a teacher's features; all are means over places, so sizes and batches compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "class_divergence",
    "cosine_distance",
    "decision_error",
    "magnitude_error",
    "pairwise_error",
    "squared_size",
    "unexplained",
    "update_error",
]


def class_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the classes' probabilities from logits (B, K), in nats."""
    ours, theirs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (student, teacher))
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos over rows (R, C); in [0, 2]."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def decision_error(student: Tensor, teacher: Tensor, anchor: float) -> Tensor:
    """Cross entropy of logits (B, C) to the teacher's own arg-max, plus `anchor` times KL(teacher || student) (ours).

    Pictures weigh by the teacher's confidence, its largest probability. Not 0 where both are equal: it asks for what
    the teacher decides, with more confidence than the teacher has.
    """
    student, teacher = student.float(), teacher.float()
    confidence = teacher.softmax(1).amax(1)
    error = F.cross_entropy(student, teacher.argmax(1), reduction="none")
    return (confidence * error).sum() / confidence.sum() + anchor * class_divergence(student, teacher)


def magnitude_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows (R, C) of the squared logarithm of the ratio of both norms; 0 where all sizes agree (ours)."""
    tiny = torch.finfo(torch.float32).eps
    ours, theirs = (features.float().square().sum(-1).clamp_min(tiny).log() for features in (student, teacher))
    return ((ours - theirs) / 2).square().mean()


def pairwise_error(student: Tensor, teacher: Tensor, scale: float = 10.0) -> Tensor:
    """Sigmoid loss (SigLIP, arXiv 2303.15343, with fixed scale and bias) of outputs (B, D), each row's own the match.

    B-cosification (arXiv 2411.00715) aligns CLIP's image tower so, with a scale of 10 and a bias of -10.
    """
    logits = scale * F.normalize(student.float()) @ F.normalize(teacher.float()).T - scale
    labels = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(labels * logits).sum(1).mean()


def unexplained(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error of rows (R, C) over the teacher's `variance` (), summed over the channels.

    0 where both are equal, 1 for as good as the teacher's mean. It is the squared error, as a mean over channels, of
    both after PHI-S (arXiv 2410.01680): x -> R (x - mean) / sqrt(variance / C), where the rotation R gives every
    channel the same variance, 1. A squared error does not see R or the mean, so neither is computed.
    """
    error = squared_size(student.float() - teacher.float()).mean()
    return error / variance.clamp_min(torch.finfo(torch.float32).tiny)


def update_error(student: Tensor, teacher: Tensor, mean_size: Tensor | None = None, floor: float = 0.1) -> Tensor:
    """Mean over rows (R, C) of squared error over the teacher's squared size plus `floor` of its mean (ours).

    The floor keeps places where the teacher hardly moves from ruling the mean. 1 means as good as no update at all.

    Args:
        mean_size: the mean of `squared_size` that the floor is a share of; by default that of these rows. One that is
            fixed makes the loss of a batch the mean of its parts' losses, however it is split.
    """
    error = (student.float() - teacher.float()).square().sum(-1)
    size = squared_size(teacher)
    mean_size = size.mean() if mean_size is None else mean_size
    return (error / (size + floor * mean_size + torch.finfo(torch.float32).tiny)).mean()


def squared_size(features: Tensor) -> Tensor:
    """(R,): squared norms of rows (R, C), in float32."""
    return features.float().square().sum(-1)
