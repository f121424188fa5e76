"""What B-cos layers multiply their response by, |cos(x, w)|^(B-1), with few passes over memory and little kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...explain.linearise import gated_by
from .convolution import applied, in_blocks, unobserved
from .scheduled import is_exactly

__all__ = [
    "TINY",
    "Norm",
    "bcos_scale",
    "filters_with_norms",
    "gradients",
    "inverse",
    "of_norm",
    "raised",
    "root",
    "scaled",
]

Norm = Tensor | None
# Squared norms below this count as zero: the one epsilon of all B-cos layers.
TINY = 1e-24


class _BcosScale(torch.autograd.Function):
    """|cos|^(B-1) * o, where |cos| = |o| / sqrt(q * w2); None for w2 is one.

    Keeps its output, which whatever reads it keeps too, and the two small norms: |cos| = (|y| / sqrt(q * w2))^(1/B).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(o: Tensor, q: Tensor, w2: Norm, b: float | Tensor) -> Tensor:
        inverse_w = inverse_or_one(w2)
        if not unobserved(o, q):
            return scaled(o, inverse(q), inverse_w, b)
        y = torch.empty_like(o)
        for out, part, of_part in _blocks(y, o, q):
            scaled(part, inverse(of_part), inverse_w, b, out)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own signature
        _, q, w2, ctx.b = inputs
        ctx.save_for_backward(output, q, w2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205 - torch's own signature
        (y, q, w2), b = ctx.saved_tensors, ctx.b
        inverse_w, sums_q, sums_w = inverse_or_one(w2), [], []
        lean = unobserved(grad, y, q)
        whole = torch.empty_like(y) if lean else None
        for out, part, pull, of_part in _blocks(y if whole is None else whole, y, grad, q):
            of_o, product = gradients(part, pull, inverse(of_part), inverse_w, b, out if lean else None)
            sums_q.append(product.sum_to_size(of_part.shape))
            if w2 is not None:
                sums_w.append(product.sum_to_size(w2.shape))
        of_w2 = None if w2 is None else of_norm(torch.stack(sums_w).sum(0), w2, b)
        return of_o if whole is None else whole, of_norm(torch.cat(sums_q), q, b), of_w2, None


def _blocks(y: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts along the first dimension (B, ...) that fit into a CPU's cache."""
    return zip(in_blocks(y), *(in_blocks(other, like=y) for other in others), strict=True)


def inverse(norm_sq: Tensor) -> Tensor:
    """1 / norm from its square, a new tensor."""
    return norm_sq.clamp_min(TINY).rsqrt_()


def inverse_or_one(norm_sq: Norm) -> Norm:
    return None if norm_sq is None else inverse(norm_sq)


def _gate(o: Tensor, inverse_q: Tensor, inverse_w: Norm, b: float | Tensor) -> Tensor:
    """|cos|^(B-1), a new tensor in the precision of the norms."""
    return raised(_power(o, inverse_q, inverse_w), b)


def scaled(o: Tensor, inverse_q: Tensor, inverse_w: Norm, b: float | Tensor, out: Tensor | None = None) -> Tensor:
    """|cos|^(B-1) * o, into `out`; where something follows what is done, every derivative of it exists."""
    if unobserved(o, inverse_q):
        return torch.mul(_gate(o, inverse_q, inverse_w, b), o, out=out).to(o.dtype)
    return raised(_above_zero(_power(o, inverse_q, inverse_w)), b).mul_(o).to(o.dtype)


def gradients(
    y: Tensor, grad: Tensor, inverse_q: Tensor, inverse_w: Norm, b: float | Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """That of o, into `out`, from that of y = |cos|^(B-1) * o; and y * grad, of which those of norms are sums.

    (`of_norm`.)
    """
    product = grad * y.to(torch.promote_types(y.dtype, torch.float32))
    if unobserved(y, grad, inverse_q):
        # dy/do is B |cos|^(B-1), and of B the root is taken where there are fewer numbers.
        power = _power(y, inverse_q * b ** (b / max(b - 1, 1e-12)), inverse_w)
        return torch.mul(root(power, b), grad, out=out).to(y.dtype), product
    return (root(_above_zero(_power(y, inverse_q, inverse_w)), b) * grad).mul_(b).to(y.dtype), product


def of_norm(total: Tensor, norm_sq: Tensor, b: float | Tensor) -> Tensor:
    """The gradient of a squared norm from the sum of y * grad over what it scales; zero where the norm is clamped.

    y depends on both norms through their power (1-B)/2, so dy/dq = (1-B)/2 * y/q.
    """
    return (total * ((1 - b) / 2) / F.threshold(norm_sq, TINY, math.inf)).to(norm_sq.dtype)


def filters_with_norms(weight: Tensor, norm_sq: Tensor, b: float | Tensor) -> Tensor:
    """Filters v (C_out, ...) that hold their norms: |cos|^(B-1) * w.x = |v.x|^(B-1) * v.x / |x|^(B-1).

    `norm_sq` (C_out, ...) broadcasts.
    """
    norm_sq = torch.where(norm_sq > TINY, norm_sq, 1)
    return (weight * norm_sq ** ((1 - b) / (2 * b))).to(weight.dtype)


def _power(o: Tensor, inverse_q: Tensor, inverse_w: Norm) -> Tensor:
    """|o| / sqrt(q * w2), a new tensor in the precision of the norms: |cos| of o, |cos|^B of y."""
    power = o * inverse_q
    return (power if inverse_w is None else power.mul_(inverse_w)).abs_()


def _above_zero(power: Tensor) -> Tensor:
    """`power`, in place, but not quite zero: there a root has no derivative, and what is derived of it would be NaN."""
    return power.clamp_min_(torch.finfo(torch.float32).tiny)


def raised(cosine: Tensor, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) from |cos|, in place."""
    return cosine if is_exactly(b, 2) else cosine.pow_(b - 1)


def root(power: Tensor, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) from |cos|^B, in place."""
    return power.sqrt_() if is_exactly(b, 2) else power.pow_((b - 1) / b)


def _apart(o: Tensor, patch_norm_sq: Tensor, weight_norm_sq: Norm, b: float | Tensor) -> tuple[Tensor, Tensor]:
    """What `bcos_scale` multiplies o by, and what it returns, which is written over o."""
    gates, inverse_w = torch.empty_like(o), inverse_or_one(weight_norm_sq)
    for out, part, of_part in _blocks(gates, o, patch_norm_sq):
        part.mul_(out.copy_(_gate(part, inverse(of_part), inverse_w, b)))
    return gates, o


@gated_by(_apart)
def bcos_scale(o: Tensor, patch_norm_sq: Tensor, weight_norm_sq: Norm, b: float | Tensor) -> Tensor:
    """|cos|^(B-1) * o, where |cos| = |o| / sqrt(patch_norm_sq * weight_norm_sq).

    `o` (..., C), (B, C, H, W) or (B, G, C/G, H, W); the squared norms are float32 and broadcast against it, None is
    one; b >= 1. Where gradients are off, `o` is overwritten and returned. Explanation mode sees it as o times a frozen
    gate.
    """
    if not unobserved():
        return applied(_BcosScale, o, patch_norm_sq, weight_norm_sq, b)
    inverse_w = inverse_or_one(weight_norm_sq)
    for part, of_part in _blocks(o, patch_norm_sq):
        part.mul_(_gate(part, inverse(of_part), inverse_w, b))
    return o
