"""B-cos of depthwise convolutions, whose patch norms are as many as their responses.

Elsewhere one norm serves all channels. Here norms, scales and their gradients are as large as the response, so they are
made for some pictures at a time, and one map of them is kept for the backward pass. Filters hold their own norms, which
spares the passes that divide by them. (Ours.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...explain.linearise import gated_by
from .convolution import (
    Pair,
    Window,
    applied,
    convolution_gradients,
    in_blocks,
    input_gradient,
    layout_of,
    sums_over,
    sums_under,
    unobserved,
)
from .scale import TINY, gradients, inverse, of_norm, raised, root, scaled
from .scheduled import autocast_dtype, without_autocast

__all__ = ["depthwise_bcos"]

# Elements of a block: of small ones convolutions take longer than a cache saves.
BLOCK = 2**19


class _DepthwiseBcos(torch.autograd.Function):
    """|v.x / |x||^(B-1) * v.x, and 1 / |x|, which is only for the backward pass; it keeps both, x and the filters."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> tuple[Tensor, Tensor]:
        if not unobserved(x, filters):
            inverse_q = inverse(_patch_norms(x, _size(filters), window))
            return scaled(_convolved(x, filters, window), inverse_q, None, b), inverse_q
        y, inverse_q = _Whole(x), _Whole(x)
        for place, o, q in _blocks(x, filters, window):
            inverse_norm = torch.rsqrt(q, out=inverse_q.at(place, like=q))
            torch.mul(raised(torch.mul(o, inverse_norm, out=q).abs_(), b), o, out=y.at(place, like=o))
        return y.tensor, inverse_q.tensor

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own signature
        x, filters, ctx.b, ctx.window = inputs
        y, inverse_q = output
        ctx.mark_non_differentiable(inverse_q)
        ctx.save_for_backward(y, inverse_q, x, filters)

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor | None):  # noqa: ANN001, ANN205 - torch's own signature
        (y, inverse_q, x, filters), b, window = ctx.saved_tensors, ctx.b, ctx.window
        kernel, groups, wanted = _size(filters), len(filters), (True, ctx.needs_input_grad[1])
        if not unobserved(grad, y, x, filters):
            q = _patch_norms(x, kernel, window)
            of_o, product = gradients(y, grad, inverse(q), None, b)
            of_x, of_filters = convolution_gradients(of_o, x, filters, window, groups, wanted)
            of_squares = sums_over(of_norm(product, q, b), kernel, window, x.shape)
            return torch.addcmul(of_x, x, of_squares.to(x.dtype), value=2), of_filters, None, None
        of_x, of_filters, layout = torch.empty_like(x), [], layout_of(x)
        parts = (in_blocks(each, x, BLOCK) for each in (of_x, x, y, inverse_q, grad))
        for into, part, of_y, inverse_norm, pull in zip(*parts, strict=True):
            cosine = of_y * inverse_norm  # to the power of B, with a sign
            of_o = root(cosine.abs(), b).mul_(pull).to(x.dtype)  # but for a factor B
            of_o, beside = (_quickly(each, kernel) if wanted[1] else each for each in (of_o, part))
            of_part, of_each = convolution_gradients(of_o, beside, filters * b, window, groups, wanted)
            of_part = of_part.contiguous(memory_format=layout)
            of_squares = sums_over(cosine.mul_(inverse_norm).mul_(pull), kernel, window, part.shape).to(x.dtype)
            torch.addcmul(of_part, part, of_squares, value=float(1 - b), out=into)
            of_filters.append(of_each)
        return of_x, torch.stack(of_filters).sum(0) * b if wanted[1] else None, None, None


def _size(filters: Tensor) -> Pair:
    return filters.shape[2], filters.shape[3]


def _patch_norms(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W'), squared, in float32 at least: 300 squared is already infinite in float16."""
    return sums_under(x.to(torch.promote_types(x.dtype, torch.float32)).square(), kernel, window)


def _convolved(x: Tensor, filters: Tensor, window: Window) -> Tensor:
    return F.conv2d(x, filters, None, *window, len(filters))


def _blocks(x: Tensor, filters: Tensor, window: Window) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of some pictures at a time: which, v.x, and |x|^2, which counts as at least TINY."""
    begin = 0
    for part in in_blocks(x, elements=BLOCK):
        end = begin + len(part)
        norms = _patch_norms(part, _size(filters), window).clamp_min_(TINY)
        yield slice(begin, end), _convolved(part, filters, window), norms
        begin = end


class _Whole:
    """The tensor (B, ...) that parts along B of x are written to; made when the first one is known."""

    def __init__(self, x: Tensor) -> None:
        self._number = len(x)
        self.tensor = torch.empty(0)

    def at(self, place: slice, like: Tensor) -> Tensor:
        if not place.start:
            shape = (self._number, *like.shape[1:])
            self.tensor = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout_of(like))
        return self.tensor[place]


def _quickly(x: Tensor, kernel: Pair) -> Tensor:
    """x as a CPU's gradient of filters wants it: of large ones it takes several times as long in the other layout."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and max(kernel) > 3 else x


def _apart(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The scale, and what `_depthwise_bcos` returns."""
    gates, y = _Whole(x), _Whole(x)
    for place, o, q in _blocks(x, filters, window):
        gate = gates.at(place, like=o).copy_(raised(q.rsqrt_().mul_(o).abs_(), b))
        torch.mul(gate, o, out=y.at(place, like=o))
    return gates.tensor, y.tensor


def _gradient(size: torch.Size, grad: Tensor, filters: Tensor, _: float | Tensor, window: Window) -> Tensor:
    """At x of `size`, from `grad` (B, C, H', W') at v.x."""
    return input_gradient(size, grad, filters, window, len(filters))


@gated_by(_apart, _gradient)
def _depthwise_bcos(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> Tensor:
    if not unobserved():
        return applied(_DepthwiseBcos, x, filters, b, window)[0]
    y = _Whole(x)
    for place, o, q in _blocks(x, filters, window):
        torch.mul(raised(q.rsqrt_().mul_(o).abs_(), b), o, out=y.at(place, like=o))
    return y.tensor


def depthwise_bcos(x: Tensor, filters: Tensor, b: float | Tensor, window: Window) -> Tensor:
    """|v.x|^(B-1) * v.x / |x|^(B-1) for every patch x of a channel and its filter v, which holds its norm.

    x (B, C, H, W), `filters` (C, 1, k, l) -> (B, C, H', W'); b >= 1. Explanation mode sees the convolution times a
    frozen gate.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, filters = x.to(dtype), filters.to(dtype)
    with without_autocast(x):
        return _depthwise_bcos(x, filters, b, window)
