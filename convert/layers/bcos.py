"""B-cos layers: y = |cos(x, w)|^(B-1) * w.x + beta * bias (B-cos, arXiv 2205.10268 eq. 3, with the true cosine).

The cosine lies in [0, 1], so B means the same in every layer, whatever the norm of the pretrained w. One matrix
product a layer: |cos| comes from o = w.x, the patch norm of x and the norm of w. At B = 1 the scale is 1 and the
layer is its source. Zero patches and zero filters (real weights have them) give 0, never NaN. Norms are taken in
float32, so half precision neither overflows nor vanishes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...explain.linearise import gated
from .convolution import DynamicConv2d, SamePadding, sum_of_squares
from .scheduled import Rescalable, is_exactly

__all__ = ["BcosConv2d", "BcosConv2dSame", "BcosLinear", "bcos_scale"]

# Squared norms below this count as zero: the one epsilon of all B-cos layers.
TINY = 1e-24


class _BcosScale(torch.autograd.Function):
    """|o| / sqrt(q * w2) to the power B-1, times o; keeps only o and the two small norms for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(o: Tensor, patch_norm_sq: Tensor, weight_norm_sq: Tensor, b: float | Tensor) -> Tensor:
        return o * _scale(o, patch_norm_sq, weight_norm_sq, b)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own signature
        o, patch_norm_sq, weight_norm_sq, b = inputs
        ctx.save_for_backward(o, patch_norm_sq, weight_norm_sq)
        ctx.b = b

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205 - torch's own signature
        o, q, w2 = ctx.saved_tensors
        scaled_grad = grad * _scale(o, q, w2, ctx.b)
        # y depends on q and w2 through their power (1-B)/2, so dy/dq = (1-B)/2 * y/q; zero where clamped.
        product = scaled_grad * o * ((1 - ctx.b) / 2)
        grad_q = _over(product.sum_to_size(q.shape), q) if ctx.needs_input_grad[1] else None
        grad_w2 = _over(product.sum_to_size(w2.shape), w2) if ctx.needs_input_grad[2] else None
        return ctx.b * scaled_grad, grad_q, grad_w2, None


def _scale(o: Tensor, q: Tensor, w2: Tensor, b: float | Tensor) -> Tensor:
    cosine = o.abs() * q.clamp_min(TINY).rsqrt() * w2.clamp_min(TINY).rsqrt()
    return (cosine if is_exactly(b, 2) else cosine.pow(b - 1)).to(o.dtype)


def _over(total: Tensor, q: Tensor) -> Tensor:
    return torch.where(q > TINY, total / q.clamp_min(TINY), 0.0).to(q.dtype)


@gated
def bcos_scale(o: Tensor, patch_norm_sq: Tensor, weight_norm_sq: Tensor, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) * o, where |cos| = |o| / sqrt(patch_norm_sq * weight_norm_sq).

    `o` (..., C) or (B, G, C/G, H, W); the squared norms are float32 and broadcast against it; b >= 1. Explanation mode
    sees it as o times a frozen gate.
    """
    return _BcosScale.apply(o, patch_norm_sq, weight_norm_sq, b)


class _Bcos(Rescalable):
    """Mixin: B beside beta. `bounded=False` leaves the weight's norm in the scale (B-cosification's own variant)."""

    b: Tensor
    _b: float
    weight: nn.Parameter
    bounded: bool = True

    def start_schedule(self) -> None:
        super().start_schedule()
        self._register_strength("b", 1.0)

    def strengths(self) -> dict[str, float]:
        return {"b": self._b, **super().strengths()}

    def _weight_norm_sq(self) -> Tensor:
        """(C_out,) float32: squared norm of every filter; ones for the unbounded variant."""
        squares = sum_of_squares(self.weight.flatten(1), 1)
        return squares if self.bounded else torch.ones_like(squares)


class BcosLinear(_Bcos):
    """B-cos over `nn.Linear`: (..., C_in) -> (..., C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        b = self._strength("b")
        if is_exactly(b, 1):
            return F.linear(x, self.weight, self.bias)
        o = F.linear(x, self.weight)
        y = bcos_scale(o, sum_of_squares(x, -1, keepdim=True), self._weight_norm_sq(), b)
        return y if self.bias is None else y + self.bias


class BcosConv2d(_Bcos, DynamicConv2d):
    """B-cos over `nn.Conv2d`: (B, C_in, H, W) -> (B, C_out, H', W').

    The patch norm comes from one pooled map of the channels' sum of squares per group, not from a second convolution.
    """

    def _respond(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        b = self._strength("b")
        if is_exactly(b, 1):
            return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        o = F.conv2d(x, self.weight, None, self.stride, padding, self.dilation, self.groups)
        grouped = o.unflatten(1, (self.groups, -1))
        weight_norm_sq = self._weight_norm_sq().view(self.groups, -1, 1, 1)
        y = bcos_scale(grouped, self.patch_norm_sq(x, padding), weight_norm_sq, b).flatten(1, 2)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class BcosConv2dSame(SamePadding, BcosConv2d):
    """B-cos over timm's `Conv2dSame`."""
