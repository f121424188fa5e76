"""B-cos layers: y = |cos(x, w)|^(B-1) * w.x + beta * bias (B-cos, arXiv 2205.10268 eq. 3, with the true cosine).

The cosine lies in [0, 1], so B means the same in every layer, whatever the norm of the pretrained w. One matrix
product a layer: |cos| comes from o = w.x, the patch norm of x and the norm of w. At B = 1 the scale is 1 and the
layer is its source. Zero patches and zero filters (real weights have them) give 0, never NaN. Norms are taken in
float32, so half precision neither overflows nor vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...explain.linearise import gated_by
from .convolution import DynamicConv2d, SamePadding, applied, in_blocks, sum_of_squares, unobserved, with_squares
from .scheduled import OutputKept, is_exactly

__all__ = ["BcosConv2d", "BcosConv2dSame", "BcosLinear", "bcos_scale"]

# Squared norms below this count as zero: the one epsilon of all B-cos layers.
TINY = 1e-24


class _BcosScale(torch.autograd.Function):
    """|cos|^(B-1) * o, where |cos| = |o| / sqrt(q * w2).

    Keeps its output, which whatever reads it keeps too, and the two small norms: |cos| = (|y| / sqrt(q * w2))^(1/B).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(o: Tensor, q: Tensor, w2: Tensor, b: float | Tensor) -> Tensor:
        if not unobserved(o, q, w2):
            return _scale(_above_zero(_power(o, _inverse(q), _inverse(w2))), b).mul_(o).to(o.dtype)
        y, inverse_w = torch.empty_like(o), _inverse(w2)
        for out, part, of_part in _blocks(y, o, q):
            torch.mul(_scale(_power(part, _inverse(of_part), inverse_w), b), part, out=out)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own signature
        _, q, w2, ctx.b = inputs
        ctx.save_for_backward(output, q, w2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205 - torch's own signature
        (y, q, w2), b = ctx.saved_tensors, ctx.b
        inverse_w = _inverse(w2)
        if unobserved(grad, y, q, w2):
            grad_o, sums_q, sums_w = torch.empty_like(y), [], []
            for out, part, pull, of_part in _blocks(grad_o, y, grad, q):
                product = _product(part, pull)
                sums_q.append(product.sum_to_size(of_part.shape))
                sums_w.append(product.sum_to_size(w2.shape))
                torch.mul(_root(_power(part, _inverse(of_part), inverse_w), b).mul_(b), pull, out=out)
            sum_q, sum_w = torch.cat(sums_q), torch.stack(sums_w).sum(0)
        else:
            product = _product(y, grad)
            sum_q, sum_w = product.sum_to_size(q.shape), product.sum_to_size(w2.shape)
            grad_o = (_root(_above_zero(_power(y, _inverse(q), inverse_w)), b) * grad).mul_(b).to(y.dtype)
        # y depends on q and w2 through their power (1-B)/2, so dy/dq = (1-B)/2 * y/q; zero where clamped.
        return grad_o, _over(sum_q * ((1 - b) / 2), q), _over(sum_w * ((1 - b) / 2), w2), None


def _blocks(y: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts along the first dimension (B, ...) that fit into a CPU's cache."""
    return zip(in_blocks(y), *(in_blocks(other, like=y) for other in others), strict=True)


def _inverse(norm_sq: Tensor) -> Tensor:
    return norm_sq.clamp_min(TINY).rsqrt_()


def _power(o: Tensor, inverse_q: Tensor, inverse_w: Tensor | None) -> Tensor:
    """|o| / sqrt(q * w2), a new tensor in the precision of the norms: |cos| of o, |cos|^B of y."""
    power = o * inverse_q
    return (power if inverse_w is None else power.mul_(inverse_w)).abs_()


def _above_zero(power: Tensor) -> Tensor:
    """`power`, in place, but not quite zero: there a root has no derivative, and what is derived of it would be NaN."""
    return power.clamp_min_(torch.finfo(torch.float32).tiny)


def _scale(cosine: Tensor, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) from |cos|, in place."""
    return cosine if is_exactly(b, 2) else cosine.pow_(b - 1)


def _root(power: Tensor, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) from |cos|^B, in place; dy/do is B times that."""
    return power.sqrt_() if is_exactly(b, 2) else power.pow_((b - 1) / b)


def _product(y: Tensor, grad: Tensor) -> Tensor:
    """Of which the gradients of both norms are sums; in float32 at least."""
    return grad * y.to(torch.promote_types(y.dtype, torch.float32))


def _over(total: Tensor, q: Tensor) -> Tensor:
    return torch.where(q > TINY, total / q.clamp_min(TINY), 0.0).to(q.dtype)


Norm = Tensor | None


def _apart(o: Tensor, patch_norm_sq: Tensor, weight_norm_sq: Norm, b: float | Tensor) -> tuple[Tensor, Tensor]:
    """What `bcos_scale` multiplies o by, and what it returns, which is written over o."""
    gate, inverse_w = torch.empty_like(o), None if weight_norm_sq is None else _inverse(weight_norm_sq)
    for out, part, of_part in _blocks(gate, o, patch_norm_sq):
        part.mul_(out.copy_(_scale(_power(part, _inverse(of_part), inverse_w), b)))
    return gate, o


@gated_by(_apart)
def bcos_scale(o: Tensor, patch_norm_sq: Tensor, weight_norm_sq: Norm, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) * o, where |cos| = |o| / sqrt(patch_norm_sq * weight_norm_sq).

    `o` (..., C), (B, C, H, W) or (B, G, C/G, H, W); the squared norms are float32 and broadcast against it, None is
    one; b >= 1. Where gradients are off, `o` is overwritten and returned. Explanation mode sees it as o times a frozen
    gate.
    """
    if not unobserved():
        weight_norm_sq = patch_norm_sq.new_ones(()) if weight_norm_sq is None else weight_norm_sq
        return applied(_BcosScale, o, patch_norm_sq, weight_norm_sq, b)
    inverse_w = None if weight_norm_sq is None else _inverse(weight_norm_sq)
    for part, of_part in _blocks(o, patch_norm_sq):
        part.mul_(_scale(_power(part, _inverse(of_part), inverse_w), b))
    return o


class _Bcos(OutputKept):
    """Mixin: B beside beta. `bounded=False` leaves the weight's norm in the scale (B-cosification's own variant)."""

    moves: ClassVar[tuple[str, ...]] = ("b", *OutputKept.moves)
    b: Tensor
    _b: float
    weight: nn.Parameter
    bounded: bool = True

    def _scaled(self, o: Tensor, patch_norm_sq: Tensor, weight_norm_sq: Norm, b: float | Tensor) -> Tensor:
        return self._given(bcos_scale(o, patch_norm_sq, weight_norm_sq, b))

    def _with_norms(self) -> tuple[Tensor, Norm]:
        """The weight, and the squared norm (C_out,) of every filter; None for the unbounded variant."""
        if not self.bounded:
            return self.weight, None
        weight, squares = with_squares(self.weight, tuple(range(1, self.weight.dim())))
        return weight, squares.flatten()

    def rescale(self, gain: Tensor) -> None:
        # A cosine does not see the gain; without a bound the response grows with the weight to the power of B.
        super().rescale(gain if self.bounded else gain.sign() * gain.abs() ** (1 / self._b))

    @torch.no_grad()
    def take_norms(self) -> None:
        """Puts every filter's norm into the filter, at the present B: the same function, unbounded, with no norm to
        take."""
        if self.bounded:
            squares = sum_of_squares(self.weight, tuple(range(1, self.weight.dim()))).clamp_min(TINY)
            self.weight.copy_(self.weight * squares ** ((1 - self._b) / (2 * self._b)))
            self.bounded = False


class BcosLinear(_Bcos):
    """B-cos over `nn.Linear`: (..., C_in) -> (..., C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        b = self._strength("b")
        if is_exactly(b, 1):
            return F.linear(x, self.weight, self.bias)
        (x, patch_norm_sq), (weight, weight_norm_sq) = with_squares(x, -1), self._with_norms()
        y = self._scaled(F.linear(x, weight), patch_norm_sq, weight_norm_sq, b)
        return y if self.bias is None else y + self.bias


class BcosConv2d(_Bcos, DynamicConv2d):
    """B-cos over `nn.Conv2d`: (B, C_in, H, W) -> (B, C_out, H', W').

    The patch norm comes from one pooled map of the channels' sum of squares per group, not from a second convolution.
    """

    def _respond(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        b = self._strength("b")
        if is_exactly(b, 1):
            return self.products(x, padding, self.weight, bias=self.bias)[0]
        (x, patch_norm_sq), (weight, weight_norm_sq) = self.with_patch_norms(x, padding), self._with_norms()
        (o,) = self.products(x, padding, weight)
        if self.groups in (1, self.out_channels):  # no view, which would make every write to it a copy
            y = self._scaled(o, patch_norm_sq.flatten(1, 2), _shaped(weight_norm_sq, (-1, 1, 1)), b)
        else:
            group = (self.groups, -1)
            norms = _shaped(weight_norm_sq, (*group, 1, 1))
            y = self._scaled(o.unflatten(1, group), patch_norm_sq, norms, b).flatten(1, 2)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def _shaped(norm: Norm, shape: tuple[int, ...]) -> Norm:
    return None if norm is None else norm.view(shape)


class BcosConv2dSame(SamePadding, BcosConv2d):
    """B-cos over timm's `Conv2dSame`."""
