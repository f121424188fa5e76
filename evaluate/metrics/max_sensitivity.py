"""How much a map changes where the picture hardly does (Yeh et al. 2019, arXiv 1901.09392, max-sensitivity)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.errors import NotApplicable
from ..baselines import Method, find_method, maps_of
from ..decisions import Decisions
from ..registry import metric
from ..subject import Subject

if TYPE_CHECKING:
    from ..task import Explained

__all__ = ["DRAWS", "RADIUS", "max_sensitivity"]

RADIUS = 0.02  # of the range of colours, [0, 1]
DRAWS = 5


def max_sensitivity(
    method: Method, subject: Subject, images: Tensor, maps: Tensor, decisions: Decisions, seed: int = 0
) -> Tensor:
    """(N,) at least 0: the largest of `DRAWS` changes ‖map(x + d) - map(x)‖ / ‖map(x)‖ of maps (N, H, W).

    d is uniform in [-RADIUS, RADIUS] for each colour of each pixel of images (N, 3, H, W), drawn by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = maps.new_zeros(len(maps))
    for _ in range(DRAWS):
        noise = (2 * torch.rand(images.shape, generator=generator) - 1) * RADIUS
        changed = subject.normalised((subject.colours(images) + noise.to(images)).clamp(0, 1))
        found = maps_of(method, subject, changed, decisions, seed)
        size = torch.linalg.vector_norm(maps, dim=(1, 2)).clamp_min(1e-12)
        worst = worst.maximum(torch.linalg.vector_norm(found - maps, dim=(1, 2)) / size)
    return worst


@metric("max_sensitivity", "faithfulness", better=-1, needs="maps", place=34)
def _measured(task: Explained, model: str, method: str) -> Tensor:
    way, few = find_method(method), task.settings.cascade_pictures
    if not way.cheap:
        raise NotApplicable(f"{way.passes} passes a picture are too many to explain it {DRAWS} times more")
    images = task.pictures.images[:few]
    wanted = task.decisions.rows(torch.arange(len(images)))
    maps = task.maps[model, method][:few]
    return max_sensitivity(way, task.subjects[model], images, maps, wanted, task.settings.seed)
