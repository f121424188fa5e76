"""The transpose of a convolution as a function that is cheap to differentiate once more.

torch's own second derivative of a grouped convolution on a CPU goes group by group, which for a depthwise one of
hundreds of channels is nearly all of the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.torch_internals import convolution_backward

__all__ = ["transposed"]

Pair = tuple[int, int]
Window = tuple[Pair, Pair, Pair]  # stride, padding, dilation


def transposed(
    size: torch.Size, grad: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """The gradient at a convolution's input of `size` (B, C, H, W), from `grad` (B, K, H', W') at its output.

    Linear in `grad` and in `weight` (K, C/G, k, l), and differentiable in both.
    """
    return _Transposed.apply(grad, weight, size, (stride, padding, dilation), groups)


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, size: torch.Size, window: Window, groups: int):
        ctx.save_for_backward(grad, weight)
        ctx.window, ctx.groups = window, groups
        # Of the input only size and layout are read.
        layout = torch.channels_last if grad.stride(1) == 1 else torch.contiguous_format
        x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
        return convolution_backward(grad, x, weight, *window, groups, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.window
        of_grad = of_weight = None
        if ctx.needs_input_grad[0]:
            of_grad = F.conv2d(tangent, weight, None, stride, padding, dilation, ctx.groups)
        if ctx.needs_input_grad[1]:
            of_weight = convolution_backward(
                grad, tangent, weight, stride, padding, dilation, ctx.groups, (False, True)
            )[1]
        return of_grad, of_weight, None, None, None
