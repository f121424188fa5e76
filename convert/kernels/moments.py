"""Mean and variance of channels, and what BatchNorm's shift may count in proportion to."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from ...core.torch_internals import channels_last_moments
from ...linearise.mode import carries_bias, with_mean
from .dispatch import backward_is_followed, gradients_of, is_exactly, lean
from .memory import blocks, blocks_of_all
from .precision import wide

__all__ = ["carrying", "moments", "over_processes", "proportion", "root_mean_square", "with_moments"]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of the channels of x (B, C, ...), in float32 at least."""
    variance, mean = torch.var_mean(x.to(wide(x)), _others(x), correction=0)
    return mean, variance


def input_and_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, and its `moments`."""
    return x, *moments(x)


def _others(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [dim for dim in range(x.dim()) if dim != 1]


def variance_of(mean: Tensor, square: Tensor) -> Tensor:
    """From the mean and the mean square."""
    return (square - mean.square()).clamp_min(0)


def over_processes(mean: Tensor, variance: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) over the batches of all processes, from this one's, exchanged about `centre`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mean = mean - centre
        sums = all_reduce(torch.stack([mean, variance + mean.square()]))
        mean, square = sums / torch.distributed.get_world_size()
        return mean + centre, variance_of(mean, square)
    return mean, variance


def root_mean_square(energy: Tensor) -> Tensor:
    """The square root of `energy`; in explanation mode linear in it, as the factor is a constant there."""
    return energy * energy.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()


def proportion(energy: Tensor, window: float, spread: float | Tensor) -> Tensor:
    """rms(x), from the mean square (B, 1, ...) of every place.

    Of the whole map; of `window` places around each, or that share of a side; or by `spread` between the two.
    """
    places = energy.shape[2:]
    whole = (
        root_mean_square(energy.mean(tuple(range(2, energy.dim())), keepdim=True))
        if places
        else root_mean_square(energy)
    )
    sides = [_places(window, side) for side in places]
    if not places or not window or all(k >= 2 * side - 1 for k, side in zip(sides, places, strict=True)):
        return whole
    pool = F.avg_pool2d if len(places) == 2 else F.avg_pool1d
    near = root_mean_square(pool(energy, sides, 1, [k // 2 for k in sides], count_include_pad=False))
    return near if is_exactly(spread, 0) else near * (1 - spread) + whole * spread


def _places(window: float, side: int) -> int:
    """The odd number of places that a window has along a side of the map."""
    places = window if window >= 1 else window * side
    return min(2 * math.floor(places / 2) + 1, 2 * side - 1)


@carries_bias
def carrying(proportion: Tensor, bias: Tensor) -> Tensor:
    """`proportion` (B, 1, ...), by which the shift counts."""
    return proportion


# ----------------------------------------------------------------------------------------------------------- lean forms


class _MomentsBeside(torch.autograd.Function):
    """`input_and_moments`: the gradients of all three meet in one pass over x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _moments(x)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_mean: Tensor, of_variance: Tensor) -> Tensor | None:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        if backward_is_followed(grad, of_mean, of_variance):
            return gradients_of(input_and_moments, (x,), (True,), (grad, of_mean, of_variance))[0]
        count = x.numel() / x.shape[1]
        slope = of_variance * (2 / count)
        shift = of_mean / count - mean * slope
        shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        slope, shift = (each.to(x.dtype).view(shape) for each in (slope, shift))
        # In place: nobody else has this gradient, as only the layer's own norm reads x behind this function.
        for part, x_part in blocks_of_all(grad, x):
            part.addcmul_(x_part, slope).add_(shift)
        return grad


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":
        return moments(x)
    if x.dtype == wide(x) and x.stride(1) == 1:
        return channels_last_moments(x)
    parts, others = blocks(x), _others(x)
    # About a value in their midst: a mean square less the square of a large mean would have few digits left.
    centre = parts[0].to(wide(x)).mean(others, keepdim=True)
    apart = (part.to(wide(x)) - centre for part in parts)
    sums = zip(*((part.sum(others), part.square_().sum(others)) for part in apart), strict=True)
    mean, square = (torch.stack(each).sum(0) / (x.numel() / x.shape[1]) for each in sums)
    return mean + centre.flatten(), variance_of(mean, square)


with_moments = with_mean(lean(input_and_moments, _MomentsBeside.apply, lambda x: (x, *_moments(x))))
