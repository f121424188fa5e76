"""What all dynamic-linear convolutions have in common: the source's padding, geometry and products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..kernels.windows import Pads, Pair, Window, same_padding, with_patch_norms, zero_padded
from .scheduled import BiasScheduled

__all__ = ["DynamicConv2d", "SamePadding"]


class DynamicConv2d(BiasScheduled):
    """Mixin over `nn.Conv2d`: (B, C, H, W) -> (B, K, H', W'), any stride, padding, padding mode, dilation, groups."""

    kernel_size: Pair
    stride: Pair
    dilation: Pair
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: Pads

    def forward(self, x: Tensor) -> Tensor:
        pads = self.pads(*x.shape[-2:])
        if self.padding_mode == "zeros":
            return self.respond(*zero_padded(x, pads))
        return self.respond(F.pad(x, pads, mode=self.padding_mode), (0, 0))

    def respond(self, x: Tensor, padding: Pair) -> Tensor:
        """The layer's formula, on x with zeros (rows, columns) still to be padded."""
        raise NotImplementedError

    def pads(self, height: int, width: int) -> Pads:
        """What the source pads a picture of this size with."""
        return self._reversed_padding_repeated_twice  # torch's own, in this order, with `same` and `valid` resolved

    def window(self, padding: Pair) -> Window:
        """Where the kernel is put, with zeros (rows, columns) still to be padded."""
        return Window(self.stride, padding, self.dilation)

    def product(self, x: Tensor, padding: Pair, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """w.x of every patch of x and every filter of `kernel` (K, C/G, k, l): (B, K, H', W')."""
        return F.conv2d(x, kernel, bias, *self.window(padding), self.groups)

    def products(self, x: Tensor, padding: Pair, *kernels: Tensor) -> list[Tensor]:
        """`product` of each of `kernels`."""
        return [self.product(x, padding, kernel) for kernel in kernels]

    def with_patch_norms(self, x: Tensor, padding: Pair) -> tuple[Tensor, Tensor]:
        """x, to be read on, and the squared norm (B, G, H', W') of every patch, in float32 at least."""
        return with_patch_norms(x, self.groups, self.kernel_size, self.window(padding))


class SamePadding(DynamicConv2d):
    """Mixin over timm's `Conv2dSame`: TensorFlow's padding, which depends on the picture's size."""

    def pads(self, height: int, width: int) -> Pads:
        return same_padding((height, width), self.kernel_size, self.stride, self.dilation)
