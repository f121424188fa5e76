"""B-cos of depthwise convolutions, whose patch norms are as many as their responses.

Elsewhere one norm serves all channels. Here norms, scales and their gradients are as large as the response, so they are
made for some pictures at a time, and one map of them is kept for the backward pass. Filters hold their own norms, which
spares the passes that divide by them. (Ours.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.torch_internals import convolution_backward
from ...linearise.mode import gated_by
from .bcos import TINY, bcos, raised, root
from .dispatch import backward_is_followed, gradients_of, lean
from .memory import blocks, layout_of, room_for
from .precision import autocast_dtype, wide, without_autocast
from .windows import Pair, Window, input_gradient, sums_over, sums_under

__all__ = ["bcos_of_channels", "depthwise_bcos"]

# Elements of a block: of small ones convolutions take longer than a cache saves.
BLOCK = 2**19


def bcos_of_channels(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> Tensor:
    """|v.x|^(B-1) * v.x / |x|^(B-1) for every patch x of a channel and its filter v, which holds its norm.

    x (B, C, H, W), `filters` (C, 1, k, l) -> (B, C, H', W').
    """
    return bcos(_convolved(x, filters, window), _patch_norms(x, filters, window), None, b)


def _convolved(x: Tensor, filters: Tensor, window: Window) -> Tensor:
    return F.conv2d(x, filters, None, *window, len(filters))


def _patch_norms(x: Tensor, filters: Tensor, window: Window) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W'), squared, in float32 at least."""
    return sums_under(x.to(wide(x)).square(), _size(filters), window)


def _size(filters: Tensor) -> Pair:
    return filters.shape[2], filters.shape[3]


# ----------------------------------------------------------------------------------------------------------- lean forms


class _BcosOfChannels(torch.autograd.Function):
    """`bcos_of_channels`; keeps its output, 1 / |x|, x and the filters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> Tensor:
        y = inverses = torch.empty(0)
        for place, o, q in _parts(x, filters, window):
            if not place.start:
                y, inverses = room_for(o, len(x)), room_for(q, len(x))
            inverse = torch.rsqrt(q, out=inverses[place])
            torch.mul(raised(torch.mul(o, inverse, out=q).abs_(), b), o, out=y[place])
        ctx.save_for_backward(y, inverses, x, filters)
        ctx.b, ctx.window = b, window
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (y, inverses, x, filters), b, window = ctx.saved_tensors, ctx.b, ctx.window
        if backward_is_followed(grad):
            return gradients_of(bcos_of_channels, (x, filters, b, window), ctx.needs_input_grad, (grad,))
        kernel, groups, wanted = _size(filters), len(filters), (True, ctx.needs_input_grad[1])
        stride, padding, dilation = window
        of_x, of_filters, layout = torch.empty_like(x), [], layout_of(x)
        parts = (blocks(each, x, BLOCK) for each in (of_x, x, y, inverses, grad))
        for into, part, of_y, inverse, pull in zip(*parts, strict=True):
            cosine = of_y * inverse  # to the power of B, with a sign
            of_o = root(cosine.abs(), b).mul_(pull).to(x.dtype)  # but for a factor B
            of_o, beside = (_quickly(each, kernel) if wanted[1] else each for each in (of_o, part))
            of_part, of_each = convolution_backward(
                of_o, beside, filters * b, stride, padding, dilation, groups, wanted
            )
            of_part = of_part.contiguous(memory_format=layout)
            of_squares = sums_over(cosine.mul_(inverse).mul_(pull), kernel, window, part.shape).to(x.dtype)
            torch.addcmul(of_part, part, of_squares, value=float(1 - b), out=into)
            of_filters.append(of_each)
        return of_x, torch.stack(of_filters).sum(0) * b if wanted[1] else None, None, None


def _parts(x: Tensor, filters: Tensor, window: Window) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of some pictures at a time: which, v.x, and |x|^2, which counts as at least TINY."""
    begin = 0
    for part in blocks(x, None, BLOCK):
        end = begin + len(part)
        norms = _patch_norms(part, filters, window).clamp_min_(TINY)
        yield slice(begin, end), _convolved(part, filters, window), norms
        begin = end


def _quickly(x: Tensor, kernel: Pair) -> Tensor:
    """x as a CPU's gradient of filters wants it: of large ones it takes several times as long in the other layout."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and max(kernel) > 3 else x


def _inference(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> Tensor:
    y = torch.empty(0)
    for place, o, q in _parts(x, filters, window):
        y = y if place.start else room_for(o, len(x))
        torch.mul(raised(q.rsqrt_().mul_(o).abs_(), b), o, out=y[place])
    return y


def _with_gate(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """What `bcos_of_channels` multiplies v.x by, and what it returns."""
    y = gates = torch.empty(0)
    for place, o, q in _parts(x, filters, window):
        if not place.start:
            y, gates = room_for(o, len(x)), room_for(o, len(x))
        gate = gates[place].copy_(raised(q.rsqrt_().mul_(o).abs_(), b))
        torch.mul(gate, o, out=y[place])
    return gates, y


def _gradient(size: torch.Size, grad: Tensor, filters: Tensor, _: float | Tensor, window: Window) -> Tensor:
    """At x of `size`, from `grad` (B, C, H', W') at v.x."""
    return input_gradient(size, grad, filters, window, len(filters))


_bcos_of_channels = gated_by(_with_gate, _gradient)(lean(bcos_of_channels, _BcosOfChannels.apply, _inference))


def depthwise_bcos(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> Tensor:
    """`bcos_of_channels`, in autocast's precision. Explanation mode sees the convolution times a frozen gate."""
    if (dtype := autocast_dtype(x)) is not None:
        x, filters = x.to(dtype), filters.to(dtype)
    with without_autocast(x):
        return _bcos_of_channels(x, filters, b, window)
