"""Sums under a convolution's kernel, by which the norm of every patch comes from one map of squares."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.torch_internals import convolution_backward
from ...linearise.mode import with_statistics
from ...linearise.transposed import transposed
from .dispatch import followed
from .memory import layout_of
from .precision import without_autocast
from .squares import with_squares_of

__all__ = [
    "Pads",
    "Pair",
    "Window",
    "input_gradient",
    "pools",
    "same_padding",
    "sums",
    "sums_over",
    "sums_under",
    "with_patch_norms",
    "zero_padded",
]

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]  # left, right, top, bottom, as `F.pad` takes them


class Window(NamedTuple):
    """Where a convolution's kernel is put: (rows, columns) each."""

    stride: Pair
    padding: Pair
    dilation: Pair


def sums(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """(B, G, H, W) -> (B, G, H', W'): the sum under a kernel of this size, sum_ij x[s r + d i, t c + e j].

    Rows first and then columns: k + l additions and not k * l.
    """
    top, left = window.padding
    x = F.pad(x, (left, left, top, top))
    for k, step, apart in zip(kernel, window.stride, window.dilation, strict=True):
        x = x.mT
        size = x.shape[-1] - apart * (k - 1)
        x = functools.reduce(torch.add, (x[..., i : i + size : step] for i in range(0, apart * k, apart)))
    return x


def sums_under(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """`sums`, by the operation that is quickest on x's device; all are plain torch."""
    if x.shape[1] == 1 or kernel == (1, 1):
        return sums(x, kernel, window)
    if x.device.type == "cpu":
        # Exact: other devices' convolutions take such sums in TF32.
        with without_autocast(x):
            return F.conv2d(x, x.new_ones(x.shape[1], 1, *kernel), None, *window, x.shape[1])
    pooled = window.dilation == (1, 1) and all(2 * p <= k for p, k in zip(window.padding, kernel, strict=True))
    return pools(x, kernel, window) if pooled else sums(x, kernel, window)


def pools(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """`sums` without dilation, by pools, which are fast where many channels lie side by side."""
    exporting = torch.compiler.is_exporting()  # ONNX's pools know no divisor of their own
    divisor = None if exporting else 1
    (k, l), (s, t), (p, q) = kernel, window.stride, window.padding
    x = F.avg_pool2d(x, (1, l), (1, t), (0, q), divisor_override=divisor)
    x = F.avg_pool2d(x, (k, 1), (s, 1), (p, 0), divisor_override=divisor)
    return x * (k * l) if exporting else x


def sums_over(grad: Tensor, kernel: Pair, window: Window, size: torch.Size) -> Tensor:
    """The transpose of `sums_under`: (B, G, H', W') -> (B, G, H, W) of `size`, the sum over the kernels above."""
    reach = [d * (k - 1) - p for k, p, d in zip(kernel, window.padding, window.dilation, strict=True)]
    if window.stride == (1, 1) and min(reach) >= 0:
        return sums_under(grad, kernel, Window((1, 1), (reach[0], reach[1]), window.dilation))
    return input_gradient(size, grad, grad.new_ones(size[1], 1, *kernel), window, size[1])


def input_gradient(size: torch.Size, grad: Tensor, weight: Tensor, window: Window, groups: int = 1) -> Tensor:
    """Of a convolution, at its input of `size` (B, C, H, W), from `grad` (B, K, H', W') at its output."""
    if torch.is_grad_enabled() and (grad.requires_grad or weight.requires_grad) and not followed():
        return transposed(size, grad, weight, *window, groups)
    # Of the input only size and layout are read.
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout_of(grad))
    return convolution_backward(grad, x, weight, *window, groups, (True, False))[0]


@with_statistics
def with_patch_norms(x: Tensor, groups: int, kernel: Pair, window: Window) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W), to be read on, and |patch|^2 (B, G, H', W') of every patch, in float32 at least.

    One map of squares a group serves all its filters. In explanation mode the norms are constants.
    """
    grouped, squares = with_squares_of(x.unflatten(1, (groups, -1)), 2)
    return grouped.flatten(1, 2), sums_under(squares.squeeze(2), kernel, window)


# -------------------------------------------------------------------------------------------------------------- padding


def zero_padded(x: Tensor, pads: Pads) -> tuple[Tensor, Pair]:
    """x (B, C, H, W) with `pads`, and the zeros (rows, columns) that a convolution can still pad by itself."""
    left, right, top, bottom = pads
    return (x, (top, left)) if left == right and top == bottom else (F.pad(x, pads), (0, 0))


def same_padding(size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Pads:
    """TensorFlow's padding of a picture of `size`: as much as gives ceil(size / stride) places, the odd one behind."""
    total = [
        max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
    return left, right, top, bottom
