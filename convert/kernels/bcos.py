"""B-cos: |cos(x, w)|^(B-1) * w.x (B-cos Networks, Boehle et al., CVPR 2022, arXiv 2205.10268, eq. 3).

The paper divides w by its norm: |cos|^B |x|, with the sign of w.x. Here w keeps the norm that it was pretrained with.
(Ours.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linearise.mode import gated_by
from .dispatch import backward_is_followed, gradients_of, is_exactly, lean
from .memory import blocks_of_all
from .precision import wide

__all__ = ["TINY", "bcos", "bcos_scale", "bcos_scale_of_maps", "filters_with_norms", "inverse", "raised", "root"]

Norm = Tensor | None
# Squared norms below this count as zero: the one epsilon of all B-cos layers.
TINY = 1e-24
# Cosines below this count as this, where autograd differentiates the formula: of a root at zero it would make NaN.
SMALLEST = 1e-12


def bcos(o: Tensor, q: Tensor, w2: Norm, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) * o, with |cos| = |o| / (|x| |w|), from o = w.x, q = |x|^2 and w2 = |w|^2.

    q and w2 broadcast against o, and are float32 at least; None is one; b >= 1. Where a norm is 0, so is the result.
    """
    cosine = o.abs() * q.clamp_min(TINY).rsqrt()
    if w2 is not None:
        cosine = cosine * w2.clamp_min(TINY).rsqrt()
    return (cosine.clamp_min(SMALLEST) ** (b - 1) * o).to(o.dtype)


def filters_with_norms(weight: Tensor, w2: Tensor, b: float | Tensor) -> Tensor:
    """Filters v (C_out, ...) that hold their norms: |cos|^(B-1) * w.x = |v.x|^(B-1) * v.x / |x|^(B-1).

    v = w |w|^((1-B)/B), from w2 = |w|^2 (C_out,). (Ours.)
    """
    w2 = torch.where(w2 > TINY, w2, 1).view(-1, *[1] * (weight.dim() - 1))
    return (weight * w2 ** ((1 - b) / (2 * b))).to(weight.dtype)


# ----------------------------------------------------------------------------------------------------------- lean forms


class _Bcos(torch.autograd.Function):
    """`bcos`, which keeps its output, as whatever reads it does too, and the two small norms.

    The output holds the cosine as well as the response does: |y| = |x| |w| |cos|^B.
    """

    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor, w2: Norm, b: float | Tensor) -> Tensor:
        y, inverse_w = torch.empty_like(o), _inverse_or_one(w2)
        for part, q_part, into in blocks_of_all(o, q, y):
            torch.mul(_gate(part, inverse(q_part), inverse_w, b), part, out=into)
        ctx.save_for_backward(y, q, w2)
        ctx.b = b
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (y, q, w2), b = ctx.saved_tensors, ctx.b
        if backward_is_followed(grad):
            return gradients_of(bcos, (_response(y, q, w2, b), q, w2, b), ctx.needs_input_grad, (grad,))
        of_o, inverse_w, sums_q, sums_w = torch.empty_like(y), _inverse_or_one(w2), [], []
        for part, pull, q_part, into in blocks_of_all(y, grad, q, of_o):
            product = pull * part.to(wide(part))
            # dy/do is B |cos|^(B-1), and of B the root is taken where there are fewer numbers.
            power = _power(part, inverse(q_part) * b ** (b / max(b - 1, 1e-12)), inverse_w)
            torch.mul(root(power, b), pull, out=into)
            sums_q.append(product.sum_to_size(q_part.shape))
            if w2 is not None:
                sums_w.append(product.sum_to_size(w2.shape))
        of_w2 = None if w2 is None else _of_norm(torch.stack(sums_w).sum(0), w2, b)
        return of_o, _of_norm(torch.cat(sums_q), q, b), of_w2, None


def _response(y: Tensor, q: Tensor, w2: Norm, b: float | Tensor) -> Tensor:
    """o, from y = bcos(o, q, w2, b)."""
    power = y.abs() * q.clamp_min(TINY).rsqrt()
    if w2 is not None:
        power = power * w2.clamp_min(TINY).rsqrt()
    return (y / power.clamp_min(SMALLEST**2) ** ((b - 1) / b)).to(y.dtype)


def _of_norm(total: Tensor, norm_sq: Tensor, b: float | Tensor) -> Tensor:
    """The gradient of a squared norm from the sum of y * grad over what it scales; zero where the norm is clamped.

    y depends on both norms through their power (1-B)/2, so dy/dq = (1-B)/2 * y/q.
    """
    return (total * ((1 - b) / 2) / F.threshold(norm_sq, TINY, math.inf)).to(norm_sq.dtype)


def inverse(norm_sq: Tensor) -> Tensor:
    """1 / norm from its square, a new tensor."""
    return norm_sq.clamp_min(TINY).rsqrt_()


def _inverse_or_one(norm_sq: Norm) -> Norm:
    return None if norm_sq is None else inverse(norm_sq)


def _power(o: Tensor, inverse_q: Tensor, inverse_w: Norm) -> Tensor:
    """|o| / (|x| |w|), a new tensor in the precision of the norms: |cos| of o, |cos|^B of y."""
    power = o * inverse_q
    return (power if inverse_w is None else power.mul_(inverse_w)).abs_()


def _gate(o: Tensor, inverse_q: Tensor, inverse_w: Norm, b: float | Tensor) -> Tensor:
    """|cos|^(B-1), a new tensor in the precision of the norms."""
    return raised(_power(o, inverse_q, inverse_w), b)


def raised(cosine: Tensor, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) from |cos|, in place."""
    return cosine if is_exactly(b, 2) else cosine.pow_(b - 1)


def root(power: Tensor, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) from |cos|^B, in place."""
    return power.sqrt_() if is_exactly(b, 2) else power.pow_((b - 1) / b)


def _over(o: Tensor, q: Tensor, w2: Norm, b: float | Tensor) -> Tensor:
    """`bcos`, written over o."""
    inverse_w = _inverse_or_one(w2)
    for part, q_part in blocks_of_all(o, q):
        part.mul_(_gate(part, inverse(q_part), inverse_w, b))
    return o


def _with_gate(o: Tensor, q: Tensor, w2: Norm, b: float | Tensor) -> tuple[Tensor, Tensor]:
    """What `bcos` multiplies o by, and what it returns, which is written over o."""
    gates, inverse_w = torch.empty_like(o), _inverse_or_one(w2)
    for part, q_part, into in blocks_of_all(o, q, gates):
        part.mul_(into.copy_(_gate(part, inverse(q_part), inverse_w, b)))
    return gates, o


bcos_scale = gated_by(_with_gate)(lean(bcos, _Bcos.apply, _over))


def bcos_scale_of_maps(o: Tensor, q: Tensor, w2: Norm, b: float | Tensor) -> Tensor:
    """`bcos_scale` of maps o (B, K, H, W), from q (B, G, H, W) of the G groups and w2 (K,) of the filters."""
    groups, units = q.shape[1], o.shape[1]
    if groups in (1, units):  # no view, which would make every write to it a copy
        return bcos_scale(o, q, _shaped(w2, (-1, 1, 1)), b)
    shape = (groups, units // groups)
    return bcos_scale(o.unflatten(1, shape), q.unsqueeze(2), _shaped(w2, (*shape, 1, 1)), b).flatten(1, 2)


def _shaped(norm: Norm, shape: tuple[int, ...]) -> Norm:
    return None if norm is None else norm.view(shape)
