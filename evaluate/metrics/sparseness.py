"""How few pixels hold a map: the Gini index of its sizes (Chalasani et al. 2020, arXiv 1810.06583)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..registry import metric

if TYPE_CHECKING:
    from ..task import Explained

__all__ = ["gini"]


def gini(maps: Tensor) -> Tensor:
    """(B,) in [0, 1) of |maps| (B, H, W): 0 where all pixels are alike, towards 1 where one holds all; 0 for no map."""
    sizes = maps.abs().flatten(1).double().sort(1).values
    count = sizes.shape[1]
    weights = 2 * torch.arange(1, count + 1, dtype=sizes.dtype, device=sizes.device) - count - 1
    return ((sizes * weights).sum(1) / (count * sizes.sum(1)).clamp_min(torch.finfo(sizes.dtype).tiny)).float()


@metric("sparseness", "faithfulness", better=0, needs="maps", title="sparseness (Gini)", place=60)
def _measured(task: Explained, model: str, method: str) -> Tensor:
    return gini(task.maps[model, method])
