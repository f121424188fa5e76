"""Private and undocumented names of torch that the project reads: what each is for, and since when torch has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

__all__ = [
    "channels_last_moments",
    "convolution_backward",
    "gradients_are_batched",
    "in_forward_mode",
    "transforms_active",
]

Pair = tuple[int, int]


def transforms_active() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp ...) is running.

    `torch._C._are_functorch_transforms_active`, since torch 2.0: torch's own `autograd.Function.apply` asks it. There
    is no public question of this kind.
    """
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether derivatives are being taken in forward mode.

    `forward_ad._current_level`, since torch 1.8, is at least 0 inside `dual_level`; torch offers no reader.
    """
    return forward_ad._current_level >= 0


def gradients_are_batched(x: Tensor) -> bool:
    """Whether `x` stands for many gradients at once (`torch.autograd.grad(..., is_grads_batched=True)`).

    `torch._C._functorch.is_legacy_batchedtensor`, since torch 2.1: these batches are not of `torch.func`, and
    `transforms_active` does not see them.
    """
    return is_legacy_batchedtensor(x)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution at x (B, C, H, W) and at `weight` where `wanted`, from `grad` (B, K, H', W').

    `torch.ops.aten.convolution_backward`, since torch 1.11. The public `torch.nn.grad.conv2d_input` and `conv2d_weight`
    each take one gradient of the two, and answer in one memory format always.
    """
    settings: tuple[Any, ...] = (None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False))
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *settings)
    return of_x, of_weight


def channels_last_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of the channels of x (B, C, ...), in one pass; quick where channels lie side by side.

    `torch.batch_norm_update_stats`, since torch 1.2: a public name without documentation. `torch.var_mean` takes
    several times as long in that layout on a CPU.
    """
    return torch.batch_norm_update_stats(x, None, None, 0.0)
