"""What other methods should beat: maps that know nothing of the decision, or are only calmer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...explain import Views, explain_views
from ..decisions import Decisions, side_by_side
from ..subject import Subject
from .registry import method

BLIND = {"in_score_units": False, "control": True, "of_decision": False}


@method("centre", 1, "control: a Gaussian at the centre, whatever the picture", **BLIND)
def _centre(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """Its standard deviation is a quarter of the side."""
    height, width = (torch.linspace(-2, 2, length).to(images) for length in images.shape[-2:])
    return torch.exp(-(height[:, None] ** 2 + width**2) / 2).expand(len(images), -1, -1)


@method("edges", 1, "control: Sobel's gradient of the grey picture", **BLIND)
def _edges(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    return F.conv2d(grey, torch.stack([across, across.T])[:, None]).norm(dim=1)


@method("averaged", 18, "control: the mean of the exact maps of nine noisy views (`Views`)", control=True, several=True)
def _averaged_views(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    views = Views(9, "noise", seed=seed)
    target = side_by_side(decisions, len(images))
    return explain_views(subject.model, images, target, views, check=False, parts=False).contributions.flatten(0, 1)
