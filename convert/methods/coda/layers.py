"""Dynamic alignment units: y = gain * g(w(x)).x + beta * bias, whose weights w(x) = A B x + b follow the input.

g bounds the weights, so that a unit can only respond strongly where w(x) points the way x does (CoDA-Nets, arXiv
2104.00032, eqs. 1-4; how it is computed: `kernels.alignment`).

Conversion (ours): b_k is the pretrained kernel divided by its norm, A_k is zero, B is random, and the gain makes the
layer its source. The gradient of M (or A) is not zero there, and the norm is taken as above and not by a QR
decomposition, whose gradient at A = 0 is not a number. In explanation mode z and the norm are constants: the gradient
is exactly gain * g(w(x)).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.alignment import FLOOR, SQUASHES, TINY, Layout, Squash, aligned, gram_of
from ...kernels.precision import wide, without_autocast
from ...kernels.squares import sum_of_squares
from ...kernels.windows import Pair
from ...layers.convolution import DynamicConv2d, SamePadding
from ...layers.scheduled import biased
from ...layers.stem import SixChannel
from ...layers.watch import OutputKept

__all__ = [
    "SQUASHES",
    "CodaConv2d",
    "CodaConv2dSame",
    "CodaLinear",
    "SixChannelCodaConv2d",
    "SixChannelCodaConv2dSame",
    "Squash",
]

HALF = (torch.float16, torch.bfloat16)


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
    squash: Squash

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
        norm = sum_of_squares(weight.flatten(1), 1).flatten().sqrt().to(wide(weight))
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

    def _apply(self, fn, recurse=True):
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
            gram = self._gram()
            floor = (FLOOR * gram[..., -1].detach()).clamp_min(TINY)
            gain, floor = (layout.over_places(each) for each in (self.gain.unflatten(0, (self.groups, -1)), floor))
            y = aligned((responses, u), mixing, z, layout.of_units(gram), gain, floor, self.squash, layout)
        return self._given(layout.back(y, static))

    def _gram(self) -> Tensor:
        """What |w(x)|^2 is made of, in float32 at least."""
        dtype = wide(self.weight)
        b = self.weight.to(dtype).flatten(1).unflatten(0, (self.groups, -1))
        a = self.directions.to(dtype).flatten(1).unflatten(0, (self.groups, -1))
        return gram_of(b, a, None if self.mixing is None else self.mixing.to(dtype).unflatten(0, (self.groups, -1)))

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

    def respond(self, x: Tensor, padding: Pair) -> Tensor:
        static, probed = self.products(x, padding, self.weight, self._probes())
        side_by_side = self.groups == 1 and static.stride(1) == 1
        y = self._aligned(static, probed, Layout(1, None if side_by_side else self.groups))
        return biased(self._at_reference(y, 1), self.bias, 1)


class CodaConv2dSame(SamePadding, CodaConv2d):
    """Alignment units over timm's `Conv2dSame`."""


class SixChannelCodaConv2d(SixChannel, CodaConv2d):
    """Six-channel stem over `nn.Conv2d`, of alignment units."""


class SixChannelCodaConv2dSame(SixChannel, CodaConv2dSame):
    """Six-channel stem over timm's `Conv2dSame`, of alignment units."""
