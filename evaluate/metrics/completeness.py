"""Does a map add up to the score that it explains? (Sundararajan et al. 2017, arXiv 1703.01365; as an error, LibraGrad,
arXiv 2411.16760.)

Where constants have a share in the score, a map of the input alone cannot add up to it, however exact it is: our ledger
says which they are. A method that compares with a baseline explains the difference to that, and falls short by as much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...core.errors import NotApplicable
from ..baselines import find_method
from ..registry import metric

if TYPE_CHECKING:
    from ..task import Explained

__all__ = ["completeness_error"]


def completeness_error(maps: Tensor, scores: Tensor) -> Tensor:
    """(B,) at least 0: |sum of maps (B, H, W) - scores (B,)| over max(1, |scores|)."""
    return (maps.sum((1, 2)) - scores).abs() / scores.abs().clamp_min(1)


@metric("completeness_error", "faithfulness", better=-1, needs="maps", place=21)
def _measured(task: Explained, model: str, method: str) -> Tensor:
    if not find_method(method).in_score_units:
        raise NotApplicable("its maps are not in units of the score")
    return completeness_error(task.maps[model, method], task.decisions.scores(task.outputs[model]).cpu())
