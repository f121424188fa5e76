"""B-cos layers: y = |cos(x, w)|^(B-1) * w.x + beta * bias (B-cos, arXiv 2205.10268 eq. 3, with the true cosine).

The cosine lies in [0, 1], so B means the same in every layer, whatever the norm of the pretrained w. One matrix
product a layer: |cos| comes from o = w.x, the patch norm of x and the norm of w. At B = 1 the scale is 1 and the
layer is its source. Zero patches and zero filters (real weights have them) give 0, never NaN. Norms are taken in
float32, so half precision neither overflows nor vanishes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.bcos import bcos_scale, bcos_scale_of_maps, filters_with_norms
from ..kernels.depthwise import depthwise_bcos
from ..kernels.dispatch import is_exactly
from ..kernels.squares import with_squares
from ..kernels.windows import Pair
from .convolution import DynamicConv2d, SamePadding
from .scheduled import biased
from .watch import OutputKept

__all__ = ["BcosConv2d", "BcosConv2dSame", "BcosLinear"]


class _Bcos(OutputKept):
    """Mixin: B beside beta. `bounded=False` leaves the weight's norm in the scale (B-cosification's own variant)."""

    strength_names: ClassVar[tuple[str, ...]] = ("b", *OutputKept.strength_names)
    b: Tensor
    _b: float
    weight: nn.Parameter
    bounded: bool = True

    def _with_norms(self) -> tuple[Tensor, Tensor | None]:
        """The weight, and the squared norm (C_out,) of every filter; None, which counts as one, if not `bounded`."""
        if not self.bounded:
            return self.weight, None
        weight, squares = with_squares(self.weight, tuple(range(1, self.weight.dim())))
        return weight, squares.flatten()

    def _filters(self, b: float | Tensor) -> Tensor:
        """The weight, its filters' norms in it; as it is, if not `bounded`."""
        weight, norm_sq = self._with_norms()
        return weight if norm_sq is None else filters_with_norms(weight, norm_sq, b)

    def rescale(self, gain: Tensor) -> None:
        # A cosine does not see the gain; without a bound the response grows with the weight to the power of B.
        super().rescale(gain if self.bounded else gain.sign() * gain.abs() ** (1 / self._b))

    @torch.no_grad()
    def take_norms(self) -> None:
        """Puts every filter's norm into the filter, at the present B: the same function, unbounded, with no norm to
        take."""
        if self.bounded:
            self.weight.copy_(self._filters(self._b))
            self.bounded = False


class BcosLinear(_Bcos):
    """B-cos over `nn.Linear`: (..., C_in) -> (..., C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        b = self._strength("b")
        if is_exactly(b, 1):
            if not self.sized:
                return F.linear(x, self.weight, self.bias)
            y = F.linear(x, self.weight)
        else:
            (x, patch_norm_sq), (weight, norm_sq) = with_squares(x, -1), self._with_norms()
            y = self._given(bcos_scale(F.linear(x, weight), patch_norm_sq, norm_sq, b))
        return biased(self._at_reference(y, -1), self.bias)


class BcosConv2d(_Bcos, DynamicConv2d):
    """B-cos over `nn.Conv2d`: (B, C_in, H, W) -> (B, C_out, H', W').

    The patch norm comes from one map of the channels' sum of squares per group, not from a second convolution.
    """

    def respond(self, x: Tensor, padding: Pair) -> Tensor:
        b = self._strength("b")
        if is_exactly(b, 1):
            if not self.sized:
                return self.product(x, padding, self.weight, self.bias)
            y = self.product(x, padding, self.weight)
        elif 1 < self.groups == self.in_channels == self.out_channels:
            y = self._given(depthwise_bcos(x, self._filters(b), b, self.window(padding)))
        else:
            (x, patch_norm_sq), (weight, norm_sq) = self.with_patch_norms(x, padding), self._with_norms()
            y = self._given(bcos_scale_of_maps(self.product(x, padding, weight), patch_norm_sq, norm_sq, b))
        return biased(self._at_reference(y, 1), self.bias, 1)


class BcosConv2dSame(SamePadding, BcosConv2d):
    """B-cos over timm's `Conv2dSame`."""
