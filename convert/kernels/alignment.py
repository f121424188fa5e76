"""Dynamic alignment units, w(x).x squashed by the length of w(x) (CoDA-Nets, arXiv 2104.00032, eqs. 1-4).

With w(x) = A B x + b and a squashing g that bounds its length:

    y = gain * g(w(x)).x
    l2:  g(v) = v / |v|                           |g| = 1
    sq:  g(v) = v / |v| * |v|^2 / (1 + |v|^2)     |g| < 1         =>  |y| <= gain * |x|

Materialised, w(x) is one whole weight for every unit and place: 16 GB for one picture in a ResNet-50. It is never made
here (ours). With z = B x, in r channels, numerator and norm of K units need only inner products with the static b, with
directions u = U x in m channels that all units of a group share (A_k = U M_k), and numbers that depend on no input:

    w_k.x    = b_k.x + sum_ij u_i z_j M_kij
    |w_k|^2  = z' (M_k' U'U M_k) z + 2 (M_k' U' b_k)' z + |b_k|^2

so everything that has K channels is a matrix product of r * m or r * r + r channels. Units with directions of their own
(A_k free, K * r filters) are the general form; groups with few units, as in depthwise convolutions, use it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ...linearise import dynamic_linear
from .dispatch import backward_is_followed, gradients_of, lean
from .memory import BLOCK, blocks

__all__ = ["FLOOR", "SQUASHES", "TINY", "Layout", "Squash", "aligned", "gram_of"]

Squash = Literal["l2", "sq"]


@dataclasses.dataclass(frozen=True)
class Squashing:
    """g(v) = v * scale(|v|^2), and the derivative of log(scale)."""

    scale: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


SQUASHES: dict[str, Squashing] = {
    "l2": Squashing(lambda n: n.rsqrt(), lambda n: -0.5 / n),
    "sq": Squashing(lambda n: n.sqrt() / (1 + n), lambda n: (1 - n) / (2 * n * (1 + n))),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How matrix products see maps whose channels are dimension `channels`, without moving the K of them in memory.

    K channels as (N, K), a row a place, where those of the one group lie side by side; else as (B, G, K/G, P). Few
    channels f as (f, N) or (B, G, f, P), places side by side. Coefficients are (K, f) or (G, K/G, f).
    """

    channels: int
    groups: int | None = None

    def seen(self, x: Tensor) -> Tensor:
        """Many channels."""
        if self.groups is None:
            return x.movedim(self.channels, -1).reshape(-1, x.shape[self.channels])
        return x.unflatten(self.channels, (self.groups, -1)).flatten(3)

    def back(self, seen: Tensor, like: Tensor) -> Tensor:
        """The transpose of `seen`."""
        if self.groups is None:
            return seen.view(like.movedim(self.channels, -1).shape).movedim(-1, self.channels)
        return seen.view(like.shape)

    def turned(self, x: Tensor) -> Tensor:
        """Many channels, laid as few are, or the other way round."""
        return x.mT if self.groups is None else x

    def of_units(self, coefficients: Tensor) -> Tensor:
        """(G, K/G, ...) coefficients as they are seen."""
        return coefficients.flatten(0, 1) if self.groups is None else coefficients

    def over_places(self, per_unit: Tensor) -> Tensor:
        """(G, K/G) so that it broadcasts over places."""
        return per_unit.flatten() if self.groups is None else per_unit.unsqueeze(-1)

    def spread(self, coefficients: Tensor, few: Tensor) -> Tensor:
        """Many channels of few."""
        return few.mT @ coefficients.mT if self.groups is None else coefficients @ few

    def gathered(self, coefficients: Tensor, many: Tensor) -> Tensor:
        """The transpose of `spread`: few channels of many."""
        return coefficients.mT @ self.turned(many)

    def pulled(self, many: Tensor, few: Tensor) -> Tensor:
        """The gradient of the coefficients of `spread`."""
        pulled = self.turned(many) @ few.mT
        return pulled if self.groups is None else pulled.sum(0)

    def parts(self, many: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """`blocks` of many channels."""
        return blocks(many, like, ROWS if self.groups is None else BLOCK)

    def parts_of_few(self, few: Tensor, like: Tensor) -> list[Tensor]:
        """The same places of few channels."""
        return [self.turned(part) for part in self.parts(self.turned(few), like)]

    def joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The transpose of `parts_of_few`."""
        return torch.cat(parts, -1 if self.groups is None else 0)


# |w(x)|^2 counts as at least this share of |b|^2: where A B x all but cancels b, float32 rounding in the norm would
# break the bound, or divide by nothing.
FLOOR = 1e-4
# The floor of units without static weights, whose gain is 0.
TINY = 1e-24


def alignment(
    static: Tensor,
    u: Tensor,
    mixing: Tensor | None,
    z: Tensor,
    gram: Tensor,
    gain: Tensor,
    floor: Tensor,
    squash: Squash,
    layout: Layout,
) -> Tensor:
    """gain * g(w).x of K units, from their `static` responses b.x, the directions' u, and z.

    All as `layout` sees it; |w|^2 is `gram` of the features of z. Units share their directions through `mixing`, and
    where that is None have r each of their own. `gain` and `floor` broadcast; |w|^2 counts as >= `floor`.
    """
    norm_sq = torch.maximum(layout.spread(gram, _features(z, gram.dtype)), floor)
    return (static + _moving(u, z, mixing, layout)) * _factor(norm_sq, gain, squash).to(static.dtype)


def gram_of(b: Tensor, a: Tensor, mixing: Tensor | None) -> Tensor:
    """(G, K/G, r * r + r + 1): A_k'A_k, 2 A_k'b_k and |b_k|^2, of which |w_k|^2 is the product with z's features.

    b is (G, K/G, D), `a` the directions, (G, m, D) shared through `mixing` (G, K/G, m, r), or (G, K/G * r, D).
    """
    constant = b.square().sum(-1, keepdim=True)
    if mixing is None:
        a = a.unflatten(1, (b.shape[1], -1))
        quadratic, linear = a @ a.mT, 2 * (a @ b.unsqueeze(-1)).squeeze(-1)
    else:
        linear = 2 * (mixing.mT @ (b @ a.mT).unsqueeze(-1)).squeeze(-1)
        quadratic = mixing.mT @ (a @ a.mT).unsqueeze(1) @ mixing
    return torch.cat([quadratic.flatten(2), linear, constant], 2)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """All products of a channel of `a` (..., m, P) and one of `b` (..., r, P), as m * r channels."""
    products = a.unsqueeze(-2) * b.unsqueeze(-3)
    return products.reshape(*a.shape[:-2], a.shape[-2] * b.shape[-2], a.shape[-1])


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """For every i the sum over j of channel ij of `a` (..., m * r, P) times channel j of `b` (..., r, P)."""
    return (_pairs(a, a.shape[-2] // b.shape[-2], b.shape[-2]) * b.unsqueeze(-3)).sum(-2)


def _inner_first(a: Tensor, b: Tensor) -> Tensor:
    """For every j the sum over i of channel ij of `a` (..., m * r, P) times channel i of `b` (..., m, P)."""
    return (_pairs(a, b.shape[-2], a.shape[-2] // b.shape[-2]) * b.unsqueeze(-2)).sum(-3)


def _pairs(a: Tensor, m: int, r: int) -> Tensor:
    """(..., m * r, P) -> (..., m, r, P); `gradcheck`'s batches know no `unflatten`."""
    return a.reshape(*a.shape[:-2], m, r, a.shape[-1])


def _features(z: Tensor, dtype: torch.dtype) -> Tensor:
    """What |w|^2 is linear in: z_i z_j for every i and j, z, and 1; r * r + r + 1 channels in `dtype`."""
    z = z.to(dtype)
    return torch.cat([_outer(z, z), z, torch.ones_like(z[..., :1, :])], -2)


def _moving(u: Tensor, z: Tensor, mixing: Tensor | None, layout: Layout) -> Tensor:
    """(A B x).x of every unit: what it mixes of all u_i z_j, or with u of its own their sum of u_j z_j."""
    return layout.turned(_inner(u, z)) if mixing is None else layout.spread(mixing, _outer(u, z))


def _factor(norm_sq: Tensor, gain: Tensor, squash: Squash) -> Tensor:
    """What w.x is multiplied by, from |w|^2."""
    return SQUASHES[squash].scale(norm_sq) * gain


# ----------------------------------------------------------------------------------------------------------- lean forms

# Elements of a block of rows: of few places, which many units leave in a smaller one, every operation costs more.
ROWS = 2**18


class _Alignment(torch.autograd.Function):
    """`alignment`, in blocks that fit into a CPU's cache.

    Keeps its output, which whatever reads it keeps too, and u and z, of which the backward pass makes everything else
    again.
    """

    @staticmethod
    def forward(ctx: Any, static: Tensor, *others: Any) -> Tensor:
        y = _responses(static, *others, into=torch.empty_like(static))
        *kept, ctx.squash, ctx.layout = others
        # In explanation mode z and the norm are constants, and what follows may write to the output.
        ctx.varies = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(y if ctx.varies else None, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, *others = *ctx.saved_tensors, ctx.squash, ctx.layout
        if backward_is_followed(grad):
            static = _static(y, *others) if ctx.varies else torch.zeros_like(grad)  # in which y is linear
            return gradients_of(alignment, (static, *others), ctx.needs_input_grad, (grad,))
        u, mixing, z, gram, gain, floor, squash, layout = others
        of_static = torch.empty_like(grad, memory_format=torch.contiguous_format)
        parts, totals = [], []
        for into, pull, of_y, u_part, z_part in _blocks(layout, (of_static, grad, y), (u, z)):
            features = _features(z_part, gram.dtype)
            norm_sq = layout.spread(gram, features)
            clamped = torch.maximum(norm_sq, floor)
            numerator = torch.mul(pull, _factor(clamped, gain, squash).to(pull.dtype), out=into)
            if mixing is None:
                of_terms = layout.turned(numerator)
                of_u = _outer(of_terms, z_part)
            else:
                of_terms = layout.gathered(mixing, numerator)
                of_u = _inner(of_terms, z_part)
            of_z = of_mixing = of_gram = None
            if ctx.needs_input_grad[2]:
                of_mixing = layout.pulled(numerator, _outer(u_part, z_part))
            if ctx.varies:
                of_norm = pull.to(norm_sq.dtype) * of_y * SQUASHES[squash].slope(clamped)
                of_norm = torch.where(norm_sq > floor, of_norm, 0.0)
                of_z = _inner_first(u_part, of_terms) if mixing is None else _inner_first(of_terms, u_part)
                of_z = (of_z + _of_z(layout.gathered(gram, of_norm), z_part)).to(z.dtype)
                of_gram = layout.pulled(of_norm, features)
            parts.append((of_u, of_z))
            totals.append((of_mixing, of_gram))
        of_u, of_z = (None if each[0] is None else layout.joined(each) for each in zip(*parts, strict=True))
        of_mixing, of_gram = (
            None if each[0] is None else functools.reduce(torch.add, each) for each in zip(*totals, strict=True)
        )
        return (of_static, of_u, of_mixing, of_z, of_gram, *[None] * 4)


def _static(
    y: Tensor,
    u: Tensor,
    mixing: Tensor | None,
    z: Tensor,
    gram: Tensor,
    gain: Tensor,
    floor: Tensor,
    squash: Squash,
    layout: Layout,
) -> Tensor:
    """The static responses, from what `alignment` makes of them; y tells nothing of units whose gain is 0."""
    norm_sq = torch.maximum(layout.spread(gram, _features(z, gram.dtype)), floor)
    factor = _factor(norm_sq, gain, squash)
    return (y / torch.where(factor > 0, factor, 1) - _moving(u, z, mixing, layout)).to(y.dtype)


def _blocks(layout: Layout, many: tuple[Tensor | None, ...], few: tuple[Tensor, ...]) -> Iterator[tuple[Any, ...]]:
    """Parts of maps of many and of few channels; many[1] is not None, and None stays so."""
    like = many[1]
    assert like is not None
    parts = [None if each is None else layout.parts(each, like) for each in many]
    parts += [layout.parts_of_few(each, like) for each in few]
    for k in range(len(layout.parts(like, like))):
        yield tuple(None if each is None else each[k] for each in parts)


def _of_z(of_features: Tensor, z: Tensor) -> Tensor:
    """The gradient of z from that of its `_features`, in the precision of those."""
    rank, z = z.shape[-2], z.to(of_features.dtype)
    of_products, of_z, _ = of_features.split([rank * rank, rank, 1], -2)
    return of_z + _inner(of_products, z) + _inner_first(of_products, z)


def _responses(
    static: Tensor,
    u: Tensor,
    mixing: Tensor | None,
    z: Tensor,
    gram: Tensor,
    gain: Tensor,
    floor: Tensor,
    squash: Squash,
    layout: Layout,
    into: Tensor,
) -> Tensor:
    """`alignment`, written `into` a tensor, which may be `static` itself."""
    for y, of_static, u_part, z_part in _blocks(layout, (into, static), (u, z)):
        numerator = of_static + _moving(u_part, z_part, mixing, layout)
        norm_sq = torch.maximum(layout.spread(gram, _features(z_part, gram.dtype)), floor)
        torch.mul(numerator, _factor(norm_sq, gain, squash).to(numerator.dtype), out=y)
    return into


_alignment = lean(alignment, _Alignment.apply, lambda static, *others: _responses(static, *others, into=static))


@dynamic_linear
def aligned(responses: tuple[Tensor, Tensor], *others: Any) -> Tensor:
    """`alignment` of the `responses` (static, u), in which it is linear; explanation mode holds all else constant.

    Where gradients are off, the static response is overwritten and returned.
    """
    return _alignment(*responses, *others)
