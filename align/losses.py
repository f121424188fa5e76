"""Losses between a student's and a teacher's features; all are means over places, so sizes and batches compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine_distance", "update_error"]


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos over rows (R, C); in [0, 2]."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def update_error(student: Tensor, teacher: Tensor, floor: float = 0.1) -> Tensor:
    """Mean over rows (R, C) of squared error over the teacher's squared size plus `floor` of its mean (ours).

    The floor keeps places where the teacher hardly moves from ruling the mean. 1 means as good as no update at all.
    """
    error = (student.float() - teacher.float()).square().sum(-1)
    size = teacher.float().square().sum(-1)
    return (error / (size + floor * size.mean() + torch.finfo(torch.float32).tiny)).mean()
