"""Dynamic alignment units: y = gain * g(w(x)).x + beta * bias, whose weights w(x) = A B x + b follow the input.

CoDA-Nets (arXiv 2104.00032, eqs. 1-4) bound the weights by a squashing g, so that a unit can only respond strongly
where w(x) points the way x does:

    l2:  g(v) = v / |v|                 |g| = 1
    sq:  g(v) = v / |v| * |v|^2 / (1 + |v|^2)     |g| < 1         =>  |y - beta * bias| <= gain * |x|

Materialised, w(x) is one whole weight for every unit and place: 16 GB for one picture in a ResNet-50. It is never made
here (ours). With z = B x, in r channels, numerator and norm of K units need only inner products with the static b, with
directions u = U x in m channels that all units of a group share (A_k = U M_k), and numbers that depend on no input:

    w_k.x    = b_k.x + sum_ij u_i z_j M_kij
    |w_k|^2  = z' (M_k' U'U M_k) z + 2 (M_k' U' b_k)' z + |b_k|^2

so everything that has K channels is a matrix product of r * m or r * r + r channels. Units with directions of their own
(A_k free, K * r filters) are the general form; groups with few units, as in depthwise convolutions, use it.

Conversion (ours): b_k is the pretrained kernel divided by its norm, A_k is zero, B is random, and the gain makes the
layer its source. The gradient of M (or A) is not zero there, and the norm is taken as above and not by a QR
decomposition, whose gradient at A = 0 is not a number. In explanation mode z and the norm are constants: the gradient
is exactly gain * g(w(x)).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...explain.linearise import dynamic_linear
from .convolution import DynamicConv2d, SamePadding, applied, in_blocks, sum_of_squares, unobserved
from .scheduled import biased, without_autocast
from .watch import OutputKept

__all__ = ["SQUASHES", "CodaConv2d", "CodaConv2dSame", "CodaLinear", "Squash", "aligned"]

Squash = Literal["l2", "sq"]
# |w(x)|^2 counts as at least this share of |b|^2: where A B x all but cancels b, float32 rounding in the norm would
# break the bound, or divide by nothing.
FLOOR = 1e-4
# The floor of units without static weights, whose gain is 0.
TINY = 1e-24
HALF = (torch.float16, torch.bfloat16)
# Elements of a block of rows: of few places, which many units leave in a smaller one, every operation costs more.
ROWS = 2**18


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
        """`in_blocks` of many channels."""
        return in_blocks(many, like, ROWS if self.groups is None else None)

    def parts_of_few(self, few: Tensor, like: Tensor) -> list[Tensor]:
        """The same places of few channels."""
        return [self.turned(part) for part in self.parts(self.turned(few), like)]

    def joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The transpose of `parts_of_few`."""
        return torch.cat(parts, -1 if self.groups is None else 0)


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


class _Aligned(torch.autograd.Function):
    """gain * g(w).x of K units, from K static responses and the few channels of u and z.

    Keeps its output, which whatever reads it keeps too, and u and z, of which the backward pass makes everything else
    again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _respond(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own signature
        _, *kept, ctx.squash, ctx.layout = inputs
        # In explanation mode z and the norm are constants, and what follows may write to the output.
        ctx.varies = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(output if ctx.varies else None, *kept)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205 - torch's own signature
        y, u, mixing, z, gram, gain, floor = ctx.saved_tensors
        layout, slope = ctx.layout, SQUASHES[ctx.squash].slope
        lean = unobserved(grad, u, z, gram, gain)
        whole = torch.empty_like(grad, memory_format=torch.contiguous_format) if lean else None
        parts, sums = [], []
        for into, pull, of_y, u_part, z_part in _blocks(layout, (whole, grad, y), (u, z)):
            features = _features(z_part, gram.dtype)
            norm_sq, clamped, factor = _norms_and_factor(features, gram, gain, floor, ctx.squash, layout)
            numerator = torch.mul(pull, factor.to(pull.dtype), out=into)
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
                of_norm = pull.to(norm_sq.dtype) * of_y * slope(clamped)
                of_norm = torch.where(norm_sq > floor, of_norm, 0.0)
                of_z = _inner_first(u_part, of_terms) if mixing is None else _inner_first(of_terms, u_part)
                of_z = (of_z + _of_z(layout.gathered(gram, of_norm), z_part)).to(z.dtype)
                of_gram = layout.pulled(of_norm, features)
            parts.append((of_u, of_z))
            sums.append((of_mixing, of_gram))
        of_u, of_z = (None if each[0] is None else layout.joined(each) for each in zip(*parts, strict=True))
        of_mixing, of_gram = (
            None if each[0] is None else functools.reduce(torch.add, each) for each in zip(*sums, strict=True)
        )
        return (numerator if whole is None else whole, of_u, of_mixing, of_z, of_gram, *[None] * 4)


def _blocks(layout: Layout, many: tuple[Tensor | None, ...], few: tuple[Tensor, ...]) -> Iterator[tuple[Any, ...]]:
    """Parts of maps of many and of few channels that fit into a CPU's cache; many[1] is not None, and None stays so."""
    like = many[1]
    assert like is not None
    parts = [None if each is None else layout.parts(each, like) for each in many]
    parts += [layout.parts_of_few(each, like) for each in few]
    for k in range(len(layout.parts(like, like))):
        yield tuple(None if each is None else each[k] for each in parts)


def _features(z: Tensor, dtype: torch.dtype) -> Tensor:
    """What |w|^2 is linear in: z_i z_j for every i and j, z, and 1; r * r + r + 1 channels in `dtype`."""
    z = z.to(dtype)
    return torch.cat([_outer(z, z), z, torch.ones_like(z[..., :1, :])], -2)


def _of_z(of_features: Tensor, z: Tensor) -> Tensor:
    """The gradient of z from that of its `_features`, in the precision of those."""
    rank, z = z.shape[-2], z.to(of_features.dtype)
    of_products, of_z, _ = of_features.split([rank * rank, rank, 1], -2)
    return of_z + _inner(of_products, z) + _inner_first(of_products, z)


def _norms_and_factor(
    features: Tensor, gram: Tensor, gain: Tensor, floor: Tensor, squash: str, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """|w|^2, the same at least as large as `floor`, and what w.x is multiplied by."""
    norm_sq = layout.spread(gram, features)
    clamped = torch.maximum(norm_sq, floor)
    return norm_sq, clamped, SQUASHES[squash].scale(clamped) * gain


def _moving(u: Tensor, z: Tensor, mixing: Tensor | None, layout: Layout) -> Tensor:
    """(A B x).x of every unit: what it mixes of all u_i z_j, or with u of its own their sum of u_j z_j."""
    return layout.turned(_inner(u, z)) if mixing is None else layout.spread(mixing, _outer(u, z))


def _respond(
    static: Tensor,
    u: Tensor,
    mixing: Tensor | None,
    z: Tensor,
    gram: Tensor,
    gain: Tensor,
    floor: Tensor,
    squash: str,
    layout: Layout,
    over: bool = False,
) -> Tensor:
    """The response of alignment units; written `over` the static one, if so."""
    lean = unobserved(static, u, z, gram, gain)
    y = (static if over else torch.empty_like(static)) if lean else None
    for into, of_static, u_part, z_part in _blocks(layout, (y, static), (u, z)):
        numerator = of_static + _moving(u_part, z_part, mixing, layout)
        features = _features(z_part, gram.dtype)
        *_, factor = _norms_and_factor(features, gram, gain, floor, squash, layout)
        product = torch.mul(numerator, factor.to(numerator.dtype), out=into)
    return product if y is None else y


@dynamic_linear
def aligned(
    responses: tuple[Tensor, Tensor],
    mixing: Tensor | None,
    z: Tensor,
    gram: Tensor,
    gain: Tensor,
    floor: Tensor,
    squash: str,
    layout: Layout,
) -> Tensor:
    """gain * g(w).x of K units, from their static `responses` and those of the directions, u.

    All as `layout` sees it; |w|^2 is `gram` of `_features`. Units share their directions through `mixing`, and where
    that is None have r each of their own. `gain` and `floor` broadcast; the norm counts as >= `floor`. Where gradients
    are off, the static response is overwritten and returned.
    """
    arguments = (*responses, mixing, z, gram, gain, floor, squash, layout)
    return _respond(*arguments, over=True) if unobserved() else applied(_Aligned, *arguments)


class _Coda(OutputKept):
    """Mixin: the weight becomes b, one unit vector a unit, beside `reader` (B), `directions` (U, or A) and `mixing`.

    `reader` is (G * r, C/G, ...) and `directions` (G * m, C/G, ...), shaped like kernels of the layer, `mixing`
    (K, m, r). Where units have directions of their own, `directions` is (K * r, C/G, ...) and `mixing` None.
    """

    weight: nn.Parameter
    reader: nn.Parameter
    directions: nn.Parameter
    mixing: nn.Parameter | None
    gain: Tensor
    groups: int = 1
    squash: str

    @torch.no_grad()
    def start_alignment(self, rank: int, basis: int, squash: Squash) -> None:
        """Makes the layer one of alignment units that compute what it computes now.

        Args:
            rank: channels r of z, at most the size of a patch, and in grouped layers the units of a group.
            basis: directions m that the units of a group share; groups of at most so many units, and all where it is 0,
                get r directions for each unit.
        """
        weight, self.squash = self.weight, squash
        units, size = weight.shape[0] // self.groups, weight[0].numel()
        rank = min(rank, size if self.groups == 1 else min(size, units))
        norm = (
            sum_of_squares(weight.flatten(1), 1).flatten().sqrt().to(torch.promote_types(weight.dtype, torch.float32))
        )
        # Of a zero kernel nothing is left to align: its gain is 0, so it stays silent.
        direction = weight / _per_unit(torch.where(norm > 0, norm, 1), weight)
        self.register_buffer("gain", norm / SQUASHES[squash].scale(torch.ones_like(norm)))
        self.weight = nn.Parameter(direction.to(weight.dtype), weight.requires_grad)
        generator = torch.Generator().manual_seed(0)

        def filters(count: int) -> nn.Parameter:
            noise = torch.randn(count, *weight.shape[1:], generator=generator) * size**-0.5
            return nn.Parameter(noise.to(weight), weight.requires_grad)

        self.reader = filters(self.groups * rank)
        if basis and units > basis:
            self.directions = filters(self.groups * basis)
            self.mixing = nn.Parameter(weight.new_zeros(weight.shape[0], basis, rank), weight.requires_grad)
        else:
            zeros = weight.new_zeros(weight.shape[0] * rank, *weight.shape[1:])
            self.directions = nn.Parameter(zeros, weight.requires_grad)
            self.register_parameter("mixing", None)

    @property
    def natural_sizes(self) -> Mapping[str, float]:
        # So that a relative step of these turns w(x) about as far as one of b does, where z is of the size of 1.
        if self.mixing is None:
            rank = self.directions.shape[0] // self.weight.shape[0]
            return {"directions": self.weight[0].numel() ** -0.5 / rank}
        return {"mixing": 1 / self.mixing[0].numel()}

    def rescale(self, gain: Tensor) -> None:
        self.gain.mul_(gain.to(self.gain.dtype))

    def _apply(self, fn, recurse=True):  # noqa: ANN001, ANN202 - torch's own signature
        gain = self.gain
        super()._apply(fn, recurse)
        if self.gain.dtype in HALF:
            self.gain = gain.to(self.gain.device)
        return self

    def _probes(self) -> Tensor:
        """The filters of `reader` and `directions`, group by group, so that one small map holds z and u."""
        parts = (self.reader, self.directions)
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)

    def _aligned(self, static: Tensor, probed: Tensor, layout: Layout) -> Tensor:
        """gain * g(w(x)).x from b.x and the response to `_probes`."""
        responses, probed = layout.seen(static), layout.turned(layout.seen(probed)).contiguous()
        rank = self.reader.shape[0] // self.groups
        z, u = probed.split([rank, probed.shape[-2] - rank], -2)
        # Not as convolutions, nor in half precision: the norm would be off by more than the bound allows.
        with without_autocast(z):
            mixing = self.mixing
            if mixing is not None:
                mixing = layout.of_units(mixing.to(u.dtype).flatten(1).unflatten(0, (self.groups, -1)))
            quadratic, linear, constant = self._gram()
            gram = layout.of_units(torch.cat([quadratic.flatten(2), linear, constant.unsqueeze(-1)], 2))
            gain = self.gain.unflatten(0, (self.groups, -1))
            per_unit = (gain, (FLOOR * constant.detach()).clamp_min(TINY))
            per_unit = (layout.over_places(each) for each in per_unit)
            y = aligned((responses, u), mixing, z, gram, *per_unit, self.squash, layout)
        return self._given(layout.back(y, static))

    def _gram(self) -> tuple[Tensor, Tensor, Tensor]:
        """A_k'A_k (G, K/G, r, r), 2 A_k'b_k (G, K/G, r) and |b_k|^2 (G, K/G), in float32 at least."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        b = self.weight.to(dtype).flatten(1).unflatten(0, (self.groups, -1))
        a = self.directions.to(dtype).flatten(1).unflatten(0, (self.groups, -1))
        constant = b.square().sum(-1)
        if self.mixing is None:
            a = a.unflatten(1, (b.shape[1], -1))
            return a @ a.mT, 2 * (a @ b.unsqueeze(-1)).squeeze(-1), constant
        mixing = self.mixing.to(dtype).unflatten(0, (self.groups, -1))
        linear = 2 * (mixing.mT @ (b @ a.mT).unsqueeze(-1)).squeeze(-1)
        return mixing.mT @ (a @ a.mT).unsqueeze(1) @ mixing, linear, constant

    def extra_repr(self) -> str:
        rank = self.reader.shape[0] // self.groups
        own = "own directions" if self.mixing is None else f"basis={self.mixing.shape[1]}"
        return f"{super().extra_repr()}, {self.squash}, rank={rank}, {own}"


def _per_unit(values: Tensor, like: Tensor) -> Tensor:
    """(K,) so that it broadcasts over kernels (K, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


class CodaLinear(_Coda):
    """Alignment units over `nn.Linear`: (..., C) -> (..., K)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._aligned(F.linear(x, self.weight), F.linear(x, self._probes()), Layout(-1))
        return biased(self._at_reference(y, -1), self.bias)


class CodaConv2d(_Coda, DynamicConv2d):
    """Alignment units over `nn.Conv2d`: (B, C, H, W) -> (B, K, H', W')."""

    groups: int

    def _respond(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        static, probed = self.products(x, padding, self.weight, self._probes())
        side_by_side = self.groups == 1 and static.stride(1) == 1
        y = self._aligned(static, probed, Layout(1, None if side_by_side else self.groups))
        return biased(self._at_reference(y, 1), self.bias, 1)


class CodaConv2dSame(SamePadding, CodaConv2d):
    """Alignment units over timm's `Conv2dSame`."""
