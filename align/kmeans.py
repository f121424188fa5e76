"""k-means in a few lines of torch: seeded, deterministic, and one rule for empty clusters and for duplicates."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kmeans"]


def kmeans(points: Tensor, count: int, generator: torch.Generator, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on points (N, d), N > 0, from k-means++ (Arthur and Vassilvitskii 2007).

    Returns:
        centres (K, d), each the mean of its points, and assigned (N,), the index of each point's nearest centre (ties
        go to the lowest). K is smaller than `count` where there are not that many different points.
    """
    centres = _spread(points, count, generator)
    assigned = _nearest(points, centres)
    for _ in range(iterations):
        sizes = assigned.bincount(minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        # A centre that lost all its points stays; it may win some back.
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
        again = _nearest(points, centres)
        if torch.equal(again, assigned):
            break
        assigned = again
    kept, assigned = assigned.unique(return_inverse=True)
    return centres[kept], assigned


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points that lie far from each other: each drawn in proportion to its squared distance to those before."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distances = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count and bool((distances > 1e-9 * points.square().sum(1).amax()).any()):
        chosen.append(int(torch.multinomial(distances.cpu(), 1, generator=generator)))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    # The squared distance without |x|^2, which is the same for all centres and would round away what differs.
    return (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
