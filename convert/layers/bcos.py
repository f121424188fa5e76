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

from .convolution import DynamicConv2d, SamePadding, with_squares
from .depthwise import depthwise_bcos
from .scale import Norm, bcos_scale, filters_with_norms
from .scheduled import biased, is_exactly
from .watch import OutputKept

__all__ = ["BcosConv2d", "BcosConv2dSame", "BcosLinear"]


class _Bcos(OutputKept):
    """Mixin: B beside beta. `bounded=False` leaves the weight's norm in the scale (B-cosification's own variant)."""

    moves: ClassVar[tuple[str, ...]] = ("b", *OutputKept.moves)
    b: Tensor
    _b: float
    weight: nn.Parameter
    bounded: bool = True

    def _filters(self, b: float | Tensor) -> Tensor:
        """The weight, its filters' norms in it; as it is in the unbounded variant."""
        if not self.bounded:
            return self.weight
        weight, squares = self._with_squares()
        return filters_with_norms(weight, squares, b)

    def _with_norms(self) -> tuple[Tensor, Norm]:
        """The weight, and the squared norm (C_out,) of every filter; None for the unbounded variant."""
        if not self.bounded:
            return self.weight, None
        weight, squares = self._with_squares()
        return weight, squares.flatten()

    def _with_squares(self) -> tuple[Tensor, Tensor]:
        return with_squares(self.weight, tuple(range(1, self.weight.dim())))

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
            return biased(self._at_reference(F.linear(x, self.weight), -1), self.bias)
        (x, patch_norm_sq), (weight, weight_norm_sq) = with_squares(x, -1), self._with_norms()
        y = self._given(bcos_scale(F.linear(x, weight), patch_norm_sq, weight_norm_sq, b))
        return biased(self._at_reference(y, -1), self.bias)


class BcosConv2d(_Bcos, DynamicConv2d):
    """B-cos over `nn.Conv2d`: (B, C_in, H, W) -> (B, C_out, H', W').

    The patch norm comes from one pooled map of the channels' sum of squares per group, not from a second convolution.
    """

    @property
    def _is_depthwise(self) -> bool:
        return 1 < self.groups == self.in_channels == self.out_channels

    def _respond(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        b = self._strength("b")
        if is_exactly(b, 1):
            if not self.sized:
                return self.products(x, padding, self.weight, bias=self.bias)[0]
            y = self.products(x, padding, self.weight)[0]
        else:
            y = self._given((self._depthwise if self._is_depthwise else self._scaled)(x, padding, b))
        return biased(self._at_reference(y, 1), self.bias, 1)

    def _depthwise(self, x: Tensor, padding: tuple[int, int], b: float | Tensor) -> Tensor:
        return depthwise_bcos(x, self._filters(b), b, self.window(padding))

    def _scaled(self, x: Tensor, padding: tuple[int, int], b: float | Tensor) -> Tensor:
        (x, patch_norm_sq), (weight, weight_norm_sq) = self.with_patch_norms(x, padding), self._with_norms()
        (o,) = self.products(x, padding, weight)
        if self.groups in (1, self.out_channels):  # no view, which would make every write to it a copy
            return bcos_scale(o, patch_norm_sq.flatten(1, 2), _shaped(weight_norm_sq, (-1, 1, 1)), b)
        group = (self.groups, -1)
        norms = _shaped(weight_norm_sq, (*group, 1, 1))
        return bcos_scale(o.unflatten(1, group), patch_norm_sq, norms, b).flatten(1, 2)


def _shaped(norm: Norm, shape: tuple[int, ...]) -> Norm:
    return None if norm is None else norm.view(shape)


class BcosConv2dSame(SamePadding, BcosConv2d):
    """B-cos over timm's `Conv2dSame`."""
