"""How well a map, read as a ranking of pixels, finds the object's mask.

- Average precision over pixels, from the largest contribution to the least (Chefer et al. 2021, arXiv 2012.09838;
  LibraGrad, arXiv 2411.16760). A map that ranks at random has the mask's share of the area.
- mIoU: pixels above the map's mean are the object, the others the background; the mean of both intersections over
  unions (Chefer et al. 2021).
- Rank accuracy: of as many of the largest contributions as the mask has pixels, the share inside (Arras et al. 2022,
  arXiv 2003.07258, relevance rank accuracy).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..registry import metric

if TYPE_CHECKING:
    from ..task import Explained

__all__ = ["average_precision", "mean_iou", "rank_accuracy"]


def average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """(B,) in [0, 1]: of maps (B, H, W) against masks (B, H, W), cut at one half; equal values count at once."""
    found = []
    for values, inside in zip(maps.flatten(1), masks.flatten(1) > 0.5, strict=True):
        values, order = values.sort(descending=True)
        hits = inside[order].double().cumsum(0)
        _, counts = values.unique_consecutive(return_counts=True)
        last = counts.cumsum(0) - 1
        gained = hits[last].diff(prepend=hits.new_zeros(1))
        found.append((gained * hits[last] / (last + 1)).sum() / hits[-1].clamp_min(1))
    return torch.stack(found).float()


def mean_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """(B,) in [0, 1] of maps (B, H, W), cut at their mean, against masks (B, H, W), cut at one half."""
    found, wanted = (maps > maps.mean((1, 2), keepdim=True)).flatten(1), (masks > 0.5).flatten(1)
    both = [(found & wanted, found | wanted), (~found & ~wanted, ~found | ~wanted)]
    return sum(common.sum(1) / either.sum(1).clamp_min(1) for common, either in both) / 2  # type: ignore[return-value]


def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """(B,) in [0, 1] of maps (B, H, W) in masks (B, H, W), cut at one half."""
    inside = (masks > 0.5).flatten(1)
    place = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    area = inside.sum(1)
    return ((place < area[:, None]) & inside).sum(1) / area.clamp_min(1)


@metric("average_precision", "localisation", needs="maps", place=13)
def _average_precision(task: Explained, model: str, method: str) -> Tensor:
    return average_precision(task.maps[model, method], task.masks)


@metric("mean_iou", "localisation", needs="maps", title="mIoU", place=13)
def _mean_iou(task: Explained, model: str, method: str) -> Tensor:
    return mean_iou(task.maps[model, method], task.masks)


@metric("rank_accuracy", "localisation", needs="maps", place=13)
def _rank_accuracy(task: Explained, model: str, method: str) -> Tensor:
    return rank_accuracy(task.maps[model, method], task.masks)
