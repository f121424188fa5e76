"""One patch of 4 x 4 at a time is taken away: do the patches that cost most have the largest contributions?

The single-deletion score (Hesse et al. 2024, IDSDS, "Benchmarking the Attribution Quality of Vision Models"): the rank
correlation, over the patches of a picture, of the sum of the map in a patch with the drop of the score without it. The
paper's own is measured on models that were trained with patches taken away ("in-domain"); this one takes models as they
are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decisions import Decisions
from ..fills import FILLS
from ..registry import metric
from ..subject import Subject, outputs_of

if TYPE_CHECKING:
    from ..task import Explained

__all__ = ["SIDE", "deletion_drops", "patch_numbers", "rank_correlations", "single_deletion"]

SIDE = 4  # patches a side


def patch_numbers(height: int, width: int, side: int = SIDE) -> Tensor:
    """(H, W) the number of each pixel's patch, of `side` x `side` as equal ones as pixels allow."""
    rows, columns = (torch.arange(length) * side // length for length in (height, width))
    return rows[:, None] * side + columns


def deletion_drops(
    subject: Subject, images: Tensor, decisions: Decisions, side: int = SIDE, fill: str = "grey"
) -> Tensor:
    """(N, side²): score of each picture (N, 3, H, W) minus its score without each patch."""
    number = patch_numbers(images.shape[-2], images.shape[-1], side).to(images.device)
    drops = [decisions.scores(outputs_of(subject, images.split(subject.batch_size)))]
    for patch in range(side * side):
        without = (part.where(number != patch, FILLS[fill](subject, part)) for part in images.split(subject.batch_size))
        drops.append(decisions.scores(outputs_of(subject, without)))
    return drops[0][:, None] - torch.stack(drops[1:], 1)


def rank_correlations(one: Tensor, other: Tensor) -> Tensor:
    """(N,) Spearman's correlation in [-1, 1] of values (N, R) and (N, R), equal ones sharing their rank; 0 of a row
    whose values are all equal."""
    ours, theirs = (_shared_ranks(values) for values in (one, other))
    return F.cosine_similarity(ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True))


def _shared_ranks(values: Tensor) -> Tensor:
    """(N, R) the mean place of each value (N, R) among those equal to it."""
    below = (values[:, None] < values[:, :, None]).sum(-1)
    return below.double() + ((values[:, None] == values[:, :, None]).sum(-1) - 1) / 2


def single_deletion(maps: Tensor, drops: Tensor, side: int = SIDE) -> Tensor:
    """(N,) in [-1, 1]: of maps (N, H, W), summed over each patch, with drops (N, side²)."""
    number = patch_numbers(maps.shape[-2], maps.shape[-1], side).flatten()
    sums = maps.new_zeros(len(maps), side * side).index_add_(1, number, maps.flatten(1))
    return rank_correlations(sums, drops.to(sums)).float()


@metric("single_deletion", "faithfulness", needs="maps", place=33)
def _measured(task: Explained, model: str, method: str) -> Tensor:
    """Of the first pictures: each takes 17 passes, which all methods of a model share."""
    images = task.pictures.images[: task.settings.subset_pictures]
    decisions = task.decisions.rows(torch.arange(len(images)))
    drops = task.once(("single deletion", model), lambda: deletion_drops(task.subjects[model], images, decisions))
    return single_deletion(task.maps[model, method][: len(images)], drops)
