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
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...explain.linearise import dynamic_linear
from .convolution import DynamicConv2d, SamePadding, applied, sum_of_squares
from .scheduled import Rescalable

__all__ = ["SQUASHES", "CodaConv2d", "CodaConv2dSame", "CodaLinear", "Squash", "squashed"]

Squash = Literal["l2", "sq"]
# |w(x)|^2 counts as at least this share of |b|^2: where A B x all but cancels b, float32 rounding in the norm would
# break the bound, or divide by nothing.
FLOOR = 1e-4
# The floor of units without static weights, whose gain is 0.
TINY = 1e-24
HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Squashing:
    """g(v) = v * scale(|v|^2), and the derivative of that scale."""

    scale: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


SQUASHES: dict[str, Squashing] = {
    "l2": Squashing(lambda n: n.rsqrt(), lambda n: n.rsqrt() / (-2 * n)),
    "sq": Squashing(lambda n: n.sqrt() / (1 + n), lambda n: (1 - n) / (2 * n.sqrt() * (1 + n).square())),
}


class _Squashed(torch.autograd.Function):
    """numerator * gain * scale(norm_sq); keeps only the two maps for the backward, not what lies between them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(numerator: Tensor, norm_sq: Tensor, gain: Tensor, floor: Tensor, squash: str) -> Tensor:
        factor = SQUASHES[squash].scale(torch.maximum(norm_sq, floor)) * gain
        return numerator * factor.to(numerator.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own signature
        *tensors, ctx.squash = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205 - torch's own signature
        numerator, norm_sq, gain, floor = ctx.saved_tensors
        squashing, clamped = SQUASHES[ctx.squash], torch.maximum(norm_sq, floor)
        grad_numerator = grad * (squashing.scale(clamped) * gain).to(grad.dtype)
        grad_norm_sq = None
        if ctx.needs_input_grad[1]:
            grad_norm_sq = (grad * numerator).to(norm_sq.dtype) * gain * squashing.slope(clamped)
            grad_norm_sq = torch.where(norm_sq > floor, grad_norm_sq, 0.0)
        return grad_numerator, grad_norm_sq, None, None, None


@dynamic_linear
def squashed(numerator: Tensor, norm_sq: Tensor, gain: Tensor, floor: Tensor, squash: str) -> Tensor:
    """gain * g(w).x from w.x and |w|^2, of one shape; `gain` and `floor` broadcast. The norm counts as >= `floor`."""
    return applied(_Squashed, numerator, norm_sq, gain, floor, squash)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where features hold the channels of a group, and how (G, K/G, f) coefficients map f of them to K/G."""

    channels: int
    mix: str


TOKENS = Layout(-1, "gkf,...f->...k")
MAPS = Layout(2, "gkf,bgfhw->bgkhw")


@dynamic_linear
def shared_moving(u: Tensor, z: Tensor, mixing: Tensor, layout: Layout) -> Tensor:
    """sum_ij u_i z_j M_kij for every unit: the moving part A_k z . x with A_k = U M_k; `mixing` (G, K/G, m, r)."""
    return torch.einsum(layout.mix, mixing.flatten(2), _outer(u, z, layout.channels))


@dynamic_linear
def own_moving(u: Tensor, z: Tensor, layout: Layout) -> Tensor:
    """sum_j u_kj z_j for every unit, with u_k = A_k' x of its own."""
    dim = layout.channels % u.dim()
    return (u.unflatten(dim, (-1, z.shape[dim])) * z.unsqueeze(dim)).sum(dim + 1)


def _outer(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """All products of a channel of `a` (m) and one of `b` (r), as m * r channels in `dim`."""
    dim %= a.dim()
    return (a.unsqueeze(dim + 1) * b.unsqueeze(dim)).flatten(dim, dim + 1)


class _Coda(Rescalable):
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
    layout: Layout

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

    def _aligned(self, static: Tensor, probed: Tensor) -> Tensor:
        """gain * g(w(x)).x from b.x and the response to `_probes`."""
        layout, rank = self.layout, self.reader.shape[0] // self.groups
        z, u = probed.split([rank, probed.shape[layout.channels] - rank], layout.channels)
        if self.mixing is None:
            moving = own_moving(u, z, layout)
        else:
            moving = shared_moving(u, z, self.mixing.unflatten(0, (self.groups, -1)), layout)
        with torch.autocast(z.device.type, enabled=False):
            quadratic, linear, constant = self._gram()
            z = z.to(constant.dtype)
            features = torch.cat([_outer(z, z, layout.channels), z], layout.channels)
            # Not as a convolution, which would be taken in TF32: the norm would be off by more than the bound allows.
            varying = torch.einsum(layout.mix, torch.cat([quadratic.flatten(2), linear], 2), features)
            norm_sq = varying + self._spread(constant)
            floor = (FLOOR * constant.detach()).clamp_min(TINY)
        gain = self.gain.unflatten(0, (self.groups, -1))
        return squashed(static + moving, norm_sq, self._spread(gain), self._spread(floor), self.squash)

    def _spread(self, per_unit: Tensor) -> Tensor:
        """(G, K/G) so that it broadcasts over places."""
        return per_unit[0] if self.layout is TOKENS else per_unit[..., None, None]

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

    layout = TOKENS

    def forward(self, x: Tensor) -> Tensor:
        y = self._aligned(F.linear(x, self.weight), F.linear(x, self._probes()))
        return y if self.bias is None else y + self.bias


class CodaConv2d(_Coda, DynamicConv2d):
    """Alignment units over `nn.Conv2d`: (B, C, H, W) -> (B, K, H', W')."""

    groups: int
    layout = MAPS

    def _respond(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        products = self.products(x, padding, self.weight, self._probes())
        y = self._aligned(*(product.unflatten(1, (self.groups, -1)) for product in products)).flatten(1, 2)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class CodaConv2dSame(SamePadding, CodaConv2d):
    """Alignment units over timm's `Conv2dSame`."""
