"""A mean over pictures with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import NotApplicable

__all__ = ["Estimate", "bootstrap", "jackknife"]

RESAMPLES = 1000
# Numbers of draws held at once.
AT_ONCE = 10_000_000
GROUPS = 20


class Estimate(NamedTuple):
    """A value, its 95 % interval (None where one picture gives none), and how many pictures it is of."""

    value: float
    low: float | None
    high: float | None
    n: int


def bootstrap(
    values: Tensor, seed: int = 0, level: float = 0.95, statistic: Callable[[Tensor], Tensor] | None = None
) -> Estimate:
    """The mean of `values` (N,) with the percentile bootstrap's interval (Efron 1979); the same for the same seed.

    `statistic`, (R, N, ...) -> (R,), takes the place of the mean: `values` (N, ...) are then resampled in whole rows.

    Raises NotApplicable where there are none, or some are NaN or infinite: their mean would be a number about fewer
    pictures than it says.
    """
    values = values.detach().double().cpu()
    values = values.flatten() if statistic is None else values
    take = statistic or (lambda drawn: drawn.mean(1))
    if not len(values):
        raise NotApplicable("no picture is left to measure this on")
    if wrong := int((~values.isfinite()).sum()):
        raise NotApplicable(f"{wrong} of {values.numel()} values are not finite")
    value = float(take(values[None]))
    if len(values) == 1:
        return Estimate(value, None, None, 1)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, AT_ONCE // values.numel())
    found = torch.cat(
        [
            take(values[torch.randint(len(values), (min(rows, RESAMPLES - start), len(values)), generator=generator)])
            for start in range(0, RESAMPLES, rows)
        ]
    )
    low, high = torch.quantile(found, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=found.dtype)).tolist()
    return Estimate(value, low, high, len(values))


def jackknife(statistic: Callable[[Tensor], Tensor], n: int, seed: int = 0) -> Estimate:
    """statistic(rows) of all N pictures, with the normal interval of the grouped jackknife (Quenouille, Tukey).

    For statistics that are no mean: resampling with replacement would compare pictures with themselves. Raises
    NotApplicable where the value is not finite.
    """
    everything = torch.arange(n)
    value = float(statistic(everything))
    if not math.isfinite(value):
        raise NotApplicable(f"its value on {n} pictures is not finite")
    groups = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split(min(GROUPS, n))
    if n < 4:
        return Estimate(value, None, None, n)
    left = torch.tensor([float(statistic(everything[~torch.isin(everything, group)])) for group in groups])
    spread = 1.96 * float((left - left.mean()).square().sum().mul((len(groups) - 1) / len(groups)).sqrt())
    return Estimate(value, value - spread, value + spread, n)
