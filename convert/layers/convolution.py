"""What all dynamic-linear convolutions share: the source's padding, and the norm of every patch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .scheduled import BiasScheduled

__all__ = ["DynamicConv2d", "SamePadding", "sum_of_squares"]


def sum_of_squares(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """In float32 at least: 300 squared is already infinite in float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim, keepdim=keepdim)


class DynamicConv2d(BiasScheduled):
    """Mixin over `nn.Conv2d`: (B, C, H, W) -> (B, K, H', W'), any stride, padding, padding mode, dilation, groups."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: tuple[int, int, int, int]

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:  # noqa: ARG002 - sizes matter to subclasses
        """(left, right, top, bottom) that the source pads a picture of this size with."""
        return self._reversed_padding_repeated_twice  # torch's own, in this order, with `same` and `valid` resolved

    def forward(self, x: Tensor) -> Tensor:
        return self._respond(*self.padded(x))

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x (B, C, H, W), padded where a convolution cannot do it itself, and what (rows, columns) it still pads."""
        left, right, top, bottom = self.pads(*x.shape[-2:])
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return x, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)

    def _respond(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The layer's formula, on x with zeros (rows, columns) still to be padded."""
        raise NotImplementedError

    def patch_norm_sq(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """(B, G, 1, H', W') float32: sum of squares under every patch, per group of channels."""
        per_pixel = sum_of_squares(x.unflatten(1, (self.groups, -1)), 2)
        area = math.prod(self.kernel_size)
        if area == 1:
            pooled = F.pad(per_pixel, _four(padding))[..., :: self.stride[0], :: self.stride[1]]
        elif self.dilation == (1, 1) and all(2 * p <= k for p, k in zip(padding, self.kernel_size, strict=True)):
            pooled = F.avg_pool2d(per_pixel, self.kernel_size, self.stride, padding) * area
        else:
            # A pool cannot do it, and a convolution would take the sums in float16 or TF32 where those are switched on.
            pooled = F.pad(per_pixel, _four(padding))
            for dim, kernel, dilation in zip((-2, -1), self.kernel_size, self.dilation, strict=True):
                size = pooled.shape[dim] - dilation * (kernel - 1)
                pooled = torch.stack([pooled.narrow(dim, k * dilation, size) for k in range(kernel)]).sum(0)
            pooled = pooled[..., :: self.stride[0], :: self.stride[1]]
        return pooled.unsqueeze(2)


def _four(padding: tuple[int, int]) -> tuple[int, int, int, int]:
    """(rows, columns) as `F.pad` wants it."""
    return padding[1], padding[1], padding[0], padding[0]


class SamePadding(DynamicConv2d):
    """Mixin over timm's `Conv2dSame`: TensorFlow's padding, which depends on the picture's size."""

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:
        (top, bottom), (left, right) = (
            self._same(size, kernel, stride, dilation)
            for size, kernel, stride, dilation in zip(
                (height, width), self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        return left, right, top, bottom

    @staticmethod
    def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
        total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        return total // 2, total - total // 2
